"""Clients that leave, in three phases of a request and over both protocols: the engine stops."""

from __future__ import annotations

import asyncio
import re
import socket
import statistics
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, contextmanager

import httpx
import pytest
from kvlane.client import Client

from tests.integration.end_to_end.sending import ABORT_DEADLINE_S, LONG, PLACES, eventually, long_body, post_raw
from tests.integration.stack import Stack
from tests.integration.vllm_fixtures import MODEL

pytestmark = [pytest.mark.vllm, pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]


GROUPS = 4
"""Requests leave in groups, and what runs beside them begins anew for each: so it lasts, however slow a machine is."""
PER_GROUP = 5


@contextmanager
def beside(stack: Stack, phase: str) -> Iterator[int]:
    """What runs beside the requests that are left; yields how many. For the phase before the first token the engines
    are full and as many wait, so that one more waits behind them in an engine which goes on.
    """
    eventually(stack.idle, told=stack.held)  # What other tests left would end meanwhile, and be counted.
    count = 2 * PLACES if phase == "before the first token" else 0
    with ExitStack() as held:
        connections = [held.enter_context(post_raw(stack, long_body(stream=False))) for _ in range(count)]

        def told() -> object:
            return stack.held(), list(map(answered, connections)), stack.log()[-2000:]

        def full() -> bool:
            return stack.holds(count) and stack.metric("kvlane_replica_running") == min(count, PLACES)

        eventually(full, told=told)
        yield count
        assert full(), told()
    eventually(stack.idle, ABORT_DEADLINE_S)


def answered(connection: socket.socket) -> bytes | None:
    """The beginning of what has come already, if anything has."""
    connection.setblocking(False)
    try:
        return connection.recv(300)
    except BlockingIOError:
        return None


@pytest.mark.parametrize("phase", ["before the first token", "mid-stream", "not streamed"])
def test_an_http_disconnect_reaches_the_engine(stack: Stack, phase: str) -> None:
    took = []
    for _ in range(GROUPS):
        with beside(stack, phase) as others:
            took += [leave(stack, phase, others) for _ in range(PER_GROUP)]
    print(f"gone after an HTTP disconnect {phase}: median {statistics.median(took) * 1000:.0f} ms of {len(took)}")
    cancelled = re.search(
        r'kvlane_requests_total\{outcome="cancelled",rpc="http"\} (\d+)', httpx.get(f"{stack.http}/metrics").text
    )
    assert cancelled is not None
    assert int(cancelled[1]) >= len(took)


def leave(stack: Stack, phase: str, others: int) -> float:
    """Asks over HTTP and leaves; after how many seconds the request was gone everywhere."""
    before = stack.metric("kvlane_requests_total")
    with post_raw(stack, long_body(phase != "not streamed")) as connection:
        if phase == "mid-stream":
            assert connection.recv(1 << 16).startswith(b"HTTP/1.1 200")
            connection.recv(1 << 16)
        eventually(lambda: stack.holds(others + 1))
        if phase != "mid-stream":
            assert answered(connection) is None
    took = eventually(lambda: stack.holds(others), ABORT_DEADLINE_S)
    eventually(
        lambda: stack.metric("kvlane_requests_total") > before,
        told=lambda: (before, stack.metric("kvlane_requests_total")),
    )
    return took


@pytest.mark.parametrize("phase", ["before the first token", "mid-stream"])
async def test_a_grpc_cancel_reaches_the_engine(stack: Stack, phase: str) -> None:
    took = []
    for _ in range(GROUPS):
        with beside(stack, phase) as others:
            async with Client(stack.grpc) as client:
                took += [await cancel(client, stack, phase, others) for _ in range(PER_GROUP)]
    print(f"gone after a gRPC cancel {phase}: median {statistics.median(took) * 1000:.0f} ms of {len(took)}")


async def cancel(client: Client, stack: Stack, phase: str, others: int) -> float:
    """Asks over gRPC and cancels; after how many seconds the request was gone everywhere."""
    async with client.generate(MODEL, "Once", max_tokens=LONG, ignore_eos=True) as call:
        reading = asyncio.ensure_future(read(call, 3 if phase == "mid-stream" else 1))
        if phase == "mid-stream":
            await reading
        await asyncio.to_thread(eventually, lambda: stack.holds(others + 1))
        assert reading.done() == (phase == "mid-stream")
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
    return await asyncio.to_thread(eventually, lambda: stack.holds(others), ABORT_DEADLINE_S)


async def read(call: AsyncIterator[object], count: int) -> None:
    """Reads so many messages of a stream."""
    for _ in range(count):
        await anext(call)
