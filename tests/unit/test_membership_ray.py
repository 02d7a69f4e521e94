"""The parts of membership through Ray that need no Ray cluster: the directory's table and the router's view of it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from router import ray_private
from router.errors import ConfigError
from router.membership.base import ReplicaRecord
from router.membership.directory import Directory, Listing, Table
from router.membership.ray import MemberView


def record(name: str, port: int = 1) -> ReplicaRecord:
    return ReplicaRecord(name, "127.0.0.1", port, b"secret")


def listing(epoch: str, version: int, *names: str) -> Listing:
    return Listing(epoch, version, {name: record(name) for name in names})


class TestTable:
    def test_the_version_rises_with_changes_only(self) -> None:
        table = Table()
        table.register(record("a"), now=0)
        table.register(record("a"), now=1)
        assert table.version == 1
        table.register(record("a", port=2), now=2)
        assert table.version == 2
        table.deregister("a")
        table.deregister("a")
        assert (table.version, table.records) == (3, {})

    def test_a_heartbeat_of_an_unknown_replica_says_so(self) -> None:
        table = Table()
        assert not table.heartbeat("a", now=0)
        table.register(record("a"), now=0)
        assert table.heartbeat("a", now=0)

    def test_a_replica_expires_by_silence_and_not_while_it_beats(self) -> None:
        table = Table(expiry_s=10)
        table.register(record("a"), now=0)
        table.register(record("b"), now=0)
        table.heartbeat("b", now=8)
        assert table.expire(now=10) == []
        assert table.expire(now=10.5) == ["a"]
        assert (set(table.records), table.version) == ({"b"}, 3)


class TestView:
    def test_the_first_listing_counts_whole(self) -> None:
        view = MemberView(grace_s=5)
        assert view.take(listing("one", 3, "a", "b"), now=0)
        assert set(view.members) == {"a", "b"}
        assert (view.epoch, view.version) == ("one", 3)

    def test_a_known_directory_is_believed_at_once(self) -> None:
        view = MemberView(grace_s=5)
        view.take(listing("one", 3, "a", "b"), now=0)
        assert view.take(listing("one", 4, "a"), now=1)
        assert set(view.members) == {"a"}

    def test_the_same_listing_again_is_no_change(self) -> None:
        view = MemberView(grace_s=5)
        view.take(listing("one", 3, "a"), now=0)
        assert not view.take(listing("one", 3, "a"), now=1)

    def test_a_restarted_directory_takes_nothing_away_until_the_grace_is_over(self) -> None:
        view = MemberView(grace_s=5)
        view.take(listing("one", 3, "a", "b"), now=0)
        assert not view.take(listing("two", 0), now=10)
        assert set(view.members) == {"a", "b"}
        assert view.wait_s(30, now=11) == 4
        assert view.take(listing("two", 1, "c"), now=12)
        assert set(view.members) == {"a", "b", "c"}
        assert view.take(listing("two", 2, "b", "c"), now=15)
        assert set(view.members) == {"b", "c"}
        assert view.wait_s(30, now=16) == 30

    def test_a_second_restart_begins_a_new_grace(self) -> None:
        view = MemberView(grace_s=5)
        view.take(listing("one", 1, "a"), now=0)
        view.take(listing("two", 0), now=10)
        view.take(listing("three", 0), now=14)
        assert set(view.members) == {"a"}
        assert view.wait_s(30, now=14) == 5
        assert view.take(listing("three", 0), now=19)
        assert view.members == {}


class TestDirectory:
    async def test_a_watch_of_another_version_is_answered_at_once(self) -> None:
        directory = Directory()
        first = await directory.watch("", -1, 60)
        assert (first.version, first.records) == (0, {})
        await directory.register(record("a"))
        assert set((await directory.watch(first.epoch, first.version, 60)).records) == {"a"}

    async def test_a_watch_of_the_current_version_is_answered_after_its_time(self) -> None:
        directory = Directory()
        first = await directory.watch("", -1, 60)
        assert await directory.watch(first.epoch, first.version, 0.01) == first

    async def test_two_directories_have_two_epochs(self) -> None:
        assert (await Directory().watch("", -1, 0)).epoch != (await Directory().watch("", -1, 0)).epoch


@pytest.mark.parametrize("version", ["2.56.0", "2.59.1", "2.60.0", "2.60.0rc1"])
def test_ray_versions_that_were_tried_are_accepted(version: str) -> None:
    ray_private.check_version(version)


@pytest.mark.parametrize("version", ["2.55.1", "2.61.0", "3.0.0", "1.13.0"])
def test_other_ray_versions_are_refused(version: str) -> None:
    with pytest.raises(ConfigError, match=f"Ray {version} is installed"):
        ray_private.check_version(version)


def test_the_reason_of_a_failed_call_is_one_line() -> None:
    assert ray_private.reason(OSError("first\nsecond")) == "first"
    assert ray_private.reason(TimeoutError()) == "TimeoutError"


def test_a_router_tells_ray_to_outlive_the_clusters_head_before_ray_is_loaded() -> None:
    script = """
import os, sys
import router.membership.base
assert "ray" not in sys.modules
print(os.environ["RAY_gcs_rpc_server_reconnect_timeout_s"])
"""
    env = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("86400\n", "")
