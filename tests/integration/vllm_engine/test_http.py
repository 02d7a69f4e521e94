"""HTTP calls of a real vLLM engine: whole and streamed answers, and its own words for what is bad."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from engine.vllm import VllmEngine
from tests.integration.vllm_engine.asked import SCHEMA, TOOLS, USER
from tests.integration.vllm_fixtures import FOREIGN_WARNINGS, MODEL, ask, http_call, post

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.asyncio(loop_scope="package"),
    FOREIGN_WARNINGS,
]


async def test_a_completion_comes_as_one_body(engine: VllmEngine) -> None:
    out = await post(engine, "/v1/completions", prompt="Hello", max_tokens=8, temperature=0)
    assert (out.status, out.headers["content-type"]) == (200, "application/json")
    assert int(out.headers["content-length"]) == len(out.body)
    answer = out.json()
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"] == answer["usage"] | {"prompt_tokens": 3, "completion_tokens": 8, "total_tokens": 11}


async def test_a_streamed_completion_says_the_same_as_the_whole_one(engine: VllmEngine) -> None:
    fields: dict[str, Any] = {"prompt": "Hello", "max_tokens": 8, "temperature": 0}
    whole = (await post(engine, "/v1/completions", **fields)).json()
    out = await post(engine, "/v1/completions", stream=True, **fields)
    assert out.headers["content-type"].startswith("text/event-stream")
    events = out.events()
    assert "".join(event["choices"][0]["text"] for event in events) == whole["choices"][0]["text"]
    assert events[-1]["choices"][0]["finish_reason"] == "length"
    assert out.tokens == len(events)


async def test_a_streamed_chat_begins_with_the_role_and_ends_with_usage(engine: VllmEngine) -> None:
    options = {"include_usage": True}
    out = await post(
        engine, "/v1/chat/completions", messages=USER, max_tokens=5, stream=True, stream_options=options, temperature=0
    )
    events = out.events()
    assert events[0]["choices"][0]["delta"]["role"] == "assistant"
    assert events[-1]["usage"]["completion_tokens"] == 5
    whole = await post(engine, "/v1/chat/completions", messages=USER, max_tokens=5, temperature=0)
    text = "".join(event["choices"][0]["delta"].get("content", "") for event in events[:-1])
    assert text == whole.json()["choices"][0]["message"]["content"]


async def test_only_the_first_token_of_a_stream_is_urgent(engine: VllmEngine) -> None:
    out = await post(engine, "/v1/chat/completions", messages=USER, max_tokens=5, stream=True)
    assert out.urgent == [False, True] + [False] * (len(out.pieces) - 2)
    whole = await post(engine, "/v1/chat/completions", messages=USER, max_tokens=5)
    assert not any(whole.urgent)


async def test_two_choices_over_http(engine: VllmEngine) -> None:
    answer = (await post(engine, "/v1/completions", prompt="Hello", max_tokens=4, n=2, seed=3)).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    assert answer["usage"]["completion_tokens"] == 8
    events = (await post(engine, "/v1/completions", prompt="Hello", max_tokens=4, n=2, stream=True)).events()
    assert {event["choices"][0]["index"] for event in events} == {0, 1}


async def test_logprobs_over_http(engine: VllmEngine) -> None:
    answer = (await post(engine, "/v1/completions", prompt="Hello", max_tokens=3, logprobs=2, temperature=0)).json()
    logprobs = answer["choices"][0]["logprobs"]
    assert len(logprobs["tokens"]) == len(logprobs["token_logprobs"]) == 3
    assert all(len(top) == 2 for top in logprobs["top_logprobs"])
    chatted = await post(engine, "/v1/chat/completions", messages=USER, max_tokens=3, logprobs=True, top_logprobs=2)
    content = chatted.json()["choices"][0]["logprobs"]["content"]
    assert [len(position["top_logprobs"]) for position in content] == [2, 2, 2]


async def test_tools_change_the_prompt_over_http(engine: VllmEngine) -> None:
    plain = await post(engine, "/v1/chat/completions", messages=USER, max_tokens=1)
    tools = await post(engine, "/v1/chat/completions", messages=USER, max_tokens=1, tools=TOOLS, tool_choice="none")
    assert tools.json()["usage"]["prompt_tokens"] > plain.json()["usage"]["prompt_tokens"]


async def test_a_tool_is_called_over_http(engine: VllmEngine) -> None:
    choice = {"type": "function", "function": {"name": "weather"}}
    strict = [{"type": "function", "function": TOOLS[0]["function"] | {"strict": True}}]
    fields: dict[str, Any] = {"messages": USER, "tools": strict, "tool_choice": choice, "max_tokens": 400, "seed": 1}
    message = (await post(engine, "/v1/chat/completions", **fields)).json()["choices"][0]["message"]
    (call,) = message["tool_calls"]
    assert call["function"]["name"] == "weather"
    assert isinstance(json.loads(call["function"]["arguments"])["sunny"], bool)


@pytest.mark.parametrize(
    ("constraint", "pattern"),
    [
        ({"json": SCHEMA}, r'\s*\{\s*"sunny"\s*:\s*(true|false)\s*\}\s*'),
        ({"regex": "[0-9]{3}"}, "[0-9]{3}"),
        ({"choice": ["yes", "no"]}, "yes|no"),
    ],
    ids=["json", "regex", "choice"],
)
async def test_structured_output_over_http(engine: VllmEngine, constraint: dict[str, Any], pattern: str) -> None:
    out = await post(engine, "/v1/completions", prompt="Hello", max_tokens=200, structured_outputs=constraint, seed=1)
    assert re.fullmatch(pattern, out.json()["choices"][0]["text"])


async def test_the_other_endpoints_answer_as_vllm_does(engine: VllmEngine) -> None:
    models = await ask(engine, http_call("/v1/models", b"", "GET"))
    assert [card["id"] for card in models.json()["data"]] == [MODEL]
    tokens = (await post(engine, "/tokenize", prompt="Hello")).json()["tokens"]
    assert (await post(engine, "/detokenize", tokens=tokens)).json()["prompt"] == "Hello"
    version = await ask(engine, http_call("/version?verbose=1", b"", "GET"))
    assert version.json()["version"] == engine.info().version


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/v1/embeddings", {"model": MODEL, "input": "x"}, 404),
        ("/v1/nothing", {}, 404),
        ("/v1/completions", {"model": "other", "prompt": "x"}, 404),
        ("/v1/completions", b'{"model": "tiny", "prompt"', 400),
        ("/v1/completions", b'{"model": "tiny", "prompt": "\xff"}', 400),
        ("/v1/completions", {"model": MODEL, "prompt": "x", "temperature": -1}, 400),
        ("/v1/completions", {"model": MODEL, "prompt": "x", "max_tokens": "many"}, 400),
        ("/v1/completions", {"model": MODEL, "prompt": ""}, 400),
        ("/v1/completions", {"model": MODEL, "prompt": "hi " * 9000}, 400),
        ("/v1/chat/completions", {"model": MODEL, "messages": "x"}, 400),
        ("/v1/chat/completions", {"model": MODEL, "messages": USER, "n": 0}, 400),
    ],
)
async def test_a_bad_request_over_http_gets_vllms_own_answer(
    engine: VllmEngine, path: str, body: Any, status: int
) -> None:
    out = await ask(engine, http_call(path, body))
    assert not out.failures
    assert out.status == status
    assert out.headers["content-type"] == "application/json"
    await engine.check_health()
