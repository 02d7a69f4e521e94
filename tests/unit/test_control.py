"""What supervisor and workers say to each other, over real sockets."""

from __future__ import annotations

import asyncio
import socket

import pytest

from router.control import (
    Channel,
    Collect,
    Collected,
    Drain,
    Hurry,
    Leaving,
    Listen,
    Notice,
    Order,
    Page,
    Ready,
    Scrape,
    Seat,
    Started,
    ToSupervisor,
    ToWorker,
    address_line,
    supervisors_end,
    workers_end,
)
from router.observe.merge import Family
from router.options import AdminOptions, Config, GrpcOptions

FIGURES = [Family("kvlane_requests", "counter", "Requests.", {("kvlane_requests_total", (("outcome", "ok"),)): 3.0})]


async def channels() -> tuple[Channel[ToSupervisor], Channel[ToWorker]]:
    ours, theirs = socket.socketpair()
    return await supervisors_end(ours), await workers_end(Seat(0, theirs.detach()))


async def test_every_message_arrives_as_it_was_sent_and_in_order() -> None:
    supervisor, worker = await channels()
    down: list[ToWorker] = [Listen((0, 2)), Collect(7), Page(1, b"text" * 100_000, "text/plain"), Drain(5.0)]
    down += [Notice(2.5), Hurry()]
    up: list[ToSupervisor] = [Started(), Ready(), Collected(7, FIGURES), Scrape(1), Leaving()]
    for each in down:
        supervisor.send(each)
    for one in up:
        worker.send(one)
    assert [await worker.receive() for _ in down] == down
    assert [await supervisor.receive() for _ in up] == up
    await supervisor.close()
    await worker.close()


async def test_the_end_of_one_side_is_the_end_of_what_the_other_receives() -> None:
    supervisor, worker = await channels()
    worker.send(Leaving())
    await worker.close()
    assert await supervisor.receive() == Leaving()
    assert await supervisor.receive() is None
    supervisor.send(Collect(1))  # Nobody is there any more.
    await supervisor.close()
    supervisor.send(Collect(2))


async def test_half_a_message_is_the_end() -> None:
    ours, theirs = socket.socketpair()
    supervisor = await supervisors_end(ours)
    with theirs:
        theirs.sendall(b"\xff\0\0\0half")
    async with asyncio.timeout(30):
        assert await supervisor.receive() is None
    await supervisor.close()


async def test_a_message_of_another_version_is_the_end(caplog: pytest.LogCaptureFixture) -> None:
    ours, theirs = socket.socketpair()
    supervisor = await supervisors_end(ours)
    with theirs:
        theirs.sendall(b"\x01\0\0\0\x05")
        assert await supervisor.receive() is None
    assert "makes no sense" in caplog.text
    await supervisor.close()


@pytest.mark.parametrize(
    ("config", "line"),
    [
        (Config(), "ready http=http://127.0.0.1:1 grpc=127.0.0.1:2"),
        (Config(grpc=GrpcOptions(enabled=False)), "ready http=http://127.0.0.1:1"),
        (
            Config(admin=AdminOptions(enabled=True, host="127.0.0.2")),
            "ready http=http://127.0.0.1:1 grpc=127.0.0.1:2 admin=http://127.0.0.2:3",
        ),
    ],
)
def test_the_ready_line_tells_the_addresses_that_are_served(config: Config, line: str) -> None:
    assert Order(config).seat is None
    assert address_line(config, 1, 2, 3) == line
