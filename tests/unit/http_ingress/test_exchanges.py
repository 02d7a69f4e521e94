"""Requests and responses over real sockets: framing, keep-alive, pipelines, and the clients that people use."""

from __future__ import annotations

import asyncio
import gzip
import json

import httpx
import openai as openai_sdk
import pytest

from router.errors import NoReplica
from router.types import Request, Sink
from tests.unit.http_ingress.serving import CHAT, JSON, SSE, echo, get, post, receipt, served, stream


async def test_a_request_reaches_dispatch_with_its_body_untouched_and_the_answer_comes_back_whole() -> None:
    body = b' {"model" : "tiny",\n"x": "\xc3\xa9"} '
    async with served() as serving:
        answer = await serving.say(post("/v1/chat/completions?a=%20b", body, "Authorization: Bearer k"))
        request = serving.dispatch.requests[0]
    assert (request.method, request.path, request.body) == ("POST", "/v1/chat/completions?a=%20b", body)
    assert request.model == "tiny"
    assert ("authorization", "Bearer k") in request.headers
    assert (answer.status, answer.body) == (200, b"POST /v1/chat/completions?a=%20b " + body)
    assert answer.headers["x-kvlane-route"] == "replica=r-1;policy=random;reason=random;queue=3"
    assert answer.headers["x-request-id"] == request.request_id
    assert answer.headers["date"] == "Tue, 14 Nov 2023 22:13:20 GMT"


async def test_hop_by_hop_and_nominated_headers_stay_here() -> None:
    lines = ["Connection: keep-alive, X-Secret", "X-Secret: 1", "TE: trailers", "Keep-Alive: 5", "Origin: http://o"]
    async with served() as serving:
        await serving.say(post("/v1/completions", CHAT, *lines, "X-Kept: 2", "traceparent: 00-a-b-01"))
        names = [name for name, _ in serving.dispatch.requests[0].headers]
    assert names == ["host", "content-type", "x-kept", "traceparent", "x-request-id"]


async def test_a_stream_is_chunked_one_chunk_per_payload() -> None:
    async with served(stream) as serving:
        client = await serving.connect()
        client.write(post())
        status, headers = await client.head()
        assert (status, headers["transfer-encoding"]) == (200, "chunked")
        chunks = [await client.chunk() for _ in range(5)]
        assert chunks == [b"data: one\n\n", b"data: two\n\n", b"data: three\n\n", b"data: [DONE]\n\n", b""]
        await client.close()


@pytest.mark.parametrize(
    "data", [post() + post("/tokenize") + get("/healthz") + post("/v1/completions", CHAT + b" ")], ids=["four"]
)
async def test_pipelined_requests_are_answered_in_order_however_the_bytes_arrive(data: bytes) -> None:
    async with served() as serving:
        for step in (len(data), 1):
            client = await serving.connect()
            for at in range(0, len(data), step):
                client.write(data[at : at + step])
                await client.writer.drain()
                if step == 1:
                    await asyncio.sleep(0)
            bodies = [(await client.answer()).body.split(b" {")[0] for _ in range(4)]
            assert bodies == [b"POST /v1/chat/completions", b"POST /tokenize", b"ok", b"POST /v1/completions"]
            await client.close()


async def test_a_long_pipeline_is_answered_in_order_with_a_bounded_queue() -> None:
    async with served(stream) as serving:
        client = await serving.connect()
        client.write(b"".join(post("/v1/completions", CHAT, f"x-request-id: id-{n}") for n in range(300)))
        answers = [await client.answer() for _ in range(300)]
        assert [answer.headers["x-request-id"] for answer in answers] == [f"id-{n}" for n in range(300)]
        await client.close()


async def test_a_chunked_request_body_is_put_together() -> None:
    head = b"POST /tokenize HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
    async with served() as serving:
        await serving.say(head + b'8;x=y\r\n{"model"\r\n8\r\n:"tiny"}\r\n0\r\nTrailer: v\r\n\r\n')
        request = serving.dispatch.requests[0]
        assert request.body == b'{"model":"tiny"}'
        assert "transfer-encoding" not in dict(request.headers)


async def test_a_client_that_expects_100_continue_gets_it_before_its_body_is_sent() -> None:
    head, _, body = post("/tokenize", CHAT, "Expect: 100-continue").partition(b"\r\n\r\n")
    async with served() as serving:
        client = await serving.connect()
        client.write(head + b"\r\n\r\n")
        assert (await client.head())[0] == 100
        client.write(body)
        assert (await client.answer()).status == 200
        await client.close()


async def test_http_1_0_is_answered_without_chunks_and_closed() -> None:
    async with served(stream) as serving:
        client = await serving.connect()
        client.write(post().replace(b"HTTP/1.1", b"HTTP/1.0"))
        _, headers = await client.head()
        assert headers["connection"] == "close"
        assert "transfer-encoding" not in headers
        assert (await client.rest()).endswith(b"data: three\n\ndata: [DONE]\n\n")
        await client.close()


