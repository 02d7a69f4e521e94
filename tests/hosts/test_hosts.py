"""Several hosts: routers that join the Ray cluster by themselves share its replicas, and what they outlive.

The tests share one world and run in this order; each leaves all hosts up.
"""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hosts.client import Load
from tests.hosts.network import Host, missing
from tests.hosts.world import PER_HOST, REPLICAS, World, wait_until, world
from tests.integration.asking import CUT, ERROR_EVENT, WHOLE

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(bool(why := missing()), reason=f"NO HOSTS CAN BE MADE: {why}"),
]

HEAD_AWAY_S = 30.0


@pytest.fixture(scope="module")
def hosts() -> Iterator[World]:
    with world() as made:
        yield made


def more(load: Load, count: int = 12) -> None:
    """So many more whole answers."""
    wanted = load.ends[WHOLE] + count
    wait_until(lambda: load.ends[WHOLE] >= wanted, f"{count} more streams end whole")


def assert_only_begun_streams_of(lost: Host, load: Load, hosts: dict[str, str]) -> None:
    """Whatever had no byte yet was answered; what was cut ran on that host, and was told."""
    assert set(load.ends) <= {WHOLE, ERROR_EVENT, CUT}, load.broken
    assert {hosts[replica] for replica, _ in load.broken} <= {lost.address}, load.broken


def process(host: Host, name: str) -> int:
    """The process of that name on a host."""
    return next(pid for pid in host.pids() if Path(f"/proc/{pid}/comm").read_text().strip() == name)


def zombies(host: Host) -> list[int]:
    """Processes that have ended and of which nobody took notice."""
    found = []
    for pid in host.pids():
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                found.append(pid)
        except OSError:
            pass
    return found


def test_two_routers_share_the_replicas_of_two_hosts(hosts: World) -> None:
    records = hosts.records()
    assert sorted(records.values()) == sorted([host.address for host in hosts.engines] * PER_HOST)
    with hosts.load() as load:
        wait_until(
            lambda: all(set(found) >= set(records) for found in load.replicas.values()),
            "both routers have sent to each replica",
            lambda: str(load.replicas),
        )
    assert load.broken == []


def test_a_router_with_another_token_gets_no_part_in_the_cluster(hosts: World) -> None:
    token = "e" * 64
    with hosts.stranger(token) as router:
        wait_until(lambda: "the Ray node has ended" in router.host.log(), "its node is refused", router.host.log)
        healthy, ready = hosts.get(router, "/healthz"), hosts.get(router, "/readyz")
        assert (healthy and healthy.status_code, ready and ready.status_code) == (200, 503)
    assert "kvlane-directory" not in router.host.log()
    assert token not in router.host.log()


@pytest.mark.parametrize(
    ("sends", "hears"), [(False, False), (False, True)], ids=["nothing gets through", "one direction is dead"]
)
def test_a_cut_link_takes_a_hosts_replicas_away_until_it_is_mended(hosts: World, sends: bool, hears: bool) -> None:
    cut, records = hosts.engines[1], hosts.records()
    before = {router: router.host.log() for router in hosts.routers}
    with hosts.load() as load:
        more(load)
        cut.link(sends=sends, hears=hears)
        try:
            for router in hosts.routers:
                hosts.wait_for_replicas(router, REPLICAS - PER_HOST)
            more(load)
        finally:
            cut.link()
        for router in hosts.routers:
            hosts.wait_for_replicas(router, REPLICAS)
        more(load)
    assert_only_begun_streams_of(cut, load, records)
    for router in hosts.routers:
        news = router.host.log().removeprefix(before[router])
        assert len(re.findall(r"replicas: replica \S+: replica \S+ was silent for [3-5] s", news)) == PER_HOST, news


def test_a_slow_link_costs_no_lane_and_no_stream(hosts: World) -> None:
    slow = hosts.engines[1]
    before = [router.host.log() for router in hosts.routers]
    with hosts.load() as load:
        slow.link(delay_s=0.15)
        try:
            more(load, 24)
        finally:
            slow.link()
    assert load.broken == []
    for router, earlier in zip(hosts.routers, before, strict=True):
        assert "ready -> joining" not in router.host.log().removeprefix(earlier)


def test_a_router_whose_ray_node_dies_gets_another_without_a_cut_stream(hosts: World) -> None:
    router = hosts.routers[0]
    before = router.host.log()

    def news() -> str:
        return router.host.log().removeprefix(before)

    with hosts.load() as load:
        more(load)
        os.kill(process(router.host, "raylet"), signal.SIGKILL)
        wait_until(lambda: "the Ray node has ended" in news(), "the end of the node is noticed", news)
        wait_until(lambda: "reloaded: " in news(), "workers of another node have taken over", news)
        more(load)
    assert load.broken == []
    wait_until(lambda: not zombies(router.host), "whatever ended is buried")
    hosts.wait_for_replicas(router, REPLICAS)


def test_a_lost_engine_host_and_then_thirty_seconds_without_the_head(hosts: World) -> None:
    lost, records = hosts.engines[1], hosts.records()
    with hosts.load() as load:
        more(load)
        lost.crash()
        for router in hosts.routers:
            hosts.wait_for_replicas(router, REPLICAS - PER_HOST)
        more(load)
    assert_only_begun_streams_of(lost, load, records)

    with hosts.load() as load:
        more(load)
        hosts.head.crash()
        until = time.monotonic() + HEAD_AWAY_S
        while time.monotonic() < until:
            more(load)
        lost.link()
        hosts.head.link()
        hosts.start_head()
        hosts.start_engines(lost)
        for router in hosts.routers:
            hosts.wait_for_replicas(router, REPLICAS)
        more(load)
    assert load.broken == []
    assert set(hosts.records().values()) == {host.address for host in hosts.engines}


def test_the_first_process_of_the_container_ends_its_streams_and_then_its_node(hosts: World) -> None:
    router = hosts.routers[1]
    with hosts.load() as load:
        more(load)
        load.end()  # What is in flight goes on.
        assert router.container.stop(90) == 0, router.host.log()
    assert load.broken == []
    assert router.host.pids() == []
