"""What the routers are told of a simulated engine's KV cache: as with a real engine, but the events need no socket.

Rule: the KV blocks' own hashes are the ledger's keys; where a prompt's prefix blocks end among its tokens is found as
for a real engine, with tokens that are four bytes of text each. `SimulatedReports` owns the feed and the ledger.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import msgspec
import numpy as np

from engine.alignment import Aligner, Places, TokenBytes
from engine.cache_ledger import CacheLedger
from engine.cache_report import CacheFeed
from engine.following import Following
from engine.prompts import ForeignChain, HashedPrompt, expected_tokens, is_off, open_blocks, prompt_of
from engine.simulated_ask import Ask
from engine.simulated_cache import Stored
from engine.simulated_core import Job, SimulatedOptions, StepResult
from engine.simulated_text import TOKEN_BYTES, answer, pad
from router.lane.frames import Submit
from router.types import CacheMode


class _FourBytes(TokenBytes):
    """Tokens that are their own text."""

    def __init__(self) -> None:
        super().__init__([], frozenset())

    def join_and_ends(self, token_ids: Sequence[int]) -> tuple[bytes, Places] | None:
        text = array("I", token_ids).tobytes()
        return text, np.arange(1, len(token_ids) + 1, dtype=np.int64) * TOKEN_BYTES


class _Asked(msgspec.Struct, frozen=True):
    """A request whose prompt came with a chain."""

    prompt: HashedPrompt
    ends: tuple[int, ...]
    expected: tuple[int, int] | None
    whole_tokens: bool
    """The prompt's text fills its last token, so the answer's tokens are those of its text behind it."""


class SimulatedReports:
    """Follows one simulated engine's KV cache."""

    def __init__(self, options: SimulatedOptions) -> None:
        self._ledger = CacheLedger(options.block_tokens)
        on = options.prefix_caching
        self.feed = CacheFeed(
            self._ledger, CacheMode.EXACT if on else CacheMode.OFF, "prefix caching is off in the simulated engine"
        )
        self._aligner = Aligner(_FourBytes())
        self._following = Following()
        self._asked: dict[int | str, _Asked] = {}

    def asked(self, call: Submit, ask: Ask, job: Job) -> None:
        """The engine took a request: ties its prompt. Never raises: the request is served in any case."""
        if self.feed.mode is CacheMode.OFF:
            return
        try:
            self._tie_prompt(call, ask, job)
        except ForeignChain as error:
            self._following.failed(call.request_id, str(error))
        except Exception as error:
            self._following.failed(call.request_id, repr(error), error)
        cause = self._following.cause
        self.feed.set_mode(CacheMode.APPROXIMATE if cause else CacheMode.EXACT, cause)

    def _tie_prompt(self, call: Submit, ask: Ask, job: Job) -> None:
        prompt = prompt_of(call)
        if prompt is None:
            return
        chain, size = prompt.chain, self._ledger.block_tokens
        tokens = array("I", pad(ask.text))
        if not prompt.has_media:
            self.feed.seen(chain.prompt_bytes, len(tokens))
        ends = self._aligner.ends(prompt.data, prompt.pieces, tokens, chain.block_bytes, len(chain.blocks)).ends
        self._ledger.prompt(chain, job.prompt.hashes, ends)
        expected = expected_tokens(call.matched, ends, len(tokens), size)
        self._asked[job.id] = _Asked(prompt, ends, expected, not len(ask.text) % TOKEN_BYTES)
        self._following.followed()

    def cleared(self) -> None:
        """The cache is empty."""
        self._ledger.cleared()

    def aborted(self, id: int) -> None:
        """A request left before its answer was whole."""
        self._asked.pop(id, None)

    def stepped(self, result: StepResult) -> None:
        """A step is over."""
        for event in result.cache_events:
            change = self._ledger.stored if isinstance(event, Stored) else self._ledger.evicted
            for block in event.hashes:
                change(block)
        for job in result.produced:
            if job.produced == 1 and (asked := self._asked.get(job.id)) is not None and asked.expected is not None:
                self.feed.compared(is_off(asked.expected, job.cached_tokens, self._ledger.block_tokens))
        for job in result.finished:
            asked = self._asked.pop(job.id, None)
            if asked is not None and asked.whole_tokens:
                self._tie_answer(asked, job)

    def _tie_answer(self, asked: _Asked, job: Job) -> None:
        """Ties the next turn's prefix blocks over an answer; its words are four bytes each, as token ids are."""
        prompt, tokens = asked.prompt, job.prompt.tokens
        blocks = prompt.continued(answer(job.prompt.key, 0, job.produced))
        size, first = prompt.chain.block_bytes, len(prompt.chain.blocks)
        start = len(prompt.data) + len(prompt.answer_prefix or b"")
        ends = (
            tokens + max(-(-((block + 1) * size - start) // TOKEN_BYTES), 0)
            for block in range(first, first + len(blocks))
        )
        open, open_ends = open_blocks(prompt.chain, asked.ends, tokens, self._ledger.block_tokens)
        self._ledger.answer((*open, *blocks), job.hashes, (*open_ends, *ends))
