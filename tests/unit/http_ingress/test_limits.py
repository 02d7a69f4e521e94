"""What a hostile or broken client meets: refusals of doubtful framing, limits, and timeouts under an injected clock.

Sections in comments are those of RFC 9112.
"""

from __future__ import annotations

import asyncio
import json
import tracemalloc

import pytest

from router.ingress.http_parser import HttpRequest, RequestParser
from router.types import Request, Sink
from tests.unit.http_ingress.serving import CHAT, Client, get, post, served

POST = b"POST /tokenize HTTP/1.1\r\nHost: a\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"

DOUBTFUL = {
    # 6.1 and 6.3: a length beside a coding is an attempt at smuggling.
    "length and coding": POST + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "coding and length": POST + b"Transfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n0\r\n\r\n",
    # 6.2 and 6.3: one valid length, or none.
    "two equal lengths": POST + b"Content-Length: 3\r\nContent-Length: 3\r\n\r\nabc",
    "two lengths": POST + b"Content-Length: 3\r\nContent-Length: 4\r\n\r\nabcd",
    "a list of lengths": POST + b"Content-Length: 3, 3\r\n\r\nabc",
    "a signed length": POST + b"Content-Length: +3\r\n\r\nabc",
    "a negative length": POST + b"Content-Length: -3\r\n\r\nabc",
    "a length of 5000 digits": POST + b"Content-Length: " + b"0" * 5000 + b"3\r\n\r\nabc",
    "an overflowing length": POST + b"Content-Length: 99999999999999999999\r\n\r\nabc",
    "an empty length": POST + b"Content-Length: \r\n\r\nabc",
    # 5.1: no space before the colon.
    "a space before a colon": POST + b"Content-Length : 3\r\n\r\nabc",
    # 6.1: chunked is the only coding, is last and once, and not in HTTP/1.0.
    "another coding": POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "an unknown coding": POST + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    "chunked not last": POST + b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
    "chunked twice": POST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunked behind a control character": POST + b"Transfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n",
    "chunked with a parameter": POST + b"Transfer-Encoding: chunked;q=1\r\n\r\n0\r\n\r\n",
    "a quoted coding": POST + b'Transfer-Encoding: "chunked"\r\n\r\n0\r\n\r\n',
    "a coding and a length whose name is spelt otherwise": (
        POST + b"tRANSFER-eNCODING: chunked\r\nCONTENT-length: 3\r\n\r\n0\r\n\r\n"
    ),
    "chunked in 1.0": CHUNKED.replace(b"1.1", b"1.0") + b"0\r\n\r\n",
    # 5.2 and 2.2: no folding, and line ends of two bytes.
    "a folded header": POST + b"X: a\r\n b\r\n\r\n",
    "bare line feeds": b"GET /healthz HTTP/1.1\nHost: a\n\n",
    "a bare carriage return": POST + b"X: a\rY: b\r\n\r\n",
    "a null byte": POST + b"X: a\0b\r\n\r\n",
    # 3.2: one Host.
    "two hosts": POST + b"Host: b\r\n\r\n",
    "no host": b"GET /healthz HTTP/1.1\r\n\r\n",
    # 3 and 2.3: the request line.
    "an unknown method": b"FOO / HTTP/1.1\r\nHost: a\r\n\r\n",
    "a tunnel": b"CONNECT a:1 HTTP/1.1\r\nHost: a\r\n\r\n",
    "an unknown version": b"GET / HTTP/2.0\r\nHost: a\r\n\r\n",
    "HTTP/0.9": b"GET /\r\n\r\n",
    "the HTTP/2 preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "raw bytes in the path": b"GET /\xff HTTP/1.1\r\nHost: a\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    # 7.1: chunks.
    "a wrong chunk size": CHUNKED + b"zz\r\n\r\n",
    "a signed chunk size": CHUNKED + b"-3\r\nabc\r\n0\r\n\r\n",
    "a chunk longer than its size": CHUNKED + b"3\r\nabcd\r\n0\r\n\r\n",
    "a chunk with a bare line feed": CHUNKED + b"3\nabc\r\n0\r\n\r\n",
}


