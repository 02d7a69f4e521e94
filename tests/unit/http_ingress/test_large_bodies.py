"""Large bodies: taken in without holding up others, without copies, and without trust in a claimed length."""

from __future__ import annotations

import asyncio
import json
import tracemalloc
from typing import Any, cast

import pytest

from router.ingress.http_connection import PACED_BYTES, Connection
from router.ingress.http_parser import HttpRequest, RequestParser
from tests.unit.http_ingress.serving import post, served

POST = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\n"
LARGE = 6 << 20


def large_body(model: str = "tiny") -> bytes:
    return json.dumps({"prompt": "long words " * (LARGE // 11), "user": "u", "model": model}).encode()


def chunked(body: bytes, size: int) -> bytes:
    chunks = [body[at : at + size] for at in range(0, len(body), size)]
    return b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\n\r\n"


@pytest.mark.parametrize("size", [16 << 10, 256_000, 3 << 20])
@pytest.mark.parametrize("framing", ["length", "chunked"])
def test_a_body_comes_out_as_it_came_in(framing: str, size: int) -> None:
    parser = RequestParser(1 << 16, 32 << 20)
    body = bytes(range(251)) * (LARGE // 251)
    data = (
        POST + b"Content-Length: %d\r\n\r\n" % len(body) + body
        if framing == "length"
        else POST + b"Transfer-Encoding: chunked\r\n\r\n" + chunked(body, 100_000)
    )
    data += b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n"
    for at in range(0, len(data), size):
        parser.feed(data[at : at + size])
    large, small = parser.complete
    assert isinstance(large, HttpRequest)
    assert isinstance(small, HttpRequest)
    assert type(large.body) is bytes
    assert (large.body, small.body) == (body, b"")


def test_a_claimed_length_takes_no_memory_before_its_bytes_come() -> None:
    parser = RequestParser(1 << 16, 32 << 20)
    tracemalloc.start()
    try:
        parser.feed(POST + b"Content-Length: 30000000\r\n\r\n")
        for _ in range(10):
            parser.feed(b"a" * 10_000)
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < 1_000_000


async def test_a_large_request_is_relayed_untouched_and_others_are_answered_meanwhile() -> None:
    async with served() as serving:
        body = large_body()
        client = await serving.connect()
        client.write(post("/v1/completions", body))
        assert (await serving.say(post("/tokenize", b'{"model":"tiny"}'))).status == 200
        answer = await client.answer()
        assert answer.status == 200
        (request,) = [each for each in serving.dispatch.requests if each.path == "/v1/completions"]
        assert (request.body, request.model, request.session_id) == (body, "tiny", "u")
        client.write(post("/tokenize", b'{"model":"tiny"}'))
        assert (await client.answer()).status == 200
        await client.close()


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (large_body()[:-1], "not valid JSON"),
        (b"\xff" * LARGE, "not valid UTF-8 (byte 0)"),
        (large_body(""), "model parameter"),
        (b'{"x":' + b"[" * LARGE, "nested too deeply"),
    ],
    ids=["cut", "no text", "no model", "deep"],
)
async def test_a_large_request_that_makes_no_sense_is_refused_and_counted(body: bytes, said: str) -> None:
    async with served() as serving:
        client = await serving.connect()
        client.write(post("/v1/completions", body))
        answer = await client.answer()
        assert answer.status == 400
        assert said in json.loads(answer.body)["error"]["message"]
        assert [rpc for rpc, _ in serving.refused] == ["http"]
        assert not serving.dispatch.requests
        client.write(post("/tokenize", b'{"model":"tiny"}'))
        assert (await client.answer()).status == 200
        await client.close()


async def test_a_client_that_leaves_while_its_body_is_read_is_forgotten() -> None:
    async with served() as serving:
        client = await serving.connect()
        client.write(post("/v1/completions", b'{"x":[' + b'"a",' * (LARGE // 4)))
        await serving.until(lambda: serving.ingress.connections == 1)
        await client.close()
        await serving.until(lambda: serving.ingress.connections == 0)
        assert not serving.dispatch.requests


class Pausing(asyncio.Transport):
    """Says whether it is read."""

    def __init__(self) -> None:
        super().__init__()
        self.read = True

    def pause_reading(self) -> None:
        self.read = False

    def resume_reading(self) -> None:
        self.read = True

    def write(self, data: Any) -> None: ...
    def close(self) -> None: ...
    def can_write_eof(self) -> bool:
        return False

    def is_closing(self) -> bool:
        return False


async def test_after_a_large_read_reading_pauses_for_one_turn() -> None:
    async with served() as serving:
        connection, transport = Connection(cast(Any, serving.ingress), asyncio.get_running_loop()), Pausing()
        connection.connection_made(transport)
        connection.data_received(POST + b"Content-Length: 30000000\r\n\r\n")
        assert transport.read
        connection.data_received(b"a" * (PACED_BYTES + 1))
        assert not transport.read
        await asyncio.sleep(0)
        assert transport.read
        connection.connection_lost(None)
