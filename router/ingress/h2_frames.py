"""HTTP/2 frames as bytes: what comes in is cut into whole frames, what goes out is built here.

Sans-IO. Rule: an input's size is judged by a frame's first nine bytes, so that nobody makes us keep more than one frame
(h2's own buffer looks at a frame's length only once all of it is there). Numbers and layouts are RFC 9113's.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Final

from h2.exceptions import DenialOfServiceError, FlowControlError, FrameTooLargeError, ProtocolError

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)
END_STREAM: Final = 0x1
ACK: Final = 0x1
END_HEADERS: Final = 0x4
PADDED: Final = 0x8
HEAD_BYTES: Final = 9
MAX_BODY_BYTES: Final = 1 << 14
"""Of a frame, both ways: what every peer takes, and what we take ourselves."""
MAX_WINDOW: Final = (1 << 31) - 1
DEFAULT_WINDOW: Final = (1 << 16) - 1
MAX_BLOCK_BYTES: Final = 1 << 16
"""Of one encoded header block, its CONTINUATION frames included."""

Frame = tuple[int, int, int, bytes]
"""Type, flags, stream, and the whole frame."""

_HEAD: Final = struct.Struct(">IBI")
MESSAGE_HEAD: Final = struct.Struct(">IxIxI")
"""Of a DATA frame that holds one uncompressed message, with the message's own prefix: the frame's size before its type,
which is 0, the stream, the message's size."""
_WORD: Final = struct.Struct(">I")
_WORDS: Final = struct.Struct(">II")


class FrameCutter:
    """Cuts what one peer sends into frames. Raises h2's `ProtocolError`s."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._preface = PREFACE
        self._settings_due = True
        self._block = 0
        self._block_bytes = 0

    @property
    def ready(self) -> bool:
        """The peer has sent its preface and its first settings."""
        return not self._settings_due

    @property
    def pending(self) -> bool:
        """A frame or a header block has begun and is not whole yet."""
        return bool(self._buffer) or bool(self._block)

    def feed(self, data: bytes) -> Iterator[Frame]:
        """The frames that `data` completes. Take them all before more is fed."""
        if self._preface:
            data = self._without_preface(data)
        if self._buffer:
            self._buffer += data
            data = bytes(self._buffer)
            self._buffer.clear()
        at, size = 0, len(data)
        while size - at >= HEAD_BYTES:
            word, flags, stream = _HEAD.unpack_from(data, at)
            length = word >> 8
            if length > MAX_BODY_BYTES:
                raise FrameTooLargeError(f"a frame of {length} bytes")
            end = at + HEAD_BYTES + length
            if end > size:
                break
            kind, stream = word & 0xFF, stream & MAX_WINDOW
            if self._settings_due or self._block or kind in (HEADERS, CONTINUATION):
                self._order(kind, flags, stream, length)
            yield kind, flags, stream, data[at:end]
            at = end
        if at < size:
            self._buffer += data[at:]

    def _without_preface(self, data: bytes) -> bytes:
        preface = self._preface
        if not data.startswith(preface[: len(data)]):
            raise ProtocolError("this is no HTTP/2")
        self._preface = preface[len(data) :]
        return data[len(preface) :]

    def _order(self, kind: int, flags: int, stream: int, length: int) -> None:
        """Settings come first, and nothing comes between the frames of one header block."""
        if self._settings_due:
            if kind != SETTINGS or flags & ACK:
                raise ProtocolError("the first frame is not the settings")
            self._settings_due = False
        if self._block and (kind != CONTINUATION or stream != self._block):
            raise ProtocolError("a frame between those of a header block")
        if kind == HEADERS:
            self._block_bytes = 0
        if kind in (HEADERS, CONTINUATION):
            self._block_bytes += length
            if self._block_bytes > MAX_BLOCK_BYTES:
                raise DenialOfServiceError("a header block of too many bytes")
            self._block = 0 if flags & END_HEADERS else stream


def message_prefix(size: int) -> bytes:
    """What stands before an uncompressed message of `size` bytes."""
    return b"\0" + _WORD.pack(size)


def frame_head(kind: int, flags: int, stream: int, length: int) -> bytes:
    return _HEAD.pack(length << 8 | kind, flags, stream)


def headers_frame(stream: int, block: bytes, *, end_stream: bool) -> bytes:
    """A whole header block of at most `MAX_BODY_BYTES`."""
    flags = END_HEADERS | END_STREAM if end_stream else END_HEADERS
    return _HEAD.pack(len(block) << 8 | HEADERS, flags, stream) + block


def rst_stream_frame(stream: int, code: int) -> bytes:
    return _HEAD.pack(4 << 8 | RST_STREAM, 0, stream) + _WORD.pack(code)


def goaway_frame(last_stream: int, code: int, text: bytes = b"") -> bytes:
    return _HEAD.pack(8 + len(text) << 8 | GOAWAY, 0, 0) + _WORDS.pack(last_stream, code) + text


def ping_frame(opaque: bytes, *, ack: bool) -> bytes:
    return _HEAD.pack(8 << 8 | PING, ACK if ack else 0, 0) + opaque


def window_update_frame(stream: int, increment: int) -> bytes:
    return _HEAD.pack(4 << 8 | WINDOW_UPDATE, 0, stream) + _WORD.pack(increment)


def window_increment(frame: bytes, window: int) -> int:
    """Of a WINDOW_UPDATE frame.

    Raises `FrameTooLargeError` for one of the wrong size, and another `ProtocolError` where the window cannot take it.
    """
    if len(frame) != HEAD_BYTES + 4:
        raise FrameTooLargeError("a WINDOW_UPDATE of the wrong size")
    increment: int = _WORD.unpack_from(frame, HEAD_BYTES)[0] & MAX_WINDOW
    if not increment:
        raise ProtocolError("a WINDOW_UPDATE by nothing")
    if window + increment > MAX_WINDOW:
        raise FlowControlError("a window beyond its bounds")
    return increment
