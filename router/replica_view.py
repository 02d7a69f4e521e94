"""What is known of a replica: its load, what to expect of it, and how a policy sees it.

Imports nothing of ours; `router.types` has all of it, too.
"""

from __future__ import annotations

import enum
from typing import Final, Protocol

import msgspec

_set: Final = msgspec.structs.force_setattr
_UNBOUNDED: Final = 1 << 30


class Load(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """A replica's load after its last engine step, all routers together."""

    running: int = 0
    """Requests in the engine's batch."""
    waiting: int = 0
    """Requests accepted but not in the batch."""
    queued_prefill_tokens: int = 0
    """Prompt tokens still to be computed, those found in the KV cache left out."""
    kv_usage: float = 0.0
    """Share of the KV blocks in use, 0 to 1."""
    step_ms: float = 0.0
    """Duration of the last engine step in milliseconds."""
    queued_prefill_pairs: float = 0.0
    """Attention's part of the queued prefill: pairs of a token to be computed and a token before it in its own prompt;
    n uncached tokens behind c cached ones make n * c + n * n / 2. 0 where the engine cannot say."""
    step_prefill_tokens: int = 0
    """Prompt tokens that the last step computed."""
    step_prefill_pairs: float = 0.0
    """Attention pairs of those tokens; 0 where the engine cannot say."""
    step_decodes: int = 0
    """Requests that the last step advanced by an output token without computing any of their prompt."""
    step_context_tokens: int = 0
    """Tokens in the KV cache that those requests' attention read."""
    asleep: bool = False
    """The engine sleeps, or is about to, or wakes: what is sent there waits until it is awake."""


class CacheMode(enum.StrEnum):
    """What the router knows of a replica's KV cache."""

    EXACT = "exact"
    """The replica reports what it stores and evicts."""
    APPROXIMATE = "approximate"
    """No usable reports: the router remembers what it sent there, as much as fits into the replica's KV cache."""
    OFF = "off"
    """The engine reuses no prefixes."""


class Outlook(msgspec.Struct, frozen=True, gc=False):
    """What the load model expects of a replica; learned from its steps, in seconds."""

    wait_s: float = 0.0
    """From `as_of` until it would begin with another prompt: the prompt work that was queued there, and at least the
    step under way. It has been worked on since."""
    step_s: float = 0.0
    """A step with the present batch and no prompt in it: the time per output token when nobody disturbs."""
    token_s: float = 0.0
    """Per uncached prompt token."""
    pair_s: float = 0.0
    """Per attention pair of prompt tokens (see `Load.queued_prefill_pairs`)."""
    batch_s: float = 0.0
    """What a step with prompt tokens takes beside them: the least that any prompt waits for its first token."""
    as_of: float = 0.0
    """When the step under way began, or else when the load was reported, on the router's clock."""
    sent_s: float = 0.0
    """Prompt work of requests that are on their way there, or that the load does not count yet."""

    def begins_s(self, now: float) -> float:
        """From `now` until the engine would begin to compute the prompt of a request that is sent now."""
        wait = self.wait_s - (now - self.as_of)
        return (wait if wait > 0.0 else 0.0) + self.sent_s

    def prefill_s(self, tokens: float, cached: float) -> float:
        """Time to compute a prompt of `tokens` tokens whose first `cached` ones are in the KV cache."""
        new = tokens - cached
        return new * self.token_s + new * (cached + new * 0.5) * self.pair_s


Terms = tuple[float, float, float, float, float, float, int, int, int, float, int]
"""What a decision asks of each replica: free_at, sent_s, batch_s, step_s, token_s, pair_s, running, queue_depth,
beyond, kv_usage, leases. *Beyond* is by how much the queue is longer than the largest batch, below 0 while there is
room in it; a batch of unknown size has room always."""
TERMS: Final = 11


class ReplicaView(msgspec.Struct, frozen=True, gc=False):
    """One ready replica as a policy sees it."""

    replica: str
    load: Load
    unacked: int
    """Requests that this router sent and that ``load`` does not count yet."""
    leases: int
    """This router's own requests in flight there."""
    max_num_seqs: int = 0
    outlook: Outlook = Outlook()
    unacked_tokens: int = 0
    """Uncached prompt tokens of the `unacked` requests, as estimated when they were routed."""
    unacked_pairs: float = 0.0
    """Their attention pairs."""
    kv_tokens: int = 0
    """Size of its KV cache in tokens; 0 where it does not say."""
    cache: CacheMode = CacheMode.OFF
    # Worked out of the others, once, since every decision reads them of every replica; what is given here is ignored.
    running: int = 0
    """Requests in its batch, those on their way included."""
    queue_depth: int = 0
    """Requests running or waiting there, those on their way included."""
    free_at: float = 0.0
    """When it would begin with another prompt, on the clock of `Outlook.as_of`."""
    terms: Terms = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0, 0, 0, 0.0, 0)

    def __post_init__(self) -> None:
        load, outlook = self.load, self.outlook
        running = load.running + self.unacked
        depth = running + load.waiting
        free_at = outlook.as_of + outlook.wait_s
        _set(self, "running", running)
        _set(self, "queue_depth", depth)
        _set(self, "free_at", free_at)
        terms = (
            free_at,
            outlook.sent_s,
            outlook.batch_s,
            outlook.step_s,
            outlook.token_s,
            outlook.pair_s,
            running,
            depth,
            depth - (self.max_num_seqs or _UNBOUNDED),
            load.kv_usage,
            self.leases,
        )
        _set(self, "terms", terms)

    @property
    def asleep(self) -> bool:
        """Whether its engine sleeps."""
        return self.load.asleep

    def expects_s(self, now: float, tokens: int, cached: int) -> float:
        """From a submit at `now` until the first output for a prompt of which so much is cached there: what is left of
        the queue, the step that computes the prompt, and the rest of the prompt. 0 where the prompt's length or the
        replica's speed is not known, or where it has to wake first."""
        outlook = self.outlook
        if not tokens or not outlook.token_s or self.load.asleep:
            return 0.0
        return outlook.begins_s(now) + outlook.batch_s + outlook.prefill_s(tokens, cached)


class Brief(Protocol):
    """Of a replica, what a receipt tells: a view, or what views are made of."""

    @property
    def queue_depth(self) -> int: ...

    @property
    def asleep(self) -> bool: ...

    def expects_s(self, now: float, tokens: int, cached: int) -> float:
        """As `ReplicaView.expects_s`."""
