"""Requests and responses over real sockets: framing, routing, headers and errors."""

from __future__ import annotations

import asyncio
import gzip
import json
import logging

import httpx
import msgspec
import openai as openai_sdk
import pytest

import router.up  # noqa: F401  It has an error of its own.
from router.dispatch import EXPLAIN_HEADER
from router.errors import (
    ClientTooSlow,
    KvlaneError,
    MethodNotAllowed,
    ModelNotFound,
    NoReplica,
    Overloaded,
    ReplicaLost,
)
from router.ingress.http_response import Exchange
from router.types import Candidate, Request, Sink
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


async def test_browsers_from_any_origin_are_allowed_by_default() -> None:
    wish = ("Origin: http://o", "Access-Control-Request-Method: POST", "Access-Control-Request-Headers: x-a, x-b")
    async with served() as serving:
        answer = await serving.say(get("/v1/chat/completions", *wish, method="OPTIONS"))
        assert (answer.status, answer.headers["access-control-allow-origin"]) == (200, "*")
        assert answer.headers["access-control-allow-headers"] == "x-a, x-b"
        assert "POST" in answer.headers["access-control-allow-methods"]
        assert (await serving.say(post("/tokenize", CHAT, wish[0]))).headers["access-control-allow-origin"] == "*"
        assert "access-control-allow-origin" not in (await serving.say(post())).headers
        refused = await serving.say(get("/nothing", wish[0]))
        assert (refused.status, refused.headers["access-control-allow-origin"]) == (404, "*")


async def test_only_configured_origins_are_allowed() -> None:
    wish = "Access-Control-Request-Method: POST"
    async with served(cors_origins=("http://good",)) as serving:
        good = await serving.say(get("/tokenize", "Origin: http://good", wish, method="OPTIONS"))
        assert (good.status, good.headers["access-control-allow-origin"]) == (200, "http://good")
        bad = await serving.say(get("/tokenize", "Origin: http://bad", wish, method="OPTIONS"))
        assert (bad.status, bad.body) == (400, b"Disallowed CORS origin")
        answer = await serving.say(post("/tokenize", CHAT, "Origin: http://bad"))
        assert "access-control-allow-origin" not in answer.headers
    async with served(cors_origins=()) as serving:
        off = await serving.say(get("/tokenize", "Origin: http://good", wish, method="OPTIONS"))
        assert (off.status, off.headers["allow"]) == (405, "POST")


async def test_the_routers_own_pages() -> None:
    async with served() as serving:
        assert (await serving.say(get("/healthz"))).body == b"ok"
        ready = await serving.say(get("/readyz"))
        assert (ready.status, json.loads(ready.body)) == (
            200,
            {
                "ready": True,
                "models": {"tiny": 1},
                "caches": {"r-1": {"mode": "exact"}, "r-2": {"mode": "approximate", "cause": "no events"}},
                "lanes": {},
            },
        )
        serving.fleet.ready = False
        assert (await serving.say(get("/readyz"))).status == 503
        metrics = await serving.say(get("/metrics"))
        assert (metrics.body, metrics.headers["content-type"]) == (b"kvlane_up 1\n", "text/plain; version=0.0.4")
        models = json.loads((await serving.say(get("http://a/v1/models"))).body)
        assert [model["id"] for model in models["data"]] == ["lora-a", "tiny"]
        assert json.loads((await serving.say(get("/v1/models/tiny"))).body)["max_model_len"] == 64
        missing = await serving.say(get("/v1/models/org%2Fnobody"))
        assert (missing.status, json.loads(missing.body)["error"]["param"]) == (404, "model")
        assert (await serving.say(get("/healthz", method="DELETE"))).headers["allow"] == "GET, HEAD"


@pytest.mark.parametrize(
    "path", ["/health", "/reset_prefix_cache", "/v1/load_lora_adapter", "/v1/nothing", "/", "*", "/v1/%2e%2e/health"]
)
async def test_an_engines_own_paths_are_out_of_reach(path: str) -> None:
    async with served() as serving:
        for data in (get(path), post(path, b"{")):
            answer = await serving.say(data)
            assert (answer.status, answer.headers["x-kvlane-error"]) == (404, "path_not_found")
        assert not serving.dispatch.requests


