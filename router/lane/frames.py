"""The frames of a lane and their sans-IO codec.

A lane is an ordered pipe of bytes. On it each frame is a little-endian uint32 length and that many bytes of
MessagePack: an array whose first item is the frame's tag. Later versions of a frame may append fields; readers ignore
what they do not know and give what is missing its default.

The conversation: the replica sends `Challenge`; the router answers `Hello` with proof that it knows the replica's
secret; the replica answers `Welcome` or `Refused`. Then `Submit`, `Abort`, `Resync`, `Wake` and `Ping` go up, `Step`,
`Draining` and `Pong` come down. `Challenge`, `Hello` and `Refused` keep their layout in every version, so that two
versions can tell each other that they differ.
"""

from __future__ import annotations

import hashlib
import hmac
import io
import struct
from typing import Final, TypeAlias

import msgspec

from router.types import CacheMode, Chain, EngineInfo, Load

VERSION: Final = 1
MAX_FRAME_BYTES: Final = 256 << 20
"""Larger than any body limit; a longer frame is a broken or hostile peer."""
RESERVE_AT: Final = 1 << 20
"""A frame of so many bytes gets memory for all of it at once."""
MAX_HANDSHAKE_BYTES: Final = 4096
"""Until the peer has proved that it knows the secret."""
LARGE_BYTES: Final = 256 << 10
"""A body from which on `encode_large` is worth it, and a frame from which on `LargeStep` is; not less than 64 KiB,
where MessagePack's lengths get their longest form."""
LEAST_BLOCK_BYTES: Final = 16
"""Of a chain's prefix blocks; the least that the configuration takes."""

_LENGTH: Final = struct.Struct("<I")
_BINARY: Final = struct.Struct(">BI")
_BINARY_TAG: Final = 0xC6
_ARRAY_TAG: Final = 0x90  # Of up to 15 items.


class FrameError(Exception):
    """The peer sent bytes that are no frame; the lane cannot go on."""


class Challenge(msgspec.Struct, array_like=True, tag=1, frozen=True, gc=False):
    version: int
    nonce: bytes


class Hello(msgspec.Struct, array_like=True, tag=2, frozen=True, gc=False):
    version: int
    proof: bytes
    """HMAC-SHA256 of the challenge's nonce and the router's name under the replica's secret."""
    router: str
    """Name of the router process, for logs."""


class Refused(msgspec.Struct, array_like=True, tag=3, frozen=True, gc=False):
    code: str
    """``version``, ``secret`` or ``protocol``."""
    message: str


class Welcome(msgspec.Struct, array_like=True, tag=4, frozen=True):
    version: int
    replica: str
    info: EngineInfo
    load: Load
    draining: bool = False


class Submit(msgspec.Struct, array_like=True, tag=5, frozen=True):
    stream: int
    """Unique on this lane and rising by one per submit, so `Step.acked` can be one number."""
    request_id: str
    rpc: int
    method: str
    path: str
    headers: tuple[tuple[str, str], ...]
    body: bytes
    timeout_s: float | None = None
    priority: int = 0
    chain: bytes = b""
    """The prompt's `Chain` by `pack_chain`; empty where it has none."""
    matched: int = 0
    """Prefix blocks that the router believes this replica to hold."""


class Resync(msgspec.Struct, array_like=True, tag=11, frozen=True, gc=False):
    """The router missed a cache report: the next one shall be a snapshot."""

    seq: int
    """The last report that it has seen."""


class Abort(msgspec.Struct, array_like=True, tag=6, frozen=True, gc=False):
    stream: int


class Wake(msgspec.Struct, array_like=True, tag=12, frozen=True, gc=False):
    """The replica is soon needed: one that sleeps shall wake. Only for one whose load says that it does: before there
    was `Load.asleep`, replicas did not know this frame."""


class Ping(msgspec.Struct, array_like=True, tag=7, frozen=True, gc=False):
    nonce: int


class Pong(msgspec.Struct, array_like=True, tag=8, frozen=True, gc=False):
    nonce: int


