"""Metrics of several processes as one."""

from __future__ import annotations

import re
import time
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from router.admission import Admission
from router.observe.merge import CUMULATIVE, GAUGES, Families, exposition, merge, remains, snapshot
from router.observe.metrics import Metrics
from router.observe.workers import WorkerMetrics
from router.options import PrefixOptions
from router.prefix.prefixes import Prefixes
from tests.fakes import Fleet, make_request

DOCS = Path(__file__).resolve().parents[2] / "docs" / "metrics.md"
GREATEST = {
    "kvlane_replicas_ready",
    "kvlane_replica_running",
    "kvlane_replica_waiting",
    "kvlane_replica_kv_usage",
    "kvlane_replica_cache_mode",
    "kvlane_prefix_late_replicas",
    "kvlane_worker_loop_lag_seconds",  # With a label of each worker's own.
    "process_max_fds",
    "python_info",
}
"""Gauges of which the greater counts, on purpose."""


class Process:
    """A process with a few figures."""

    def __init__(self, requests: int, in_flight: int, ready: int, times_s: tuple[float, ...] = ()) -> None:
        registry = CollectorRegistry()
        counter = Counter("kvlane_requests", "Requests.", ["outcome"], registry=registry)
        counter.labels("ok").inc(requests)
        Gauge("kvlane_streams_in_flight", "In flight.", registry=registry).set(in_flight)
        Gauge("kvlane_replicas_ready", "Ready.", registry=registry).set(ready)
        histogram = Histogram("kvlane_request_seconds", "Time.", buckets=(1, 2), registry=registry)
        for each in times_s:
            histogram.observe(each)
        self.families = snapshot(registry)


def lines(families: Families) -> set[str]:
    text, content_type = exposition(families)
    assert content_type.startswith("text/plain")
    return {line for line in text.decode().splitlines() if not line.startswith("#")}


@pytest.fixture
async def fleet() -> AsyncIterator[Fleet]:
    fleet = Fleet()
    yield fleet
    await fleet.close()


def test_counters_and_histograms_add_up_and_gauges_follow_their_rule() -> None:
    one, two = Process(3, 5, 2, (0.5, 1.5)), Process(4, 1, 1, (1.5, 9.0))
    assert lines(merge([one.families, two.families])) == {
        'kvlane_requests_total{outcome="ok"} 7.0',
        "kvlane_streams_in_flight 6.0",
        "kvlane_replicas_ready 2.0",
        'kvlane_request_seconds_bucket{le="1.0"} 1.0',
        'kvlane_request_seconds_bucket{le="2.0"} 3.0',
        'kvlane_request_seconds_bucket{le="+Inf"} 4.0',
        "kvlane_request_seconds_count 4.0",
        "kvlane_request_seconds_sum 12.5",
    }


def test_what_only_one_process_has_is_there_and_no_process_is_changed_by_merging() -> None:
    one, two = Process(3, 5, 2), Process(0, 0, 0)
    del two.families[0]
    before = lines(one.families)
    assert 'kvlane_requests_total{outcome="ok"} 3.0' in lines(merge([two.families, one.families]))
    assert lines(one.families) == before
    assert merge([]) == []


def test_an_ended_process_leaves_what_it_counted_and_no_gauges() -> None:
    left = lines(remains(Process(3, 5, 2).families))
    assert 'kvlane_requests_total{outcome="ok"} 3.0' in left
    assert not any(line.startswith(("kvlane_streams_in_flight", "kvlane_replicas_ready")) for line in left)


def test_figures_cross_between_processes_unchanged() -> None:
    families = Process(3, 5, 2, (0.5,)).families
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(families), type=Families) == families


async def test_every_gauge_of_a_router_has_a_rule(fleet: Fleet) -> None:
    metrics = Metrics()
    metrics.watch(Admission(10), fleet.router, Prefixes(PrefixOptions(), time.monotonic))
    gauges = {family.name for family in metrics.snapshot() if family.kind not in CUMULATIVE}
    assert gauges <= set(GAUGES) | GREATEST
    assert not set(GAUGES) & GREATEST


async def test_every_metric_is_documented(fleet: Fleet) -> None:
    metrics = Metrics()
    metrics.watch(Admission(10), fleet.router, Prefixes(PrefixOptions(), time.monotonic))
    families = [*metrics.snapshot(), *WorkerMetrics(dict).snapshot(0)]
    names = {f"{each.name}_total" if each.kind == "counter" else each.name for each in families}
    documented = set(re.findall(r"`(kvlane_\w+)(?:\{[\w,]+\})?`", DOCS.read_text()))
    assert documented == {name for name in names if name.startswith("kvlane_")}


def test_a_scrape_of_one_process_shows_what_its_figures_say() -> None:
    metrics = Metrics()
    metrics.ended(make_request(), metrics.began(), "ok")
    assert 'kvlane_requests_total{outcome="ok",rpc="http"} 1.0' in lines(merge([metrics.snapshot()] * 1))
    assert 'kvlane_requests_total{outcome="ok",rpc="http"} 2.0' in lines(merge([metrics.snapshot()] * 2))
    assert b"_created" not in metrics.exposition()[0]