@pytest.mark.parametrize("data", [post(), post("/v1/whatever"), post("/tokenize"), get("/v1/responses/x?model=tiny")])
async def test_before_the_first_replica_came_dispatch_judges_what_could_be_relayed(data: bytes) -> None:
    async def refuse(request: Request, sink: Sink) -> None:
        raise NoReplica("none is ready")

    async with served(refuse) as serving:
        serving.fleet.cards, serving.fleet.routes = [], {}
        answer = await serving.say(data)
        assert (answer.status, answer.headers["x-kvlane-error"]) == (503, "no_replica")
        for path in ("/health", "/v1/load_lora_adapter", "/reset_prefix_cache"):
            assert (await serving.say(post(path))).headers["x-kvlane-error"] == "path_not_found"
        assert len(serving.dispatch.requests) == 1


async def test_path_is_checked_before_method_and_method_before_body() -> None:
    async with served() as serving:
        wrong = await serving.say(get("/v1/chat/completions"))
        assert (wrong.status, wrong.headers["allow"]) == (405, "POST")
        assert (await serving.say(get("/v1/responses/x", method="PUT"))).headers["allow"] == "GET, HEAD"


@pytest.mark.parametrize(
    ("data", "param", "said"),
    [
        (post(body=b'{"model":'), None, "(byte 9)"),
        (post(body=b"[]"), None, "must be a JSON object"),
        (post(body=b'{"model":7}'), "model", "Expected `str"),
        (post(body=b'{"messages":[]}'), "model", "you must provide a model parameter"),
        (post(body=b'{"x":"\xff"}'), None, "not valid UTF-8"),
        (get("/v1/%ff"), None, "path is not valid UTF-8"),
    ],
)
async def test_a_bad_request_is_refused_in_openais_shape_and_the_connection_goes_on(
    data: bytes, param: str | None, said: str
) -> None:
    async with served() as serving:
        client = await serving.connect()
        client.write(data + get("/healthz"))
        answer = await client.answer()
        error = json.loads(answer.body)["error"]
        assert (answer.status, error["code"], error["type"], error["param"]) == (400, 400, "BadRequestError", param)
        assert said in error["message"]
        assert answer.headers["x-kvlane-error"] == "invalid_request"
        assert (await client.answer()).body == b"ok"
        await client.close()


async def test_the_model_comes_from_wherever_the_request_can_name_it() -> None:
    form = b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\nwhisper\r\n--b--\r\n'
    async with served() as serving:
        head = f"POST /v1/audio/transcriptions HTTP/1.1\r\nHost: a\r\nContent-Length: {len(form)}\r\n"
        await serving.say(head.encode() + b"Content-Type: Multipart/Form-Data; boundary=b\r\n\r\n" + form)
        await serving.say(get("/v1/responses/x?model=q"))
        await serving.say(get("/v1/responses/x", "x-kvlane-model: h"))
        await serving.say(get("/v1/responses/x"))
        serving.fleet.cards = []
        assert (await serving.say(get("/v1/responses/x"))).status == 400
        assert [request.model for request in serving.dispatch.requests] == ["whisper", "q", "h", "tiny"]
        assert serving.dispatch.requests[0].body == form
    async with served(default_model="base") as serving:
        await serving.say(post(body=b"{}"))
        assert serving.dispatch.requests[0].model == "base"


async def test_session_salt_and_priority_are_read() -> None:
    body = b'{"model":"tiny","user":"u","cache_salt":"s","priority":2}'
    async with served() as serving:
        await serving.say(post(body=body))
        await serving.say(post("/tokenize", body, "x-session-id: mine"))
        first, second = serving.dispatch.requests
    assert (first.session_id, first.cache_salt, first.priority) == ("u", "s", 2)
    assert second.session_id == "mine"


