"""What becomes of a replica's answer: errors before and after the first byte, what breaks off, and the last payload."""

from __future__ import annotations

import asyncio
import json

import msgspec
import pytest

import router.up  # noqa: F401  It has an error of its own.
from router.errors import ClientTooSlow, KvlaneError, MethodNotAllowed, Overloaded, ReplicaLost
from router.ingress.http_response import Exchange
from router.types import Candidate, Request, Sink
from tests.unit.http_ingress.serving import JSON, SSE, get, post, receipt, served


def _every_error() -> list[KvlaneError]:
    found: list[KvlaneError] = []
    classes: list[type[KvlaneError]] = [KvlaneError]
    while classes:
        cls = classes.pop()
        classes += cls.__subclasses__()
        found.append(MethodNotAllowed("why", allow=("GET",)) if issubclass(cls, MethodNotAllowed) else cls("why"))
    return found


@pytest.mark.parametrize("error", _every_error(), ids=lambda error: type(error).__name__)
async def test_every_error_before_the_first_byte_is_a_status_and_an_error_object(error: KvlaneError) -> None:
    async def fail(request: Request, sink: Sink) -> None:
        sink.routed(receipt(request))
        sink.head(200, SSE)  # A head alone has not been sent; it is forgotten.
        raise error

    async with served(fail) as serving:
        answer = await serving.say(post())
    assert answer.status == error.http_status
    told = json.loads(answer.body)["error"]
    assert told == {
        "message": "why",
        "type": error.openai_type,
        "param": None,
        "code": error.openai_code or error.http_status,
    }
    assert answer.headers["x-kvlane-error"] == error.name
    assert ("retry-after" in answer.headers) == (error.http_status in (429, 503))
    assert (answer.headers.get("connection") == "close") == isinstance(error, ClientTooSlow)


async def test_an_error_says_when_to_retry() -> None:
    async def fail(request: Request, sink: Sink) -> None:
        raise Overloaded("full", retry_after_s=2.3)

    async with served(fail) as serving:
        assert (await serving.say(post())).headers["retry-after"] == "3"


async def test_a_defect_is_a_500_that_tells_nothing() -> None:
    async def fail(request: Request, sink: Sink) -> None:
        raise ZeroDivisionError("secret")

    async with served(fail) as serving:
        answer = await serving.say(post())
    assert answer.status == 500
    assert b"secret" not in answer.body


async def test_an_error_inside_an_event_stream_is_an_event_and_a_clean_end() -> None:
    async def fail(request: Request, sink: Sink) -> None:
        sink.routed(receipt(request))
        sink.head(200, SSE)
        sink.data(b"data: one\n\n", 1)
        raise ReplicaLost("gone")

    async with served(fail) as serving:
        client = await serving.connect()
        client.write(post() + get("/healthz"))
        answer = await client.answer()
        assert answer.status == 200
        assert answer.body == (
            b'data: one\n\ndata: {"error":{"message":"gone","type":"BadGatewayError","param":null,"code":502}}\n\n'
            b"data: [DONE]\n\n"
        )
        assert (await client.answer()).body == b"ok"
        await client.close()


@pytest.mark.parametrize("headers", [JSON, (*JSON, ("content-length", "20")), (*SSE, ("content-length", "20"))])
async def test_any_other_answer_that_breaks_breaks_the_connection(headers: tuple[tuple[str, str], ...]) -> None:
    async def fail(request: Request, sink: Sink) -> None:
        sink.routed(receipt(request))
        sink.head(200, headers)
        sink.data(b'{"half":', 0)
        await asyncio.sleep(0)
        raise ReplicaLost("gone")

    async with served(fail) as serving:
        client = await serving.connect()
        client.write(post())
        with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
            await client.answer()
        await client.close()


@pytest.mark.parametrize("length", ["3", "9"])
async def test_a_replica_that_lies_about_its_length_never_looks_whole(length: str) -> None:
    async def lie(request: Request, sink: Sink) -> None:
        sink.routed(receipt(request))
        sink.head(200, (("content-length", length),))
        sink.data(b"ab", 0)
        sink.data(b"cdef", 0)

    async with served(lie) as serving:
        client = await serving.connect()
        client.write(post())
        with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
            await client.answer()
        await client.close()


@pytest.mark.parametrize(
    ("status", "headers"),
    [(200, [("x", "a\r\nb: c")]), (200, [("x", "\u2603")]), (101, []), (200, [("content-length", "-1")])],
)
async def test_a_head_that_cannot_be_sent_is_a_failure_of_the_replica(
    status: int, headers: list[tuple[str, str]]
) -> None:
    async def malformed(request: Request, sink: Sink) -> None:
        sink.head(status, headers)

    async with served(malformed) as serving:
        answer = await serving.say(post())
    assert (answer.status, answer.headers["x-kvlane-error"]) == (500, "replica_failed")


