"""Payloads that go from a step's frame straight to the client's socket, in order with what the transport takes."""

from __future__ import annotations

import asyncio
import random
import socket
import struct
from collections.abc import Callable
from typing import Any

import pytest

from router import compiled
from router.errors import ReplicaLost
from router.lane import frames
from router.lane.client import Lane
from router.lane.frames import CacheReport, End, Head, Output, Step, Welcome
from router.types import EngineInfo, Load, Request, Sink
from tests.unit.http_ingress import serving
from tests.unit.http_ingress.serving import DEADLINE_S, SSE, Client, Served, post, receipt, served

STRAIGHT = compiled.part("router.lane._relay") is not None
LONGEST = 2048
"""A longer payload is framed elsewhere."""


class Pipe(asyncio.Transport):
    def __init__(self) -> None:
        super().__init__()
        self.frames: list[bytes] = []

    def write(self, data: Any) -> None:
        self.frames.append(bytes(data))

    def is_closing(self) -> bool:
        return False


class Replica:
    """What the test says in a replica's name, and the lane that hears it."""

    def __init__(self) -> None:
        self.pipe = Pipe()
        self.lane = Lane("r", b"s", "test", self)
        self.lane.connection_made(self.pipe)
        info = EngineInfo("tiny", (), max_num_seqs=8, kv_blocks=100, kv_block_tokens=16)
        self.lane.data_received(frames.encode(Welcome(frames.VERSION, "r", info, Load())))
        self.sinks: list[Any] = []
        self.by_transport: list[int] = []
        """How many writes of each stream went by the transport's own method."""

    def lane_opened(self, lane: Lane) -> None: ...
    def lane_draining(self, lane: Lane) -> None: ...
    def lane_lost(self, lane: Lane, error: ReplicaLost) -> None: ...
    def first_output(self, waited_s: float, expected_s: float) -> None: ...
    def cache_reported(self, lane: Lane, report: CacheReport) -> None: ...

    async def script(self, request: Request, sink: Sink) -> None:
        sink.routed(receipt(request))
        exchange: Any = sink
        at, write = len(self.sinks), exchange._write

        def counted(data: bytes) -> None:
            self.by_transport[at] += 1
            write(data)

        exchange._write = counted
        self.sinks.append(exchange)
        self.by_transport.append(0)
        await self.lane.run(request, sink)

    def step(self, *outputs: Output) -> None:
        self.lane.data_received(frames.encode(Step(1, 0, Load(running=1), list(outputs))))

    def say(self, payload: bytes, stream: int = 1) -> None:
        self.step(Output(stream, payload, 1))

    def begin(self, stream: int = 1) -> None:
        self.step(Output(stream, b"first", 1, None, Head(200, SSE)))

    def end(self, stream: int = 1) -> None:
        self.step(Output(stream, b"", 0, End("stop")))

    def transport(self, stream: int = 1) -> Any:
        return self.sinks[stream - 1]._output._transport


async def asked(serves: Served, replica: Replica, streams: int = 1) -> list[Client]:
    clients = []
    for number in range(1, streams + 1):
        clients.append(await serves.connect())
        clients[-1].write(post())
        await serves.until(lambda: len(replica.sinks) == number)  # noqa: B023
        replica.begin(number)
    return clients


async def begun(client: Client) -> None:
    assert (await client.head())[0] == 200
    assert await client.chunk() == b"first"


async def narrow_client(serves: Served) -> Client:
    """One that the kernel keeps little for."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", serves.port))
    return Client(*await asyncio.open_connection(sock=sock, limit=1024))


async def body_of(client: Client, got: bytes) -> bytes:
    """All of the answer's body, still in chunks; `got` was read already."""
    while not got.endswith(b"\r\n0\r\n\r\n"):
        got += await asyncio.wait_for(client.reader.read(1000), DEADLINE_S)
    return got.partition(b"\r\n\r\n")[2]


def chunked(payloads: list[bytes]) -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in [*payloads, b""])


def narrowed(replica: Replica, stream: int = 1) -> None:
    replica.transport(stream).get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)


async def test_payloads_go_straight_to_a_client_that_keeps_up() -> None:
    replica = Replica()
    sizes = [*range(1, LONGEST, 7), LONGEST - 1, LONGEST, LONGEST + 1, 3 * LONGEST, 255, 256, 4095, 4096]
    payloads = [bytes([65 + at % 26]) * size for at, size in enumerate(sizes)]
    async with served(replica.script) as serves:
        (client,) = await asked(serves, replica)
        await begun(client)
        for payload in payloads:
            replica.say(payload)
            assert await client.chunk() == payload
        assert replica.by_transport[0] == (0 if STRAIGHT and serving.TLS is None else len(payloads))
        assert replica.sinks[0]._socket == (
            -1 if serving.TLS else replica.transport().get_extra_info("socket").fileno()
        )
        replica.end()
        assert await client.chunk() == b""
        client.write(post())  # The connection lives on.
        await serves.until(lambda: len(replica.sinks) == 2)
        replica.begin(2)
        replica.say(b"second", 2)
        replica.end(2)
        assert (await client.answer()).body == b"firstsecond"
        await client.close()


