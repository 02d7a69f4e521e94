"""A whole comparison: systems up at the same time, measured in turns.

Rounds with engines that set the pace, for cost and latency; one with engines that are not waited for, for what goes
through; where asked for, open loops at a share of what each system's round showed, and replays of traces. A system that
fails is left out from then on, and the others go on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Final, TypeAlias, TypeVar

import msgspec

from loadtests.peers import alone, load, replays
from loadtests.peers.base import Running, Setup, System
from loadtests.peers.errors import PeerError
from loadtests.peers.measure import MOST_AT_ONCE, Bench, Open, Paced, Saturated, Shape, opened, peak_memory_mb
from loadtests.peers.replicas import EngineOrder, Replicas
from loadtests.peers.report import open_row, row
from loadtests.peers.systems import SYSTEMS
from loadtests.results import Row
from loadtests.simulate import traces

FLOOR: Final = "direct"
REPLAY_TAIL_S: Final = 300.0
"""What the answers of a replay may take after its last arrival."""

Say = Callable[[str], None]
_S = TypeVar("_S", Paced, Saturated, Open)
Measure: TypeAlias = Callable[[str, Running], _S]


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


class Replay(msgspec.Struct, frozen=True):
    """The beginning of a trace, faster than it was."""

    trace: str
    factor: float
    requests: int


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
    loads: Sequence[float] = ()
    """Open loops, by each system's own capacity."""
    replays: Sequence[Replay] = ()


class Outcome(msgspec.Struct):
    """What came out."""

    rows: list[Row]
    failed: bool
    """Whether any system could not be measured, or some loads were left out."""
    open: list[Row] = []
    replays: list[Row] = []


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
    comparison = _Comparison(plan, time.monotonic() + plan.limit_s, say)
    rows: dict[Load, Row] = {}
    outcome = Outcome([], False)
    for group in _groups(chosen):
        for load_, made in comparison.streams(group):
            rows.setdefault(load_, made)  # The floor is in every group.
        outcome.open += comparison.open(group)
        outcome.replays += comparison.replays(group)
    whole = [(each, streams) for streams in plan.streams for each in chosen]
    for each, streams in whole:
        if (each, streams) not in rows:
            say(f"{each.name}: no row for {streams} streams, not everything was measured")
    outcome.rows = [rows[load_] for load_ in whole if load_ in rows]
    others = len(chosen) - 1
    missing = len(whole) - len(rows) + others * len(plan.loads) - len(outcome.open)
    outcome.failed = missing > 0 or len(outcome.replays) < len(chosen) * len(plan.replays)
    return outcome


def _groups(chosen: Sequence[Contender]) -> Iterator[list[Contender]]:
    """Who is up at the same time: all that are quiet, then each of the others with the floor alone."""
    floor, *others = chosen
    quiet = [each for each in others if each.made.quiet]
    if quiet or not others:
        yield [floor, *quiet]
    for each in others:
        if not each.made.quiet:
            yield [floor, each]