async def test_a_second_try_replaces_the_first_ones_head_and_receipt() -> None:
    async def retry(request: Request, sink: Sink) -> None:
        sink.routed(receipt(request, "r-1"))
        sink.head(500, (("content-length", "3"), ("x-try", "1")))
        assert not sink.started
        sink.routed(receipt(request, "r-2"))
        sink.head(200, JSON)
        sink.data(b"", 0)
        assert not sink.started
        sink.data(b"{}", 0)
        assert sink.started

    async with served(retry) as serving:
        answer = await serving.say(post())
    assert (answer.status, answer.body) == (200, b"{}")
    assert answer.headers["x-kvlane-route"].startswith("replica=r-2;")
    assert "x-try" not in answer.headers


async def test_answers_without_a_body_are_framed_right() -> None:
    async def empty(request: Request, sink: Sink) -> None:
        sink.head(204 if request.path == "/tokenize" else 200, ())

    async def nothing(request: Request, sink: Sink) -> None: ...

    async with served(empty) as serving:
        client = await serving.connect()
        client.write(post("/tokenize") + post() + get("/healthz"))
        assert (await client.answer()).status == 204
        assert (await client.answer()).body == b""
        assert (await client.answer()).body == b"ok"
        await client.close()
    async with served(nothing) as serving:
        assert (await serving.say(post())).headers["x-kvlane-error"] == "replica_failed"


async def test_a_receipt_with_candidates_goes_out_as_one_header() -> None:
    candidates = tuple(Candidate(f"replica-{i}", i, 1, 64, 0.01, 0.5) for i in range(500))

    async def explained(request: Request, sink: Sink) -> None:
        sink.routed(msgspec.structs.replace(receipt(request), candidates=candidates))
        sink.head(200, JSON)
        sink.data(b"{}", 0)

    async with served(explained) as serving:
        answer = await serving.say(post())
    route = answer.headers["x-kvlane-route"]
    assert route.startswith("replica=r-1;policy=random;reason=random;queue=3;candidates=replica-0(matched=1 ")
    assert len(route) < 2200


def finished(request: Request, sink: Sink) -> Exchange:
    """The exchange that was told its head and receipt."""
    assert isinstance(sink, Exchange)
    sink.routed(receipt(request))
    sink.head(200, SSE)
    return sink


@pytest.mark.parametrize("before", [0, 1])
async def test_the_last_payload_and_the_end_are_one_write(before: int) -> None:
    writes: list[bytes] = []

    async def short(request: Request, sink: Sink) -> None:
        exchange = finished(request, sink)
        write = exchange._write
        exchange._write = lambda data: (writes.append(data), write(data))
        for _ in range(before):
            exchange.data(b"data: one\n\n", 1)
        exchange.last(b"data: two\n\n", 1)

    async with served(short) as serving:
        client = await serving.connect()
        for _ in range(2):  # The connection is good for another request.
            client.write(post())
            answer = await client.answer()
            assert (answer.status, answer.body) == (200, b"data: one\n\n" * before + b"data: two\n\n")
        await client.close()
    assert len(writes) == 2
    assert all(write.endswith(b"b\r\ndata: two\n\n\r\n0\r\n\r\n") for write in writes)


async def test_a_last_payload_for_a_client_that_does_not_keep_up_waits_its_turn() -> None:
    async def short(request: Request, sink: Sink) -> None:
        exchange = finished(request, sink)
        exchange.data(b"data: one\n\n", 1)
        (connection,) = serving.ingress._connections
        connection.pause_writing()
        exchange.last(b"data: two\n\n", 1)
        asyncio.get_running_loop().call_soon(connection.resume_writing)

    async with served(short) as serving:
        answer = await serving.say(post())
    assert answer.body == b"data: one\n\ndata: two\n\n"


@pytest.mark.parametrize("lines", [JSON, (*JSON, ("content-length", "2"))])
async def test_a_last_payload_is_framed_as_the_answer_is(lines: tuple[tuple[str, str], ...]) -> None:
    async def short(request: Request, sink: Sink) -> None:
        assert isinstance(sink, Exchange)
        sink.head(200, lines)
        sink.last(b"{}", 0)

    async with served(short) as serving:
        assert (await serving.say(post())).body == b"{}"
        request = post().replace(b"HTTP/1.1", b"HTTP/1.0")
        assert (await serving.say(request)).body == b"{}"


async def test_an_answer_that_is_whole_stays_so_whatever_happens_after() -> None:
    async def short(request: Request, sink: Sink) -> None:
        finished(request, sink).last(b"data: one\n\n", 1)
        raise ReplicaLost("too late to matter")

    async with served(short) as serving:
        client = await serving.connect()
        for _ in range(2):
            client.write(post())
            assert (await client.answer()).body == b"data: one\n\n"
        await client.close()


async def test_a_last_payload_without_a_head_is_a_failure_of_the_replica() -> None:
    async def short(request: Request, sink: Sink) -> None:
        assert isinstance(sink, Exchange)
        sink.last(b"data: one\n\n", 1)

    async with served(short) as serving:
        assert (await serving.say(post())).status == 500
