"""What a scrape shows."""

from __future__ import annotations

import re
import time
from array import array
from collections.abc import AsyncIterator

import pytest

from router.admission import Admission
from router.errors import ReplicaLost
from router.lane.frames import CacheReport
from router.observe.metrics import Metrics
from router.options import PrefixOptions
from router.prefix.prefixes import Prefixes
from router.types import Reason, Receipt
from tests.fakes import Fleet, make_request


@pytest.fixture
async def fleet() -> AsyncIterator[Fleet]:
    fleet = Fleet()
    yield fleet
    await fleet.close()


class Clock:
    """Time under the test's control."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


async def samples(metrics: Metrics) -> dict[str, float]:
    text, content_type = await metrics.exposition()
    assert content_type.startswith("text/plain")
    lines = re.findall(r"^(kvlane_[^ ]+) (\S+)$", text.decode(), re.MULTILINE)
    return {name: float(value) for name, value in lines if not name.startswith("kvlane_request_seconds_created")}


async def test_ended_and_refused_requests_are_counted_by_outcome() -> None:
    clock = Clock()
    metrics = Metrics(clock)
    began = metrics.began()
    clock.now += 0.2
    metrics.ended(make_request(), began, "ok")
    metrics.ended(make_request(), began, "ok")
    metrics.ended(make_request(), began, "replica_lost")
    metrics.refused("grpc", "invalid_request")
    metrics.retried(ReplicaLost("gone"))
    metrics.first_output(0.02, 0.0)
    metrics.first_output(0.03, 0.02)
    found = await samples(metrics)
    assert found['kvlane_requests_total{outcome="ok",rpc="http"}'] == 2
    assert found['kvlane_requests_total{outcome="replica_lost",rpc="http"}'] == 1
    assert found['kvlane_requests_total{outcome="invalid_request",rpc="grpc"}'] == 1
    assert found['kvlane_retries_total{error="replica_lost"}'] == 1
    assert found['kvlane_request_seconds_bucket{le="0.1",rpc="http"}'] == 0
    assert found['kvlane_request_seconds_bucket{le="0.5",rpc="http"}'] == 3
    assert found['kvlane_first_output_seconds_bucket{le="0.025"}'] == 1
    assert (found["kvlane_first_output_ratio_count"], found["kvlane_first_output_ratio_sum"]) == (1, 1.5)


async def test_a_scrape_shows_pools_and_lanes_as_they_are(fleet: Fleet) -> None:
    metrics, admission = Metrics(), Admission(10)
    metrics.watch(admission, fleet.router, Prefixes(PrefixOptions(), time.monotonic))
    await fleet.add("a")
    await fleet.until(lambda: fleet.ready() == 1)
    with admission, fleet.router.lease("a"):
        found = await samples(metrics)
    assert found["kvlane_streams_in_flight"] == 1
    assert found['kvlane_replicas_ready{model="m"}'] == 1
    assert found['kvlane_replica_leases{replica="a"}'] == 1
    assert found['kvlane_replica_running{replica="a"}'] == 0
    assert (await samples(metrics))["kvlane_streams_in_flight"] == 0


async def test_a_scrape_shows_what_is_known_of_kv_caches() -> None:
    prefixes = Prefixes(PrefixOptions(), time.monotonic)
    fleet, metrics = Fleet(prefixes), Metrics()
    metrics.watch(Admission(10), fleet.router, prefixes)
    await fleet.add("a")
    await fleet.until(lambda: fleet.ready() == 1)
    assert (await samples(metrics))['kvlane_replica_cache_mode{mode="approximate",replica="a"}'] == 1
    (lane,) = fleet.router.lanes()
    stored, depths = array("Q", [1, 2]).tobytes(), array("I", [64, 128]).tobytes()
    for report in (
        CacheReport(1, True, stored, depths, compared=5, off=1),
        CacheReport(3),
        CacheReport(4, True, stored, depths),
    ):
        fleet.router.cache_reported(lane, report)
    found = await samples(metrics)
    assert 'kvlane_replica_cache_mode{mode="approximate",replica="a"}' not in found
    assert found['kvlane_replica_cache_mode{mode="exact",replica="a"}'] == 1
    assert (found["kvlane_prefix_blocks"], found["kvlane_cache_reports_total"]) == (2, 3)
    assert found["kvlane_prefix_index_bytes"] > 0
    assert (found["kvlane_cache_gaps_total"], found["kvlane_cache_gaps_healed_total"]) == (1, 1)
    assert (found["kvlane_cache_predictions_total"], found["kvlane_cache_predictions_off_total"]) == (5, 1)
    await fleet.close()


async def test_what_prompts_cost_and_what_of_them_was_held_is_added_up_by_model() -> None:
    metrics = Metrics()
    receipt = Receipt("r1", "a", "cost", Reason.LEAST_COST, 0, 2, 3, 60, 100)
    metrics.hashed(0.25, 7)
    metrics.looked_up(0.5, 7)
    for model in ("m", "m", "other"):
        metrics.hashed(0.25)
        metrics.looked_up(0.5)
        metrics.routed(make_request(model=model), receipt)
    metrics.routed(make_request(model="unhashed"), Receipt("r1", "a", "cost", Reason.LEAST_COST, 0))
    found = await samples(metrics)
    assert (found["kvlane_prefix_hash_seconds_count"], found["kvlane_prefix_hash_seconds_sum"]) == (10, 2.5)
    assert (found["kvlane_prefix_lookup_seconds_count"], found["kvlane_prefix_lookup_seconds_sum"]) == (10, 5.0)
    assert found['kvlane_prompt_tokens_total{model="m"}'] == 200
    assert found['kvlane_prefix_matched_tokens_total{model="m"}'] == 120
    assert found['kvlane_prefix_matched_tokens_total{model="other"}'] == 60
    assert 'kvlane_prompt_tokens_total{model="unhashed"}' not in found


async def test_a_scrape_shows_what_is_late_what_expired_and_what_was_not_explained() -> None:
    prefixes = Prefixes(PrefixOptions(), time.monotonic)
    fleet, metrics = Fleet(prefixes), Metrics()
    metrics.watch(Admission(1), fleet.router, prefixes)
    metrics.policies.explain_failed("stalled")
    text = (await metrics.exposition())[0].decode()
    assert "kvlane_prefix_late_replicas 0.0" in text
    assert "kvlane_prefix_holds_expired_total 0.0" in text
    assert 'kvlane_explain_failures_total{kind="stalled"} 1.0' in text
    await fleet.close()
