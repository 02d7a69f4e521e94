"""The requests inside vLLM, as its front end in this process sees them, and what they say of the load.

Rule: what is said here follows from vLLM's own state of each request, from its figures of each step, and from what the
ledger holds; nothing is counted up in one place and down in another. Per output token there is nothing to do.

Exact: the prompt tokens and the decodes of a step, and how many prompt tokens were cached once a prompt is done. Of a
prompt that waits, what it will find cached is what is held now. Pairs and context are exact where prompts are computed
in one step and nothing is preempted, and close elsewhere: vLLM's front end hears of single chunks in sums only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

_RECOUNT_STEPS: Final = 256
"""How often the context is added up anew: speculative tokens behind a stop string are counted and then dropped."""
_GLANCE: Final = 64
"""Most KV blocks looked up at once."""


class Running:
    """One request in the engine: a prompt and, as a rule, one answer."""

    __slots__ = ("computed", "expected", "held", "id", "keys", "left", "state", "tokens")

    def __init__(self, id: str, state: Any, keys: Sequence[int]) -> None:
        self.id = id
        self.state = state
        """vLLM's `RequestState`: lives on when the request is over."""
        self.tokens: int = state.prompt_len
        self.keys = keys
        """Of the prompt's full KV blocks; empty where nobody follows them."""
        self.held = 0
        """How many of them are held, from the first on; they are not looked at again."""
        self.computed = 0
        """Prompt tokens that earlier steps computed, as far as is known."""
        self.expected: tuple[int, int] | None = None
        """How many prompt tokens vLLM should find cached: at least, at most. None where nobody said."""
        self.left: Callable[[], None] = _nothing
        """Called when the request has left the engine, however it did."""

    @property
    def produced(self) -> list[int]:
        """The answer's tokens by now."""
        detokenizer = self.state.detokenizer
        tokens: list[int] = [] if detokenizer is None else detokenizer.output_token_ids
        return tokens


class VllmWork:
    """All requests in one engine.

    `states` are vLLM's requests by its own ids; `held` says how many of the KV blocks with the given keys are held,
    from the first on. `prompted` is called with each request whose first token has come.
    """

    def __init__(
        self,
        states: dict[str, Any],
        block_tokens: int,
        held: Callable[[Sequence[int]], int],
        prompted: Callable[[Running], None],
        clock: Callable[[], float],
    ) -> None:
        self.busy_since = 0.0
        """When the engine last got a request after it had none, by `clock`."""
        self.step_prefill_tokens = 0
        self.step_prefill_pairs = 0.0
        self.step_decodes = 0
        self.step_context_tokens = 0
        self._states = states
        self._block_tokens = block_tokens
        self._held = held
        self._prompted = prompted
        self._clock = clock
        self._all: dict[str, Running] = {}
        self._waiting: dict[str, Running] = {}
        """Those among them without a first token, in the order in which they came."""
        self._decoding_context = 0
        """Tokens in the KV cache of all others."""
        self._steps = 0
        self._queued: tuple[int, float] | None = None

    def knows(self, id: str) -> bool:
        """Whether a request was added and has not left."""
        return id in self._all

    def add(self, id: str, keys: Sequence[int]) -> Running:
        """A request that vLLM has taken."""
        if not self._all:
            self.busy_since = self._clock()
        running = self._all[id] = self._waiting[id] = Running(id, self._states[id], keys)
        self._queued = None
        return running

    def queued(self) -> tuple[int, float]:
        """Prompt tokens that are still to be computed, and their attention pairs."""
        self._sweep()
        if self._queued is None:
            self._queued = self._count_queued()
        return self._queued

    def cache_changed(self) -> None:
        """Other KV blocks are held than before."""
        self._queued = None

    def step(self, details: Any, produced: int) -> None:
        """A step is over and its output is in vLLM's states.

        `details` are vLLM's `SchedulerIterationDetails`, None where nothing was computed, which leaves the last step's
        figures as they are; `produced` is how many tokens all requests got.
        """
        self._steps += 1
        self._queued = None
        first = [running for running in self._waiting.values() if not running.state.is_prefilling]
        if details is not None:
            self.step_prefill_tokens = details.num_ctx_tokens
            self.step_decodes = details.num_generation_requests
            self.step_context_tokens = self._context_read(self.step_decodes)
            self.step_prefill_pairs = self._pairs_computed(self.step_prefill_tokens, first)
        before = len(self._all) - len(self._waiting)
        for running in first:
            del self._waiting[running.id]
            self._decoding_context += running.tokens
            self._prompted(running)
        self._decoding_context += produced
        self._sweep()
        if not before or not self._steps % _RECOUNT_STEPS:
            self._decoding_context = self._count_context()

    def _context_read(self, decodes: int) -> int:
        decoding = len(self._all) - len(self._waiting)
        # Those that are not in the batch, such as preempted ones, read nothing.
        share = decodes / decoding if decoding > decodes else 1.0
        return round(self._decoding_context * share)

    def _pairs_computed(self, rest: int, first: list[Running]) -> float:
        """Attention pairs of a step's `rest` prompt tokens; the prompts `first` are done with it."""
        pairs = 0.0
        for running in first:
            begun = min(running.state.num_cached_tokens + running.computed, running.tokens)
            new = min(running.tokens - begun, rest)
            rest -= new
            pairs += new * (begun + new * 0.5)
        for running in self._waiting.values():
            if rest <= 0:
                break
            if not running.state.is_prefilling:
                continue
            # What a step has computed of a prompt counts as held already where the ledger is followed.
            done = self._done(running)
            begun = max(done - rest, 0) if running.keys else done
            new = min(running.tokens - begun, rest)
            running.computed += new
            rest -= new
            pairs += new * (begun + new * 0.5)
        return pairs

    def _done(self, running: Running) -> int:
        """Tokens of its prompt that it need not compute any more; one is left until the first token is here."""
        while running.held < len(running.keys):
            found = self._held(running.keys[running.held : running.held + _GLANCE])
            running.held += found
            if found < _GLANCE:
                break
        return min(max(running.held * self._block_tokens, running.computed), running.tokens - 1)

    def _sweep(self) -> None:
        """Lets go of what has left the engine, with its first token only once `step` knows of that."""
        if len(self._all) == len(self._states):
            return
        for id in [id for id in self._all if id not in self._states]:
            if id in self._waiting and not self._waiting[id].state.is_prefilling:
                continue
            running = self._all.pop(id)
            if self._waiting.pop(id, None) is None:
                self._decoding_context -= running.tokens + len(running.produced)
            running.left()
        self._queued = None

    def _count_queued(self) -> tuple[int, float]:
        tokens, pairs = 0, 0.0
        for running in self._waiting.values():
            if not running.state.is_prefilling:
                continue
            done = self._done(running)
            new = running.tokens - done
            tokens += new
            pairs += new * (done + new * 0.5)
        return tokens, pairs

    def _count_context(self) -> int:
        return sum(
            running.tokens + len(running.produced) for id, running in self._all.items() if id not in self._waiting
        )


def _nothing() -> None:
    """For a request that nobody waits for."""