class _Comparison:
    """All loads on the groups."""

    def __init__(self, plan: Plan, deadline: float, say: Say) -> None:
        self._plan = plan
        self._deadline = deadline
        self._say = say
        self._capacity: dict[Contender, float] = {}
        """The most chunks per second that each relayed."""

    def streams(self, group: Sequence[Contender]) -> Iterator[tuple[Load, Row]]:
        """Rows of those of a group that came through, first of which is the floor."""
        plan, shape = self._plan, self._plan.shape
        costs: dict[Load, list[Paced]] = {}
        memory_mb: dict[Contender, float] = {}
        bare: dict[int, list[float]] = {streams: self._alone(streams) for streams in plan.streams}
        for step_ms in dict.fromkeys(shape.paced_step_ms(streams) for streams in plan.streams):
            same = [streams for streams in plan.streams if shape.paced_step_ms(streams) == step_ms]
            bench = Bench(msgspec.structs.replace(shape, step_ms=step_ms))
            with self._up(group, EngineOrder(options={"step_ms": step_ms})) as up:
                costs |= up.closed(bench, same, lambda bench, streams: partial(_paced, bench, streams))
            memory_mb = {each: max(mb, memory_mb.get(each, 0.0)) for each, mb in up.memory_mb.items()}
        left = [each for each in group if all(len(costs.get((each, n), [])) == plan.reps for n in plan.streams)]
        rates: dict[Load, list[Saturated]] = {}
        if left:
            with self._up(left, EngineOrder(options={"step_ms": 0.0})) as up:
                rates = up.closed(
                    Bench(shape), plan.streams, lambda bench, streams: partial(_saturated, bench, streams)
                )
            memory_mb = {each: max(mb, up.memory_mb.get(each, 0.0)) for each, mb in memory_mb.items()}
        for (each, _), samples in rates.items():
            most = median(sample.chunks_per_s for sample in samples)
            self._capacity[each] = max(most, self._capacity.get(each, 0.0))
        for streams in plan.streams:
            for each in group:
                mine, under = costs.get((each, streams), []), costs.get((group[0], streams), [])
                sated = rates.get((each, streams), [])
                if min(len(mine), len(sated), len(under)) == plan.reps:
                    key = (each.system, each.policy, plan.protocol, streams)
                    made = row(key, mine, under, sated, bare[streams], memory_mb[each])
                    made["step_ms"] = shape.paced_step_ms(streams)
                    yield (each, streams), made

    def _alone(self, streams: int) -> list[float]:
        """What the engines take per token with nobody to write to, once for each repetition."""
        plan, shape = self._plan, self._plan.shape
        step_ms = shape.paced_step_ms(streams)
        order = Replicas(plan.replicas, EngineOrder(options={"step_ms": step_ms}))
        seconds = (shape.tokens + 1) * step_ms / 1e3
        return [alone.measure(order, streams, shape.tokens, seconds) for _ in range(plan.reps)]

    def open(self, group: Sequence[Contender]) -> Iterator[Row]:
        """At shares of each system's own capacity, each beside the floor under the same load."""
        plan = self._plan
        floor, *others = [each for each in group if each in self._capacity] or group
        if not plan.loads or not others:
            return
        step_ms = plan.shape.open_step_ms()
        bench = Bench(msgspec.structs.replace(plan.shape, step_ms=step_ms))
        with self._up([floor, *others], EngineOrder(options={"step_ms": step_ms})) as up:
            for share in plan.loads:
                mine: dict[Contender, list[Open]] = {each: [] for each in others}
                under: dict[Contender, list[Open]] = {each: [] for each in others}
                for rep in range(plan.reps):
                    for each, running in up.turns(backwards=rep % 2 == 1):
                        if each is floor:
                            continue
                        rate = share * self._capacity[each] / plan.shape.tokens
                        what = f"{share:g} of capacity, {rate:.0f} requests/s"
                        both = [(each, running, mine), (floor, up.running[floor], under)]
                        with up.leaving_out(each):
                            for one, where, samples in both if rep % 2 else reversed(both):
                                sample = up.measured(one, what, rep, where, partial(_open, bench, rate))
                                samples[each].append(sample)
                for each in others:
                    if len(mine[each]) == len(under[each]) == plan.reps:
                        made = open_row((each.system, each.policy, plan.protocol), mine[each], under[each])
                        rate = share * self._capacity[each] / plan.shape.tokens
                        offered = {"requests": rate, "chunks": rate * plan.shape.tokens}
                        made |= {f"offered_{what}_per_s": round(most, 1) for what, most in offered.items()}
                        yield made | {"load": share, "step_ms": step_ms}

    def replays(self, group: Sequence[Contender]) -> Iterator[Row]:
        """Traces. The floor takes replicas in turn."""
        for replay in self._plan.replays:
            trace = traces.load(replay.trace)
            engine = replays.engine(replay.factor, trace.requests[: replay.requests])
            samples: dict[Contender, list[Open]] = {each: [] for each in group}
            for rep in range(self._plan.reps):
                with self._up(group, engine) as up:  # Caches are empty at each beginning.
                    for each, running in up.turns(backwards=rep % 2 == 1):
                        with up.leaving_out(each):
                            asked = partial(_replayed, trace, replay)
                            samples[each].append(up.measured(each, f"trace {replay.trace}", rep, running, asked))
            for each in group:
                mine, under = samples[each], samples[group[0]]
                if len(mine) == len(under) == self._plan.reps:
                    made = open_row((each.system, each.policy, self._plan.protocol), mine, under)
                    yield made | {"trace": replay.trace, "time_factor": replay.factor, "requests": replay.requests}

    @contextmanager
    def _up(self, group: Sequence[Contender], engine: EngineOrder) -> Iterator[_Up]:
        with ExitStack() as stack:
            up = _Up(self._plan, self._deadline, self._say)
            up.start(group, engine, stack)
            yield up


