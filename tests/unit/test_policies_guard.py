"""A guarded policy's defects and slowness cost no request."""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Callable
from typing import Any

import pytest

from router.policies import registry
from router.policies.guard import LOG_INTERVAL_S, REST_S, STALLS_TO_REST, Failure, Guard, Usage, thread_usage
from router.testing import make_request, make_snapshot
from router.types import Decision, Reason, Request, Snapshot

STALL_S = 0.005
SNAPSHOT = make_snapshot([3, 0, 2])
SHORTEST = "replica-1"
GOOD = Decision("replica-2", Reason.POLICY, ("replica-0",), 4.0)


class Clock:
    """Time under the test's control."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


class Counting:
    """A `GuardObserver` that remembers."""

    def __init__(self) -> None:
        self.took: list[float] = []
        self.failures: list[str] = []

    def policy_took(self, policy: str, seconds: float) -> None:
        assert policy == "mine"
        self.took.append(round(seconds, 6))

    def policy_failed(self, policy: str, kind: str) -> None:
        assert policy == "mine"
        self.failures.append(kind)


class Thread:
    """What the thread did, under the test's control."""

    worked_s = 50.0
    waits = 7

    def __call__(self) -> Usage:
        return self.worked_s, self.waits


class Scripted:
    """A policy that answers what the test says and takes its time: it computes, unless the test says otherwise."""

    def __init__(self, clock: Clock, thread: Thread) -> None:
        self._clock = clock
        self._thread = thread
        self.answer: Callable[[], Any] = lambda: GOOD
        self.takes_s = 0.0
        self.share = 1.0
        """Of the time that it takes, in which it computes."""
        self.waits = 0
        """How often it waits for something meanwhile."""
        self.asked = 0

    def choose(self, request: Request, snapshot: Snapshot) -> Decision:
        self.asked += 1
        self._clock.now += self.takes_s
        self._thread.worked_s += self.takes_s * self.share
        self._thread.waits += self.waits
        decision: Decision = self.answer()
        return decision


class Bench:
    """A guard and what is around it; by default one answer was late before, so that it looks at the thread."""

    def __init__(self, *, looks: bool = True) -> None:
        self.clock = Clock()
        self.thread = Thread()
        self.policy = Scripted(self.clock, self.thread)
        self.seen = Counting()
        fallback = registry.create("least-queue", {}, random.Random(0))
        self.guard = Guard(self.policy, "mine", fallback, self.seen, self.clock, STALL_S, usage=self.thread)
        if looks:
            self.stall()
            self.choose()
            self.clock.now += LOG_INTERVAL_S
            self.seen.took.clear()
            self.seen.failures.clear()

    def choose(self) -> Decision:
        return self.guard.choose(make_request(), SNAPSHOT)

    def stall(self, times: int = 1) -> list[Decision]:
        self.policy.takes_s = STALL_S * 2
        decisions = [self.choose() for _ in range(times)]
        self.policy.takes_s = 0.0
        return decisions


@pytest.fixture
def bench() -> Bench:
    return Bench()


def fail() -> Decision:
    raise ZeroDivisionError("a defect")


def test_a_good_decision_passes_as_it_is_and_is_timed(bench: Bench) -> None:
    bench.policy.takes_s = 0.002
    assert bench.choose() is GOOD
    assert (bench.seen.took, bench.seen.failures) == ([0.002], [])


def test_a_policy_that_raises_gives_way_to_the_shortest_queue(bench: Bench) -> None:
    bench.policy.answer = fail
    decision = bench.choose()
    assert (decision.replica, decision.reason, decision.score) == (SHORTEST, Reason.POLICY_FAILED, 0)
    assert bench.seen.failures == [Failure.RAISED]
    assert len(bench.seen.took) == 1


class Hostile(str):
    """A name that raises where it is compared."""

    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("not comparable")


