"""The longest held prefix, as long as load allows."""

from __future__ import annotations

import random
from typing import Annotated

import msgspec

from router.policies.queues import Patience, place_of, queue_depths, shortest_queue
from router.types import Decision, Reason, Request, Snapshot

_DEPTH_BITS = 32
"""More requests than that are in no queue."""
_OVERLOADED = -1 << _DEPTH_BITS


class PrefixAffinity:
    """Sends a request to the replica that holds the most of its prompt, among those that are not overloaded.

    Of several that hold as much, to the one with the shortest queue; ties at random. Where nobody holds enough, or all
    that do are overloaded, to the shortest queue.
    """

    class Options(Patience, frozen=True, forbid_unknown_fields=True):
        min_share: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.1
        """Of the prompt's prefix blocks. Less is not worth a longer queue: a tenth of a prompt is soon computed."""

    def __init__(self, options: Options, random: random.Random) -> None:
        self._options = options
        self._random = random

    def choose(self, request: Request, snapshot: Snapshot) -> Decision:
        replicas, chain, held = snapshot.replicas, snapshot.prefix.chain, snapshot.prefix.held
        depths = queue_depths(replicas)
        if len(replicas) == 1:
            return Decision(replicas[0].replica, Reason.ONLY_REPLICA, (), depths[0])
        if not held or chain is None:
            return shortest_queue(replicas, depths, self._random)
        enough = max(1, self._options.min_share * len(chain.blocks))
        limit = self._options.limit(depths)
        # The longest prefix first and then the shortest queue, as one number: half of the time that two passes take.
        found = map(held.get, [view.replica for view in replicas])
        ranks = [
            ((here.blocks << _DEPTH_BITS if here else 0) - depth) if depth <= limit else _OVERLOADED
            for here, depth in zip(found, depths, strict=True)
        ]
        place = place_of(ranks, max(ranks), self._random)
        chosen = replicas[place].replica
        if chosen in held and held[chosen].blocks >= enough:
            return Decision(chosen, Reason.LONGEST_PREFIX, (), depths[place])
        busy = any(view.replica in held and held[view.replica].blocks >= enough for view in replicas)
        reason = Reason.OVERLOADED if busy else Reason.SHORTEST_QUEUE
        return shortest_queue(replicas, depths, self._random, reason)
