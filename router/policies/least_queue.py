"""The replica with the shortest queue."""

from __future__ import annotations

import random
from typing import ClassVar

import msgspec

from router.policies.base import NoOptions
from router.types import Decision, Reason, Request, Snapshot


class LeastQueue:
    """Sends each request to the replica with the fewest requests running, waiting or on their way; ties at random.

    The decision names no fallbacks: when one is needed the queues have changed, and asking again is better.
    """

    Options: ClassVar[type[msgspec.Struct]] = NoOptions

    def __init__(self, options: NoOptions, random: random.Random) -> None:
        self._random = random

    def choose(self, request: Request, snapshot: Snapshot) -> Decision:
        replicas = snapshot.replicas
        if len(replicas) == 1:
            return Decision(replicas[0].replica, Reason.ONLY_REPLICA, (), replicas[0].queue_depth)
        # `queue_depth` written out: its calls would be half of the cost.
        depths = [view.load.running + view.load.waiting + view.unacked for view in replicas]
        shortest = min(depths)
        ties = depths.count(shortest)
        place = depths.index(shortest)
        for _ in range(int(self._random.random() * ties) if ties > 1 else 0):
            place = depths.index(shortest, place + 1)
        return Decision(replicas[place].replica, Reason.SHORTEST_QUEUE, (), shortest)
