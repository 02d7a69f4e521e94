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


@contextmanager
def beside(stack: Stack, phase: str) -> Iterator[int]:
    """What runs beside the request that is left; yields how many. For the phase before the first token the engines are
    full, so that it waits in an engine which goes on.
    """
    eventually(stack.idle, told=stack.held)  # What other tests left would end meanwhile, and be counted.
    count = 0
    connections: list[socket.socket] = []

    def told() -> object:
        return count, stack.held(), list(map(answered, connections)), stack.log()[-2000:]

    with ExitStack() as held:
        # However they are routed: one engine may be full before the other is.
        while phase == "before the first token" and stack.metric("kvlane_replica_running") < PLACES:
            assert count < 2 * PLACES, "the engines do not fill"
            connections.append(held.enter_context(post_raw(stack, long_body(stream=False))))
            count += 1
            eventually(lambda count=count: stack.holds(count), told=told)  # type: ignore[misc]
        yield count
        assert stack.holds(count), "the engines were not full all the time"
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
    with beside(stack, phase) as others:
        for _ in range(20):
            before = stack.metric("kvlane_requests_total")
            with post_raw(stack, long_body(phase != "not streamed")) as connection:
                if phase == "mid-stream":
                    assert connection.recv(1 << 16).startswith(b"HTTP/1.1 200")
                    connection.recv(1 << 16)
                eventually(lambda: stack.holds(others + 1))
                if phase != "mid-stream":
                    connection.setblocking(False)
                    with pytest.raises(BlockingIOError):
                        connection.recv(1)
            took.append(eventually(lambda: stack.holds(others), ABORT_DEADLINE_S))
            eventually(
                lambda before=before: stack.metric("kvlane_requests_total") > before,  # type: ignore[misc]
                told=lambda before=before: (before, stack.metric("kvlane_requests_total")),  # type: ignore[misc]
            )
    print(f"gone after an HTTP disconnect {phase}: median {statistics.median(took) * 1000:.0f} ms of {len(took)}")
    cancelled = re.search(
        r'kvlane_requests_total\{outcome="cancelled",rpc="http"\} (\d+)', httpx.get(f"{stack.http}/metrics").text
    )
    assert cancelled is not None
    assert int(cancelled[1]) >= 20


@pytest.mark.parametrize("phase", ["before the first token", "mid-stream"])
async def test_a_grpc_cancel_reaches_the_engine(stack: Stack, phase: str) -> None:
    took = []
    with beside(stack, phase) as others:
        async with Client(stack.grpc) as client:
            for _ in range(20):
                call = client.generate(MODEL, "Once", max_tokens=LONG, ignore_eos=True)
                async with call:
                    reading = asyncio.ensure_future(read(call, 3 if phase == "mid-stream" else 1))
                    if phase == "mid-stream":
                        await reading
                    await asyncio.to_thread(eventually, lambda: stack.holds(others + 1))
                    assert reading.done() == (phase == "mid-stream")
                    reading.cancel()
                    await asyncio.gather(reading, return_exceptions=True)
                took.append(await asyncio.to_thread(eventually, lambda: stack.holds(others), ABORT_DEADLINE_S))
    print(f"gone after a gRPC cancel {phase}: median {statistics.median(took) * 1000:.0f} ms of {len(took)}")


async def read(call: AsyncIterator[object], count: int) -> None:
    """Reads so many messages of a stream."""
    for _ in range(count):
        await anext(call)
