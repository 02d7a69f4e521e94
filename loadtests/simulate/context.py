"""What the simulator's own baselines get: the truth about the replicas, which no router has."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import msgspec

from engine.simulated_core import SimulatedCore
from loadtests.simulate.perf import Profile
from router.types import Request


class Truth(Protocol):
    """A live replica; the simulation changes it while a policy holds it."""

    name: str
    core: SimulatedCore
    """Its queue (`core.load()`) and KV cache (`core.pool.holds(hash)`, `core.pool.match(hashes, limit)`)."""
    slowness: float
    """1, or how much longer its steps take than its profile says."""
    alone: bool
    """Whether it is idle, with no step under way."""

    def settle(self) -> None:
        """Brings `core` up to the present; call before reading it."""

    def step_ends_s(self) -> float:
        """When the step under way ends; now, where there is none."""


class Context(msgspec.Struct):
    """For one policy in one router."""

    random: random.Random
    """Seeded."""
    now: Callable[[], float]
    """The virtual clock, in seconds."""
    replicas: Mapping[str, Truth]
    """By name; follows joins and losses."""
    profile: Profile
    request: Callable[[Request], Any]
    """The `TraceRequest` that a request replays."""
    router: int = 0
    routers: int = 1
    options: Mapping[str, Any] = {}
    """The policy's own, from the command line."""
    pooled: bool = False
    """Whether replicas share one pool of KV caches."""
    in_flight: Callable[[str, Sequence[int]], int] = lambda replica, blocks: 0
    """How many of a prompt's blocks, from its first on, the router's own requests in flight on a replica have."""
