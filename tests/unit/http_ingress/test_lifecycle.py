"""Clients that leave, clients that do not read, many at once, and the server's own end."""

from __future__ import annotations

import asyncio
import socket

import pytest

from router.errors import ClientTooSlow, ReplicaLost
from router.types import Request, Sink
from tests.unit.http_ingress.serving import (
    DEADLINE_S,
    JSON,
    SSE,
    Client,
    Script,
    get,
    post,
    receipt,
    served,
    stream,
    tls_options,
)


async def forever(request: Request, sink: Sink) -> None:
    """Says nothing."""
    await asyncio.Event().wait()


async def one_event_then_nothing(request: Request, sink: Sink) -> None:
    sink.routed(receipt(request))
    sink.head(200, SSE)
    sink.data(b"data: one\n\n", 1)
    await asyncio.Event().wait()


async def head_then_nothing(request: Request, sink: Sink) -> None:
    sink.routed(receipt(request))
    sink.head(200, JSON)
    await asyncio.Event().wait()


@pytest.mark.parametrize("half_close", [False, True], ids=["closed", "half-closed"])
@pytest.mark.parametrize("script", [forever, one_event_then_nothing, head_then_nothing])
async def test_a_client_that_leaves_cancels_its_request(script: Script, half_close: bool) -> None:
    async with served(script) as serving:
        client = await serving.connect()
        client.write(post())
        async with asyncio.timeout(DEADLINE_S):
            await serving.dispatch.running.wait()
            if script is one_event_then_nothing:
                await client.head()
            if half_close:
                client.writer.write_eof()
            else:
                client.writer.close()
            await serving.dispatch.ended.wait()
        assert serving.dispatch.outcome == [asyncio.CancelledError]
        sink = serving.dispatch.sinks[0]
        sink.head(200, SSE)
        sink.data(b"late", 1)  # The lane may not know yet; it must do no harm.
        await client.close()


@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
@pytest.mark.parametrize(
    "ahead",
    [post() * 12, post(body=b" " * 1_200_000) + b"G" * 200_000],
    ids=["many requests", "a large one"],
)
async def test_a_client_that_leaves_with_requests_sent_ahead_cancels_its_request(ahead: bytes, reset: bool) -> None:
    async with served(forever) as serving:
        client = await serving.connect()
        client.write(post() + ahead)
        async with asyncio.timeout(DEADLINE_S):
            await client.writer.drain()
            await serving.dispatch.running.wait()
            if reset:
                client.writer.transport.abort()
            else:
                client.writer.close()
            await serving.dispatch.ended.wait()
        await serving.until(lambda: serving.ingress.connections == 0)
        assert serving.dispatch.outcome == [asyncio.CancelledError]
        await client.close()


async def test_a_client_that_sends_far_too_much_ahead_is_cut_off() -> None:
    async with served(forever) as serving:
        client = await serving.connect()
        client.write(post() * 20_000)
        async with asyncio.timeout(DEADLINE_S):
            await serving.dispatch.ended.wait()
        await serving.until(lambda: serving.ingress.connections == 0)
        assert serving.dispatch.outcome == [asyncio.CancelledError]
        assert len(serving.dispatch.requests) == 1
        await client.close()


async def test_a_client_that_leaves_before_its_task_began_runs_nothing() -> None:
    async with served(forever) as serving:
        for _ in range(20):
            client = await serving.connect()
            client.write(post())
            client.writer.transport.abort()
        await serving.until(lambda: serving.ingress.connections == 0)
        assert serving.dispatch.outcome == [asyncio.CancelledError] * len(serving.dispatch.requests)


async def _flood(request: Request, sink: Sink) -> None:
    sink.routed(receipt(request))
    sink.head(200, SSE)
    while True:
        sink.data(b"data: " + b"x" * 50_000 + b"\n\n", 1)
        await asyncio.sleep(0)


