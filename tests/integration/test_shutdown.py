"""How `kvlane serve` goes away: it gives notice, lets streams end, and can be hurried."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import signal
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from kvlane.client import Client, KvlaneCallError

from loadtests.processes import MODEL, engines, router
from tests.integration.ray_local import alive, until, wait_until
from tests.integration.served import Load, Served, accepts, free_port, last_line, serving, streaming

pytestmark = pytest.mark.slow

LONG_S = 600.0
"""Longer than any test: what has to wait for it has failed."""
TOKENS_PER_S = 200
ENDLESS = 30_000
"""Tokens for two minutes and a half."""
BODY = {"model": MODEL, "prompt": "x", "max_tokens": 1}


@pytest.fixture(scope="module")
def addresses() -> Iterator[list[dict[str, Any]]]:
    """Two simulated replicas that take 5 ms for a token."""
    with engines(2, {"step_base_ms": 5.0, "prefill_ms_per_token": 0.0}) as (_, found):
        yield found


def readiness(port: int) -> int:
    """The status of ``/readyz`` on a connection of its own."""
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=30)) as connection:
        connection.request("GET", "/readyz")
        return connection.getresponse().status


def unready(port: int) -> bool:
    """Whether no worker is ready: each connection may lead to another."""
    return {readiness(port) for _ in range(12)} == {503}


def ask(port: int) -> httpx.Response:
    return httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=BODY, timeout=30)


async def is_unready(port: int) -> None:
    async with asyncio.timeout(60):
        while not await asyncio.to_thread(unready, port):
            await asyncio.sleep(0.02)


async def health(port: int) -> int:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=30)
        return int(answer.status)


def error_of(line: str) -> str:
    """What an error event says."""
    return str(json.loads(line.removeprefix("data: "))["error"]["message"])


async def test_in_the_notice_nobody_is_refused_and_a_second_signal_ends_it_at_once(
    tmp_path: Path, addresses: list[dict[str, Any]]
) -> None:
    with serving(tmp_path, addresses, notice_s=LONG_S, grace_s=LONG_S) as served:
        load = Load(served)
        async with streaming(served.http, ENDLESS) as lines:
            async with load.running(streams=4, callers=2, newcomers=2):
                await load.more(5)
                served.process.terminate()
                await is_unready(served.http)
                assert await asyncio.to_thread(unready, served.admin)
                assert await health(served.grpc) == health_pb2.HealthCheckResponse.NOT_SERVING
                await load.more(10)
            assert load.broken == []
            answer = await asyncio.to_thread(ask, served.http)
            assert (answer.status_code, answer.headers["connection"]) == (200, "close")
            served.process.send_signal(signal.SIGTERM)
            assert [line async for line in lines if "shutting down" in line]
        assert await asyncio.to_thread(served.process.wait, 30) == 128 + signal.SIGTERM


def test_a_worker_that_is_replaced_in_the_notice_is_unready_too(
    tmp_path: Path, addresses: list[dict[str, Any]]
) -> None:
    with serving(tmp_path, addresses, notice_s=LONG_S) as served:
        served.process.terminate()
        wait_until(lambda: unready(served.http), "both are unready")
        killed = min(served.workers())
        os.kill(killed, signal.SIGKILL)
        wait_until(lambda: len(served.workers() - {killed}) == 2, "another worker is there")
        wait_until(lambda: served.metrics(served.admin)['kvlane_workers{state="ready"}'] == 2, "it has its replicas")
        assert unready(served.http)
        assert ask(served.http).status_code == 200
        served.process.send_signal(signal.SIGINT)
        assert served.process.wait(30) == 128 + signal.SIGINT


async def test_after_the_notice_newcomers_are_refused_and_streams_in_flight_end_whole(
    tmp_path: Path, addresses: list[dict[str, Any]]
) -> None:
    with serving(tmp_path, addresses, notice_s=1.0, grace_s=60.0) as served:
        tokens = 4 * TOKENS_PER_S
        async with streaming(served.http, tokens) as one, streaming(served.http, tokens) as other:
            async with Client(f"127.0.0.1:{served.grpc}") as client:
                stream = client.generate(MODEL, "x", max_tokens=tokens)
                deltas = [await anext(stream)]
                served.process.terminate()
                await until(lambda: not accepts(served.http) and not accepts(served.grpc), "newcomers are refused")
                assert served.process.poll() is None
                deltas += [delta async for delta in stream]
            assert sum(len(delta.token_ids) for delta in deltas) == tokens
            assert {await last_line(one), await last_line(other)} == {"data: [DONE]"}
        assert await asyncio.to_thread(served.wait) == 0


@pytest.mark.parametrize("workers", [1, 2])
async def test_streams_that_outlive_the_grace_are_cut_with_an_error_and_the_status_is_0(
    tmp_path: Path, addresses: list[dict[str, Any]], workers: int
) -> None:
    with serving(tmp_path, addresses, workers=workers, notice_s=0.0, grace_s=1.0) as served:
        async with streaming(served.http, ENDLESS) as one, streaming(served.http, ENDLESS) as other:
            async with Client(f"127.0.0.1:{served.grpc}") as client:
                stream = client.generate(MODEL, "x", max_tokens=ENDLESS)
                await anext(stream)
                served.process.terminate()
                with pytest.raises(KvlaneCallError) as caught:
                    async for _ in stream:
                        pass
            assert caught.value.status is grpc.StatusCode.UNAVAILABLE
            for lines in (one, other):
                assert "shutting down" in error_of([line async for line in lines if line.startswith("data: {")][-1])
        assert await asyncio.to_thread(served.wait) == 0


async def test_ctrl_c_gives_no_notice_and_a_request_that_comes_later_is_told_to_come_again(
    tmp_path: Path, addresses: list[dict[str, Any]]
) -> None:
    with serving(tmp_path, addresses, workers=1, notice_s=LONG_S) as served:
        reader, writer = await asyncio.open_connection("127.0.0.1", served.http)
        body = json.dumps(BODY).encode()
        writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n")
        async with streaming(served.http, 4 * TOKENS_PER_S) as lines:
            served.process.send_signal(signal.SIGINT)
            await until(lambda: not accepts(served.http), "newcomers are refused")
            writer.write(b"content-length: %d\r\n\r\n%b" % (len(body), body))
            head, _, text = (await asyncio.wait_for(reader.read(), 60)).decode().partition("\r\n\r\n")
            writer.close()
            assert head.startswith("HTTP/1.1 503 ")
            assert {"retry-after: 1", "connection: close", "x-kvlane-error: shutting_down"} <= set(head.split("\r\n"))
            assert json.loads(text)["error"]["code"] == 503
            assert await last_line(lines) == "data: [DONE]"
        assert await asyncio.to_thread(served.process.wait, 60) == 0


def test_a_second_signal_does_not_wait_for_a_worker_that_hangs(tmp_path: Path, addresses: list[dict[str, Any]]) -> None:
    with serving(tmp_path, addresses, grace_s=LONG_S) as served:
        hung = max(served.workers())
        os.kill(hung, signal.SIGSTOP)
        served.process.terminate()
        wait_until(lambda: served.workers() == {hung}, "the other one has stopped")
        served.process.terminate()
        assert served.process.wait(60) == 128 + signal.SIGTERM
        assert not alive(hung)


async def test_a_router_alone_gives_notice_and_can_be_hurried(addresses: list[dict[str, Any]]) -> None:
    with router(addresses, "random", notice_s=LONG_S) as (process, port, _):
        async with streaming(port, ENDLESS) as lines:
            os.kill(process, signal.SIGTERM)
            await is_unready(port)
            answer = await asyncio.to_thread(ask, port)
            assert (answer.status_code, answer.headers["connection"]) == (200, "close")
            os.kill(process, signal.SIGTERM)
            assert [line async for line in lines if "shutting down" in line]
        await until(lambda: not alive(process), "it has ended")


def test_a_router_is_ready_once_a_replica_is_and_not_before(tmp_path: Path, addresses: list[dict[str, Any]]) -> None:
    port = free_port()
    assert not accepts(port)
    nobody = [{"replica": "nobody", "lane": free_port()}]
    with serving(tmp_path, nobody, http=port, ready=False, watched=True) as served:
        wait_until(lambda: accepts(port), "its workers have started")
        assert unready(port)
        found = Served(tmp_path, addresses, watched=True)
        found.write(http=port)
        wait_until(lambda: readiness(port) == 200, "it is ready")
        assert served.process.stdout is not None
        assert served.process.stdout.readline().startswith("ready ")
