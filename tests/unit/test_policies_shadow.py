"""A shadow decides on live traffic without effect."""

from __future__ import annotations

import random
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from router.observe.policies import PolicyMetrics
from router.policies import registry
from router.policies.guard import Guard
from router.policies.shadow import Shadow
from router.testing import make_prefix, make_replica, make_request, make_snapshot
from router.types import Decision, Outlook, Reason, Request, Snapshot

REPLICAS = (
    make_replica("a", outlook=Outlook(wait_s=1.0, token_s=1e-3)),
    make_replica("b", outlook=Outlook(wait_s=0.25, token_s=1e-3)),
)
SNAPSHOT = Snapshot("model", REPLICAS, make_prefix({"a": 8}, prompt_tokens=1024))
"""Expected there: 1 s and the other half of 1,024 tokens, or 0.25 s and all of them."""


class Says:
    """A policy that always says the same, or raises it."""

    def __init__(self, answer: Any) -> None:
        self._answer = answer
        self.asked = 0

    def choose(self, request: Request, snapshot: Snapshot) -> Decision:
        self.asked += 1
        if isinstance(self._answer, Exception):
            raise self._answer
        decision: Decision = self._answer
        return decision


class Comparing:
    """A `ShadowObserver` that remembers."""

    def __init__(self) -> None:
        self.decided: list[tuple[bool, float]] = []
        self.failed = 0

    def shadow_decided(self, agreed: bool, difference_s: float) -> None:
        self.decided.append((agreed, round(difference_s, 6)))

    def shadow_failed(self) -> None:
        self.failed += 1


A = Decision("a", Reason.POLICY)
B = Decision("b", Reason.POLICY)


def test_the_live_decision_counts_and_the_expected_difference_is_told() -> None:
    seen = Comparing()
    assert Shadow(Says(A), Says(B), seen).choose(make_request(), SNAPSHOT) is A
    assert Shadow(Says(B), Says(A), seen).choose(make_request(), SNAPSHOT) is B
    assert Shadow(Says(A), Says(Decision("a", Reason.RANDOM)), seen).choose(make_request(), SNAPSHOT) is A
    apart = (0.25 + 1.024) - (1.0 + 0.512)
    assert seen.decided == [(False, round(apart, 6)), (False, round(-apart, 6)), (True, 0.0)]


@pytest.mark.parametrize(
    "answer", [ValueError("a defect"), None, Decision("elsewhere", Reason.POLICY)], ids=["raises", "none", "stranger"]
)
def test_a_shadows_defects_never_matter_and_are_counted(answer: Any) -> None:
    seen = Comparing()
    assert Shadow(Says(A), Says(answer), seen).choose(make_request(), SNAPSHOT) is A
    assert (seen.decided, seen.failed) == ([], 1)


def test_what_a_guard_decided_for_either_is_no_comparison() -> None:
    seen = Comparing()
    for live, shadow in ((A, Decision("b", Reason.POLICY_FAILED)), (Decision("a", Reason.POLICY_STALLED), B)):
        assert Shadow(Says(live), Says(shadow), seen).choose(make_request(), SNAPSHOT) is live
    assert (seen.decided, seen.failed) == ([], 0)


def test_a_pool_of_one_is_no_comparison() -> None:
    shadow = Says(A)
    Shadow(Says(A), shadow, Comparing()).choose(make_request(), make_snapshot([0], names=["a"]))
    assert shadow.asked == 0


def test_a_guarded_shadow_that_stalls_rests_and_the_live_policy_goes_on() -> None:
    now = 0.0

    def clock() -> float:
        return now

    class Slow(Says):
        def choose(self, request: Request, snapshot: Snapshot) -> Decision:
            nonlocal now
            now += 1.0
            return super().choose(request, snapshot)

    metrics = PolicyMetrics(CollectorRegistry())
    fallback = registry.create("least-queue", {}, random.Random(0))
    slow = Slow(B)
    live = Guard(Says(A), "live", fallback, metrics, clock, 0.005)
    guarded = Guard(slow, "slow (shadow)", fallback, metrics, clock, 0.005, usage=lambda: (now, 0))
    shadowed = Shadow(live, guarded, metrics)
    assert {shadowed.choose(make_request(), SNAPSHOT).replica for _ in range(20)} == {"a"}
    assert slow.asked == 3


def test_the_metrics_show_time_failures_agreement_and_difference() -> None:
    prometheus = CollectorRegistry()
    metrics = PolicyMetrics(prometheus)
    metrics.policy_took("cost", 8e-6)
    metrics.policy_took("cost", 8e-5)
    metrics.policy_failed("cost", "raised")
    metrics.shadow_decided(True, 0.0)
    metrics.shadow_decided(False, 0.5)
    metrics.shadow_decided(False, -0.125)
    metrics.shadow_failed()
    text = generate_latest(prometheus).decode()
    for line in (
        'kvlane_policy_seconds_bucket{le="1e-05",policy="cost"} 1.0',
        'kvlane_policy_seconds_bucket{le="0.0001",policy="cost"} 2.0',
        'kvlane_policy_failures_total{kind="raised",policy="cost"} 1.0',
        'kvlane_shadow_decisions_total{agreed="true"} 1.0',
        'kvlane_shadow_decisions_total{agreed="false"} 2.0',
        'kvlane_shadow_cost_difference_seconds_bucket{le="-0.05"} 1.0',
        'kvlane_shadow_cost_difference_seconds_bucket{le="0.0"} 2.0',
        "kvlane_shadow_cost_difference_seconds_count 3.0",
        "kvlane_shadow_lost_seconds_total 0.5",
        "kvlane_shadow_saved_seconds_total 0.125",
        "kvlane_shadow_failures_total 1.0",
    ):
        assert line in text.splitlines(), line
