"""As much of HTTP/2 (RFC 9113) and HPACK (RFC 7541) as a load needs: frames, and header blocks that need no state."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = 0, 1, 3, 4, 6, 7, 8, 9
END_STREAM, ACK, END_HEADERS, PADDED, PRIORITY = 1, 1, 4, 8, 32
HEADER_TABLE_SIZE, INITIAL_WINDOW_SIZE, MAX_FRAME_SIZE = 1, 4, 5
DEFAULT_WINDOW: Final = 65_535
DEFAULT_FRAME_BYTES: Final = 16_384
MOST_WINDOW: Final = (1 << 31) - 1
# Static table entries that are used whole, and names of it in front of a literal value.
POST, HTTP, STATUS_200 = b"\x83", b"\x86", b"\x88"
_NAMES: Final = {":authority": b"\x01", ":path": b"\x04", "content-type": b"\x0f\x10"}


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """One frame."""
    return len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big") + payload


def settings(**values: int) -> bytes:
    """A SETTINGS frame of header_table_size and initial_window_size."""
    numbers = {"header_table_size": HEADER_TABLE_SIZE, "initial_window_size": INITIAL_WINDOW_SIZE}
    parts = [numbers[name].to_bytes(2, "big") + value.to_bytes(4, "big") for name, value in values.items()]
    return frame(SETTINGS, 0, 0, b"".join(parts))


def window_update(stream: int, size: int) -> bytes:
    return frame(WINDOW_UPDATE, 0, stream, size.to_bytes(4, "big"))


def literals(fields: Sequence[tuple[str, str]]) -> bytes:
    """A header block of literals that go into no table."""
    return b"".join(
        (_NAMES.get(name) or b"\x00" + _string(name.encode())) + _string(value.encode()) for name, value in fields
    )


def _string(value: bytes) -> bytes:
    """Without Huffman coding; its length as an integer with a prefix of 7 bits."""
    length = len(value)
    if length < 127:
        return bytes((length,)) + value
    packed, length = [127], length - 127
    while length >= 128:
        packed.append(length % 128 + 128)
        length //= 128
    return bytes((*packed, length)) + value


class Frames:
    """Cuts what arrives into frames."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> Iterator[tuple[int, int, int, bytes]]:
        """The frames that `data` completes: kind, flags, stream and payload, padding and priority taken off."""
        if self._rest:
            data = self._rest + data
        at, size = 0, len(data)
        while size - at >= 9:
            end = at + 9 + int.from_bytes(data[at : at + 3], "big")
            if end > size:
                break
            kind, flags = data[at + 3], data[at + 4]
            payload = data[at + 9 : end]
            if kind <= HEADERS and flags & (PADDED | PRIORITY):
                payload = _bare(kind, flags, payload)
            yield kind, flags, int.from_bytes(data[at + 5 : at + 9], "big"), payload
            at = end
        self._rest = data[at:]


def _bare(kind: int, flags: int, payload: bytes) -> bytes:
    if flags & PADDED:
        payload = payload[1 : len(payload) - payload[0]]
    return payload[5:] if kind == HEADERS and flags & PRIORITY else payload
