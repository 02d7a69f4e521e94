"""Membership through the directory of a real Ray cluster, and what it outlives."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager

import pytest
import ray

from engine.registration import Registration
from router.membership import directory
from router.membership.base import ReplicaRecord
from router.membership.directory_client import DirectoryAway, DirectoryClient
from router.membership.ray import RayMembership
from router.options import MembershipOptions
from tests.integration.ray_local import DEADLINE_S, NAMESPACE, cluster, process, running, until

pytestmark = [pytest.mark.ray, pytest.mark.slow]

OPTIONS = MembershipOptions(ray_namespace=NAMESPACE, relist_interval_s=1.0)


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with cluster(cpus=1) as gcs_address:
        yield gcs_address


class Seen:
    """All that a membership reported."""

    def __init__(self) -> None:
        self.reports: list[set[str]] = []

    def __call__(self, members: Mapping[str, ReplicaRecord]) -> None:
        self.reports.append(set(members))

    @property
    def last(self) -> set[str] | None:
        return self.reports[-1] if self.reports else None


@asynccontextmanager
async def registered(*names: str) -> AsyncIterator[list[Registration]]:
    async with AsyncExitStack() as stack:
        registrations = []
        for port, name in enumerate(names, 1):
            registration = Registration(ReplicaRecord(name, "127.0.0.1", port, b"secret"), NAMESPACE)
            await registration.enter()
            stack.push_async_callback(registration.leave)
            registrations.append(registration)
        yield registrations


@asynccontextmanager
async def following(seen: Seen) -> AsyncIterator[None]:
    async with running(asyncio.create_task(RayMembership(OPTIONS).run(seen))):
        yield


async def test_an_empty_directory_is_reported_too(address: str) -> None:
    seen = Seen()
    async with following(seen):
        await until(lambda: seen.last == set(), "the empty directory is reported")


async def test_replicas_are_reported_as_they_come_and_go(address: str) -> None:
    seen = Seen()
    async with following(seen), registered("a", "b") as (a, _):
        await until(lambda: seen.last == {"a", "b"}, "both are reported")
        await a.leave()
        await until(lambda: seen.last == {"b"}, "the one that left is gone")


@pytest.mark.parametrize("restarts", [True, False], ids=["restarted by Ray", "gone for good"])
async def test_a_directory_that_dies_takes_no_replica_away_and_heals(address: str, restarts: bool) -> None:
    seen = Seen()
    async with following(seen), registered("a", "b"):
        await until(lambda: seen.last == {"a", "b"}, "both are reported")
        client = DirectoryClient(NAMESPACE)
        before = await client.watch("", -1, 0)
        ray.kill(await asyncio.to_thread(directory.find, NAMESPACE), no_restart=not restarts)

        async with asyncio.timeout(DEADLINE_S):
            while (after := await _listing()).epoch == before.epoch or set(after.records) != {"a", "b"}:
                await asyncio.sleep(0.1)
        async with registered("c"):
            await until(lambda: seen.last == {"a", "b", "c"}, "the new directory is followed")
        assert all(report >= {"a", "b"} for report in seen.reports[seen.reports.index({"a", "b"}) :])


async def test_a_replica_that_a_restarted_directory_never_lists_is_dropped_after_a_while(address: str) -> None:
    seen = Seen()
    async with following(seen), registered("stays"):
        client = DirectoryClient(NAMESPACE)
        await client.register(ReplicaRecord("silent", "127.0.0.1", 9, b""))
        await until(lambda: seen.last == {"stays", "silent"}, "both are reported")
        ray.kill(await asyncio.to_thread(directory.find, NAMESPACE), no_restart=False)
        await until(lambda: seen.last == {"stays"}, "the silent one is dropped")


async def test_a_replica_that_falls_silent_is_dropped(address: str) -> None:
    seen = Seen()
    async with following(seen):
        await DirectoryClient(NAMESPACE).register(ReplicaRecord("silent", "127.0.0.1", 9, b""))
        await until(lambda: seen.last == {"silent"}, "it is reported")
        await until(lambda: seen.last == set(), "it is dropped")


async def test_a_cluster_head_that_stops_for_a_while_takes_no_replica_away(
    address: str, caplog: pytest.LogCaptureFixture
) -> None:
    seen = Seen()
    head = process("gcs_server")
    async with following(seen), registered("a", "b"):
        await until(lambda: seen.last == {"a", "b"}, "both are reported")
        os.kill(head, signal.SIGSTOP)
        try:
            newcomer = RayMembership(OPTIONS)
            late = Seen()
            async with running(asyncio.create_task(newcomer.run(late))):
                await asyncio.sleep(8)
                assert seen.last == {"a", "b"}
                os.kill(head, signal.SIGCONT)
                await until(lambda: late.last == {"a", "b"}, "a router that joined meanwhile sees them too")
        finally:
            os.kill(head, signal.SIGCONT)
        async with registered("c"):
            await until(lambda: seen.last == {"a", "b", "c"}, "changes come through again")
        assert all(report >= {"a", "b"} for report in seen.reports[seen.reports.index({"a", "b"}) :])
    assert sum("out of reach" in record.message for record in caplog.records) <= 2, "one line per outage and router"


async def test_a_router_process_of_its_own_joins_the_cluster(address: str) -> None:
    async with registered("a", "b"):
        router = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", ROUTER, address, NAMESPACE), stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        try:
            out, errors = await asyncio.wait_for(router.communicate(), DEADLINE_S)
        finally:
            if router.returncode is None:
                router.kill()
                await router.wait()
    assert (router.returncode, out.decode().split()) == (0, ["a", "b"]), errors.decode()


ROUTER = """
import asyncio, sys
from router.membership.ray import RayMembership
from router.options import MembershipOptions

async def main():
    members = asyncio.Queue()
    options = MembershipOptions(ray_address=sys.argv[1], ray_namespace=sys.argv[2])
    task = asyncio.create_task(RayMembership(options).run(members.put_nowait))
    async with asyncio.timeout(60):
        while len(found := await members.get()) < 2:
            pass
    print(*sorted(found))
    task.cancel()

asyncio.run(main())
"""


async def _listing() -> directory.Listing:
    client = DirectoryClient(NAMESPACE)
    while True:
        try:
            return await client.watch("", -1, 0)
        except DirectoryAway:
            await asyncio.sleep(0.1)
