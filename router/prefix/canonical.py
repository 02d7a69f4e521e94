"""Canonical prompt bytes: what a request asks the engine to read, in a form of which equal prompts have equal bytes.

Router and replica both make them, each from the request's own bytes; no tokenizer and no chat template takes part. Pure
functions. The rule: the canonical bytes of a conversation begin those of the same conversation continued, the answer
included, and no input raises. The form is described in docs/routing.md.
"""

from __future__ import annotations

import enum
from collections.abc import Generator
from typing import Final

import msgspec
import xxhash
from google.protobuf.message import DecodeError

from router.prefix import grpc_large, grpc_prompts, http_large, http_prompts
from router.prefix.draft import MEDIA, Digest, Draft, compact, compact_tools, is_mark
from router.prefix.window import drained
from router.types import Rpc

MAX_PROMPT_BYTES: Final = 1 << 20
"""A million-token prompt's first quarter; reading and hashing it takes about 3 ms."""


class PieceKind(enum.IntEnum):
    """What stands in a piece of canonical bytes."""

    TEXT = 0
    """A client's text, as UTF-8."""
    TOKENS = 1
    """Token ids, four bytes each, little-endian."""
    MEDIA = 2
    """A hash in the place of an image, a sound or a video."""
    MARK = 3
    """What keeps texts apart, with roles, names and ids."""


class Piece(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """A run of canonical bytes of one kind."""

    start: int
    length: int
    """In bytes; at least 1."""
    kind: PieceKind


class Canonical(msgspec.Struct, frozen=True, gc=False):
    """A prompt in canonical form."""

    namespace: bytes
    """Prompts share prefixes only where these bytes are the same."""
    data: bytes
    prompt_bytes: int
    """Length of the whole prompt; more than `data` has where only its beginning was read."""
    pieces: tuple[Piece, ...] = ()
    """In order, covering `data`; empty unless asked for."""
    answer_prefix: bytes | None = None
    """What the next turn's `data` has between this one's and the answer's text (or its token ids); None where the
    answer's place is not known."""


def canonical(
    rpc: Rpc,
    path: str,
    body: bytes,
    *,
    model: str,
    lora: str = "",
    cache_salt: str = "",
    tenant: str = "",
    with_pieces: bool = False,
    max_bytes: int = MAX_PROMPT_BYTES,
    memo: dict[bytes, bytes] | None = None,
) -> Canonical | None:
    """The canonical form of a request's prompt; of several prompts, the first one's.

    None where the request has no prompt, or is not as expected: the engine will judge it. Of a body that is longer than
    `max_bytes` without its media, only so much is read. `memo` may keep what is learned of tools between calls; it
    stays small.
    """
    draft = read(rpc, path, body, max_bytes)
    namespace = None if draft is None else namespace_of(draft, lora or model, cache_salt, tenant, memo)
    if draft is None or namespace is None:
        return None
    data = data_of(draft)
    pieces = _pieces(draft) if with_pieces else ()
    answer = None if draft.answer is None or draft.unread_bytes else draft.answer.encode("latin-1")
    return Canonical(namespace, data, len(data) + draft.unread_bytes, pieces, answer)


def read(rpc: Rpc, path: str, body: bytes, max_bytes: int) -> Draft | None:
    """A request's prompt in parts; None where there is none that can be read."""
    try:
        if len(body) >= _LARGE_BYTES[rpc]:
            return drained(_LARGE[rpc](path, body, max_bytes))
        if rpc is Rpc.GRPC:
            return grpc_prompts.read(path, body, max_bytes)
        return http_prompts.read(path, body, max_bytes)
    except UNREADABLE:
        return None


def read_in_slices(rpc: Rpc, path: str, body: bytes, max_bytes: int) -> Generator[None, None, Draft | None]:
    """The same of a large body; yields where others may run."""
    try:
        if len(body) >= _LARGE_BYTES[rpc]:
            return (yield from _LARGE[rpc](path, body, max_bytes))
        return read(rpc, path, body, max_bytes)
    except UNREADABLE:
        return None


_LARGE: Final = {Rpc.GRPC: grpc_large.read, Rpc.HTTP: http_large.read}
_LARGE_BYTES: Final = {Rpc.GRPC: grpc_large.LARGE_BYTES, Rpc.HTTP: http_large.LARGE_BYTES}
UNREADABLE: Final = (msgspec.MsgspecError, DecodeError, ValueError, OverflowError, RecursionError)


def data_of(draft: Draft) -> bytes:
    """The canonical bytes."""
    return "".join(draft.parts).encode("latin-1") if draft.tokens is None else draft.tokens


def namespace_of(
    draft: Draft, model: str, cache_salt: str, tenant: str = "", memo: dict[bytes, bytes] | None = None
) -> bytes | None:
    """What prompts must have in common to share prefixes; None where that cannot be read."""
    kind = draft.kind if draft.tokens is None else f"{draft.kind}-tokens"
    try:
        words = [kind.encode(), model.encode(), cache_salt.encode(), tenant.encode()]
        for name, value in draft.shape:
            words += (name.encode(), _shape_hash(name, value, {} if memo is None else memo))
    except UNREADABLE:
        return None
    # 0xFF is in no UTF-8 text, so nobody can write himself into another's namespace.
    return b"\xff".join(words)


_MEMO_ENTRIES: Final = 256


def _shape_hash(name: str, value: bytes, memo: dict[bytes, bytes]) -> bytes:
    """A hash that white space and escapes in the JSON do not change, in hexadecimal.

    Agents send the same tools with each request: reading tens of kilobytes of them would cost more than all the rest.
    """
    if type(value) is Digest:
        return value
    key = name.encode() + xxhash.xxh3_128_digest(value)
    known = memo.get(key)
    if known is None:
        if len(memo) >= _MEMO_ENTRIES:
            memo.clear()
        form = compact_tools(value) if name == "tools" else compact(value)
        known = memo[key] = xxhash.xxh3_128_hexdigest(form).encode()
    return known


def _pieces(draft: Draft) -> tuple[Piece, ...]:
    if draft.tokens is not None:
        return (Piece(0, len(draft.tokens), PieceKind.TOKENS),) if draft.tokens else ()
    pieces = []
    start = 0
    for part in filter(None, draft.parts):
        pieces.append(Piece(start, len(part), _kind(part)))
        start += len(part)
    return tuple(pieces)


def _kind(part: str) -> PieceKind:
    if not is_mark(part):
        return PieceKind.TEXT
    return PieceKind.MEDIA if part[0] == MEDIA else PieceKind.MARK
