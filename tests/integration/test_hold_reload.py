"""Requests held by `kvlane serve` over a reload: the workers that hold them serve them once there is a replica."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

import httpx
import pytest
from kvlane.client import Client

from engine.replica import Replica
from engine.simulated import SimulatedEngine
from loadtests.engines import SECRET
from loadtests.processes import MODEL
from tests.integration.ray_local import until
from tests.integration.served import Served, serving

pytestmark = pytest.mark.slow

HOLD = f"""
[lane]
reconnect_max_s = 0.2
[hold]
enabled = "always"
comment_interval_s = 0.2
[[engines]]
name = "{MODEL}"
kind = "sim"
"""
COUNT = 20
HELD = f'kvlane_held_requests{{model="{MODEL}"}}'
RELEASED = f'kvlane_held_total{{model="{MODEL}",outcome="released"}}'


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


async def held(served: Served) -> float:
    return (await asyncio.to_thread(served.metrics)).get(HELD, 0.0)


async def until_held(served: Served, count: int) -> None:
    async with asyncio.timeout(60):
        while await held(served) != count:
            await asyncio.sleep(0.1)


async def stream(client: httpx.AsyncClient, url: str) -> str:
    body = {"model": MODEL, "prompt": "hello", "max_tokens": 5, "stream": True}
    return (await client.post(f"{url}/v1/completions", json=body)).text


async def call(client: Client) -> int:
    return sum([len(delta.token_ids) async for delta in client.generate(MODEL, "hello", max_tokens=5)])


async def test_held_requests_outlive_a_reload_and_their_old_workers_serve_them(tmp_path: Path) -> None:
    addresses = [{"replica": "late", "lane": free_port()}]
    with serving(tmp_path, addresses, HOLD) as served:  # It is ready without any replica.
        async with httpx.AsyncClient(timeout=60) as http, Client(f"127.0.0.1:{served.grpc}") as grpc:
            url = f"http://127.0.0.1:{served.http}"
            streams = [asyncio.create_task(stream(http, url)) for _ in range(COUNT)]
            calls = [asyncio.create_task(call(grpc)) for _ in range(COUNT)]
            await until_held(served, 2 * COUNT)
            before = served.workers()
            await asyncio.to_thread(served.reload)
            late = [asyncio.create_task(stream(http, url)) for _ in range(COUNT)]
            await until_held(served, 3 * COUNT)
            assert before < served.workers()
            replica = Replica("late", SimulatedEngine({"step_base_ms": 5.0}, MODEL), SECRET)
            await replica.start()
            await replica.listen("127.0.0.1", addresses[0]["lane"])
            try:
                async with asyncio.timeout(60):
                    texts, counts = await asyncio.gather(*streams, *late), await asyncio.gather(*calls)
            finally:
                await replica.close()
        assert {text.count("data: {") >= 5 and text.endswith("data: [DONE]\n\n") for text in texts} == {True}
        assert counts == [5] * COUNT
        await until(lambda: not before & served.workers(), "the old workers have finished")
        assert (await asyncio.to_thread(served.metrics))[RELEASED] == 3 * COUNT
