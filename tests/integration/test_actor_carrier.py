"""The `actor` carrier between this process and a real Ray actor: order, ends, bounds."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest
import ray

from engine.actor_lane import ActorPipes
from router.lane import pipes
from router.lane.actor import ActorCarrier, ActorTransport
from router.membership.base import ReplicaRecord
from tests.integration.ray_local import DEADLINE_S, cluster, until

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module", autouse=True)
def ray_cluster() -> Iterator[None]:
    with cluster(cpus=1):
        yield


class Session(asyncio.Protocol):
    """The replica's side in these tests: echoes, or does what a batch says."""

    def __init__(self, host: Host) -> None:
        self.host = host

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: asyncio.Transport = transport  # type: ignore[assignment]
        self.host.open += 1

    def data_received(self, data: bytes) -> None:
        self.host.received += len(data)
        if data == b"close":
            self.transport.write(b"bye")
            self.transport.close()
        elif data == b"flood":
            for _ in range(100):
                self.transport.write(bytes(1 << 20))
        elif data == b"fail":
            raise ValueError("a session that fails")
        else:
            self.transport.write(data)

    def pause_writing(self) -> None:
        self.host.pauses += 1

    def resume_writing(self) -> None:
        self.host.pauses -= 1

    def connection_lost(self, exc: Exception | None) -> None:
        self.host.open -= 1


class Host:
    """An actor that offers pipes as a replica does."""

    async def __init__(self, name: str) -> None:  # type: ignore[misc]
        self.open = self.received = self.pauses = 0
        self.pipes = ActorPipes(name, lambda: Session(self))
        self.pipes.open()

    async def look(self) -> tuple[int, int, int, int]:
        """Open sessions, bytes received, sessions that wait to write, pid."""
        return self.open, self.received, self.pauses, os.getpid()


