"""What a scrape shows."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator

import pytest

from router.admission import Admission
from router.errors import ReplicaLost
from router.observe.metrics import Metrics
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


def samples(metrics: Metrics) -> dict[str, float]:
    text, content_type = metrics.exposition()
    assert content_type.startswith("text/plain")
    lines = re.findall(r"^(kvlane_[^ ]+) (\S+)$", text.decode(), re.MULTILINE)
    return {name: float(value) for name, value in lines if not name.startswith("kvlane_request_seconds_created")}


def test_ended_and_refused_requests_are_counted_by_outcome() -> None:
    clock = Clock()
    metrics = Metrics(clock)
    began = metrics.began()
    clock.now += 0.2
    metrics.ended(make_request(), began, "ok")
    metrics.ended(make_request(), began, "ok")
    metrics.ended(make_request(), began, "replica_lost")
    metrics.refused("grpc", "invalid_request")
    metrics.retried(ReplicaLost("gone"))
    metrics.first_output(0.02)
    found = samples(metrics)
    assert found['kvlane_requests_total{outcome="ok",rpc="http"}'] == 2
    assert found['kvlane_requests_total{outcome="replica_lost",rpc="http"}'] == 1
    assert found['kvlane_requests_total{outcome="invalid_request",rpc="grpc"}'] == 1
    assert found['kvlane_retries_total{error="replica_lost"}'] == 1
    assert found['kvlane_request_seconds_bucket{le="0.1",rpc="http"}'] == 0
    assert found['kvlane_request_seconds_bucket{le="0.5",rpc="http"}'] == 3
    assert found['kvlane_first_output_seconds_bucket{le="0.025"}'] == 1


def test_a_failing_policy_is_counted_each_time_and_logged_once_a_minute(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    metrics = Metrics(clock)
    for _ in range(10):
        metrics.policy_failed(ZeroDivisionError("a defect"))
    assert len(caplog.records) == 1
    clock.now += 61
    metrics.policy_failed(ZeroDivisionError("a defect"))
    assert len(caplog.records) == 2
    assert samples(metrics)['kvlane_policy_failures_total{kind="raised",policy="unguarded"}'] == 11


async def test_a_scrape_shows_pools_and_lanes_as_they_are(fleet: Fleet) -> None:
    metrics, admission = Metrics(), Admission(10)
    metrics.watch(admission, fleet.router)
    await fleet.add("a")
    await fleet.until(lambda: fleet.ready() == 1)
    with admission.admit(), fleet.router.lease("a"):
        found = samples(metrics)
    assert found["kvlane_streams_in_flight"] == 1
    assert found['kvlane_replicas_ready{model="m"}'] == 1
    assert found['kvlane_replica_leases{replica="a"}'] == 1
    assert found['kvlane_replica_running{replica="a"}'] == 0
    assert samples(metrics)["kvlane_streams_in_flight"] == 0
