"""Scorers: what the policy `weighted` adds up, each a figure for every replica. The seam, and the built-in ones.

A scorer is a class registered under the entry-point group ``kvlane.scorers``, made as policies are::

    class Mine:
        class Options(msgspec.Struct, frozen=True, forbid_unknown_fields=True): ...

        def __init__(self, options: Options, random: random.Random) -> None: ...
        def score(self, request: Request, snapshot: Snapshot) -> Sequence[float]: ...
        def chosen(self, request: Request, replica: str) -> None: ...  # only where it must learn of the choice

The figures are at most 1, which is best. What grows without bound, as queues do, goes below 0 without bound: then
affinity yields to load whatever the weights are.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Annotated, ClassVar, Protocol

import msgspec

from router.policies.adapters import AdapterMirror
from router.policies.base import NoOptions
from router.policies.expectations import first_tokens_s
from router.policies.queues import queue_depths
from router.policies.rendezvous import home, key_of
from router.types import Request, Snapshot

_ANY_QUEUE = float("inf")


class Scorer(Protocol):
    """Says how good each replica is for a request, in one respect."""

    def score(self, request: Request, snapshot: Snapshot) -> Sequence[float]:
        """A finite figure of at most 1 for each of `snapshot.replicas`, in their order; higher is better.

        As `Policy.choose` it must not block, await or do I/O. It learns nothing from being asked, only from ``chosen``.
        Equal replicas get equal figures: chance belongs to the policy, which breaks ties.
        """


class Prefix:
    """The share of the prompt's prefix blocks that the replica holds."""

    Options: ClassVar[type[msgspec.Struct]] = NoOptions

    def __init__(self, options: NoOptions, random: random.Random) -> None: ...

    def score(self, request: Request, snapshot: Snapshot) -> Sequence[float]:
        chain, held = snapshot.prefix.chain, snapshot.prefix.held
        if not held or chain is None:
            return [0.0] * len(snapshot.replicas)
        share = 1.0 / len(chain.blocks)
        found = map(held.get, [view.replica for view in snapshot.replicas])
        return [here.blocks * share if here else 0.0 for here in found]


class Queue:
    """How short the queue is: 1 for the shortest, less by 1 for each `lead` requests above it."""

    class Options(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
        lead: Annotated[float, msgspec.Meta(gt=0)] = 8.0
        """Requests above the shortest queue that cost a whole point."""
        share: Annotated[float, msgspec.Meta(ge=0)] = 0.25
        """Of the mean queue, where that is more than `lead`: a lead means less the longer all queues are."""

    def __init__(self, options: Options, random: random.Random) -> None:
        self._lead = options.lead
        self._share = options.share

    def score(self, request: Request, snapshot: Snapshot) -> Sequence[float]:
        depths = queue_depths(snapshot.replicas)
        point = 1.0 / max(self._lead, self._share * sum(depths) / len(depths))
        shortest = min(depths)
        return [1.0 - (depth - shortest) * point for depth in depths]


class Prefill:
    """How few prompt tokens wait to be computed: 1 for the fewest, less by 1 for each `tokens` above them."""

    class Options(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
        tokens: Annotated[float, msgspec.Meta(gt=0)] = 8192.0
        """Waiting tokens above the fewest that cost a whole point; an engine step computes about so many."""

    def __init__(self, options: Options, random: random.Random) -> None:
        self._point = 1.0 / options.tokens

    def score(self, request: Request, snapshot: Snapshot) -> Sequence[float]:
        point = self._point
        waiting = [view.load.queued_prefill_tokens + view.unacked_tokens for view in snapshot.replicas]
        fewest = min(waiting)
        return [1.0 - (tokens - fewest) * point for tokens in waiting]


class KvUsage:
    """The share of the KV cache that no running request occupies."""

    Options: ClassVar[type[msgspec.Struct]] = NoOptions

    def __init__(self, options: NoOptions, random: random.Random) -> None: ...

    def score(self, request: Request, snapshot: Snapshot) -> Sequence[float]:
        return [1.0 - view.load.kv_usage for view in snapshot.replicas]


class Session:
    """1 for the home of the request's session (by rendezvous hashing), 0 for the others and without a session."""

    Options: ClassVar[type[msgspec.Struct]] = NoOptions

    def __init__(self, options: NoOptions, random: random.Random) -> None: ...

    def score(self, request: Request, snapshot: Snapshot) -> Sequence[float]:
        scores = [0.0] * len(snapshot.replicas)
        if request.session_id:
            place, _ = home(key_of(request.session_id), snapshot.replicas, scores, _ANY_QUEUE)
            scores[place] = 1.0
        return scores


class Lora:
    """1 where the request's LoRA adapter was used recently, 0 elsewhere and for requests without one."""

    class Options(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
        slots: Annotated[int, msgspec.Meta(ge=1)] = 4
        """Adapters that a replica keeps loaded: the engine's `max_loras`."""

    def __init__(self, options: Options, random: random.Random) -> None:
        self._mirror = AdapterMirror(options.slots)

    def score(self, request: Request, snapshot: Snapshot) -> Sequence[float]:
        holders = self._mirror.holders(request.lora) if request.lora else ()
        if not holders:
            return [0.0] * len(snapshot.replicas)
        return [1.0 if view.replica in holders else 0.0 for view in snapshot.replicas]

    def chosen(self, request: Request, replica: str) -> None:
        if request.lora:
            self._mirror.used(replica, request.lora)


class Ttft:
    """How soon the first token is expected: 1 for the soonest, less by 1 for each `seconds` after it."""

    class Options(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
        seconds: Annotated[float, msgspec.Meta(gt=0)] = 0.5
        """Delay against the soonest that costs a whole point."""

    def __init__(self, options: Options, random: random.Random) -> None:
        self._point = 1.0 / options.seconds

    def score(self, request: Request, snapshot: Snapshot) -> Sequence[float]:
        point = self._point
        expected = first_tokens_s(snapshot)
        soonest = min(expected)
        return [1.0 - (seconds - soonest) * point for seconds in expected]
