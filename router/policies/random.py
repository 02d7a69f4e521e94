"""Any replica."""

from __future__ import annotations

import random
from typing import ClassVar

import msgspec

from router.policies.base import NoOptions
from router.types import Decision, Reason, Request, Snapshot


class Random:
    """Sends each request to a replica drawn at random: the baseline that any other policy has to beat."""

    Options: ClassVar[type[msgspec.Struct]] = NoOptions

    def __init__(self, options: NoOptions, random: random.Random) -> None:
        self._random = random

    def choose(self, request: Request, snapshot: Snapshot) -> Decision:
        replicas = snapshot.replicas
        if len(replicas) == 1:
            return Decision(replicas[0].replica, Reason.ONLY_REPLICA)
        return Decision(replicas[int(self._random.random() * len(replicas))].replica, Reason.RANDOM)