class Client(asyncio.Protocol):
    """The router's side: keeps what comes."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.paused = False
        self.resumed = 0
        self.lost: asyncio.Future[Exception | None] = asyncio.get_running_loop().create_future()

    def data_received(self, data: bytes) -> None:
        self.data += data

    def pause_writing(self) -> None:
        self.paused = True

    def resume_writing(self) -> None:
        self.paused = False
        self.resumed += 1

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost.set_result(exc)


@pytest.fixture(scope="module")
def host(ray_cluster: None) -> Any:
    """Every test leaves it without open sessions."""
    return new_host()


@pytest.fixture
def doomed(ray_cluster: None) -> Any:
    """A host for a test that kills it."""
    return new_host()


def new_host() -> Any:
    actor = ray.remote(Host).options(num_cpus=0).remote("host")
    ray.get(actor.look.remote(), timeout=DEADLINE_S)
    return actor


async def connect(actor: Any) -> tuple[ActorTransport, Client]:
    client = Client()
    record = ReplicaRecord("host", "127.0.0.1", 1, b"", actor=actor)
    transport = await asyncio.wait_for(ActorCarrier().connect(record, lambda: client), DEADLINE_S)
    assert isinstance(transport, ActorTransport)
    return transport, client


async def looked(actor: Any, open: int) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while (await actor.look.remote())[0] != open:
            await asyncio.sleep(0.02)


async def test_bytes_come_back_whole_and_in_order(host: Any) -> None:
    transport, client = await connect(host)
    sent = bytearray()
    for i in range(3000):
        piece = i.to_bytes(4, "big") * (1 + i % 97)
        sent += piece
        transport.write(piece)
        if i % 50 == 0:
            await asyncio.sleep(0)
    await until(lambda: len(client.data) == len(sent), "all came back")
    assert client.data == sent
    transport.close()
    assert await asyncio.wait_for(client.lost, DEADLINE_S) is None
    await looked(host, open=0)


async def test_two_pipes_do_not_mix(host: Any) -> None:
    (one, first), (two, second) = await connect(host), await connect(host)
    one.write(b"one" * 1000)
    two.write(b"two" * 1000)
    await until(lambda: len(first.data) == len(second.data) == 3000, "both answered")
    assert (bytes(first.data), bytes(second.data)) == (b"one" * 1000, b"two" * 1000)
    one.close()
    two.close()
    await looked(host, open=0)


async def test_what_was_written_before_close_arrives_and_the_session_ends(host: Any) -> None:
    before = (await host.look.remote())[1]
    transport, client = await connect(host)
    transport.write(b"x" * 500_000)
    transport.close()
    assert transport.is_closing()
    transport.write(b"too late")
    assert await asyncio.wait_for(client.lost, DEADLINE_S) is None
    await looked(host, open=0)
    assert (await host.look.remote())[1] - before == 500_000


async def test_an_abort_ends_the_session_at_once(host: Any) -> None:
    transport, client = await connect(host)
    await looked(host, open=1)
    transport.abort()
    assert await asyncio.wait_for(client.lost, DEADLINE_S) is None
    await looked(host, open=0)


async def test_a_session_that_closes_sends_its_last_words_first(host: Any) -> None:
    transport, client = await connect(host)
    transport.write(b"close")
    assert await asyncio.wait_for(client.lost, DEADLINE_S) is None
    assert client.data == b"bye"
    assert transport.is_closing()
    await looked(host, open=0)


async def test_a_session_that_fails_loses_its_pipe(host: Any) -> None:
    transport, client = await connect(host)
    transport.write(b"fail")
    await asyncio.wait_for(client.lost, DEADLINE_S)
    await looked(host, open=0)


async def test_the_death_of_the_actor_is_a_lost_connection(doomed: Any) -> None:
    _, client = await connect(doomed)
    os.kill((await doomed.look.remote())[3], signal.SIGKILL)
    assert isinstance(await asyncio.wait_for(client.lost, DEADLINE_S), ConnectionResetError)


async def test_a_router_that_stops_reading_bounds_what_the_replica_sends(host: Any) -> None:
    transport, client = await connect(host)
    transport.pause_reading()
    transport.write(b"flood")
    async with asyncio.timeout(DEADLINE_S):
        while (await host.look.remote())[2] != 1:
            await asyncio.sleep(0.02)
    assert len(client.data) <= pipes.WINDOW_BYTES
    transport.resume_reading()
    await until(lambda: len(client.data) == 100 << 20, "all came after reading was resumed")
    transport.close()
    await looked(host, open=0)


async def test_a_writer_ahead_of_the_replica_is_told_to_pause(host: Any) -> None:
    transport, client = await connect(host)
    transport.set_write_buffer_limits(high=1000, low=100)
    transport.write(bytes(2000))
    assert client.paused
    assert transport.get_write_buffer_size() == 2000
    await until(lambda: client.resumed == 1, "it may write again")
    transport.close()
    await looked(host, open=0)


async def test_a_connect_that_is_given_up_leaves_no_session(host: Any) -> None:
    record = ReplicaRecord("host", "127.0.0.1", 1, b"", actor=host)
    attempt = asyncio.create_task(ActorCarrier().connect(record, Client))
    await asyncio.sleep(0)
    attempt.cancel()
    with pytest.raises(asyncio.CancelledError):
        await attempt
    await asyncio.wait_for(host.look.remote(), DEADLINE_S)
    await looked(host, open=0)


async def refused(record: ReplicaRecord) -> None:
    with pytest.raises(ConnectionRefusedError):
        await asyncio.wait_for(ActorCarrier().connect(record, Client), DEADLINE_S)


async def test_a_pipe_to_another_replicas_actor_is_refused(host: Any) -> None:
    await refused(ReplicaRecord("another", "127.0.0.1", 1, b"", actor=host))


async def test_a_replica_without_an_actor_handle_is_a_refused_connection() -> None:
    await refused(ReplicaRecord("host", "127.0.0.1", 1, b""))


async def test_a_dead_actor_is_a_refused_connection(doomed: Any) -> None:
    ray.kill(doomed)
    await refused(ReplicaRecord("host", "127.0.0.1", 1, b"", actor=doomed))


async def test_no_task_is_left_after_the_end(host: Any) -> None:
    before = asyncio.all_tasks()
    transport, client = await connect(host)
    for _ in range(20):
        transport.write(b"x")
        await asyncio.sleep(0.01)
    transport.close()
    await asyncio.wait_for(client.lost, DEADLINE_S)
    await until(lambda: asyncio.all_tasks() == before, "the pipe's tasks have ended")
    await looked(host, open=0)
