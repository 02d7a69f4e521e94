"""What a request asks for: origins, paths, the model, adapters and ids; what is refused, counted and logged."""

from __future__ import annotations

import json
import logging

import pytest

from router.dispatch import EXPLAIN_HEADER
from router.errors import ModelNotFound, NoReplica
from router.types import Request, Sink
from tests.unit.http_ingress.serving import CHAT, get, post, served


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


@pytest.mark.parametrize(("model", "lora"), [("lora-a", "lora-a"), ("tiny", ""), ("unheard-of", "")])
async def test_an_adapter_that_is_asked_for_by_its_name_is_the_requests_lora(model: str, lora: str) -> None:
    async with served() as serving:
        body = json.dumps({"model": model, "messages": []}).encode()
        await serving.say(post("/v1/chat/completions", body, "X-Session-Id: s1", "X-Kvlane-Explain: 1"))
    (request,) = serving.dispatch.requests
    assert (request.model, request.lora, request.session_id) == (model, lora, "s1")
    assert EXPLAIN_HEADER in request.headers
