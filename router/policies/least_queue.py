"""The replica with the shortest queue."""

from __future__ import annotations

import random
from typing import ClassVar

import msgspec

from router.policies.base import NoOptions
from router.policies.queues import queue_depths, shortest_queue
from router.types import Decision, Reason, Request, Snapshot


class LeastQueue:
    """Sends each request to the replica with the fewest requests running, waiting or on their way; ties at random."""

    Options: ClassVar[type[msgspec.Struct]] = NoOptions

    def __init__(self, options: NoOptions, random: random.Random) -> None:
        self._random = random

    def choose(self, request: Request, snapshot: Snapshot) -> Decision:
        replicas = snapshot.replicas
        depths = queue_depths(replicas)
        if len(replicas) == 1:
            return Decision(replicas[0].replica, Reason.ONLY_REPLICA, (), depths[0])
        return shortest_queue(replicas, depths, self._random)
