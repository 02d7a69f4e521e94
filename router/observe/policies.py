"""Metrics of policies: how long they take, how often others had to decide for them, what a shadow would have done.

Rule: the only metrics that run once per decision; children are looked up once. `Metrics` owns the registry.
"""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from router.observe.histograms import Counts

_DECISION_BUCKETS_S = (5e-6, 1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2)
_DIFFERENCE_BUCKETS_S = (-5.0, -1.0, -0.25, -0.05, -0.01, -0.001, 0.0, 0.001, 0.01, 0.05, 0.25, 1.0, 5.0)


class _Decisions(Collector):
    """Each policy's decisions by how long they took; the library's own histogram takes 5 µs per decision."""

    def __init__(self, took: dict[str, Counts]) -> None:
        self._took = took

    def collect(self) -> Iterator[Metric]:
        found = HistogramMetricFamily("kvlane_policy_seconds", "Time that a policy took to decide.", labels=["policy"])
        for policy, took in self._took.items():
            took.show(found, [policy])
        yield found


class PolicyMetrics:
    """Counts for `router.policies.guard.Guard` and `router.policies.shadow.Shadow`."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._took: dict[str, Counts] = {}
        registry.register(_Decisions(self._took))
        self._failures = Counter(
            "kvlane_policy_failures",
            "Decisions that went to the shortest queue instead: the policy raised, gave an invalid answer, stalled, or"
            " was resting after it had stalled.",
            ["policy", "kind"],
            registry=registry,
        )
        self._explain_failures = Counter(
            "kvlane_explain_failures",
            "Requests whose candidates have no score: the policy's explain raised, stalled, or was resting after that.",
            ["kind"],
            registry=registry,
        )
        self._shadow_decisions = Counter(
            "kvlane_shadow_decisions",
            "Requests on which the shadow policy decided too, by whether it chose the same replica.",
            ["agreed"],
            registry=registry,
        )
        self._shadow_failures = Counter(
            "kvlane_shadow_failures", "Requests on which the shadow policy raised.", registry=registry
        )
        # A histogram with values below 0 has no sum, so the sums stand beside it.
        self._shadow_difference = Histogram(
            "kvlane_shadow_cost_difference_seconds",
            "Expected time to first token where the shadow policy pointed, minus where the request went.",
            buckets=_DIFFERENCE_BUCKETS_S,
            registry=registry,
        )
        self._shadow_saved = Counter(
            "kvlane_shadow_saved_seconds",
            "Sum of the differences where the shadow policy's choice was the better one.",
            registry=registry,
        )
        self._shadow_lost = Counter(
            "kvlane_shadow_lost_seconds",
            "Sum of the differences where the shadow policy's choice was the worse one.",
            registry=registry,
        )
        self._agreed = {agreed: self._shadow_decisions.labels(str(agreed).lower()) for agreed in (True, False)}

    def policy_took(self, policy: str, seconds: float) -> None:
        """A policy answered or raised after that time."""
        took = self._took.get(policy)
        if took is None:
            took = self._took[policy] = Counts(_DECISION_BUCKETS_S)
        took.add(seconds)

    def policy_failed(self, policy: str, kind: str) -> None:
        """The fallback decided instead of the policy."""
        self._failures.labels(policy, kind).inc()

    def explain_failed(self, kind: str) -> None:
        """A request's candidates were told without scores, or too late."""
        self._explain_failures.labels(kind).inc()

    def shadow_decided(self, agreed: bool, difference_s: float) -> None:
        """The shadow policy decided too; above 0, its choice was the worse one by that much."""
        self._agreed[agreed].inc()
        self._shadow_difference.observe(difference_s)
        if difference_s > 0.0:
            self._shadow_lost.inc(difference_s)
        else:
            self._shadow_saved.inc(-difference_s)

    def shadow_failed(self) -> None:
        """The shadow policy raised."""
        self._shadow_failures.inc()
