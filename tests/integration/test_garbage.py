"""Requests leave nothing to the garbage collector."""

from __future__ import annotations

import asyncio
import gc
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from loadtests.clients import Tally, grpc_load, http_load
from loadtests.engines import SECRET
from loadtests.processes import engines
from router.app import App
from router.options import Config, GrpcOptions, HttpOptions, MembershipOptions, StaticReplica

pytestmark = pytest.mark.slow

OURS = ("router.", "h2.", "hpack.", "hyperframe.", "httptools.", "uvloop.")
STREAMS, ROUNDS = 16, 40


@pytest.fixture
async def app(tmp_path: Path) -> AsyncIterator[App]:
    """A router over two simulated replicas in a process of their own."""
    secret = tmp_path / "secret"
    secret.write_bytes(SECRET)
    with engines(2, {"step_base_ms": 1.0}) as (_, addresses):
        replicas = tuple(
            StaticReplica(name=each["replica"], port=each["lane"], secret_file=str(secret)) for each in addresses
        )
        membership = MembershipOptions(kind="static", replicas=replicas)
        app = App(Config(http=HttpOptions(port=0), grpc=GrpcOptions(port=0), membership=membership))
        await app.start()
        await app.wait_ready()
        yield app
        await app.stop(0)


def unreachable() -> Counter[str]:
    """What only the collector can free now, by type."""
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        gc.collect()
        return Counter(f"{type(each).__module__}.{type(each).__qualname__}" for each in gc.garbage)
    finally:
        gc.set_debug(0)
        gc.garbage.clear()


@pytest.mark.parametrize(("protocol", "load"), [("http", http_load), ("grpc", grpc_load)])
async def test_requests_and_their_connections_leave_no_cycles(
    app: App, protocol: str, load: Callable[..., Awaitable[Tally]]
) -> None:
    port = {"http": app.http_port, "grpc": app.grpc_port}[protocol]
    await load(port, STREAMS, 5, 1.0, 1)
    await asyncio.sleep(0.2)  # Not waited for: the last connections' ends, which the client does not see.
    gc.collect()
    gc.disable()
    try:
        tally = await load(port, STREAMS, 5, 1.0, ROUNDS)
        await asyncio.sleep(0.2)
        left = unreachable()
    finally:
        gc.enable()
    assert (tally.requests, tally.errors) == (STREAMS * ROUNDS, 0)
    assert {name: count for name, count in left.items() if name.startswith(OURS)} == {}
    assert left.total() < tally.requests, left
