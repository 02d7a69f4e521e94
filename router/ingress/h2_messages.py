"""gRPC's length-prefixed messages: a request's bytes are cut into messages, and compressed ones decompressed.

Sans-IO. Rule: no message becomes larger than its limit, neither while it comes in nor by decompression.
"""

from __future__ import annotations

import zlib
from typing import Final

from router.errors import BadFraming, BodyTooLarge

PREFIX_BYTES: Final = 5
ENCODINGS: Final = {"identity": 0, "deflate": 15, "gzip": 31}
"""Those of requests that are understood, with zlib's word for each; gRPC's *deflate* is the zlib format."""

Message = tuple[bool, bytes]
"""Whether it is compressed, and its bytes."""


class MessageCutter:
    """Cuts one stream's bytes into messages."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._buffer = bytearray()

    @property
    def held_bytes(self) -> int:
        """Of a message that is not whole yet."""
        return len(self._buffer)

    def feed(self, data: bytes) -> list[Message]:
        """The messages that `data` completes. Raises `BodyTooLarge` and `BadFraming`, at the first bytes at fault."""
        buffer = self._buffer
        if not buffer and len(data) >= PREFIX_BYTES and len(data) == PREFIX_BYTES + self._length(data):
            return [(bool(data[0]), data[PREFIX_BYTES:])]  # As most requests come: one message in one frame.
        buffer += data
        messages = []
        while len(buffer) >= PREFIX_BYTES:
            end = PREFIX_BYTES + self._length(buffer)
            if len(buffer) < end:
                break
            with memoryview(buffer) as view:
                messages.append((bool(buffer[0]), bytes(view[PREFIX_BYTES:end])))
            del buffer[:end]
        return messages

    def clear(self) -> None:
        """Nobody wants what is held."""
        self._buffer.clear()

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
