"""The fleet on a virtual clock: replicas that step, routers that decide, reports on their way between them.

A replica is brought up to the present only when something happens there: stretches of steps that only decode are done
at once, at their end or when a request comes in between. Single-threaded and deterministic by its seed.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Callable, Sequence
from heapq import heappop, heappush
from typing import Any, Final

import msgspec

from engine.simulated_cache import BlockPool
from engine.simulated_core import SimulatedCore, StepResult
from loadtests.simulate.context import Context
from loadtests.simulate.perf import Profile
from loadtests.simulate.routers import Report, SimRouter
from loadtests.simulate.traces import TraceRequest
from router.errors import InvalidRequest
from router.policies.base import Policy

RETRIES: Final = 2
ASK_EVERY: Final = 512
"""Requests between two questions whether a run is worth going on with."""


class Change(msgspec.Struct, frozen=True):
    """A replica joins, or is lost with all that runs there."""

    at_s: float
    joins: bool
    replica: str = ""
    """Which one is lost; the oldest where empty."""


class Setup(msgspec.Struct, frozen=True):
    """What is simulated, but for the requests."""

    profile: Profile
    replicas: int
    routers: int = 1
    staleness_s: float = 0.0
    """How long a replica's report is on its way. What a router does or sees itself, its submits and the ends of its
    streams, it knows at once."""
    model_error: float = 0.0
    """Each term of a router's cost model is wrong by up to this share, for all replicas alike."""
    replica_error: float = 0.0
    """Beyond that, it takes each replica to be faster or slower by up to this share, for good."""
    token_error: float = 0.05
    """Their estimates of a prompt's tokens are wrong by up to this share, at random."""
    slow_factor: float = 1.0
    """Steps of the first replica last this much longer."""
    changes: tuple[Change, ...] = ()
    index: bool = True
    """Whether routers keep an index of prefixes: time saved where no policy looks."""
    pooled: bool = False
    """Whether every replica finds in its cache what any replica holds."""
    seed: int = 0


class Outcome(msgspec.Struct):
    """What became of one request."""

    request: TraceRequest
    at_s: float
    first_s: float = 0.0
    end_s: float = 0.0
    cached_tokens: int = 0
    replica: str = ""
    error: str = ""
    tries: int = 0


class _Flight(msgspec.Struct):
    """One try of a request on a replica."""

    outcome: Outcome
    router: SimRouter
    hold: Any


class SimReplica:
    """A replica: the engine's core and its place in time."""

    def __init__(self, name: str, profile: Profile, slowness: float, shared: dict[int, BlockPool] | None) -> None:
        options = profile.options
        if slowness != 1.0:
            options = msgspec.structs.replace(options, time_scale=options.time_scale * slowness)
        self.name = name
        self.slowness = slowness
        self.core = SimulatedCore(options, profile.step_model, shared)
        self.flights: dict[int, _Flight] = {}
        self.acked: dict[int, int] = {}
        """For each router the last stream submitted here."""
        self.ends: list[float] = []
        """When the steps of the stretch under way end; empty where single steps are made."""
        self.due = 0.0
        """When the step or stretch under way ends."""
        self.alone = True
        self.version = 0
        """Events of older versions are void."""
        self.clock: Callable[[], float]
        self.settled: Callable[[SimReplica], None]

    def settle(self) -> None:
        self.settled(self)

    def step_ends_s(self) -> float:
        return self.clock() if self.alone else self.due


