"""Replicas that die or are replaced while requests flow: nothing hangs, nothing is lost without a word."""

from __future__ import annotations

import asyncio
import os
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import httpx
import pytest
from kvlane.client import Client

from engine import deployment
from loadtests.processes import descendants
from router.app import App
from tests.integration.asking import CUT, ERROR_EVENT, WHOLE, ask, ask_grpc
from tests.integration.ray_local import DEADLINE_S, cluster, process, until
from tests.integration.serving import MODEL, config, deployed, grpc_client, routing, with_seed

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(3 * DEADLINE_S)]


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with cluster() as address:
        yield address


def replica_processes() -> list[int]:
    """The processes of the engine replicas."""
    return [
        pid
        for pid in descendants(os.getpid())
        if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"ray::ServeReplica")
    ]


def url(app: App) -> str:
    return f"http://127.0.0.1:{app.http_port}"


def in_flight(app: App) -> list[int]:
    return [lane.streams for lane in app.replicas.lanes()]


def begun(app: App) -> list[int]:
    """Of each replica, how many streams in flight have had output."""
    return [sum(not stream.began for stream in lane._streams.values()) for lane in app.replicas.lanes()]


async def test_requests_outlive_a_killed_replica_and_its_replacement_takes_traffic(address: str) -> None:
    settings = config(address, max_num_seqs=16)
    with deployed(settings):
        async with (
            routing(settings) as app,
            httpx.AsyncClient(timeout=DEADLINE_S, limits=httpx.Limits()) as client,
            grpc_client(app) as over_rpc,
        ):
            before = {lane.replica for lane in app.replicas.lanes()}
            # Each replica runs 16 at a time, half of them gRPC streams; the others wait and have no byte yet.
            streams = [asyncio.create_task(ask_grpc(over_rpc, MODEL, 400)) for _ in range(16)]
            await until(lambda: sum(in_flight(app)) == 16, "the first gRPC streams are in flight")
            streams += [asyncio.create_task(ask(client, url(app), MODEL, 400, stream=True)) for _ in range(40)]
            await until(lambda: sum(in_flight(app)) == 56, "the HTTP streams are in flight")
            streams += [asyncio.create_task(ask_grpc(over_rpc, MODEL, 400)) for _ in range(24)]
            wholes = [asyncio.create_task(ask(client, url(app), MODEL, 300, stream=False)) for _ in range(20)]
            await until(lambda: sum(in_flight(app)) == 100, "all requests are in flight")
            await until(lambda: begun(app) == [16, 16], "each replica's first 16 have begun")
            os.kill(replica_processes()[0], signal.SIGKILL)
            results = await asyncio.wait_for(asyncio.gather(*streams, *wholes), DEADLINE_S)
            outcomes = Counter(outcome for _, outcome in results)
            print(outcomes)
            assert set(outcomes) == {WHOLE, ERROR_EVENT, CUT}, outcomes
            assert outcomes[ERROR_EVENT] + outcomes[CUT] <= 16, "only streams that the dead replica had begun"
            assert {outcome for _, outcome in results[80:]} == {WHOLE}
            await until(
                lambda: (
                    len({lane.replica for lane in app.replicas.lanes()}) == 2
                    and {lane.replica for lane in app.replicas.lanes()} != before
                ),
                "the replacement has joined",
            )
            results = await asyncio.gather(*(ask(client, url(app), MODEL, 2, stream=True) for _ in range(30)))
            over_grpc = await asyncio.gather(*(ask_grpc(over_rpc, MODEL, 2) for _ in range(30)))
            (new,) = {lane.replica for lane in app.replicas.lanes()} - before
            assert {outcome for _, outcome in results + over_grpc} == {WHOLE}
            assert new in {replica for replica, _ in results}
            assert new in {replica for replica, _ in over_grpc}
            await until(lambda: sum(in_flight(app)) == 0, "no stream is left")
            assert all(lane.account.view().leases == 0 for lane in app.replicas.lanes())


class Traffic:
    """Requests without a pause until told to stop: streams and whole answers over HTTP, and gRPC streams."""

    def __init__(self, app: App, client: httpx.AsyncClient, grpc_client: Client, loops: int = 12) -> None:
        self.outcomes: Counter[str] = Counter()
        self.replicas: Counter[str] = Counter()
        self.grpc_count = 0
        self._over = False
        self._tasks = [asyncio.create_task(self._loop(app, client, grpc_client, i % 3)) for i in range(loops)]

    async def _loop(self, app: App, client: httpx.AsyncClient, grpc_client: Client, kind: int) -> None:
        while not self._over:
            if kind == 2:
                replica, outcome = await ask_grpc(grpc_client, MODEL, 60)
                self.grpc_count += 1
            else:
                replica, outcome = await ask(client, url(app), MODEL, 60, stream=kind == 0)
            self.outcomes[outcome] += 1
            self.replicas[replica] += 1

    async def stop(self) -> None:
        self._over = True
        await asyncio.wait_for(asyncio.gather(*self._tasks), DEADLINE_S)


@pytest.mark.parametrize("carrier", ["socket", "actor"])
async def test_a_rolling_redeploy_under_load_fails_no_request(
    address: str, carrier: Literal["socket", "actor"]
) -> None:
    settings = config(address, carrier=carrier)
    with deployed(settings):
        async with (
            routing(settings) as app,
            httpx.AsyncClient(timeout=DEADLINE_S) as client,
            grpc_client(app) as over_rpc,
        ):
            before = {lane.replica for lane in app.replicas.lanes()}
            traffic = Traffic(app, client, over_rpc)
            await until(lambda: traffic.outcomes.total() > 50, "traffic flows")
            await asyncio.to_thread(deployment.deploy, with_seed(settings, 7))
            await until(
                lambda: len(app.replicas.lanes()) == 2 and not before & {lane.replica for lane in app.replicas.lanes()},
                "all replicas are new ones",
            )
            count = traffic.outcomes.total()
            await until(lambda: traffic.outcomes.total() > count + 50, "traffic goes on")
            await traffic.stop()
            print(traffic.outcomes, traffic.replicas)
            assert set(traffic.outcomes) == {WHOLE}
            assert traffic.grpc_count > 10
            assert len(traffic.replicas) == 4


async def test_traffic_goes_on_while_the_ray_head_is_away(address: str) -> None:
    settings = config(address)
    with deployed(settings):
        async with (
            routing(settings) as app,
            httpx.AsyncClient(timeout=DEADLINE_S) as client,
            grpc_client(app) as over_rpc,
        ):
            head = process("gcs_server")
            os.kill(head, signal.SIGSTOP)
            try:
                traffic = Traffic(app, client, over_rpc)
                await until(lambda: traffic.outcomes.total() > 300, "traffic flows")
                await asyncio.sleep(8)  # past the directory's and the membership's own deadlines
                await traffic.stop()
            finally:
                os.kill(head, signal.SIGCONT)
            assert set(traffic.outcomes) == {WHOLE}
            assert len(app.replicas.lanes()) == 2