async def test_http_1_0_may_ask_for_keep_alive_where_the_length_is_known() -> None:
    async with served() as serving:
        client = await serving.connect()
        for _ in range(2):
            client.write(b"GET /healthz HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
            answer = await client.answer()
            assert (answer.body, answer.headers["connection"]) == (b"ok", "keep-alive")
        await client.close()


async def test_connection_close_is_honoured() -> None:
    async with served() as serving:
        client = await serving.connect()
        client.write(get("/healthz", "Connection: close") + get("/healthz"))
        assert (await client.answer()).headers["connection"] == "close"
        assert await client.rest() == b""
        await client.close()


async def test_head_gets_the_head_of_get() -> None:
    async with served() as serving:
        client = await serving.connect()
        for path, length in (("/healthz", "2"), ("/v1/responses/x?model=tiny", "31")):
            client.write(get(path, method="HEAD"))
            answer = await client.answer(head_only=True)
            assert (answer.status, answer.headers["content-length"]) == (200, length)
        assert serving.dispatch.requests[0].method == "GET"
        client.write(get("/healthz"))
        assert (await client.answer()).body == b"ok"
        await client.close()


async def test_a_head_for_an_upgrade_is_read_as_if_it_had_none() -> None:
    lines = ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMA")
    async with served() as serving:
        client = await serving.connect()
        client.write((post("/tokenize", CHAT, *lines) + get("/healthz", *lines)) * 3)
        for _ in range(3):
            assert (await client.answer()).body == b"POST /tokenize " + CHAT
            assert (await client.answer()).body == b"ok"
        await client.close()
        assert [name for name, _ in serving.dispatch.requests[0].headers] == ["host", "content-type", "x-request-id"]


async def test_httpx_streams_and_reuses_its_connection() -> None:
    async with served(stream) as serving, httpx.AsyncClient(base_url=serving.url) as client:
        for _ in range(3):
            async with client.stream("POST", "/v1/chat/completions", content=CHAT) as response:
                lines = [line async for line in response.aiter_lines() if line]
            assert lines == ["data: one", "data: two", "data: three", "data: [DONE]"]
        compressed = await client.post("/tokenize", content=gzip.compress(CHAT), headers={"content-encoding": "gzip"})
        assert (compressed.status_code, compressed.headers["accept-encoding"]) == (415, "identity")
        assert compressed.headers["x-kvlane-error"] == "unsupported_encoding"
        told = compressed.json()["error"]
        assert (told["code"], told["type"]) == (415, "UnsupportedMediaTypeError")
        assert "'gzip'" in told["message"]
        twice = [("content-encoding", "identity"), ("content-encoding", "br")]
        assert (await client.post("/tokenize", content=CHAT, headers=twice)).status_code == 415
        for plain in ("Identity", "", "identity, identity"):
            taken = await client.post("/tokenize", content=CHAT, headers={"content-encoding": plain})
            assert taken.status_code == 200
        unencoded = await client.get("/v1/models", headers={"content-encoding": "gzip"})
        assert unencoded.status_code == 200
        assert serving.ingress.connections == 1


@pytest.mark.parametrize("framing", ["Content-Length: 20000000", "Transfer-Encoding: chunked"])
async def test_a_large_compressed_body_is_refused_before_it_is_sent(framing: str) -> None:
    async with served() as serving:
        client = await serving.connect()
        client.write(f"POST /tokenize HTTP/1.1\r\nHost: a\r\nContent-Encoding: gzip\r\n{framing}\r\n\r\n".encode())
        refused = await client.answer()
        assert (refused.status, refused.headers["x-kvlane-error"]) == (415, "unsupported_encoding")
        assert refused.headers["connection"] == "close"
        await client.close()
        assert not serving.dispatch.requests


async def test_the_openai_client_streams_and_does_not_stream() -> None:
    def chunk(text: str, finish: str | None) -> bytes:
        choice = {"index": 0, "delta": {"role": "assistant", "content": text}, "finish_reason": finish}
        event = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "tiny", "choices": [choice]}
        return b"data: %b\n\n" % json.dumps(event).encode()

    async def vllm(request: Request, sink: Sink) -> None:
        sink.routed(receipt(request))
        if json.loads(request.body).get("stream"):
            sink.head(200, SSE)
            sink.data(chunk("Hel", None), 1)
            sink.data(chunk("lo", "stop"), 1)
            sink.data(b"data: [DONE]\n\n", 0)
            return
        choice = {"index": 0, "message": {"role": "assistant", "content": "Hello"}, "finish_reason": "stop"}
        body = {"id": "c", "object": "chat.completion", "created": 1, "model": "tiny", "choices": [choice]}
        encoded = json.dumps(body).encode()
        sink.head(200, (*JSON, ("content-length", str(len(encoded)))))
        sink.data(encoded, 2)

    async def refuse(request: Request, sink: Sink) -> None:
        raise NoReplica("none is ready")

    async with (
        served(vllm) as serving,
        openai_sdk.AsyncOpenAI(base_url=serving.url + "/v1", api_key="k", max_retries=0) as client,
    ):
        said = await client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "hi"}])
        assert said.choices[0].message.content == "Hello"
        events = await client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "hi"}], stream=True
        )
        assert [event.choices[0].delta.content async for event in events] == ["Hel", "lo"]
        assert [model.id async for model in client.models.list()] == ["lora-a", "tiny"]
        serving.dispatch.script = refuse
        with pytest.raises(openai_sdk.InternalServerError) as caught:
            await client.completions.create(model="tiny", prompt="x")
        assert caught.value.type == "ServiceUnavailableError"


async def test_echo_answers_many_connections_at_once() -> None:
    async with served(echo) as serving:
        answers = await asyncio.gather(*(serving.say(post()) for _ in range(50)))
    assert all(answer.status == 200 for answer in answers)
