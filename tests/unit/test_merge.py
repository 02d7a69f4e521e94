"""Metrics of several processes as one."""

from __future__ import annotations

import asyncio
import math
import re
import time
from collections.abc import AsyncIterator, Generator
from pathlib import Path
from typing import TypeVar

import msgspec
import pytest
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Summary,
    generate_latest,
)

from router.admission import Admission
from router.observe.merge import (
    CUMULATIVE,
    GAUGES,
    SLICE_SAMPLES,
    Families,
    exposition,
    exposition_in_slices,
    merge,
    remains,
    snapshot,
    snapshot_in_slices,
)
from router.observe.metrics import Metrics
from router.observe.workers import WorkerMetrics
from router.options import PrefixOptions
from router.prefix.prefixes import Prefixes
from tests.fakes import Fleet, make_request

T = TypeVar("T")
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
    metrics.watch_held({})
    gauges = {family.name for family in await metrics.snapshot() if family.kind not in CUMULATIVE}
    assert gauges <= set(GAUGES) | GREATEST
    assert not set(GAUGES) & GREATEST


async def test_every_metric_is_documented(fleet: Fleet) -> None:
    metrics = Metrics()
    metrics.watch(Admission(10), fleet.router, Prefixes(PrefixOptions(), time.monotonic))
    metrics.watch_held({})
    families = [*await metrics.snapshot(), *WorkerMetrics(dict).snapshot(0)]
    names = {f"{each.name}_total" if each.kind == "counter" else each.name for each in families}
    documented = set(re.findall(r"`(kvlane_\w+)(?:\{[\w,]+\})?`", DOCS.read_text()))
    assert documented == {name for name in names if name.startswith("kvlane_")}


async def test_a_scrape_of_one_process_shows_what_its_figures_say() -> None:
    metrics = Metrics()
    metrics.ended(make_request(), metrics.began(), "ok")
    assert 'kvlane_requests_total{outcome="ok",rpc="http"} 1.0' in lines(merge([await metrics.snapshot()] * 1))
    assert 'kvlane_requests_total{outcome="ok",rpc="http"} 2.0' in lines(merge([await metrics.snapshot()] * 2))
    assert b"_created" not in (await metrics.exposition())[0]


def many(samples: int) -> CollectorRegistry:
    """A registry of every kind of metric, with labels that must be escaped and figures of every form."""
    registry = CollectorRegistry()
    for number in range(4):
        gauge = Gauge(f"gauge_{number}", "Back\\slash,\nnew line.", ["replica", "a"], registry=registry)
        for each in range(samples // 4):
            gauge.labels(f'quote " slash \\ line \n {each}', "é").set(each * 1234.5678)
    for value in (math.inf, -math.inf, math.nan, 1e300, -0.0, 1e-9):
        gauge.labels(str(value), "").set(value)
    Counter("counted", "Counter.", registry=registry).inc(12_345_678)
    Summary("took", "Summary.", ["of"], registry=registry).labels("it").observe(0.25)
    Histogram("times", "Histogram.", registry=registry).observe(0.25)
    return registry


def test_a_page_is_what_the_library_renders() -> None:
    registry = many(20)
    text, content_type = exposition(snapshot(registry))
    assert content_type == CONTENT_TYPE_LATEST
    whole = generate_latest(registry).decode()
    # When a metric began to be counted the library shows as a gauge of its own.
    wanted = [line for line in whole.splitlines() if "_created" not in line]
    assert text.decode().splitlines() == wanted


def test_a_slice_handles_no_more_samples_than_it_may() -> None:
    slices = snapshot_in_slices(many(10 * SLICE_SAMPLES))
    turns, families = drained(slices)
    assert turns >= 10
    turns, page = drained(exposition_in_slices(families))
    assert turns >= 10
    assert page == exposition(families)


async def test_several_scrapes_take_turns_of_one() -> None:
    metrics, turns = Metrics(), 0
    for number in range(4 * SLICE_SAMPLES):
        metrics.refused("http", f"error {number}")
    pages = [asyncio.create_task(metrics.exposition()) for _ in range(5)]
    while not all(page.done() for page in pages):
        turns += 1
        await asyncio.sleep(0)
    assert turns > 5 * 4
    assert all(b'outcome="error 7"' in page.result()[0] for page in pages)


def drained(slices: Generator[None, None, T]) -> tuple[int, T]:
    """How many turns it left to others, and what it returned."""
    turns = 0
    while True:
        try:
            next(slices)
            turns += 1
        except StopIteration as end:
            return turns, end.value
