"""Metrics of the supervisor: its workers, how often they were restarted, and reloads.

Its own process is among those that the `process_…` metrics add up.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, ProcessCollector
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from router.observe.merge import Families, snapshot


class WorkerMetrics(Collector):
    """`workers` tells how many workers there are in each state."""

    def __init__(self, workers: Callable[[], Mapping[str, int]], wall: Callable[[], float] = time.time) -> None:
        self._registry = CollectorRegistry()
        self._workers = workers
        self._wall = wall
        self._answered = 0
        self._loaded = wall()
        ProcessCollector(registry=self._registry)
        self._registry.register(self)
        self._restarts = Counter(
            "kvlane_worker_restarts", "Workers that died and were started again.", registry=self._registry
        )
        self._reloads = Counter(
            "kvlane_reloads",
            "Reloads of the configuration: ok, refused (it is invalid), or failed (its workers did not become ready, "
            "or an address was taken).",
            ["outcome"],
            registry=self._registry,
        )
        for outcome in ("ok", "refused", "failed"):
            self._reloads.labels(outcome)

    def restarted(self) -> None:
        """A worker died and is started again."""
        self._restarts.inc()

    def reloaded(self, outcome: str) -> None:
        """A reload came to its end."""
        self._reloads.labels(outcome).inc()
        if outcome == "ok":
            self._loaded = self._wall()

    def snapshot(self, answered: int) -> Families:
        """The supervisor's figures; so many workers have answered this scrape."""
        self._answered = answered
        return snapshot(self._registry)

    def collect(self) -> Iterator[Metric]:
        workers = GaugeMetricFamily("kvlane_workers", "Worker processes.", labels=["state"])
        for state, count in self._workers().items():
            workers.add_metric([state], count)
        yield workers
        yield GaugeMetricFamily(
            "kvlane_workers_counted",
            "Workers whose figures are in this scrape; of others only what they had counted before.",
            self._answered,
        )
        yield GaugeMetricFamily(
            "kvlane_config_loaded_timestamp_seconds", "When the configuration in use was read.", self._loaded
        )