async def _refused(client: Client, status: int) -> str:
    answer = await client.answer()
    error = json.loads(answer.body)["error"]
    assert (answer.status, error["code"], answer.headers["connection"]) == (status, status, "close")
    client.end()
    assert await client.rest() == b""
    await client.close()
    message: str = error["message"]
    return message


@pytest.mark.parametrize("doubtful", DOUBTFUL.values(), ids=DOUBTFUL.keys())
async def test_doubtful_framing_is_refused_after_the_answers_before_it_and_closes(doubtful: bytes) -> None:
    async with served() as serving:
        client = await serving.connect()
        client.write(get("/healthz") + doubtful + get("/healthz"))
        assert (await client.answer()).body == b"ok"
        await _refused(client, 400)
        assert not serving.dispatch.requests
        assert (await serving.say(get("/healthz"))).status == 200


@pytest.mark.parametrize("doubtful", DOUBTFUL.values(), ids=DOUBTFUL.keys())
def test_doubtful_framing_is_refused_wherever_reads_split_it(doubtful: bytes) -> None:
    parser = RequestParser(1 << 16, 1 << 20)
    for at in range(len(doubtful)):
        parser.feed(doubtful[at : at + 1])
    parser.feed(get("/healthz"))
    assert len(parser.complete) == 1
    assert not isinstance(parser.complete[0], HttpRequest)


@pytest.mark.parametrize("coding", ["chunked", "Chunked", "CHUNKED", "\t chunked"])
async def test_the_chunked_coding_is_known_however_it_is_spelt(coding: str) -> None:
    data = POST + b"Transfer-Encoding:%b\r\n\r\n" % coding.encode()
    body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(CHAT), CHAT)
    async with served() as serving:
        client = await serving.connect()
        client.write(data + body + get("/healthz"))
        assert (await client.answer()).body == b"POST /tokenize " + CHAT
        assert (await client.answer()).body == b"ok"
        await client.close()


async def test_a_target_with_scheme_and_host_is_read_as_its_path() -> None:
    """RFC 9112, 3.2.2, as clients of proxies send it."""
    async with served() as serving:
        client = await serving.connect()
        client.write(get("http://a:8000/healthz") + get("http://user@b") + get("http://"))
        assert (await client.answer()).body == b"ok"
        assert (await client.answer()).status == 404
        assert (await client.answer()).status == 400
        await client.close()


@pytest.mark.parametrize(
    "data",
    [
        get("/healthz", "X: " + "a" * 5000),
        get("/healthz", *("X: aaaaaaa" for _ in range(500))),
        get("/healthz", *("Keep-Alive: aaaaaaa" for _ in range(500))),
        get("/" + "a" * 5000),
        b"GET /healthz HTTP/1.1\r\nHost: a\r\nX: " + b"a" * 5000,
    ],
    ids=["one long", "many", "many that are dropped", "a long path", "one that never ends"],
)
async def test_headers_over_the_limit_are_refused(data: bytes) -> None:
    async with served(max_header_bytes=4096) as serving:
        client = await serving.connect()
        client.write(data)
        await _refused(client, 431)
        fitting = get("/healthz", "X: " + "a" * 3000)
        assert (await serving.say(fitting)).status == 200


async def test_an_endless_header_is_refused_while_it_arrives() -> None:
    async with served(max_header_bytes=4096) as serving:
        client = await serving.connect()
        client.write(get("/healthz") + b"GET / HTTP/1.1\r\nX: ")
        assert (await client.answer()).status == 200
        for _ in range(50):
            client.write(b"a" * 100)
            await asyncio.sleep(0)
        await _refused(client, 431)


async def test_a_body_over_the_limit_is_refused_before_it_is_read_or_while_it_arrives() -> None:
    async with served(max_body_bytes=1000) as serving:
        client = await serving.connect()
        client.write(POST + b"Content-Length: 1001\r\n\r\n")
        assert "1000" in await _refused(client, 413)
        client = await serving.connect()
        client.write(CHUNKED + b"200\r\n%b\r\n" % (b"a" * 512) * 2)
        await _refused(client, 413)
        client = await serving.connect()
        client.write(post("/tokenize", CHAT, "Expect: 100-continue", "Content-Length: 5000").split(b"{")[0])
        await _refused(client, 400)
        assert (await serving.say(post("/tokenize", CHAT + b" " * (1000 - len(CHAT))))).status == 200