def _paced(bench: Bench, streams: int, system: str, running: Running) -> Paced:
    return bench.paced(system, running, streams)


def _saturated(bench: Bench, streams: int, system: str, running: Running) -> Saturated:
    return bench.saturated(system, running, streams)


def _open(bench: Bench, rate: float, system: str, running: Running) -> Open:
    return bench.open_loop(system, running, rate)


def _replayed(trace: traces.Trace, replay: Replay, system: str, running: Running) -> Open:
    due = replays.due(trace, replay.factor, replay.requests)
    limit_s = due[-1].at_s + REPLAY_TAIL_S
    most = min(len(due), MOST_AT_ONCE)
    return opened(system, running, load.open_loop(running.client, due, most, limit_s=limit_s))


class _Up:
    """Systems that are up, over engines of one kind."""

    def __init__(self, plan: Plan, deadline: float, say: Say) -> None:
        self.running: dict[Contender, Running] = {}
        self.memory_mb: dict[Contender, float] = {}
        """The most that each router side has held so far."""
        self._plan = plan
        self._deadline = deadline
        self._say = say

    def start(self, group: Sequence[Contender], engine: EngineOrder, stack: ExitStack) -> None:
        plan = self._plan
        for each in group:
            with self.leaving_out(each):
                log = plan.logs / f"{each.name.replace(' ', '-')}.log"
                setup = Setup(each.policy, plan.protocol, plan.replicas, engine, log)
                self.running[each] = stack.enter_context(each.made.start(setup))

    def closed(
        self, bench: Bench, streams: Sequence[int], measure: Callable[[Bench, int], Measure[_S]]
    ) -> dict[Load, list[_S]]:
        """The repetitions of each system and number of streams, in order; fewer where it failed."""
        samples: dict[Load, list[_S]] = {}
        for number in streams:
            for each, running in self.turns():
                with self.leaving_out(each):
                    bench.warm_up(each.name, running, number)
            for rep in range(self._plan.reps):
                for each, running in self.turns(backwards=rep % 2 == 1):
                    with self.leaving_out(each):
                        sample = self.measured(each, f"{number} streams", rep, running, measure(bench, number))
                        samples.setdefault((each, number), []).append(sample)
        return samples

    def measured(self, each: Contender, what: str, rep: int, running: Running, measure: Measure[_S]) -> _S:
        """One repetition, told of."""
        sample = measure(each.name, running)
        self.memory_mb[each] = max(self.memory_mb.get(each, 0.0), peak_memory_mb(running))
        causes = "".join(f"; {times} x {cause}" for cause, times in sample.causes.most_common(3))
        self._say(f"{each.name}, {what}, {sample.what}, repetition {rep + 1}{causes}")
        return sample

    def turns(self, *, backwards: bool = False) -> Iterator[tuple[Contender, Running]]:
        """Those that are up, until the time is up."""
        up = self.running
        for each in reversed(list(up)) if backwards else list(up):
            if time.monotonic() > self._deadline:
                self._say(f"{each.name}: left out, all loads together took longer than {self._plan.limit_s:g} s")
                up.pop(each)
            elif each in up:
                yield each, up[each]

    @contextmanager
    def leaving_out(self, each: Contender) -> Iterator[None]:
        """Whoever fails is told and left out; without the floor there is nothing to compare with."""
        try:
            yield
        except PeerError as error:
            if each.system == FLOOR:
                raise
            self._say(str(error))
            self.running.pop(each, None)