async def test_a_clients_request_id_is_kept_where_it_is_trusted_and_harmless() -> None:
    async with served() as serving:
        assert (await serving.say(get("/healthz", "X-Request-ID: mine"))).headers["x-request-id"] == "mine"
        for bad in ("a b", "x" * 129, "é"):
            made = (await serving.say(get("/healthz", f"X-Request-ID: {bad}"))).headers["x-request-id"]
            assert len(made) == 32
        await serving.say(post("/tokenize", CHAT, "X-Request-ID: mine"))
        assert dict(serving.dispatch.requests[0].headers)["x-request-id"] == "mine"
    async with served(trust_request_id=False) as serving:
        assert (await serving.say(get("/healthz", "X-Request-ID: mine"))).headers["x-request-id"] != "mine"


async def test_what_is_refused_without_dispatch_is_counted_and_nothing_else() -> None:
    async def fail(request: Request, sink: Sink) -> None:
        raise NoReplica("none is ready")

    async with served(max_body_bytes=1000) as serving:
        for data in (
            post(),
            post(body=b"{"),
            get("/v1/nothing"),
            get("/v1/models/nobody"),
            get("/v1/chat/completions"),
            post(body=b"x" * 1001),
            b"nonsense\r\n\r\n",
        ):
            await serving.say(data)
        serving.dispatch.script = fail
        await serving.say(post())
    names = [
        *("invalid_request", "path_not_found", "model_not_found", "method_not_allowed"),
        *("body_too_large", "invalid_request"),
    ]
    assert serving.refused == [("http", name) for name in names]


async def test_what_a_client_sends_cannot_forge_or_flood_the_log(caplog: pytest.LogCaptureFixture) -> None:
    async def fail(request: Request, sink: Sink) -> None:
        raise ModelNotFound(f"The model `{request.model}` does not exist.")

    caplog.set_level(logging.DEBUG, "kvlane.http")
    async with served(fail) as serving:
        forged = json.dumps({"model": "x\n2026-01-01 ERROR forged"}).encode()
        for data in (
            post(body=forged),
            post(body=b'{"model":"%b"}' % (b"m" * 100_000)),
            post("/v1/x%0a2026-01-01%20ERROR%20forged"),
            get("/v1/" + "p" * 30_000),
            get("/v1/models/" + "n" * 30_000),
        ):
            answer = await serving.say(data)
            assert answer.status == 404
            assert len(answer.body) < 2000
    lines = [record.getMessage() for record in caplog.records if record.name == "kvlane.http"]
    assert len([line for line in lines if " 404 " in line]) == 10
    assert all("\n" not in line and len(line) < 1000 for line in lines)


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


async def test_httpx_streams_and_reuses_its_connection() -> None:
    async with served(stream) as serving, httpx.AsyncClient(base_url=serving.url) as client:
        for _ in range(3):
            async with client.stream("POST", "/v1/chat/completions", content=CHAT) as response:
                lines = [line async for line in response.aiter_lines() if line]
            assert lines == ["data: one", "data: two", "data: three", "data: [DONE]"]
        compressed = await client.post("/tokenize", content=gzip.compress(CHAT), headers={"content-encoding": "gzip"})
        assert compressed.status_code == 400
        assert serving.ingress.connections == 1


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


@pytest.mark.parametrize(("model", "lora"), [("lora-a", "lora-a"), ("tiny", ""), ("unheard-of", "")])
async def test_an_adapter_that_is_asked_for_by_its_name_is_the_requests_lora(model: str, lora: str) -> None:
    async with served() as serving:
        body = json.dumps({"model": model, "messages": []}).encode()
        await serving.say(post("/v1/chat/completions", body, "X-Session-Id: s1", "X-Kvlane-Explain: 1"))
    (request,) = serving.dispatch.requests
    assert (request.model, request.lora, request.session_id) == (model, lora, "s1")
    assert EXPLAIN_HEADER in request.headers


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
