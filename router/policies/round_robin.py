"""Replicas in turn, in the order of their names."""

from __future__ import annotations

import random
from bisect import bisect_right
from typing import ClassVar

import msgspec

from router.policies.base import NoOptions
from router.types import Decision, Reason, Request, Snapshot


class RoundRobin:
    """Sends each request to the next replica of its model, blind to load.

    Its place is the last replica's name, not a position, so that replicas that join or leave neither skip nor repeat
    others. It starts at random: several routers that started at the first would march in step.
    """

    Options: ClassVar[type[msgspec.Struct]] = NoOptions

    def __init__(self, options: NoOptions, random: random.Random) -> None:
        self._random = random
        self._last: dict[str, str] = {}  # By model; as many as there are pools.

    def choose(self, request: Request, snapshot: Snapshot) -> Decision:
        names = sorted([view.replica for view in snapshot.replicas])
        size = len(names)
        if size == 1:
            self._last[snapshot.model] = names[0]
            return Decision(names[0], Reason.ONLY_REPLICA)
        last = self._last.get(snapshot.model)
        start = int(self._random.random() * size) if last is None else bisect_right(names, last) % size
        chosen = self._last[snapshot.model] = names[start]
        return Decision(chosen, Reason.NEXT_IN_TURN, (*names[start + 1 :], *names[:start]))