class Head(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """Status and headers of an HTTP response."""

    status: int
    headers: tuple[tuple[str, str], ...]


class End(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """How a stream ended. `error` is empty, or a `KvlaneError` name with its message."""

    finish: str = ""
    """``stop``, ``length``, ``abort`` …; empty where the rendered answer says it and nobody else needs it."""
    error: str = ""
    message: str = ""
    param: str | None = None


class CacheReport(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """How a replica's KV cache changed, in prefix blocks. Apply `snapshot`, then `evicted`, then `stored`."""

    seq: int
    """Rises by one per report on this lane."""
    snapshot: bool = False
    """All that was known of this replica is void; this report and the ones after it say everything anew."""
    stored: bytes = b""
    """Hashes of blocks that are held now, little-endian uint64 one after the other."""
    depths: bytes = b""
    """For each stored block, how many of the prompt's tokens its end takes: little-endian uint32."""
    evicted: bytes = b""
    """Hashes of blocks that are held no more, as `stored`."""
    mode: str = CacheMode.EXACT
    cause: str = ""
    """Why the mode is not exact."""
    prompt_bytes: int = 0
    """Canonical bytes of the prompts whose tokens were seen since the last report."""
    prompt_tokens: int = 0
    """Their tokens."""
    compared: int = 0
    """Requests since the last report whose `Submit.matched` could be held against the engine's own count."""
    off: int = 0
    """Those among them where the two differ by more than one KV block."""


class Output(msgspec.Struct, array_like=True, gc=False):
    """One stream's output in one step."""

    stream: int
    payload: bytes = b""
    tokens: int = 0
    """Tokens that the payload holds."""
    end: End | None = None
    head: Head | None = None
    """With the stream's first output; HTTP only."""


class Step(msgspec.Struct, array_like=True, tag=9, gc=False):
    """What one engine step did: all this router's streams' output, and the load after it."""

    seq: int
    """Rises by one per step frame on this lane."""
    acked: int
    """The highest stream id that this load counts."""
    load: Load
    outputs: list[Output]
    cache: CacheReport | None = None


class LargeOutput(msgspec.Struct, array_like=True, gc=False):
    """An `Output` whose payload is not copied out of its frame."""

    stream: int
    payload: memoryview = memoryview(b"")
    tokens: int = 0
    end: End | None = None
    head: Head | None = None


class LargeStep(msgspec.Struct, array_like=True, tag=9, gc=False):
    """A `Step` as it is read of a frame of `LARGE_BYTES` or more: to copy 10 MB takes 7 ms."""

    seq: int
    acked: int
    load: Load
    outputs: list[LargeOutput]
    cache: CacheReport | None = None


class Draining(msgspec.Struct, array_like=True, tag=10, frozen=True, gc=False):
    """The replica takes no new streams; those in flight go on for at most `grace_s` seconds."""

    grace_s: float


UpFrame: TypeAlias = Hello | Submit | Abort | Ping | Resync | Wake
DownFrame: TypeAlias = Challenge | Refused | Welcome | Step | LargeStep | Draining | Pong
Frame: TypeAlias = UpFrame | DownFrame

_SUBMIT_TAG: Final = 5
_BODY_FIELD: Final = Submit.__struct_fields__.index("body")

_encoder = msgspec.msgpack.Encoder()
_up_decoder = msgspec.msgpack.Decoder(Hello | Submit | Abort | Ping | Resync | Wake)
_down_decoder = msgspec.msgpack.Decoder(Challenge | Refused | Welcome | Step | Draining | Pong)
_large_decoder = msgspec.msgpack.Decoder(Challenge | Refused | Welcome | LargeStep | Draining | Pong)


def encode(frame: Frame) -> bytes:
    """One frame with its length before it."""
    buffer = bytearray(4)
    _encoder.encode_into(frame, buffer, 4)
    _LENGTH.pack_into(buffer, 0, len(buffer) - 4)
    return bytes(buffer)


def encode_large(submit: Submit) -> tuple[bytes, bytes, bytes]:
    """The same in three parts, of which the second is the body itself; for a body of `LARGE_BYTES` or more."""
    values = msgspec.structs.astuple(submit)
    place = _BODY_FIELD
    # Each array begins with one byte that says how many items it has.
    before = _encoder.encode((_SUBMIT_TAG, *values[:place]))[1:]
    after = _encoder.encode(values[place + 1 :])[1:]
    body = submit.body
    length = 1 + len(before) + _BINARY.size + len(body) + len(after)
    array = bytes([_ARRAY_TAG + 1 + len(values)])
    head = b"".join((_LENGTH.pack(length), array, before, _BINARY.pack(_BINARY_TAG, len(body))))
    return head, body, after


def decode_up(body: bytes | memoryview) -> UpFrame:
    """A frame from a router. Raises `FrameError`."""
    try:
        frame: UpFrame = _up_decoder.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise FrameError(f"not a frame: {error}") from error
    return frame


def decode_down(body: bytes | memoryview) -> DownFrame:
    """A frame from a replica; a step of `LARGE_BYTES` or more as a `LargeStep`. Raises `FrameError`."""
    decoder = _down_decoder if len(body) < LARGE_BYTES else _large_decoder
    try:
        frame: DownFrame = decoder.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise FrameError(f"not a frame: {error}") from error
    return frame


def pack_chain(chain: Chain | None) -> bytes:
    """Block size, prompt bytes, seed and block hashes as little-endian uint64; empty for None."""
    if chain is None:
        return b""
    return struct.pack(f"<{3 + len(chain.blocks)}Q", chain.block_bytes, chain.prompt_bytes, chain.seed, *chain.blocks)


def unpack_chain(packed: bytes) -> Chain | None:
    """The chain that `pack_chain` packed. Raises `FrameError`."""
    if not packed:
        return None
    if len(packed) % 8 or len(packed) < 24:
        raise FrameError(f"a chain of {len(packed)} bytes")
    block_bytes, prompt_bytes, seed, *blocks = struct.unpack(f"<{len(packed) // 8}Q", packed)
    if block_bytes < LEAST_BLOCK_BYTES:
        raise FrameError(f"a chain of blocks of {block_bytes} bytes")
    return Chain(block_bytes, seed, tuple(blocks), prompt_bytes)


class FrameSplitter:
    """Cuts a stream of bytes into frame bodies; feed it whatever arrives."""

    def __init__(self, limit: int = MAX_HANDSHAKE_BYTES) -> None:
        self.limit = limit
        """Longest body accepted, in bytes; raise it after the handshake."""
        self._rest = bytearray()
        self._long: io.BytesIO | None = None
        """A long frame that has begun; then `_rest` is empty."""
        self._missing = 0
        """Bytes of it that have not come yet."""

    @property
    def empty(self) -> bool:
        """Whether nothing is left of a frame that has begun."""
        return not self._rest and self._long is None

    def feed(self, data: bytes | bytearray | memoryview) -> list[memoryview]:
        """The bodies that `data` completes, in order. Raises `FrameError` on one longer than `limit`."""
        if self._long is not None:
            return self._go_on(self._long, memoryview(data))
        if self._rest:
            # Append until all of it is here, or its length is, and says that it is long.
            self._rest += data
            if len(self._rest) < 4 or len(self._rest) < 4 + self._length_at(self._rest, 0):
                self._reserve()
                return []
            data, self._rest = self._rest, bytearray()
        view = memoryview(data)
        start, size = 0, len(data)
        if size >= 4 and size == 4 + self._length_at(data, 0):
            return [view[4:]]
        bodies = []
        while size - start >= 4:
            end = start + 4 + self._length_at(data, start)
            if end > size:
                break
            bodies.append(view[start + 4 : end])
            start = end
        if start < size:
            self._rest += view[start:]
            self._reserve()
        return bodies

    def _go_on(self, frame: io.BytesIO, data: memoryview) -> list[memoryview]:
        part = data[: self._missing]
        frame.write(part)
        self._missing -= len(part)
        if self._missing:
            return []
        self._long = None
        body = frame.getbuffer()[4:]
        return [body, *self.feed(data[len(part) :])] if len(part) < len(data) else [body]

    def _reserve(self) -> None:
        """Memory for all of a long frame, which the system gives only where it is written to: to grow it with each read
        would copy all that has come before, in one turn of the event loop."""
        if len(self._rest) < 4 or (whole := 4 + self._length_at(self._rest, 0)) < RESERVE_AT:
            return
        # CPython does not copy the only reference to these bytes; their pages come as they are written, where the
        # allocator takes them fresh from the system, as the router's does from 8 MB on (`router.garbage`).
        self._long = io.BytesIO(bytes(whole))
        self._long.write(self._rest)
        self._missing = whole - len(self._rest)
        self._rest = bytearray()

    def _length_at(self, data: bytes | bytearray | memoryview, start: int) -> int:
        length: int = _LENGTH.unpack_from(data, start)[0]
        if length > self.limit:
            raise FrameError(f"a frame of {length} bytes is longer than the limit of {self.limit}")
        return length


def prove(secret: bytes, nonce: bytes, router: str) -> bytes:
    """The proof for `Hello`."""
    return hmac.new(secret, nonce + router.encode(), hashlib.sha256).digest()


def proof_holds(secret: bytes, nonce: bytes, hello: Hello) -> bool:
    """Whether the router that sent `hello` knows the secret; takes the same time either way."""
    return hmac.compare_digest(prove(secret, nonce, hello.router), hello.proof)
