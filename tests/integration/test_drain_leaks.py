"""Ten thousand connections that come and go while a router goes away leave nothing behind in it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from hpack import Encoder
from hyperframe.frame import DataFrame, HeadersFrame, SettingsFrame
from kvlane.v1 import inference_pb2 as pb

from loadtests.engines import SECRET
from loadtests.processes import MODEL, engines
from router.app import App
from router.ingress.h2_frames import PREFACE
from router.options import Config, GrpcOptions, HttpOptions, MembershipOptions, StaticReplica
from tests.integration.ray_local import until
from tests.integration.served import Served, serving
from tests.unit.h2_peer import HEADERS, framed

pytestmark = pytest.mark.slow

LONG_S = 600.0
AT_ONCE = 100
CONNECTED = ('kvlane_connections{protocol="http"}', 'kvlane_connections{protocol="grpc"}')
NOTHING_LEFT = (*CONNECTED, "kvlane_streams_in_flight")
Visit = Callable[[int, int], Awaitable[str]]


@pytest.fixture(scope="module")
def addresses() -> Iterator[list[dict[str, Any]]]:
    """Two simulated replicas that take 5 ms for a token."""
    with engines(2, {"step_base_ms": 5.0, "prefill_ms_per_token": 0.0}) as (_, found):
        yield found


def asked(tokens: int, *lines: str, end: int | None = None) -> bytes:
    """An HTTP request for a stream of so many tokens, with these header lines; or its beginning."""
    body = json.dumps({"model": MODEL, "prompt": "x", "max_tokens": tokens, "stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n"
    head += "".join(f"{line}\r\n" for line in lines)
    return (head.encode() + b"content-type: application/json\r\n\r\n" + body)[:end]


def called(tokens: int) -> bytes:
    """The same over gRPC: a whole connection's input."""
    message = pb.GenerateRequest(model=MODEL, text="x")
    message.sampling.max_tokens = tokens
    frames = (
        SettingsFrame(0),
        HeadersFrame(1, Encoder().encode(list(HEADERS)), flags=["END_HEADERS"]),
        DataFrame(1, framed(message.SerializeToString()), flags=["END_STREAM"]),
    )
    return PREFACE + b"".join(frame.serialize() for frame in frames)


@asynccontextmanager
async def connected(port: int) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield reader, writer
    finally:
        writer.close()


def leaves(says: bytes, *, over: str = "http") -> Visit:
    """A client that says that much and goes without a word."""

    async def visit(http: int, grpc: int) -> str:
        async with connected(http if over == "http" else grpc) as (_, writer):
            writer.write(says)
            await writer.drain()
        return "left"

    return visit


def breaks_off(says: bytes, *, over: str = "http") -> Visit:
    """A client that resets its connection once its answer has begun."""

    async def visit(http: int, grpc: int) -> str:
        async with connected(http if over == "http" else grpc) as (reader, writer):
            writer.write(says)
            began = await reader.read(64)
            writer.transport.abort()
        return "broken off" if began else "no answer"

    return visit


async def stays(http: int, _: int) -> str:
    """A client that reads its whole answer."""
    async with connected(http) as (reader, writer):
        writer.write(asked(1, "connection: close"))
        answer = await reader.read()
    return "whole" if answer.startswith(b"HTTP/1.1 200 ") and answer.endswith(b"\r\n0\r\n\r\n") else repr(answer[:80])


async def babbles(_: int, grpc: int) -> str:
    """A client that speaks no HTTP/2."""
    async with connected(grpc) as (reader, writer):
        writer.write(asked(1))
        try:
            await reader.read()
        except ConnectionError:
            pass  # Reset, with what it said unread.
    return "sent away"


VISITS: list[Visit] = [
    leaves(b""),
    leaves(asked(1, end=40)),
    leaves(b"", over="grpc"),
    leaves(PREFACE, over="grpc"),
    breaks_off(asked(1000)),
    breaks_off(called(1000), over="grpc"),
    stays,
    babbles,
]
OUTCOMES = {"left": 4, "broken off": 2, "whole": 1, "sent away": 1}
"""How many of these there are of each."""


async def come_and_go(http: int, grpc: int, connections: int) -> Counter[str]:
    """So many connections of all kinds; how they went."""
    numbers, outcomes = iter(range(connections)), Counter[str]()

    async def visitor() -> None:
        for number in numbers:
            async with asyncio.timeout(60):
                outcomes[await VISITS[number % len(VISITS)](http, grpc)] += 1

    await asyncio.gather(*(visitor() for _ in range(AT_ONCE)))
    return outcomes


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


async def left_over(served: Served) -> dict[str, float]:
    """What there still is of clients, as the admin port has it: asking there is not among it."""
    metrics = await asyncio.to_thread(served.metrics, served.admin)
    leases = sum(value for name, value in metrics.items() if name.startswith("kvlane_replica_leases"))
    return {name: metrics[name] for name in NOTHING_LEFT} | {"leases": leases}


async def is_empty(served: Served) -> None:
    async with asyncio.timeout(60):
        while any((await left_over(served)).values()):
            await asyncio.sleep(0.1)


async def test_ten_thousand_connections_in_a_notice_leave_no_descriptor_connection_or_stream(
    tmp_path: Path, addresses: list[dict[str, Any]]
) -> None:
    with serving(tmp_path, addresses, notice_s=LONG_S) as served:
        await come_and_go(served.http, served.grpc, 50 * len(VISITS))  # What is made once is there then.
        await is_empty(served)
        before = {pid: descriptors(pid) for pid in served.workers()}
        served.process.terminate()
        outcomes = await come_and_go(served.http, served.grpc, 10_000)
        assert outcomes == {outcome: 10_000 // len(VISITS) * kinds for outcome, kinds in OUTCOMES.items()}
        await is_empty(served)
        assert served.workers() == before.keys()
        await until(
            lambda: all(descriptors(pid) <= count for pid, count in before.items()), "their descriptors are closed"
        )
        assert "Traceback" not in served.log()
        served.process.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(served.process.wait, 30) == 128 + signal.SIGTERM


async def test_connections_in_a_notice_leave_no_task_and_the_stop_none_at_all(
    tmp_path: Path, addresses: list[dict[str, Any]]
) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(SECRET)
    replicas = tuple(
        StaticReplica(name=each["replica"], port=each["lane"], secret_file=str(secret)) for each in addresses
    )
    app = App(
        Config(
            http=HttpOptions(port=0),
            grpc=GrpcOptions(port=0),
            membership=MembershipOptions(kind="static", replicas=replicas),
        )
    )
    ours, files = asyncio.all_tasks(), descriptors(os.getpid())
    await app.start()
    await app.wait_ready()
    await come_and_go(app.http_port, app.grpc_port, 4 * len(VISITS))
    await until(lambda: not any(app._connections().values()), "all have gone")
    there = {task.get_name() for task in asyncio.all_tasks() - ours}
    app.notice(LONG_S)
    outcomes = await come_and_go(app.http_port, app.grpc_port, 1000)
    assert outcomes == {outcome: 1000 // len(VISITS) * kinds for outcome, kinds in OUTCOMES.items()}
    await until(lambda: not any(app._connections().values()), "all have gone")
    await until(lambda: {task.get_name() for task in asyncio.all_tasks() - ours} <= there, "their tasks have ended")
    await app.stop()
    await until(lambda: asyncio.all_tasks() <= ours, "no task is left")
    await until(lambda: descriptors(os.getpid()) <= files, "no descriptor is left")
