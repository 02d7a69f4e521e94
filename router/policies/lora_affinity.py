"""Requests for a LoRA adapter go where it is loaded."""

from __future__ import annotations

import random
from typing import Annotated

import msgspec

from router.policies.adapters import AdapterMirror
from router.policies.queues import Patience, place_of, queue_depths, shortest_queue
from router.policies.rendezvous import home, key_of
from router.types import Decision, Reason, Request, Snapshot

_NOT_THERE = 1 << 32
"""Longer than any queue."""


class LoraAffinity:
    """Sends requests for a LoRA adapter to the replicas that used it recently, the shortest queue first.

    While none did, or all of these are overloaded, to the adapter's home by rendezvous hashing, on which all routers
    agree, so that adapters spread instead of displacing each other everywhere. Requests without an adapter go to the
    shortest queue.
    """

    class Options(Patience, frozen=True, forbid_unknown_fields=True):
        slots: Annotated[int, msgspec.Meta(ge=1)] = 4
        """Adapters that a replica keeps loaded: the engine's `max_loras`."""

    def __init__(self, options: Options, random: random.Random) -> None:
        self._options = options
        self._random = random
        self._mirror = AdapterMirror(options.slots)

    def choose(self, request: Request, snapshot: Snapshot) -> Decision:
        depths = queue_depths(snapshot.replicas)
        if not request.lora:
            if len(depths) == 1:
                return Decision(snapshot.replicas[0].replica, Reason.ONLY_REPLICA, (), depths[0])
            return shortest_queue(snapshot.replicas, depths, self._random)
        place, reason = self._place(request.lora, snapshot, depths)
        chosen = snapshot.replicas[place].replica
        self._mirror.used(chosen, request.lora)
        return Decision(chosen, reason, (), depths[place])

    def _place(self, adapter: str, snapshot: Snapshot, depths: list[int]) -> tuple[int, Reason]:
        if len(depths) == 1:
            return 0, Reason.ONLY_REPLICA
        limit, holders = self._options.limit(depths), self._mirror.holders(adapter)
        if holders:
            queues = [
                depth if depth <= limit and view.replica in holders else _NOT_THERE
                for view, depth in zip(snapshot.replicas, depths, strict=True)
            ]
            shortest = min(queues)
            if shortest < _NOT_THERE:
                return place_of(queues, shortest, self._random), Reason.LORA
        place, first = home(key_of(adapter), snapshot.replicas, depths, limit)
        return place, Reason.LORA if first else Reason.OVERLOADED
