from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import openai as openai_sdk
import pytest

from router import keys
from tests.unit.http_ingress.serving import CHAT, DEADLINE_S, Answer, get, post, served
from tests.unit.locked import Locked


@pytest.fixture
def locked(tmp_path: Path) -> Locked:
    return Locked(tmp_path)


def bearer(key: str) -> str:
    return f"Authorization: Bearer {key}"


def error_of(answer: Answer) -> dict[str, Any]:
    error: dict[str, Any] = json.loads(answer.body)["error"]
    return error


async def test_a_request_without_a_valid_key_is_refused_before_any_work_and_the_connection_goes_on(
    locked: Locked, caplog: pytest.LogCaptureFixture
) -> None:
    wrong = keys.new("nobody")[0]
    async with served(gate=locked.gate) as serving:
        client = await serving.connect()
        for lines in ((), (bearer(wrong),), ("Authorization: Basic eDp5",), ("X-Api-Key: mine",)):
            client.write(post("/v1/chat/completions", CHAT, *lines))
            answer = await client.answer()
            assert (answer.status, answer.headers["www-authenticate"]) == (401, "Bearer")
            assert answer.headers["x-kvlane-error"] == "invalid_api_key"
            error = error_of(answer)
            assert (error["code"], error["type"]) == ("invalid_api_key", "AuthenticationError")
        for path in ("/v1/models", "/v1/models/tiny", "/nothing", "/health", "/docs"):
            client.write(get(path))
            assert (await client.answer()).status == 401
        assert not serving.dispatch.requests
        assert serving.refused == [("http", "invalid_api_key")] * 9
        reasons = ["missing", "unknown", "malformed", "malformed", *["missing"] * 5]
        assert locked.refused == [("http", reason) for reason in reasons]
        assert wrong not in caplog.text
        await client.close()


async def test_the_key_lets_in_and_goes_no_further(locked: Locked) -> None:
    async with served(gate=locked.gate) as serving:
        for lines in ((bearer(locked.all),), (f"x-api-key: {locked.all}",), (bearer(locked.all), "X-Api-Key: other")):
            assert (await serving.say(post("/v1/chat/completions", CHAT, *lines, "X-Other: 1"))).status == 200
        requests = serving.dispatch.requests
        assert [request.tenant for request in requests] == ["admin"] * 3
        for request in requests:
            names = [name for name, _ in request.headers]
            assert ("x-other", "1") in request.headers
            assert not {"authorization", "x-api-key"} & set(names)
            assert locked.all not in repr(request)
        assert locked.gate.asked == {"admin": 3, "team-a": 0}


async def test_without_keys_to_ask_for_credentials_are_relayed() -> None:
    async with served() as serving:
        await serving.say(post("/v1/chat/completions", CHAT, "Authorization: Bearer x", "X-Api-Key: y"))
        (request,) = serving.dispatch.requests
        assert {("authorization", "Bearer x"), ("x-api-key", "y")} <= set(request.headers)
        assert request.tenant == ""


async def test_probes_scrapes_and_preflights_need_no_key(locked: Locked) -> None:
    async with served(gate=locked.gate) as serving:
        for path in ("/healthz", "/readyz", "/metrics"):
            assert (await serving.say(get(path))).status == 200
        wish = (
            "Origin: http://o",
            "Access-Control-Request-Method: POST",
            "Access-Control-Request-Headers: authorization",
        )
        answer = await serving.say(get("/v1/chat/completions", *wish, method="OPTIONS"))
        assert (answer.status, answer.headers["access-control-allow-headers"]) == (200, "authorization")
        assert (await serving.say(get("/v1/chat/completions", method="OPTIONS"))).status == 401
        assert (await serving.say(get("//healthz"))).status == 401
        answer = await serving.say(post("/v1/chat/completions", CHAT, "Origin: http://o"))
        assert (answer.status, answer.headers["access-control-allow-origin"]) == (401, "*")


LARGE = b'{"messages":[{"role":"user","content":"%b"}],"model":"lora-a"}' % (b"x" * 400_000)