@pytest.mark.parametrize(
    "answer",
    [
        None,
        ("replica-2", Reason.POLICY),
        Decision("elsewhere", Reason.POLICY),
        Decision("replica-2", "because"),  # type: ignore[arg-type]
        Decision("replica-2", Reason.POLICY, None),  # type: ignore[arg-type]
        Decision(None, Reason.POLICY),  # type: ignore[arg-type]
        Decision("replica-2", Reason.POLICY, (None,)),  # type: ignore[arg-type]
        Decision("replica-2", Reason.POLICY, ("replica-0", 7)),  # type: ignore[arg-type]
        Decision("replica-2", Reason.POLICY, (), None),  # type: ignore[arg-type]
        Decision("replica-2", Reason.POLICY, (), "4"),  # type: ignore[arg-type]
        Decision("replica-2", Reason.POLICY, (), float("nan")),
        Decision("replica-2", Reason.POLICY, (), float("inf")),
    ],
)
def test_an_answer_that_is_no_decision_for_the_snapshot_gives_way(bench: Bench, answer: Any) -> None:
    bench.policy.answer = lambda: answer
    decision = bench.choose()
    assert (decision.replica, decision.reason) == (SHORTEST, Reason.POLICY_FAILED)
    assert bench.seen.failures == [Failure.INVALID]


def test_an_answer_that_raises_when_looked_at_gives_way(bench: Bench) -> None:
    bench.policy.answer = lambda: Decision(Hostile("replica-2"), Reason.POLICY)
    assert bench.choose().reason is Reason.POLICY_FAILED
    assert bench.seen.failures == [Failure.RAISED]


def test_an_answer_that_comes_too_late_gives_way(bench: Bench) -> None:
    bench.policy.takes_s = STALL_S * 0.999
    assert bench.choose() is GOOD
    (decision,) = bench.stall()
    assert (decision.replica, decision.reason) == (SHORTEST, Reason.POLICY_STALLED)
    assert bench.seen.failures == [Failure.STALLED]
    assert bench.choose() is GOOD


def test_a_policy_that_stalls_several_times_in_a_row_rests_and_is_tried_again(bench: Bench) -> None:
    bench.stall(STALLS_TO_REST)
    asked = bench.policy.asked
    resting = [bench.choose() for _ in range(5)]
    assert {(each.replica, each.reason) for each in resting} == {(SHORTEST, Reason.POLICY_STALLED)}
    assert bench.policy.asked == asked
    assert bench.seen.failures == [Failure.STALLED] * STALLS_TO_REST + [Failure.RESTING] * 5
    bench.clock.now += REST_S
    assert bench.choose() is GOOD
    bench.stall(STALLS_TO_REST - 1)
    assert bench.choose() is GOOD, "a good answer ends the row"


def test_a_policy_that_stalls_again_after_its_rest_rests_at_once(bench: Bench) -> None:
    bench.stall(STALLS_TO_REST)
    bench.clock.now += REST_S
    bench.stall()
    asked = bench.policy.asked
    assert bench.choose().reason is Reason.POLICY_STALLED
    assert bench.policy.asked == asked


def test_an_answer_that_was_late_for_the_machine_was_busy_with_others_stands(bench: Bench) -> None:
    bench.policy.share = 0.4
    assert bench.stall(STALLS_TO_REST + 1) == [GOOD] * (STALLS_TO_REST + 1)
    assert bench.seen.failures == []
    assert bench.seen.took == [STALL_S * 2] * (STALLS_TO_REST + 1)
    assert bench.choose() is GOOD


def test_a_policy_that_waits_for_something_is_late_though_it_computes_nothing(bench: Bench) -> None:
    bench.policy.share, bench.policy.waits = 0.0, 1
    assert {decision.reason for decision in bench.stall(STALLS_TO_REST)} == {Reason.POLICY_STALLED}
    assert bench.choose().reason is Reason.POLICY_STALLED
    assert bench.seen.failures == [Failure.STALLED] * STALLS_TO_REST + [Failure.RESTING]


def test_a_policy_that_waits_shortly_is_in_time(bench: Bench) -> None:
    bench.policy.waits = 1
    assert bench.choose() is GOOD
    assert bench.seen.failures == []


