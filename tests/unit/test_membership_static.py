"""Membership from the configuration."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path

import pytest

from router.errors import ConfigError
from router.membership.base import ReplicaRecord
from router.membership.static import StaticMembership
from router.options import MembershipOptions, StaticReplica


def options(*replicas: StaticReplica) -> MembershipOptions:
    return MembershipOptions(kind="static", replicas=replicas)


async def test_the_configured_replicas_are_reported_once_and_stay(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("s3cret\n")
    membership = StaticMembership(
        options(
            StaticReplica(name="a", port=7000, secret_file=str(secret)),
            StaticReplica(name="b", host="10.0.0.2", port=7001),
        )
    )
    secret.unlink()  # It was read at start-up.
    reports: list[Mapping[str, ReplicaRecord]] = []
    task = asyncio.create_task(membership.run(reports.append))
    await asyncio.sleep(0)
    assert reports == [
        {"a": ReplicaRecord("a", "127.0.0.1", 7000, b"s3cret"), "b": ReplicaRecord("b", "10.0.0.2", 7001, b"")}
    ]
    assert not task.done()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


def test_a_secret_that_cannot_be_read_stops_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'a' cannot be read"):
        StaticMembership(options(StaticReplica(name="a", port=1, secret_file=str(tmp_path / "none"))))


def test_an_empty_secret_file_stops_the_start(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("\n")
    with pytest.raises(ConfigError, match="is empty"):
        StaticMembership(options(StaticReplica(name="a", port=1, secret_file=str(tmp_path / "secret"))))


def test_two_replicas_of_one_name_stop_the_start() -> None:
    with pytest.raises(ConfigError, match="two replicas are named 'a'"):
        StaticMembership(options(StaticReplica(name="a", port=1), StaticReplica(name="a", port=2)))


def test_no_replica_at_all_stops_the_start() -> None:
    with pytest.raises(ConfigError, match="empty"):
        StaticMembership(options())
