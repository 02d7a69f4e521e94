"""The shorter queue of two replicas drawn at random."""

from __future__ import annotations

import random
from typing import Annotated

import msgspec

from router.types import Decision, Reason, ReplicaView, Request, Snapshot


class PowerOfTwo:
    """Draws some replicas at random and takes the one with the shortest queue.

    Nearly as even as the shortest queue of all (Mitzenmacher, "The Power of Two Choices in Randomized Load
    Balancing", 2001), and several routers that see the same load do not all run to the same replica.
    """

    class Options(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
        choices: Annotated[int, msgspec.Meta(ge=2)] = 2
        """Replicas to compare. More evens out the queues of one router, and makes several herd."""

    def __init__(self, options: Options, random: random.Random) -> None:
        self._choices = options.choices
        self._random = random

    def choose(self, request: Request, snapshot: Snapshot) -> Decision:
        replicas = snapshot.replicas
        size = len(replicas)
        if size == 1:
            return Decision(replicas[0].replica, Reason.ONLY_REPLICA, (), replicas[0].queue_depth)
        if self._choices > 2 < size:
            return self._best_of(self._random.sample(replicas, min(self._choices, size)))
        # `random.sample` costs five times as much as these two draws.
        draw = self._random.random
        first = int(draw() * size)
        second = int(draw() * (size - 1))
        if second >= first:
            second += 1
        one, other = replicas[first], replicas[second]
        depth, other_depth = one.queue_depth, other.queue_depth
        # Which of them was drawn first is chance, so a tie falls at random.
        if depth <= other_depth:
            return Decision(one.replica, Reason.SHORTER_OF_TWO, (other.replica,), depth)
        return Decision(other.replica, Reason.SHORTER_OF_TWO, (one.replica,), other_depth)

    def _best_of(self, drawn: list[ReplicaView]) -> Decision:
        # Sorting keeps the drawn order among equals, so ties fall at random.
        drawn.sort(key=_queue_depth)
        best, *rest = drawn
        return Decision(best.replica, Reason.SHORTER_OF_TWO, tuple(v.replica for v in rest), best.queue_depth)


def _queue_depth(view: ReplicaView) -> int:
    return view.queue_depth