def test_an_answer_late_for_others_neither_ends_nor_lengthens_a_row_of_late_ones(bench: Bench) -> None:
    bench.stall(STALLS_TO_REST - 1)
    bench.policy.share = 0.0
    assert bench.stall() == [GOOD]
    bench.policy.share = 1.0
    bench.stall()
    assert bench.choose().reason is Reason.POLICY_STALLED
    assert bench.seen.failures == [Failure.STALLED] * STALLS_TO_REST + [Failure.RESTING]


def test_before_the_first_late_answer_nobody_looks_at_the_thread() -> None:
    bench = Bench(looks=False)
    looked: list[Usage] = []

    def usage() -> Usage:
        looked.append(bench.thread())
        return looked[-1]

    fallback = registry.create("least-queue", {}, random.Random(0))
    bench.guard = Guard(bench.policy, "mine", fallback, bench.seen, bench.clock, STALL_S, usage=usage)
    assert bench.choose() is GOOD
    bench.policy.share = 0.0
    assert bench.stall()[0].reason is Reason.POLICY_STALLED
    assert looked == []
    assert bench.stall() == [GOOD]
    assert len(looked) == 2


def test_a_threads_usage_tells_computing_from_waiting() -> None:
    worked_s, waits = thread_usage()
    while thread_usage()[0] == worked_s:
        pass
    lock = threading.Lock()
    lock.acquire()
    lock.acquire(timeout=1e-3)
    assert thread_usage()[1] > waits


def test_stalls_apart_from_each_other_send_no_policy_to_rest(bench: Bench) -> None:
    for _ in range(10):
        bench.stall(STALLS_TO_REST - 1)
        assert bench.choose() is GOOD


def test_raising_slowly_counts_as_a_stall_too(bench: Bench) -> None:
    bench.policy.answer = fail
    bench.stall(STALLS_TO_REST)
    assert bench.choose().reason is Reason.POLICY_STALLED
    assert bench.seen.failures == [Failure.RAISED] * STALLS_TO_REST + [Failure.RESTING]


def test_failures_are_logged_once_a_minute_with_how_many_were_kept_back(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    bench.policy.answer = fail
    for _ in range(8):
        bench.choose()
    (first,) = caplog.records
    assert first.levelno == logging.ERROR
    assert "policy 'mine' raised ZeroDivisionError; requests go to the shortest queue instead" in first.message
    assert first.exc_info is not None
    bench.clock.now += 61
    bench.choose()
    assert "(7 more like it since the last such line)" in caplog.records[-1].message
    bench.clock.now += 61
    bench.choose()
    assert len(caplog.records) == 3
    assert "more like it" not in caplog.records[-1].message


def test_the_log_says_what_happens_instead(caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench()
    fallback = registry.create("least-queue", {}, random.Random(0))
    bench.policy.answer = fail
    guard = Guard(bench.policy, "mine", fallback, bench.seen, bench.clock, STALL_S, instead="a coin decides")
    guard.choose(make_request(), SNAPSHOT)
    assert caplog.records[-1].message == "policy 'mine' raised ZeroDivisionError; a coin decides"


def test_each_kind_of_failure_has_its_own_line(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    bench.policy.answer = fail
    bench.choose()
    bench.policy.answer = lambda: Decision("elsewhere", Reason.POLICY)
    bench.choose()
    bench.policy.answer = lambda: GOOD
    bench.stall(STALLS_TO_REST)
    told = [record.message for record in caplog.records]
    assert len(told) == 4
    assert "chose 'elsewhere', which is not in the snapshot" in told[1]
    assert "took 10.0 ms, above the limit of 5 ms" in told[2]
    assert "3 times in a row; it rests 60 s" in told[3]


def test_cancelling_is_not_held_up(bench: Bench) -> None:
    def interrupt() -> Decision:
        raise KeyboardInterrupt

    bench.policy.answer = interrupt
    with pytest.raises(KeyboardInterrupt):
        bench.choose()
