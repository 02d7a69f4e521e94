"""A server on sockets that it shares, how it leaves them to another, and pages that take a while."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable

from router.errors import InternalError
from router.ingress.http import HttpIngress
from router.ingress.http_connection import LAST_CALL_S
from router.options import HttpOptions
from router.types import Request, Sink
from tests.unit.http_ingress.serving import DEADLINE_S, SSE, Client, FakeDispatch, FakeFleet, echo, get, post, served


async def test_in_a_last_call_each_connection_gets_one_more_answer_that_says_so() -> None:
    async with served() as serving:
        idle = await serving.connect()
        idle.write(get("/healthz"))
        assert "connection" not in (await idle.answer()).headers
        leaving = asyncio.create_task(serving.ingress.last_call())
        await asyncio.sleep(0)
        idle.write(post())
        answer = await idle.answer()
        assert (answer.status, answer.headers["connection"]) == (200, "close")
        assert await idle.rest() == b""
        await asyncio.wait_for(leaving, DEADLINE_S)
        await idle.close()


async def test_in_a_last_call_a_stream_in_flight_ends_whole_and_its_connection_waits_for_one_more_request() -> None:
    release = asyncio.Event()

    async def slow(request: Request, sink: Sink) -> None:
        sink.head(200, SSE)
        sink.data(b"data: one\n\n", 1)
        await release.wait()
        sink.data(b"data: two\n\n", 1)

    async with served(slow) as serving:
        client = await serving.connect()
        client.write(post())
        await client.head()
        leaving = asyncio.create_task(serving.ingress.last_call())
        await asyncio.sleep(0)
        release.set()
        assert (await client.chunk(), await client.chunk(), await client.chunk()) == (
            b"data: one\n\n",
            b"data: two\n\n",
            b"",
        )
        client.write(get("/healthz"))
        assert (await client.answer()).headers["connection"] == "close"
        await asyncio.wait_for(leaving, DEADLINE_S)
        await client.close()


async def test_in_a_last_call_connections_that_stay_idle_are_closed_soon() -> None:
    async with served() as serving:
        client = await serving.connect()
        client.write(get("/healthz"))
        await client.answer()
        leaving = asyncio.create_task(serving.ingress.last_call())
        await asyncio.sleep(0)
        serving.pass_time(LAST_CALL_S - 0.1)
        assert serving.ingress.connections == 1
        serving.pass_time(0.2)
        assert await client.rest() == b""
        await asyncio.wait_for(leaving, DEADLINE_S)
        await client.close()


async def test_what_waits_when_a_server_ceases_to_listen_is_served_by_the_next_one() -> None:
    def ingress() -> HttpIngress:
        return HttpIngress(HttpOptions(), FakeDispatch(echo), FakeFleet(), metrics=lambda: (b"", "text/plain"))

    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        first, second = ingress(), ingress()
        await first.listen([sock])
        await first.listen(())
        client = Client(*await asyncio.open_connection(*sock.getsockname()))
        client.write(get("/healthz"))
        await second.listen([sock])
        assert (await client.answer()).body == b"ok"
        assert (first.connections, second.connections) == (0, 1)
        await client.close()
        await first.stop(0)
        await second.stop(0)


async def test_a_server_that_is_told_to_listen_while_it_stops_ends_all_the_same() -> None:
    release = asyncio.Event()

    async def slow(request: Request, sink: Sink) -> None:
        sink.head(200, SSE)
        sink.data(b"data: one\n\n", 1)
        await release.wait()

    ingress = HttpIngress(HttpOptions(), FakeDispatch(slow), FakeFleet(), metrics=lambda: (b"", "text/plain"))
    with socket.socket() as sock, socket.socket() as late:
        for each in (sock, late):
            each.bind(("127.0.0.1", 0))
        await ingress.listen([sock])
        client = Client(*await asyncio.open_connection(*sock.getsockname()))
        client.write(post())
        await client.head()
        stopping = asyncio.create_task(ingress.stop(DEADLINE_S))
        await asyncio.sleep(0)
        await ingress.listen([sock, late])
        release.set()
        await asyncio.wait_for(stopping, DEADLINE_S)
        await client.close()


class Slow:
    """Metrics that others have to be asked for."""

    def __init__(self) -> None:
        self.page: asyncio.Future[tuple[bytes, str]] = asyncio.get_running_loop().create_future()

    def __call__(self) -> Awaitable[tuple[bytes, str]]:
        return self.page


async def test_metrics_that_take_a_while_keep_their_place_among_the_answers() -> None:
    slow = Slow()
    ingress = HttpIngress(HttpOptions(port=0), FakeDispatch(echo), FakeFleet(), metrics=slow)
    client = Client(*await asyncio.open_connection("127.0.0.1", await ingress.start()))
    client.write(get("/metrics") + get("/healthz"))
    await asyncio.sleep(0)
    slow.page.set_result((b"up 1\n", "text/plain; version=1"))
    page, health = await client.answer(), await client.answer()
    assert (page.status, page.headers["content-type"], page.body) == (200, "text/plain; version=1", b"up 1\n")
    assert health.body == b"ok"
    await client.close()
    await ingress.stop(0)


async def test_metrics_that_cannot_be_had_are_an_error_and_not_an_empty_page() -> None:
    slow = Slow()
    slow.page.set_exception(InternalError("not in time"))
    ingress = HttpIngress(HttpOptions(port=0), FakeDispatch(echo), FakeFleet(), metrics=slow)
    client = Client(*await asyncio.open_connection("127.0.0.1", await ingress.start()))
    client.write(get("/metrics"))
    answer = await client.answer()
    assert (answer.status, answer.headers["x-kvlane-error"]) == (500, "internal")
    await client.close()
    await ingress.stop(0)
