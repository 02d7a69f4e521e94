"""The prompt in a submit, as the router hashed it, and what its hashes say of the engine's cache.

Pure functions. The rule: the router's chain counts only where the replica makes the same of the request's body.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

import msgspec

from router.lane.frames import FrameError, Submit, unpack_chain
from router.prefix.canonical import Piece, PieceKind, canonical
from router.prefix.hashing import extend
from router.types import Chain, Rpc


class ForeignChain(ValueError):
    """The chain of a submit is none of its body's; says why."""


class HashedPrompt(msgspec.Struct, frozen=True):
    """A prompt, its canonical bytes and its chain."""

    chain: Chain
    data: bytes
    """Only the beginning of a very long one."""
    pieces: tuple[Piece, ...]
    answer_prefix: bytes | None
    """What stands between `data` and the answer in the next turn's prompt; None where the chain cannot go on."""

    @property
    def tokens_given(self) -> bool:
        """It is token ids, four bytes each, and so is its continuation."""
        return bool(self.pieces) and self.pieces[0].kind is PieceKind.TOKENS

    @property
    def has_media(self) -> bool:
        """It holds images or the like, whose tokens have nothing to do with its bytes."""
        return any(piece.kind is PieceKind.MEDIA for piece in self.pieces)

    @property
    def rest(self) -> bytes:
        """What is behind the last full prefix block."""
        return self.data[len(self.chain.blocks) * self.chain.block_bytes :]

    def continued(self, answer: bytes) -> list[int]:
        """The prefix blocks that `answer` completes in the next turn's prompt, none where the chain cannot go on."""
        if self.answer_prefix is None:
            return []
        last = self.chain.blocks[-1] if self.chain.blocks else self.chain.seed
        return extend(last, self.rest, self.answer_prefix + answer, self.chain.block_bytes)[0]


def prompt_of(call: Submit) -> HashedPrompt | None:
    """The prompt of a submit; None where it came without a chain. Raises `ForeignChain`."""
    try:
        chain = unpack_chain(call.chain)
    except FrameError as error:
        raise ForeignChain(str(error)) from error
    if chain is None:
        return None
    if call.matched < 0:
        raise ForeignChain(f"{call.matched} blocks of its prompt believed to be held")
    form = canonical(Rpc(call.rpc), call.path, call.body, model="", with_pieces=True)
    if form is not None:
        blocks, _ = extend(chain.seed, b"", form.data, chain.block_bytes)
        known = len(chain.blocks)
        equal = form.prompt_bytes == chain.prompt_bytes
        # A router that reads less of a large body judges the rest of the prompt by the body's size.
        if (equal or known) and tuple(blocks[:known]) == chain.blocks:
            whole = equal and known == len(blocks) and chain.prompt_bytes == len(form.data)
            return HashedPrompt(chain, form.data, form.pieces, form.answer_prefix if whole else None)
    raise ForeignChain("the router made another chain of its prompt")


def open_blocks(
    chain: Chain, ends: Sequence[int], tokens: int, block_tokens: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The prefix blocks of a prompt of `tokens` tokens that end behind its last full KV block, and where they end.

    The answer fills that KV block, so they are tied with it.
    """
    full = tokens // block_tokens * block_tokens
    first = bisect_right(ends, full)
    return chain.blocks[first : len(ends)], tuple(ends[first:])


def expected_tokens(matched: int, ends: Sequence[int], tokens: int, block_tokens: int) -> tuple[int, int] | None:
    """How many of a prompt's `tokens` the engine should find cached: at least, at most.

    The router believes that `matched` prefix blocks are held and the next one is not; `ends` says where they end. Only
    whole KV blocks are found, and the last token is computed in any case. None where `ends` does not reach that far.
    """
    if matched > len(ends):
        return None
    most = (tokens - 1) // block_tokens * block_tokens
    least = min(ends[matched - 1] // block_tokens * block_tokens, most) if matched else 0
    return least, min(ends[matched] // block_tokens * block_tokens, most) if matched < len(ends) else most


def is_off(expected: tuple[int, int], cached_tokens: int, block_tokens: int) -> bool:
    """Whether what the engine found cached differs from what was expected by more than one KV block."""
    least, most = expected
    return not least - block_tokens <= cached_tokens <= most + block_tokens
