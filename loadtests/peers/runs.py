"""A whole comparison: systems up at the same time, measured in turns.

Two rounds: with engines that set the pace, for cost and latency, and with engines that are always done, for what goes
through. A system that fails is left out from then on, and the others go on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final, TypeAlias, TypeVar

import msgspec

from loadtests.peers.base import Running, Setup, System
from loadtests.peers.errors import PeerError
from loadtests.peers.measure import Bench, Paced, Saturated, Shape, peak_memory_mb
from loadtests.peers.report import Row, row
from loadtests.peers.systems import SYSTEMS
from loadtests.router_cost import STEP_OPTIONS

FLOOR: Final = "direct"
SATURATED_STEP_MS: Final = 1.0
"""Short enough that 32 streams ask for more than any system relays on two cores."""

Say = Callable[[str], None]
_S = TypeVar("_S", Paced, Saturated)
Measure: TypeAlias = Callable[[Bench, str, Running, int], _S]


class Contender(msgspec.Struct, frozen=True, eq=False):
    """A system with a policy."""

    system: str
    policy: str
    """In the system's own words."""
    made: System

    @property
    def name(self) -> str:
        return self.system if self.policy == "none" else f"{self.system} {self.policy}"


Load: TypeAlias = tuple[Contender, int]
"""And the number of streams."""


class Plan(msgspec.Struct, frozen=True):
    """What is to be run."""

    shape: Shape
    streams: Sequence[int]
    reps: int
    replicas: int
    protocol: str
    limit_s: float
    """For all loads together."""
    logs: Path


class Outcome(msgspec.Struct):
    """What came out."""

    rows: list[Row]
    failed: bool
    """Whether any system could not be measured, or some loads were left out."""


def contenders(
    names: Sequence[str], policies: Sequence[str], protocol: str, known: dict[str, System] = SYSTEMS
) -> list[Contender]:
    """Those asked for, the floor first. Raises `ValueError` for what is not there."""
    for policy in policies:
        if not any(
            policy in (*known[name].policies, *known[name].policies.values()) for name in names if name in known
        ):
            raise ValueError(f"--policy: none of the systems has {policy!r}")
    found = []
    for name in dict.fromkeys((FLOOR, *names)):
        if name not in known:
            raise ValueError(f"--systems: {name!r} is not one of {', '.join(known)}")
        system = known[name]
        if protocol not in system.protocols:
            raise ValueError(f"--systems: {name} does not speak {protocol}")
        chosen = [
            own
            for general, own in system.policies.items()
            if not policies or len(system.policies) == 1 or general in policies or own in policies
        ]
        if not chosen:
            raise ValueError(f"--policy: {name} has none of {', '.join(policies)}")
        found += [Contender(name, own, system) for own in chosen]
    return found


def run(plan: Plan, chosen: Sequence[Contender], say: Say) -> Outcome:
    """`chosen` begins with the floor; `say` takes lines of progress, and one for whatever fails."""
    deadline = time.monotonic() + plan.limit_s
    rows: dict[Load, Row] = {}
    for group in _groups(chosen):
        for load, made in _compare(plan, group, deadline, say):
            rows.setdefault(load, made)  # The floor is in every group.
    whole = [(each, streams) for streams in plan.streams for each in chosen]
    for each, streams in whole:
        if (each, streams) not in rows:
            say(f"{each.name}: no row for {streams} streams, not everything was measured")
    return Outcome([rows[load] for load in whole if load in rows], failed=len(rows) < len(whole))


def _groups(chosen: Sequence[Contender]) -> Iterator[list[Contender]]:
    """Who is up at the same time: all that are quiet, then each of the others with the floor alone."""
    floor, *others = chosen
    quiet = [each for each in others if each.made.quiet]
    if quiet or not others:
        yield [floor, *quiet]
    for each in others:
        if not each.made.quiet:
            yield [floor, each]


