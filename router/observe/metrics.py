"""Prometheus metrics.

Job: count requests and show the state of lanes and pools at each scrape. Rule: nothing here runs per token; token and
step counts are read from the lanes when somebody scrapes. `Metrics` owns its registry.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, PlatformCollector, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

from router.admission import Admission
from router.errors import KvlaneError
from router.observe.policies import PolicyMetrics
from router.replicas import Replicas
from router.types import Request, Rpc

log = logging.getLogger(__name__)

_TTFT_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_DURATION_BUCKETS_S = (0.01, 0.05, 0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_RPC_NAMES = {Rpc.HTTP: "http", Rpc.GRPC: "grpc"}
_POLICY_LOG_INTERVAL_S = 60.0


class Metrics:
    """The metrics of one router process (`router.dispatch.Observer`)."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        self._requests = Counter(
            "kvlane_requests",
            "Requests ended, by outcome: ok or an error's name.",
            ["rpc", "outcome"],
            registry=registry,
        )
        self._counters: dict[tuple[str, str], Counter] = {}
        durations = Histogram(
            "kvlane_request_seconds",
            "Time from dispatch to the end of a request.",
            ["rpc"],
            buckets=_DURATION_BUCKETS_S,
            registry=registry,
        )
        self._durations = {rpc: durations.labels(name) for rpc, name in _RPC_NAMES.items()}
        self._ttft = Histogram(
            "kvlane_first_output_seconds",
            "Time from submit on a lane to the stream's first output.",
            buckets=_TTFT_BUCKETS_S,
            registry=registry,
        )
        self._retries = Counter(
            "kvlane_retries", "Requests sent to another replica, by the error before.", ["error"], registry=registry
        )
        self.policies = PolicyMetrics(registry)
        """What guards and shadows report to."""
        self._policy_logged_at = -_POLICY_LOG_INTERVAL_S

    def watch(self, admission: Admission, replicas: Replicas) -> None:
        """Shows these at each scrape."""
        self._registry.register(_State(admission, replicas))

    def began(self) -> float:
        """A request begins; hand the result to `ended`."""
        return self._clock()

    def ended(self, request: Request, began: float, outcome: str) -> None:
        """A request ended: `ok`, `cancelled` or an error's name."""
        self._count(_RPC_NAMES[request.rpc], outcome)
        self._durations[request.rpc].observe(self._clock() - began)

    def refused(self, rpc: str, error: str) -> None:
        """An ingress answered a request with that error without dispatching it."""
        self._count(rpc, error)

    def _count(self, rpc: str, outcome: str) -> None:
        counter = self._counters.get((rpc, outcome))
        if counter is None:  # looking a child up by its labels costs more than counting
            counter = self._counters[rpc, outcome] = self._requests.labels(rpc, outcome)
        counter.inc()

    def first_output(self, waited_s: float) -> None:
        """A stream's first output came."""
        self._ttft.observe(waited_s)

    def retried(self, error: KvlaneError) -> None:
        """A request goes to another replica."""
        self._retries.labels(error.name).inc()

    def policy_failed(self, error: Exception) -> None:
        """The policy raised or answered nonsense; logged once a minute."""
        self.policies.policy_failed("unguarded", "raised")
        if self._clock() - self._policy_logged_at >= _POLICY_LOG_INTERVAL_S:
            self._policy_logged_at = self._clock()
            log.error("the policy failed; requests go to the shortest queue instead", exc_info=error)

    def exposition(self) -> tuple[bytes, str]:
        """What a scrape gets: the text, and its content type."""
        return generate_latest(self._registry), CONTENT_TYPE_LATEST


class _State(Collector):
    """Reads the router's state at each scrape."""

    def __init__(self, admission: Admission, replicas: Replicas) -> None:
        self._admission = admission
        self._replicas = replicas

    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily("kvlane_streams_in_flight", "Requests admitted.", self._admission.in_flight)
        steps, tokens = self._replicas.totals()
        yield CounterMetricFamily("kvlane_steps", "Step frames received.", steps)
        yield CounterMetricFamily("kvlane_tokens", "Tokens received.", tokens)
        ready = GaugeMetricFamily("kvlane_replicas_ready", "Ready replicas of a model.", labels=["model"])
        for status in self._replicas.models():
            ready.add_metric([status.card.name], status.ready_replicas)
        yield ready
        gauges = {
            name: GaugeMetricFamily(f"kvlane_replica_{name}", text, labels=["replica"])
            for name, text in (
                ("running", "Requests in the engine's batch."),
                ("waiting", "Requests waiting at the replica."),
                ("kv_usage", "Share of the KV blocks in use."),
                ("leases", "This router's requests in flight there."),
            )
        }
        for lane in self._replicas.lanes():
            gauges["running"].add_metric([lane.replica], lane.load.running)
            gauges["waiting"].add_metric([lane.replica], lane.load.waiting)
            gauges["kv_usage"].add_metric([lane.replica], lane.load.kv_usage)
            gauges["leases"].add_metric([lane.replica], lane.view().leases)
        yield from gauges.values()