class Cluster:
    """Runs one list of arrivals through one fleet."""

    def __init__(self, setup: Setup, policy: Callable[[Context], Policy], requests: Sequence[TraceRequest]) -> None:
        self._setup = setup
        self._policy = policy
        self._requests = {str(request.index): request for request in requests}
        self._random = random.Random(f"cluster/{setup.seed}")
        self._events: list[tuple[float, int, int, Any, Any]] = []
        self._sequence = 0
        self.now = 0.0
        self.replicas: dict[str, SimReplica] = {}
        self.gone: list[SimReplica] = []
        self._joined = 0
        self._shared: dict[int, BlockPool] | None = {} if setup.pooled else None
        self._routers = [
            SimRouter(
                number,
                setup.profile,
                random.Random(f"router/{setup.seed}/{number}"),
                model_error=setup.model_error,
                replica_error=setup.replica_error,
                token_error=setup.token_error,
                index=setup.index,
            )
            for number in range(setup.routers)
        ]
        for _ in range(setup.replicas):
            self._join()
        for router in self._routers:
            router.policy = policy(self._context(router.number))
        self.inflight_peak_sum = 0.0
        """Sum over arrivals of the most requests on one replica divided by the mean."""
        self.inflight_samples = 0

    def run(
        self,
        arrivals: Sequence[tuple[float, TraceRequest]],
        hopeless: Callable[[list[Outcome], float], bool] | None = None,
    ) -> list[Outcome] | None:
        """What became of each request, in order of arrival.

        Now and then `hopeless` is asked, with all that came so far and the time, whether to give up: then None.
        """
        outcomes = [Outcome(request, at) for at, request in arrivals]
        for change in self._setup.changes:
            self._at(change.at_s, _CHANGE, change, None)
        events = self._events
        for number, outcome in enumerate(outcomes):
            if hopeless is not None and number % ASK_EVERY == 0 and hopeless(outcomes[:number], self.now):
                return None
            at = outcome.at_s
            while events and events[0][0] <= at:
                self._next()
            self.now = at
            self._sample()
            self._dispatch(outcome)
        while events:
            self._next()
        return outcomes

    def _context(self, router: int) -> Context:
        setup = self._setup
        return Context(
            random=random.Random(f"policy/{setup.seed}/{router}"),
            now=lambda: self.now,
            replicas=self.replicas,
            profile=setup.profile,
            request=lambda request: self._requests[request.request_id],
            router=router,
            routers=setup.routers,
            pooled=setup.pooled,
            in_flight=self._routers[router].in_flight,
        )

    def _at(self, when: float, kind: int, what: Any, detail: Any) -> None:
        self._sequence += 1
        heappush(self._events, (when, self._sequence, kind, what, detail))

    def _next(self) -> None:
        when, _, kind, what, detail = heappop(self._events)
        if kind == _STEP:
            if what.version == detail:
                self.now = when
                self._step_ended(what)
            return
        self.now = max(self.now, when)
        if kind == _REPORT:
            self._deliver(what)
        elif what.joins:
            self._join()
        else:
            self._lose(what.replica)

    def _dispatch(self, outcome: Outcome) -> None:
        routers = self._routers
        router = routers[int(self._random.random() * len(routers))] if len(routers) > 1 else routers[0]
        if not self.replicas:
            outcome.error = "there is no replica"
            return
        outcome.tries += 1
        name, stream, hold = router.route(outcome.request, self.now)
        outcome.replica = name
        flight = _Flight(outcome, router, hold)
        replica = self.replicas.get(name)
        if replica is None:
            # The policy chose a replica that is lost and whose loss this router does not know: as a lost lane.
            self._failed(flight, name)
            return
        self.settle(replica)
        replica.acked[router.number] = stream
        request = outcome.request
        try:
            replica.core.add(request.index, request.prompt, request.answer_tokens)
        except InvalidRequest as error:
            outcome.error = error.message
            # The refusal travels back with the next report; nothing is left to learn from it.
            router.ended(name, hold)
            self._report(replica, self.now, [])
            return
        replica.flights[request.index] = flight
        if replica.alone:
            self._begin(replica)
        if len(self._routers) > 1:
            self._report(replica, self.now, [])  # as a replica does, so that the other routers know of it

    def settle(self, replica: SimReplica) -> None:
        """Does what is over of a replica's stretch, so that a request can be added or the core be read."""
        ends = replica.ends
        if not ends:
            return
        replica.ends = []
        # The last one is an event of its own, even where it ends right now.
        over = bisect_right(ends, self.now, 0, len(ends) - 1)
        if over:
            self._passed(replica, replica.core.leap(over), ends[over - 1])
        replica.core.plan()
        replica.due = ends[over]
        replica.version += 1
        self._at(replica.due, _STEP, replica, replica.version)

    def _step_ended(self, replica: SimReplica) -> None:
        core = replica.core
        ends = replica.ends
        replica.ends = []
        result = core.leap(len(ends)) if ends else core.commit()
        self._passed(replica, result, self.now)
        # Routers shall hear soon what a step takes without prompts in it.
        self._begin(replica, 1 if result.prefill_tokens else None)

    def _begin(self, replica: SimReplica, longest: int | None = None) -> None:
        core = replica.core
        ends = core.stretch(self.now, longest)
        replica.version += 1
        if ends:
            replica.ends = ends
            replica.due = ends[-1]
        else:
            duration = core.plan()
            replica.alone = duration is None
            if duration is None:
                return
            replica.due = self.now + duration / 1000
        replica.alone = False
        self._at(replica.due, _STEP, replica, replica.version)

    def _passed(self, replica: SimReplica, result: StepResult, when: float) -> None:
        """Steps are over, the last of them at `when`."""
        for job in result.prefilled:
            if job.produced == 1:
                outcome = replica.flights[job.id].outcome  # type: ignore[index]
                outcome.first_s = when
                outcome.cached_tokens = job.cached_tokens
        ended = []
        for job in result.finished:
            flight = replica.flights.pop(job.id)  # type: ignore[arg-type]
            flight.outcome.end_s = when
            ended.append(flight)
        self._report(replica, when, result.cache_events)
        for flight in ended:
            # A router sees the end of its own stream itself, however late reports are.
            flight.router.ended(replica.name, flight.hold)

    def _report(self, replica: SimReplica, when: float, cache: list[Any]) -> None:
        report = Report(replica.name, replica.core.load(), dict(replica.acked), cache)
        staleness = self._setup.staleness_s
        if staleness:
            self._at(max(when + staleness, self.now), _REPORT, report, None)
        else:
            self._deliver(report)

    def _deliver(self, report: Report) -> None:
        for router in self._routers:
            router.reported(report, self.now)

    def _join(self) -> None:
        name = f"r{self._joined}"
        slowness = self._setup.slow_factor if self._joined == 0 else 1.0
        replica = self.replicas[name] = SimReplica(name, self._setup.profile, slowness, self._shared)
        self._joined += 1
        replica.clock = lambda: self.now
        replica.settled = self.settle
        for router in self._routers:
            replica.acked[router.number] = 0
            router.join(name)

    def _lose(self, name: str) -> None:
        replica = self.replicas.pop(name or next(iter(self.replicas)))
        replica.version += 1
        self.gone.append(replica)
        if self._shared is not None:
            for block in [block for block, pool in self._shared.items() if pool is replica.core.pool]:
                del self._shared[block]
        for router in self._routers:
            router.leave(replica.name)
        for flight in list(replica.flights.values()):
            self._failed(flight, replica.name)
        replica.flights.clear()

    def _failed(self, flight: _Flight, name: str) -> None:
        """As the real router: a request may be sent again until the first byte of its answer."""
        outcome = flight.outcome
        flight.router.ended(name, flight.hold)
        if outcome.first_s or outcome.tries > RETRIES:
            outcome.error = f"replica {name} was lost"
        else:
            self._dispatch(outcome)

    def _sample(self) -> None:
        counts = [len(replica.flights) for replica in self.replicas.values()]
        total = sum(counts)
        if total:
            self.inflight_peak_sum += max(counts) * len(counts) / total
            self.inflight_samples += 1


_STEP, _REPORT, _CHANGE = range(3)