async def _narrow(serving_port: int) -> Client:
    """A connection with the smallest receive buffer, so that not reading is felt soon."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", serving_port))
    reader, writer = await asyncio.open_connection(sock=sock, limit=1024, **tls_options())
    return Client(reader, writer)


async def test_a_client_that_does_not_read_loses_its_stream_and_no_other_does() -> None:
    async def either(request: Request, sink: Sink) -> None:
        await (_flood if request.path == "/v1/completions" else one_event_then_nothing)(request, sink)

    async with served(either, stream_buffer_bytes=1 << 20) as serving:
        reading = await serving.connect()
        reading.write(post())
        await reading.head()
        assert await reading.chunk() == b"data: one\n\n"
        stuck = await _narrow(serving.port)
        stuck.write(post("/v1/completions"))
        async with asyncio.timeout(DEADLINE_S):
            await serving.dispatch.ended.wait()
        assert serving.dispatch.outcome == [ClientTooSlow]
        serving.dispatch.sinks[0].data(b"data: two\n\n", 1)
        assert await reading.chunk() == b"data: two\n\n"
        serving.pass_time(6)
        await serving.until(lambda: serving.ingress.connections == 1)
        await stuck.close()
        await reading.close()


async def test_a_client_that_was_too_slow_but_reads_on_learns_why() -> None:
    async with served(_flood, stream_buffer_bytes=1 << 20) as serving:
        client = await _narrow(serving.port)
        client.write(post())
        async with asyncio.timeout(DEADLINE_S):
            await serving.dispatch.ended.wait()
        rest = await client.rest()
        assert b'"type":"ClientTooSlowError"' in rest
        assert rest.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
        await client.close()


@pytest.mark.parametrize("queued", [0, 5])
async def test_a_client_that_reads_none_of_its_finished_answers_is_dropped(queued: int) -> None:
    async def large(request: Request, sink: Sink) -> None:
        sink.head(200, (*JSON, ("content-length", "8000000")))
        sink.data(b"a" * 8_000_000, 0)

    async with served(large, body_timeout_s=30, stream_buffer_bytes=16 << 20) as serving:
        client = await _narrow(serving.port)
        client.write(post() + post() * queued)
        async with asyncio.timeout(DEADLINE_S):
            await serving.dispatch.ended.wait()
        await serving.until(lambda: serving.deadlines == [30])
        await client.reader.readexactly(1_000_000)  # Reading on earns more time.
        serving.pass_time(30)
        await asyncio.sleep(0)
        assert serving.ingress.connections == 1
        for _ in range(3):
            serving.pass_time(31)
            await asyncio.sleep(0)
        await serving.until(lambda: serving.ingress.connections == 0)
        await client.close()


async def test_a_slow_client_within_its_bound_gets_everything_in_order() -> None:
    payloads = [b"data: %06d %b\n\n" % (number, b"x" * 20_000) for number in range(100)]

    async def much(request: Request, sink: Sink) -> None:
        sink.routed(receipt(request))
        sink.head(200, SSE)
        for payload in payloads:
            sink.data(payload, 1)
            await asyncio.sleep(0)

    async with served(much) as serving:
        client = await _narrow(serving.port)
        client.write(post() + get("/healthz"))
        async with asyncio.timeout(DEADLINE_S):
            await serving.dispatch.ended.wait()
        assert (await client.answer()).body == b"".join(payloads)
        assert (await client.answer()).body == b"ok"
        await client.close()


async def test_one_large_answer_is_no_fault_of_the_client() -> None:
    async def large(request: Request, sink: Sink) -> None:
        sink.head(200, (*JSON, ("content-length", "8000000")))
        sink.data(b"a" * 5_000_000, 0)
        await asyncio.sleep(0)
        sink.data(b"b" * 3_000_000, 0)

    async with served(large, stream_buffer_bytes=8 << 20) as serving:
        assert len((await serving.say(post())).body) == 8_000_000


async def test_five_hundred_idle_connections_are_harmless() -> None:
    async with served(stream) as serving:
        idle = [await serving.connect() for _ in range(500)]
        assert (await serving.say(post())).body.endswith(b"[DONE]\n\n")
        assert serving.ingress.connections >= 500
        serving.pass_time(11)
        assert [await client.rest() for client in idle] == [b""] * 500
        for client in idle:
            await client.close()


async def test_stopping_closes_idle_connections_and_lets_a_stream_finish() -> None:
    release = asyncio.Event()

    async def slow(request: Request, sink: Sink) -> None:
        await release.wait()
        await stream(request, sink)

    async with served(slow) as serving:
        idle, busy = await serving.connect(), await serving.connect()
        idle.write(get("/healthz"))
        await idle.answer()
        busy.write(post())
        await asyncio.wait_for(serving.dispatch.running.wait(), DEADLINE_S)
        stopping = asyncio.create_task(serving.ingress.stop(DEADLINE_S))
        assert await idle.rest() == b""
        with pytest.raises(ConnectionRefusedError):
            await serving.connect()
        release.set()
        answer = await busy.answer()
        assert (answer.headers["connection"], answer.body[-8:]) == ("close", b"[DONE]\n\n")
        await asyncio.wait_for(stopping, DEADLINE_S)
        await idle.close()
        await busy.close()


async def test_a_connection_that_was_just_accepted_does_not_hold_a_stop_up() -> None:
    async with served(forever) as serving:
        busy = await serving.connect()
        busy.write(post())
        await asyncio.wait_for(serving.dispatch.running.wait(), DEADLINE_S)
        late = [socket.create_connection(("127.0.0.1", serving.port)) for _ in range(3)]
        stopping = asyncio.create_task(serving.ingress.stop(10 * DEADLINE_S))
        await busy.close()
        await asyncio.wait_for(stopping, DEADLINE_S)
        for sock in late:
            sock.close()


async def test_stopping_ends_what_outlasts_the_grace_with_an_explicit_error() -> None:
    async def either(request: Request, sink: Sink) -> None:
        await (one_event_then_nothing if request.path == "/v1/completions" else forever)(request, sink)

    async with served(either) as serving:
        streaming, silent = await serving.connect(), await serving.connect()
        streaming.write(post("/v1/completions"))
        silent.write(post())
        await streaming.head()
        await serving.until(lambda: len(serving.dispatch.requests) == 2)
        await asyncio.wait_for(serving.ingress.stop(0), DEADLINE_S)
        assert serving.dispatch.outcome == [asyncio.CancelledError] * 2
        assert b"shutting down" in await streaming.rest()
        answer = await silent.answer()
        assert (answer.status, answer.headers["x-kvlane-error"]) == (503, "shutting_down")
        await streaming.close()
        await silent.close()


async def test_it_serves_on_a_socket_it_is_given() -> None:
    async with served() as serving:
        await serving.ingress.stop(0)
        with socket.create_server(("127.0.0.1", 0)) as sock:
            serving.port = sock.getsockname()[1]
            await serving.ingress.listen([sock])
            assert (await serving.say(get("/healthz"))).body == b"ok"


async def test_a_stream_that_breaks_in_http_1_0_tells_so_and_closes() -> None:
    async def fail(request: Request, sink: Sink) -> None:
        sink.head(200, SSE)
        sink.data(b"data: one\n\n", 1)
        raise ReplicaLost("gone")

    async with served(fail) as serving:
        client = await serving.connect()
        client.write(post().replace(b"HTTP/1.1", b"HTTP/1.0"))
        assert b'{"error":{"message":"gone"' in await client.rest()
        await client.close()
