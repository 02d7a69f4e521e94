"""Replicas that die or are replaced while requests flow: nothing hangs, nothing is lost without a word."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from engine import deployment
from router.app import App
from tests.integration.ray_local import DEADLINE_S, cluster, descendants, process, until
from tests.integration.serving import MODEL, config, deployed, routing, with_seed

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


async def ask(client: httpx.AsyncClient, app: App, tokens: int, *, stream: bool) -> tuple[str, str]:
    """One completion; returns the replica it came from and how it ended: whole, error event, or what went wrong."""
    body = {"model": MODEL, "prompt": os.urandom(8).hex(), "max_tokens": tokens, "stream": stream}
    url = f"http://127.0.0.1:{app.http_port}/v1/completions"
    try:
        response = await client.post(url, json=body)
    except httpx.HTTPError as error:
        return "", type(error).__name__
    replica = response.headers.get("x-kvlane-route", "").partition(";")[0]
    if response.status_code != 200:
        return replica, str(response.status_code)
    if not stream:
        return replica, "whole" if response.json()["usage"]["completion_tokens"] == tokens else "short"
    events = response.text.split("\n\n")
    broken = [json.loads(event[6:]) for event in events if event.startswith('data: {"error"')]
    if broken:
        assert broken[0]["error"]["message"]
        return replica, "error event"
    return replica, "whole" if events[-2:] == ["data: [DONE]", ""] else "short"


def in_flight(app: App) -> list[int]:
    return [lane.streams for lane in app.replicas.lanes()]


async def test_requests_outlive_a_killed_replica_and_its_replacement_takes_traffic(address: str) -> None:
    settings = config(address, max_num_seqs=16)
    with deployed(settings):
        async with routing(settings) as app, httpx.AsyncClient(timeout=DEADLINE_S, limits=httpx.Limits()) as client:
            before = {lane.replica for lane in app.replicas.lanes()}
            # Each replica runs 16 of these at a time, so that the others wait and have no byte yet.
            streams = [asyncio.create_task(ask(client, app, 150, stream=True)) for _ in range(80)]
            wholes = [asyncio.create_task(ask(client, app, 100, stream=False)) for _ in range(20)]
            await until(lambda: sum(in_flight(app)) == 100, "all requests are in flight")
            await until(lambda: all(lane.tokens > 100 for lane in app.replicas.lanes()), "streams have begun")
            os.kill(replica_processes()[0], signal.SIGKILL)
            results = await asyncio.wait_for(asyncio.gather(*streams, *wholes), DEADLINE_S)
            outcomes = Counter(outcome for _, outcome in results)
            print(outcomes)
            assert set(outcomes) == {"whole", "error event"}, outcomes
            assert 1 <= outcomes["error event"] <= 16, "only streams that the dead replica had begun"
            assert {outcome for _, outcome in results[80:]} == {"whole"}
            await until(
                lambda: (
                    len({lane.replica for lane in app.replicas.lanes()}) == 2
                    and {lane.replica for lane in app.replicas.lanes()} != before
                ),
                "the replacement has joined",
            )
            results = await asyncio.gather(*(ask(client, app, 2, stream=True) for _ in range(30)))
            (new,) = {lane.replica for lane in app.replicas.lanes()} - before
            assert {outcome for _, outcome in results} == {"whole"}
            assert f"replica={new}" in {replica for replica, _ in results}
            await until(lambda: sum(in_flight(app)) == 0, "no stream is left")
            assert all(lane.view().leases == 0 for lane in app.replicas.lanes())


class Traffic:
    """Requests without a pause until told to stop."""

    def __init__(self, app: App, client: httpx.AsyncClient, loops: int = 12) -> None:
        self.outcomes: Counter[str] = Counter()
        self.replicas: Counter[str] = Counter()
        self._over = False
        self._tasks = [asyncio.create_task(self._loop(app, client, i)) for i in range(loops)]

    async def _loop(self, app: App, client: httpx.AsyncClient, number: int) -> None:
        while not self._over:
            replica, outcome = await ask(client, app, 60, stream=number % 2 == 0)
            self.outcomes[outcome] += 1
            self.replicas[replica] += 1

    async def stop(self) -> None:
        self._over = True
        await asyncio.wait_for(asyncio.gather(*self._tasks), DEADLINE_S)


async def test_a_rolling_redeploy_under_load_fails_no_request(address: str) -> None:
    settings = config(address)
    with deployed(settings):
        async with routing(settings) as app, httpx.AsyncClient(timeout=DEADLINE_S) as client:
            before = {lane.replica for lane in app.replicas.lanes()}
            traffic = Traffic(app, client)
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
            assert set(traffic.outcomes) == {"whole"}
            assert len(traffic.replicas) == 4


async def test_traffic_goes_on_while_the_ray_head_is_away(address: str) -> None:
    settings = config(address)
    with deployed(settings):
        async with routing(settings) as app, httpx.AsyncClient(timeout=DEADLINE_S) as client:
            head = process("gcs_server")
            os.kill(head, signal.SIGSTOP)
            try:
                traffic = Traffic(app, client)
                await until(lambda: traffic.outcomes.total() > 300, "traffic flows")
                await asyncio.sleep(8)  # past the directory's and the membership's own deadlines
                await traffic.stop()
            finally:
                os.kill(head, signal.SIGCONT)
            assert set(traffic.outcomes) == {"whole"}
            assert len(app.replicas.lanes()) == 2
