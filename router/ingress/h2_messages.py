"""gRPC's length-prefixed messages: a request's bytes are cut into messages, and compressed ones decompressed.

Sans-IO. Rule: no message becomes larger than its limit, neither while it comes in nor by decompression.
"""

from __future__ import annotations

import io
import zlib
from typing import Final

from router.errors import BadFraming, BodyTooLarge

PREFIX_BYTES: Final = 5
ENCODINGS: Final = {"identity": 0, "deflate": 15, "gzip": 31}
"""Those of requests that are understood, with zlib's word for each; gRPC's *deflate* is the zlib format."""

_RESERVE_AT: Final = 64 << 10
"""Once so much of a message is there, it gets memory for all of it, so that it is not copied when it is whole."""

Message = tuple[bool, bytes]
"""Whether it is compressed, and its bytes."""


class MessageCutter:
    """Cuts one stream's bytes into messages."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._buffer = bytearray()
        self._large: io.BytesIO | None = None
        """A long message behind its prefix, which is all that the buffer has then."""
        self._missing = 0
        """Bytes of it."""

    @property
    def held_bytes(self) -> int:
        """Of a message that is not whole yet."""
        return len(self._buffer) + (self._large.tell() if self._large is not None else 0)

    def feed(self, data: bytes) -> list[Message]:
        """The messages that `data` completes. Raises `BodyTooLarge` and `BadFraming`, at the first bytes at fault."""
        buffer = self._buffer
        if not buffer and len(data) >= PREFIX_BYTES and len(data) == PREFIX_BYTES + self._length(data):
            return [(bool(data[0]), data[PREFIX_BYTES:])]  # As most requests come: one message in one frame.
        messages: list[Message] = []
        if self._large is not None:
            data = self._add(self._large, data, messages)
        buffer += data
        while self._large is None and len(buffer) >= PREFIX_BYTES:
            end = PREFIX_BYTES + self._length(buffer)
            if len(buffer) < end:
                if len(buffer) >= _RESERVE_AT:
                    self._reserve(end)
                break
            with memoryview(buffer) as view:
                messages.append((bool(buffer[0]), bytes(view[PREFIX_BYTES:end])))
            del buffer[:end]
        return messages

    def clear(self) -> None:
        """Nobody wants what is held."""
        self._buffer.clear()
        self._large = None

    def _reserve(self, end: int) -> None:
        """Goes on with the message in the buffer, which ends at `end`, in memory that the system gives where it is
        written to."""
        # CPython neither copies the only reference to these bytes, nor takes their pages before they are written.
        self._large = io.BytesIO(bytes(end - PREFIX_BYTES))
        self._large.write(self._buffer[PREFIX_BYTES:])
        self._missing = end - len(self._buffer)
        del self._buffer[PREFIX_BYTES:]

    def _add(self, large: io.BytesIO, data: bytes, messages: list[Message]) -> bytes:
        """What `data` has behind the long message."""
        large.write(data[: self._missing] if len(data) > self._missing else data)
        rest = data[self._missing :]
        self._missing -= len(data) - len(rest)
        if not self._missing:
            messages.append((bool(self._buffer[0]), large.getvalue()))
            self._large = None
            self._buffer.clear()
        return rest

    def _length(self, data: bytes | bytearray) -> int:
        length = int.from_bytes(data[1:PREFIX_BYTES], "big")
        if data[0] > 1:
            raise BadFraming(f"a message with the unknown flag {data[0]}")
        if length > self._max_bytes:
            raise BodyTooLarge(f"a request message of {length} bytes; at most {self._max_bytes} are taken")
        return length


def decompressed(message: bytes, encoding: str, max_bytes: int) -> bytes:
    """A compressed message's content. Raises `BadFraming`, and `BodyTooLarge` without having made more than that."""
    bits = ENCODINGS[encoding]
    if not bits:
        raise BadFraming("a compressed message, and grpc-encoding names no compression")
    decoder = zlib.decompressobj(bits)
    try:
        plain = decoder.decompress(message, max_bytes + 1)
    except zlib.error as error:
        raise BadFraming("a compressed message that cannot be decompressed") from error
    if len(plain) > max_bytes:
        raise BodyTooLarge(f"a request message of more than {max_bytes} bytes once decompressed")
    if not decoder.eof:
        raise BadFraming("a compressed message that ends too early")
    return plain