def test_a_body_in_many_small_chunks_takes_little_more_memory_than_its_bytes() -> None:
    parser = RequestParser(1 << 16, 1 << 20)
    parser.feed(CHUNKED)
    blob = b"2\r\nab\r\n" * 1000
    tracemalloc.start()
    try:
        for _ in range(200):
            parser.feed(blob)
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < 2 * 400_000
    parser.feed(b"0\r\n\r\n")
    (request,) = parser.complete
    assert isinstance(request, HttpRequest)
    assert request.body == b"ab" * 200_000


async def test_a_client_that_still_sends_can_read_why_it_was_refused() -> None:
    async with served(max_body_bytes=1000) as serving:
        client = await serving.connect()
        client.write(POST + b"Content-Length: 8000000\r\n\r\n" + b"a" * 8_000_000)
        await _refused(client, 413)


@pytest.mark.parametrize("junk", [b"1;" + b"x" * 200_000, b"0\r\nT: " + b"x" * 200_000], ids=["extension", "trailer"])
async def test_endless_chunk_framing_is_refused(junk: bytes) -> None:
    async with served() as serving:
        client = await serving.connect()
        client.write(CHUNKED + junk)
        await _refused(client, 400)


async def test_a_connection_that_never_asks_is_closed_silently() -> None:
    async with served(header_timeout_s=10) as serving:
        client = await serving.connect()
        await serving.until(lambda: serving.ingress.connections == 1)
        serving.pass_time(9)
        serving.pass_time(1)
        assert await client.rest() == b""
        await client.close()


async def test_a_half_sent_head_times_out_however_steadily_it_drips() -> None:
    async with served(header_timeout_s=10) as serving:
        client = await serving.connect()
        client.write(get("/healthz") + b"GET / HTTP/1.1\r\n")
        assert (await client.answer()).status == 200
        for _ in range(3):
            client.write(b"X: y\r\n")
            await client.writer.drain()
            serving.pass_time(3)
        assert serving.deadlines == [1]
        serving.pass_time(1)
        assert "headers" in await _refused(client, 408)


async def test_a_body_times_out_when_it_pauses_too_long() -> None:
    async with served(body_timeout_s=30) as serving:
        client = await serving.connect()
        client.write(POST + b"Content-Length: 100\r\nExpect: 100-continue\r\n\r\n")
        assert (await client.head())[0] == 100
        for _ in range(3):
            client.write(b"{")
            await serving.until(lambda: serving.deadlines == [30])
            serving.pass_time(25)
        serving.pass_time(5)
        assert "body" in await _refused(client, 408)


async def test_an_idle_connection_is_closed_and_a_busy_one_never() -> None:
    async with served(idle_timeout_s=600) as serving:
        release = asyncio.Event()
        answer = serving.dispatch.script

        async def slow(request: Request, sink: Sink) -> None:
            await release.wait()
            await answer(request, sink)

        serving.dispatch.script = slow
        client = await serving.connect()
        client.write(post())
        await asyncio.wait_for(serving.dispatch.running.wait(), 10)
        serving.pass_time(10_000)
        release.set()
        assert (await client.answer()).status == 200
        serving.pass_time(599)
        assert serving.ingress.connections == 1
        serving.pass_time(2)
        assert await client.rest() == b""
        await client.close()


async def test_a_connection_over_the_limit_is_told_so() -> None:
    async with served(max_connections=2) as serving:
        kept = [await serving.connect() for _ in range(2)]
        for client in kept:
            client.write(get("/healthz"))
            assert (await client.answer()).status == 200
        extra = await serving.connect()
        answer = await extra.answer()
        assert (answer.status, answer.headers["retry-after"]) == (503, "1")
        assert answer.headers["x-kvlane-error"] == "too_many_connections"
        assert serving.refused == [("http", "too_many_connections")]
        await extra.close()
        for client in kept:
            await client.close()


async def test_a_refused_client_that_never_closes_is_dropped() -> None:
    async with served() as serving:
        client = await serving.connect()
        client.write(b"nonsense\r\n\r\n")
        assert (await client.answer()).status == 400
        serving.pass_time(4)
        assert serving.ingress.connections == 1
        serving.pass_time(2)
        await serving.until(lambda: serving.ingress.connections == 0)
        await client.close()