async def test_what_a_slow_client_cannot_take_waits_in_the_transport_and_all_arrives_in_order() -> None:
    replica = Replica()
    draw = random.Random(5)
    payloads = [bytes(draw.choices(range(256), k=draw.choice([1, 20, 300, 2000, LONGEST, 2500]))) for _ in range(900)]
    async with served(replica.script) as serves:
        (client,) = await asked(serves, replica)
        narrowed(replica)
        got: list[bytes] = []
        await begun(client)

        async def read() -> None:
            while piece := await client.chunk():
                got.append(piece)
                if draw.random() < 0.1:
                    await asyncio.sleep(draw.choice([0, 0, 0.002]))

        reading, straight = asyncio.create_task(read()), set()
        for at, payload in enumerate(payloads):
            replica.say(payload)
            straight.add(replica.sinks[0]._socket >= 0)
            if draw.random() < 0.2:
                await asyncio.sleep(0)
            if at % 300 == 299:  # It catches up.
                await serves.until(lambda: b"".join(got) == b"".join(payloads[: at + 1]))  # noqa: B023
        assert straight == ({False} if serving.TLS else {True, False})
        replica.end()
        await asyncio.wait_for(reading, DEADLINE_S)
        assert b"".join(got) == b"".join(payloads)
        await client.close()


@pytest.mark.parametrize("size", [LONGEST, LONGEST + 500])
@pytest.mark.parametrize("kind", [bytes, memoryview])
async def test_a_short_payload_waits_behind_a_longer_one_that_is_in_the_transport(size: int, kind: Any) -> None:
    replica = Replica()
    async with served(replica.script) as serves:
        client = await narrow_client(serves)
        client.write(post())
        await serves.until(lambda: bool(replica.sinks))
        narrowed(replica)
        replica.begin()
        said = [b"first"]
        while not replica.transport().get_write_buffer_size():
            said.append(b"%05d" % len(said) * (size // 5))
            if kind is bytes:
                replica.say(said[-1])
            else:
                replica.sinks[0].data(kind(said[-1]), 1)
        got = await client.reader.read(1000)
        for _ in range(100):  # The kernel has room again for a moment, whenever the client took something.
            said.append(b"short")
            replica.say(b"short")
            got += await client.reader.read(1000)
        replica.end()
        assert await body_of(client, got) == chunked(said)
        await client.close()


async def test_payloads_wait_behind_a_first_one_that_is_still_in_the_transport() -> None:
    replica = Replica()
    first, rest = b"f" * 60_000, [b"%d" % at for at in range(100)]
    async with served(replica.script) as serves:
        client = await narrow_client(serves)
        client.write(post())
        await serves.until(lambda: bool(replica.sinks))
        narrowed(replica)
        replica.step(Output(1, first, 1, None, Head(200, SSE)))
        assert 0 < replica.transport().get_write_buffer_size() < 1 << 16, "nothing waits, or too much does"
        assert replica.sinks[0]._open
        await asyncio.sleep(0)
        # The kernel has room again for a moment, whenever the client took something.
        got = await client.reader.read(1000)
        for payload in rest:
            replica.say(payload)
            got += await client.reader.read(1000)
        replica.end()
        assert await body_of(client, got) == chunked([first, *rest])
        await client.close()


async def test_a_client_that_reset_its_connection_loses_its_stream_and_no_other_does() -> None:
    replica = Replica()
    async with served(replica.script) as serves:
        gone, kept = await asked(serves, replica, 2)
        await begun(gone)
        await begun(kept)
        sock = gone.writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        gone.writer.transport.abort()
        frames_before = len(replica.pipe.frames)
        for at in range(200):
            payload = b"%d" % at
            replica.step(Output(1, payload, 1), Output(2, payload, 1))
            assert await kept.chunk() == payload
        await serves.until(lambda: replica.sinks[0].done and replica.lane.streams == 1)
        assert not replica.sinks[0]._open
        assert len(replica.pipe.frames) > frames_before, "its engine was not told"
        assert not replica.sinks[1].done
        replica.end(2)
        assert await kept.chunk() == b""
        await kept.close()


async def test_nothing_goes_to_a_socket_of_the_same_number_that_was_opened_since() -> None:
    replica = Replica()
    async with served(replica.script) as serves:
        (gone,) = await asked(serves, replica)
        await begun(gone)
        number = replica.transport().get_extra_info("socket").fileno()
        ended: Callable[[], bool] = lambda: replica.sinks[0].done and _is_free(number)  # noqa: E731
        await gone.close()
        await serves.until(ended)
        others = [socket.socketpair() for _ in range(64)]
        assert any(number in (one.fileno(), other.fileno()) for one, other in others)
        for _ in range(50):
            replica.say(b"stray")
            replica.sinks[0].data(b"stray", 1)
        for one, other in others:
            for end in (one, other):
                end.setblocking(False)
                try:
                    assert not end.recv(100)
                except BlockingIOError:
                    pass  # As it should be: nothing came.
                end.close()


def _is_free(number: int) -> bool:
    try:
        socket.socket(fileno=number).detach()
    except OSError:
        return True
    return False