@pytest.mark.parametrize(
    "body",
    [
        b'{"model":"lora-a"}',
        b'{"model":"tiny","model":"lora-a"}',
        b'{"model":"tiny","mod\\u0065l":"lora-a"}',
        b'{"model":"lora\\u002da"}',
        LARGE,
        LARGE.replace(b"{", b'{"model":"tiny",', 1),
    ],
    ids=["plain", "the last counts", "an escaped name", "an escaped value", "large", "large, the last counts"],
)
async def test_a_key_is_for_its_models_alone(locked: Locked, body: bytes) -> None:
    async with served(gate=locked.gate) as serving:
        answer = await serving.say(post("/v1/chat/completions", body, bearer(locked.tiny)))
        assert (answer.status, answer.headers["x-kvlane-error"]) == (403, "model_forbidden")
        assert error_of(answer)["param"] == "model"
        assert locked.refused == [("http", "model")]
        assert not serving.dispatch.requests
        assert (await serving.say(post("/v1/chat/completions", CHAT, bearer(locked.tiny)))).status == 200
        assert serving.dispatch.requests[0].tenant == "team-a"


@pytest.mark.parametrize(
    ("named", "status"),
    [(["tiny"], 200), (["lora-a"], 403), (["tiny", "lora-a"], 400), (["lora-a", "tiny"], 400)],
)
async def test_a_form_is_for_one_model_that_the_key_is_for(locked: Locked, named: list[str], status: int) -> None:
    part = '--b\r\nContent-Disposition: form-data; name="model"\r\n\r\n{}\r\n'
    body = ("".join(part.format(name) for name in named) + "--b--\r\n").encode()
    head = "POST /v1/audio/transcriptions HTTP/1.1\r\nHost: a\r\nContent-Type: multipart/form-data; boundary=b\r\n"
    sent = f"{head}{bearer(locked.tiny)}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
    async with served(gate=locked.gate) as serving:
        assert (await serving.say(sent)).status == status
        assert [request.model for request in serving.dispatch.requests] == (named if status == 200 else [])


async def test_a_key_sees_its_models_alone(locked: Locked) -> None:
    async with served(gate=locked.gate) as serving:
        for key, names in ((locked.all, ["lora-a", "tiny"]), (locked.tiny, ["tiny"])):
            listed = await serving.say(get("/v1/models", bearer(key)))
            assert [model["id"] for model in json.loads(listed.body)["data"]] == names
        assert (await serving.say(get("/v1/models/tiny", bearer(locked.tiny)))).status == 200
        assert (await serving.say(get("/v1/models/lora-a", bearer(locked.tiny)))).status == 404


@pytest.mark.parametrize("framing", ["Content-Length: 1000000", "Transfer-Encoding: chunked"])
async def test_a_large_body_without_a_key_is_refused_before_it_is_read(locked: Locked, framing: str) -> None:
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nExpect: 100-continue\r\n"
    async with served(gate=locked.gate) as serving:
        client = await serving.connect()
        client.write(f"{head}{framing}\r\n\r\n".encode())
        answer = await client.answer()
        assert (answer.status, answer.headers["connection"]) == (401, "close")
        assert error_of(answer)["code"] == "invalid_api_key"
        client.end()
        assert await client.rest() == b""
        await client.close()
        client = await serving.connect()
        client.write(f"{head}{framing}\r\n{bearer(locked.all)}\r\n\r\n".encode())
        assert (await client.head())[0] == 100
        await client.close()
        assert locked.refused == [("http", "missing")]


async def test_the_openai_client_is_told_what_is_wrong_with_its_key(locked: Locked) -> None:
    async with served(gate=locked.gate) as serving:
        async with openai_sdk.AsyncOpenAI(
            base_url=f"{serving.url}/v1", api_key=keys.new("x")[0], max_retries=0
        ) as client:
            with pytest.raises(openai_sdk.AuthenticationError) as caught:
                await client.models.list()
            assert caught.value.code == "invalid_api_key"
        async with openai_sdk.AsyncOpenAI(base_url=f"{serving.url}/v1", api_key=locked.tiny, max_retries=0) as client:
            assert [model.id async for model in client.models.list()] == ["tiny"]
            with pytest.raises(openai_sdk.PermissionDeniedError):
                await client.completions.create(model="lora-a", prompt="x")


async def test_many_clients_without_keys_leave_nothing_behind(locked: Locked) -> None:
    async with served(gate=locked.gate) as serving:
        async with asyncio.timeout(3 * DEADLINE_S):
            answers = await asyncio.gather(*(serving.say(post()) for _ in range(100)))
        assert {answer.status for answer in answers} == {401}
        await serving.until(lambda: serving.ingress.connections == 0)
        assert locked.gate.asked == {"admin": 0, "team-a": 0}