def _compare(plan: Plan, group: Sequence[Contender], deadline: float, say: Say) -> Iterator[tuple[Load, Row]]:
    """Rows of those of a group that came through, first of which is the floor."""
    first = _Round(plan, plan.shape.step_ms, deadline, say)
    costs = first.run(group, Bench.paced)
    left = [each for each in group if all((each, streams) in costs for streams in plan.streams)]
    second = _Round(plan, SATURATED_STEP_MS, deadline, say)
    rates = second.run(left, Bench.saturated)
    for streams in plan.streams:
        for each in group:
            mine, under = costs.get((each, streams), []), costs.get((group[0], streams), [])
            most = rates.get((each, streams), [])
            if min(len(mine), len(most), len(under)) == plan.reps:
                key = (each.system, each.policy, plan.protocol, streams)
                rss_mb = max(first.memory_mb[each], second.memory_mb[each])
                yield (each, streams), row(key, mine, under, most, rss_mb)


class _Round:
    """One pass over all loads, with all systems up."""

    def __init__(self, plan: Plan, step_ms: float, deadline: float, say: Say) -> None:
        self.memory_mb: dict[Contender, float] = {}
        """The most that each router side has held so far."""
        self._plan = plan
        self._step_ms = step_ms
        self._deadline = deadline
        self._say = say
        self._bench = Bench(msgspec.structs.replace(plan.shape, step_ms=step_ms))

    def run(self, chosen: Sequence[Contender], measure: Measure[_S]) -> dict[Load, list[_S]]:
        """The repetitions of each system and number of streams, in order; fewer where it failed."""
        samples: dict[Load, list[_S]] = {}
        with ExitStack() as stack:
            up = self._started(chosen, stack)
            for streams in self._plan.streams:
                for each, running in self._turns(up):
                    with self._leaving_out(up, each):
                        self._bench.warm_up(each.name, running, streams)
                for rep in range(self._plan.reps):
                    for each, running in self._turns(up, backwards=rep % 2 == 1):
                        with self._leaving_out(up, each):
                            sample = measure(self._bench, each.name, running, streams)
                            samples.setdefault((each, streams), []).append(sample)
                            self.memory_mb[each] = max(self.memory_mb.get(each, 0.0), peak_memory_mb(running))
                            self._say(_line(each, streams, rep, sample))
        return samples

    def _started(self, chosen: Sequence[Contender], stack: ExitStack) -> dict[Contender, Running]:
        plan, up = self._plan, dict[Contender, Running]()
        for each in chosen:
            with self._leaving_out(up, each):
                log = plan.logs / f"{each.name.replace(' ', '-')}.log"
                options = STEP_OPTIONS | {"step_base_ms": self._step_ms}
                setup = Setup(each.policy, plan.protocol, plan.replicas, options, log)
                up[each] = stack.enter_context(each.made.start(setup))
        return up

    def _turns(self, up: dict[Contender, Running], *, backwards: bool = False) -> Iterator[tuple[Contender, Running]]:
        """Those that are up, until the time is up."""
        for each in reversed(list(up)) if backwards else list(up):
            if time.monotonic() > self._deadline:
                self._say(f"{each.name}: left out, all loads together took longer than {self._plan.limit_s:g} s")
                up.pop(each)
            else:
                yield each, up[each]

    @contextmanager
    def _leaving_out(self, up: dict[Contender, Running], each: Contender) -> Iterator[None]:
        """Whoever fails is told and left out; without the floor there is nothing to compare with."""
        try:
            yield
        except PeerError as error:
            if each.system == FLOOR:
                raise
            self._say(str(error))
            up.pop(each, None)


def _line(each: Contender, streams: int, rep: int, sample: Paced | Saturated) -> str:
    causes = "".join(f"; {times} x {cause}" for cause, times in sample.causes.most_common(3))
    return f"{each.name}, {streams} streams, {sample.what}, repetition {rep + 1}{causes}"
