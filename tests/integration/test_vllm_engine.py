"""A real vLLM engine on the tiny model: both protocols, aborts in every phase, bad input, health and the end."""

from __future__ import annotations

import asyncio
import json
import re
import statistics
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from kvlane.v1 import inference_pb2 as pb

from engine.tiny_model import CONTEXT_TOKENS, make_tiny_model
from engine.vllm import VllmEngine
from router.errors import InvalidRequest, KvlaneError, ModelNotFound, NotSupported, PathNotFound
from router.lane.frames import Submit
from router.types import Load
from tests.integration.vllm_fixtures import (
    DEADLINE_S,
    ENGINE_ARGS,
    FOREIGN_WARNINGS,
    MODEL,
    RecordingOut,
    ask,
    grpc_call,
    http_call,
    post,
    running_engine,
    submit,
)

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.asyncio(loop_scope="module"),
    FOREIGN_WARNINGS,
]

LONG = 3000
USER = [{"role": "user", "content": "hi"}]
SCHEMA = {
    "type": "object",
    "properties": {"sunny": {"type": "boolean"}},
    "required": ["sunny"],
    "additionalProperties": False,
}
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "weather", "description": "d", "parameters": SCHEMA}}
]
Sampling = pb.SamplingParams


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models"))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(model: Path) -> AsyncIterator[VllmEngine]:
    async with running_engine(model) as started:
        yield started


async def generate(engine: VllmEngine, text: str = "Hello", **sampling: Any) -> list[pb.GenerateResponse]:
    request = pb.GenerateRequest(model=MODEL, text=text, sampling=Sampling(**sampling))
    out = await ask(engine, grpc_call("Generate", request))
    assert not out.failures, out.failures
    return out.messages(pb.GenerateResponse)


async def chat(engine: VllmEngine, request: pb.ChatRequest) -> list[pb.ChatResponse]:
    out = await ask(engine, grpc_call("Chat", request))
    assert not out.failures, out.failures
    return out.messages(pb.ChatResponse)


async def refusal(engine: VllmEngine, method: str, request: Any) -> KvlaneError:
    out = await ask(engine, grpc_call(method, request))
    assert not out.pieces
    return out.failures[0]


async def settled(engine: VllmEngine) -> None:
    """Waits until the engine holds nothing any more."""
    async with asyncio.timeout(DEADLINE_S):
        while (load := engine.load()).running or load.waiting:
            await asyncio.sleep(0.0005)


# -- what the engine says of itself


async def test_info_names_the_model_its_routes_and_its_limits(engine: VllmEngine, model: Path) -> None:
    info = engine.info()
    assert info.kind == "vllm"
    assert [(card.name, card.parent, card.max_model_len) for card in info.models] == [(MODEL, "", CONTEXT_TOKENS)]
    routes = {(route.path, method) for route in info.routes for method in route.methods}
    assert {
        ("/v1/chat/completions", "POST"),
        ("/v1/completions", "POST"),
        ("/v1/models", "GET"),
        ("/v1/responses/{response_id}", "GET"),
        ("/tokenize", "POST"),
    } <= routes
    assert (info.max_num_seqs, info.kv_blocks, info.kv_block_tokens) == (8, 1024, 32)
    assert info.prefix_caching
    assert info.version.startswith("0.32")


async def test_a_living_engine_is_healthy(engine: VllmEngine) -> None:
    await engine.check_health()


async def test_streams_beyond_the_batch_wait_and_all_leave_the_counts(engine: VllmEngine) -> None:
    loads: list[Load] = []
    engine.on_step(lambda: loads.append(engine.load()))
    body = {"model": MODEL, "prompt": "Hello", "max_tokens": 64, "ignore_eos": True}
    outs = [submit(engine, http_call("/v1/completions", body))[0] for _ in range(12)]
    assert engine.load().waiting == 12
    await asyncio.gather(*(out.ended() for out in outs))
    assert max(load.running for load in loads) == ENGINE_ARGS["max_num_seqs"]
    assert any((load.running, load.waiting) == (8, 4) for load in loads)
    assert all(load.running + load.waiting <= 12 for load in loads)
    assert max(load.kv_usage for load in loads) > 0
    assert max(load.step_ms for load in loads) > 0
    assert (engine.load().running, engine.load().waiting) == (0, 0)


async def test_waiting_prompts_count_as_queued_prefill(engine: VllmEngine) -> None:
    body = {"model": MODEL, "prompt": "The old harbour town. " * 40, "max_tokens": 200, "ignore_eos": True}
    outs = [submit(engine, http_call("/v1/completions", body | {"cache_salt": str(i)}))[0] for i in range(12)]
    most = 0
    while not all(out.done.is_set() for out in outs):
        most = max(most, engine.load().queued_prefill_tokens)
        await asyncio.sleep(0.001)
    assert most > 100
    assert engine.load().queued_prefill_tokens == 0


# -- HTTP


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


# -- gRPC


async def test_generate_streams_text_and_ids_and_ends_with_usage(engine: VllmEngine) -> None:
    messages = await generate(engine, max_tokens=8, temperature=0)
    whole = (await post(engine, "/v1/completions", prompt="Hello", max_tokens=8, temperature=0)).json()
    assert "".join(message.text for message in messages) == whole["choices"][0]["text"]
    assert sum(len(message.token_ids) for message in messages) == 8
    assert [message.finish_reason for message in messages] == [""] * (len(messages) - 1) + ["length"]
    assert not any(message.HasField("usage") for message in messages[:-1])
    assert messages[-1].usage == pb.Usage(prompt_tokens=3, completion_tokens=8)
    assert not any(message.HasField("route") for message in messages)


async def test_generate_counts_tokens_and_hurries_the_first_alone(engine: VllmEngine) -> None:
    out = await ask(engine, grpc_call("Generate", pb.GenerateRequest(text="Hello", sampling=Sampling(max_tokens=4))))
    assert (out.tokens, out.finishes) == (4, ["length"])
    assert out.urgent == [True] + [False] * (len(out.pieces) - 1)


async def test_token_ids_are_the_same_prompt_as_their_text(engine: VllmEngine) -> None:
    ids = (await post(engine, "/tokenize", prompt="Hello")).json()["tokens"]
    request = pb.GenerateRequest(
        model=MODEL, token_ids=pb.TokenIds(ids=ids), sampling=Sampling(max_tokens=6, temperature=0)
    )
    by_ids = (await ask(engine, grpc_call("Generate", request))).messages(pb.GenerateResponse)
    by_text = await generate(engine, max_tokens=6, temperature=0)
    assert "".join(message.text for message in by_ids) == "".join(message.text for message in by_text)
    assert by_ids[-1].usage == by_text[-1].usage


async def test_unset_max_tokens_fills_the_context(engine: VllmEngine) -> None:
    messages = await generate(engine, "hi " * 2000, temperature=0, ignore_eos=True)
    usage = messages[-1].usage
    assert usage.prompt_tokens + usage.completion_tokens == CONTEXT_TOKENS


async def test_a_repeated_prompt_is_reported_as_cached(engine: VllmEngine) -> None:
    prompt = "The lighthouse stands on the wrong side of the bay. " * 20
    request = pb.GenerateRequest(text=prompt, sampling=Sampling(max_tokens=2))

    async def cached(salt: str) -> int:
        request.routing.cache_salt = salt
        out = await ask(engine, grpc_call("Generate", request))
        return out.messages(pb.GenerateResponse)[-1].usage.cached_tokens

    assert await cached("one") == 0
    assert await cached("one") > 200
    assert await cached("two") == 0


async def test_each_choice_ends_and_usage_counts_them_all(engine: VllmEngine) -> None:
    messages = await generate(engine, n=2, max_tokens=5, seed=1)
    for index in (0, 1):
        own = [message for message in messages if message.index == index]
        assert sum(len(message.token_ids) for message in own) == 5
        assert [message.finish_reason for message in own if message.finish_reason] == ["length"]
    assert [message.HasField("usage") for message in messages] == [False] * (len(messages) - 1) + [True]
    assert messages[-1].usage.completion_tokens == 10


async def test_logprobs_over_grpc(engine: VllmEngine) -> None:
    messages = await generate(engine, max_tokens=3, temperature=0, logprobs=2, prompt_logprobs=1)
    first, second, _ = messages[0].prompt_logprobs
    assert not any(message.prompt_logprobs for message in messages[1:])
    assert first == pb.PositionLogprobs()
    assert second.chosen.logprob < 0
    assert [top.rank for top in second.top] == [1]
    tokens = [token for message in messages for token in message.token_ids]
    positions = [position for message in messages for position in message.logprobs]
    assert [position.chosen.token_id for position in positions] == tokens
    for position in positions:
        assert [top.rank for top in position.top] == [1, 2]
        assert position.top[0] == position.chosen
    only_chosen = await generate(engine, max_tokens=1, logprobs=0)
    assert not only_chosen[0].logprobs[0].top
    assert only_chosen[0].logprobs[0].chosen.logprob < 0


async def test_a_stop_string_ends_the_text_before_it(engine: VllmEngine) -> None:
    text = "".join(message.text for message in await generate(engine, max_tokens=12, temperature=0))
    stop = text[10:13]
    messages = await generate(engine, max_tokens=12, temperature=0, stop=[stop])
    assert "".join(message.text for message in messages) == text[: text.index(stop)]
    assert (messages[-1].finish_reason, messages[-1].stop_reason) == ("stop", stop)


async def test_a_stop_token_ends_the_answer(engine: VllmEngine) -> None:
    third = (await generate(engine, max_tokens=3, temperature=0))[-1].token_ids[-1]
    messages = await generate(engine, max_tokens=12, temperature=0, stop_token_ids=[third])
    assert (messages[-1].finish_reason, messages[-1].stop_reason) == ("stop", str(third))
    assert messages[-1].usage.completion_tokens == 3


@pytest.mark.parametrize(
    ("constraint", "pattern"),
    [
        ({"json_schema": json.dumps(SCHEMA)}, r'\s*\{\s*"sunny"\s*:\s*(true|false)\s*\}\s*'),
        ({"regex": "[0-9]{3}"}, "[0-9]{3}"),
        ({"choice": pb.Choices(values=["yes", "no"])}, "yes|no"),
        ({"grammar": 'root ::= "left" | "right"'}, "left|right"),
    ],
    ids=["json_schema", "regex", "choice", "grammar"],
)
async def test_structured_output_over_grpc(engine: VllmEngine, constraint: dict[str, Any], pattern: str) -> None:
    messages = await generate(engine, max_tokens=200, seed=1, **constraint)
    assert re.fullmatch(pattern, "".join(message.text for message in messages))
    assert messages[-1].finish_reason == "stop"


async def test_a_json_object_over_grpc_begins_as_one(engine: VllmEngine) -> None:
    messages = await generate(engine, max_tokens=40, seed=1, json_object=True)
    assert "".join(message.text for message in messages).lstrip().startswith("{")


async def test_sampling_fields_reach_the_sampler(engine: VllmEngine) -> None:
    token = 42
    (forced,) = await generate(engine, max_tokens=1, logit_bias={token: 100.0})
    assert forced.token_ids == [token]
    (allowed,) = await generate(engine, max_tokens=1, allowed_token_ids=[token])
    assert allowed.token_ids == [token]
    first, second = [await generate(engine, max_tokens=8, temperature=2.0, seed=7) for _ in range(2)]
    assert "".join(message.text for message in first) == "".join(message.text for message in second)
    likely, *_ = await generate(engine, max_tokens=1, temperature=0)
    (other,) = await generate(engine, max_tokens=1, temperature=0, bad_words=[likely.text])
    assert other.token_ids != likely.token_ids
    truncated = await generate(engine, max_tokens=1, truncate_prompt_tokens=2)
    assert truncated[-1].usage.prompt_tokens == 2


async def test_chat_renders_the_prompt_as_the_http_api_does(engine: VllmEngine) -> None:
    kwargs = {"prefill": "Well, "}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "How is the weather?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Berlin"}'}}
            ],
        },
        {"role": "tool", "tool_call_id": "1", "content": "sunny"},
    ]
    fields: dict[str, Any] = {"messages": messages, "tools": TOOLS, "tool_choice": "none", "temperature": 0}
    over_http = await post(engine, "/v1/chat/completions", max_tokens=6, chat_template_kwargs=kwargs, **fields)
    request = pb.ChatRequest(
        model=MODEL,
        messages=[
            pb.ChatMessage(role="system", content="Be brief."),
            pb.ChatMessage(role="user", content="How is the weather?"),
            pb.ChatMessage(
                role="assistant",
                tool_calls=[pb.ToolCall(id="1", name="weather", arguments_json='{"city": "Berlin"}')],
            ),
            pb.ChatMessage(role="tool", tool_call_id="1", content="sunny"),
        ],
        tools=[pb.Tool(name="weather", description="d", parameters_json=json.dumps(SCHEMA))],
        chat_template_kwargs_json=json.dumps(kwargs),
        sampling=Sampling(temperature=0, max_tokens=6, logprobs=1),
    )
    answer = await chat(engine, request)
    whole = over_http.json()
    assert "".join(message.content for message in answer) == whole["choices"][0]["message"]["content"]
    assert answer[-1].usage.prompt_tokens == whole["usage"]["prompt_tokens"]
    assert sum(len(message.logprobs) for message in answer) == 6
    assert answer[-1].finish_reason == "length"


def bad_generate(**sampling: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(model=MODEL, text="Hello", sampling=Sampling(**sampling))


@pytest.mark.parametrize(
    ("request_", "kind", "words"),
    [
        (pb.GenerateRequest(model=MODEL), InvalidRequest, "empty"),
        (pb.GenerateRequest(model=MODEL, text=""), InvalidRequest, "empty"),
        (pb.GenerateRequest(model=MODEL, token_ids=pb.TokenIds()), InvalidRequest, "empty"),
        (pb.GenerateRequest(model=MODEL, token_ids=pb.TokenIds(ids=[99999])), InvalidRequest, "vocabulary"),
        (pb.GenerateRequest(model=MODEL, text="hi " * 9000), InvalidRequest, "4096"),
        (pb.GenerateRequest(model="other", text="x"), ModelNotFound, "other"),
        (pb.GenerateRequest(text="x", routing=pb.RoutingParams(lora="adapter")), ModelNotFound, "adapter"),
        (bad_generate(temperature=-1), InvalidRequest, "temperature"),
        (bad_generate(top_p=2), InvalidRequest, "top_p"),
        (bad_generate(n=0), InvalidRequest, "n must"),
        (bad_generate(max_tokens=0), InvalidRequest, "max_tokens"),
        (bad_generate(logprobs=1000), InvalidRequest, "logprobs"),
        (bad_generate(allowed_token_ids=[9999]), InvalidRequest, "allowed_token_ids"),
        (bad_generate(min_tokens=5, max_tokens=2), InvalidRequest, "min_tokens"),
        (bad_generate(truncate_prompt_tokens=-5), InvalidRequest, "truncate_prompt_tokens"),
        (bad_generate(json_schema="{"), InvalidRequest, "json_schema is not JSON"),
        (bad_generate(json_schema="3"), InvalidRequest, "JSON object"),
        (bad_generate(json_schema='{"type": "nothing"}'), InvalidRequest, "nothing"),
        (bad_generate(regex="("), InvalidRequest, "regex"),
        (bad_generate(choice=pb.Choices()), InvalidRequest, "empty"),
        (bad_generate(grammar="(("), InvalidRequest, "grammar"),
        (b"\xff\xff", InvalidRequest, "kvlane.v1.GenerateRequest"),
    ],
    ids=lambda value: None if isinstance(value, type) else str(value).replace("\n", " ")[:40],
)
async def test_a_bad_generate_is_refused_with_the_reason_on_one_line(
    engine: VllmEngine, request_: Any, kind: type[KvlaneError], words: str
) -> None:
    error = await refusal(engine, "Generate", request_)
    assert type(error) is kind
    assert words in error.message
    assert "\n" not in error.message
    await engine.check_health()


@pytest.mark.parametrize(
    "request_",
    [
        pb.ChatRequest(model=MODEL),
        pb.ChatRequest(messages=[pb.ChatMessage(content="no role")]),
        pb.ChatRequest(messages=[pb.ChatMessage(role="user", content="x")], chat_template_kwargs_json="{"),
        pb.ChatRequest(messages=[pb.ChatMessage(role="user", content="x")], tools=[pb.Tool(parameters_json="[")]),
        pb.ChatRequest(messages=[pb.ChatMessage(role="user", content="hi " * 9000)]),
    ],
    ids=["no messages", "no role", "bad kwargs", "bad tool", "too long"],
)
async def test_a_bad_chat_is_refused(engine: VllmEngine, request_: pb.ChatRequest) -> None:
    assert type(await refusal(engine, "Chat", request_)) is InvalidRequest


async def test_embedding_is_not_supported_by_a_generative_model(engine: VllmEngine) -> None:
    error = await refusal(engine, "Embed", pb.EmbedRequest(model=MODEL, texts=["x"]))
    assert type(error) is NotSupported


async def test_an_unknown_method_is_refused(engine: VllmEngine) -> None:
    assert type(await refusal(engine, "Nothing", b"")) is PathNotFound


# -- aborts


def completion(stream: bool) -> Submit:
    body = {"model": MODEL, "prompt": "Hello", "max_tokens": LONG, "ignore_eos": True, "stream": stream}
    return http_call("/v1/completions", body)


def chat_completion(stream: bool) -> Submit:
    body = {"model": MODEL, "messages": USER, "max_tokens": LONG, "ignore_eos": True, "stream": stream}
    return http_call("/v1/chat/completions", body)


def long_generate() -> Submit:
    return grpc_call("Generate", bad_generate(max_tokens=LONG, ignore_eos=True))


def long_chat() -> Submit:
    request = pb.ChatRequest(
        messages=[pb.ChatMessage(role="user", content="x")], sampling=Sampling(max_tokens=LONG, ignore_eos=True)
    )
    return grpc_call("Chat", request)


async def nothing(engine: VllmEngine, out: RecordingOut) -> None:
    """Aborts before the stream's task has run at all."""


async def before_the_first_token(engine: VllmEngine, out: RecordingOut) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not engine.load().queued_prefill_tokens:
            await asyncio.sleep(0)
    assert not out.started.is_set()


async def mid_stream(engine: VllmEngine, out: RecordingOut) -> None:
    async with asyncio.timeout(DEADLINE_S):
        await out.started.wait()


async def while_it_runs(engine: VllmEngine, out: RecordingOut) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not engine.load().running:
            await asyncio.sleep(0.001)
    assert not out.started.is_set()


@pytest.mark.parametrize(
    ("make", "phase"),
    [
        pytest.param(make, phase, id=f"{name}, {phase.__name__}")
        for name, make, phases in [
            ("streamed completion", lambda: completion(True), (nothing, before_the_first_token, mid_stream)),
            ("whole completion", lambda: completion(False), (nothing, before_the_first_token, while_it_runs)),
            ("streamed chat", lambda: chat_completion(True), (nothing, before_the_first_token, mid_stream)),
            ("whole chat", lambda: chat_completion(False), (nothing, before_the_first_token, while_it_runs)),
            ("Generate", long_generate, (nothing, before_the_first_token, mid_stream)),
            ("Chat", long_chat, (nothing, before_the_first_token, mid_stream)),
        ]
        for phase in phases
    ],
)
async def test_an_abort_empties_the_engine(
    engine: VllmEngine, make: Callable[[], Submit], phase: Callable[[VllmEngine, RecordingOut], Any]
) -> None:
    times = []
    for _ in range(20):
        out, abort = submit(engine, make())
        await phase(engine, out)
        began = time.perf_counter()
        abort()
        pieces = len(out.pieces)
        await settled(engine)
        times.append(time.perf_counter() - began)
        assert len(out.pieces) == pieces
        assert not out.done.is_set()
        abort()  # Harmless.
    print(f"abort: median {statistics.median(times) * 1e3:.1f} ms, longest {max(times) * 1e3:.1f} ms")


async def scheduled(engine: VllmEngine, count: int) -> None:
    """Waits until the last step's own statistics say so: `load` counts without what was aborted, lost or not."""
    async with asyncio.timeout(DEADLINE_S):
        while engine._steps.running != count:
            await asyncio.sleep(0.0005)


@pytest.mark.parametrize(
    "make",
    [lambda: completion(True), lambda: completion(False), long_generate, long_chat],
    ids=["streamed completion", "whole completion", "Generate", "Chat"],
)
async def test_an_abort_takes_the_stream_out_of_the_scheduler_while_another_goes_on(
    engine: VllmEngine, make: Callable[[], Submit]
) -> None:
    other, stop_other = submit(engine, completion(True))
    times = []
    for _ in range(20):
        out, abort = submit(engine, make())
        await scheduled(engine, 2)
        began = time.perf_counter()
        abort()
        await scheduled(engine, 1)
        times.append(time.perf_counter() - began)
        assert not out.done.is_set()
        assert not other.done.is_set(), "it was the other stream that left the scheduler"
    stop_other()
    await settled(engine)
    print(f"out of the scheduler: median {statistics.median(times) * 1e3:.1f} ms, longest {max(times) * 1e3:.1f} ms")


async def test_an_abort_leaves_the_other_streams_alone(engine: VllmEngine) -> None:
    body = {"model": MODEL, "prompt": "Hello", "max_tokens": 100, "ignore_eos": True, "stream": True}
    other, _ = submit(engine, http_call("/v1/completions", body))
    out, abort = submit(engine, long_generate())
    await mid_stream(engine, out)
    abort()
    assert (await other.ended()).events()[-1]["choices"][0]["finish_reason"] == "length"


async def test_the_load_after_an_abort_is_told(engine: VllmEngine) -> None:
    out, abort = submit(engine, completion(True))
    await mid_stream(engine, out)
    loads: list[Load] = []
    engine.on_step(lambda: loads.append(engine.load()))
    abort()
    async with asyncio.timeout(DEADLINE_S):
        while not loads or loads[-1].running or loads[-1].waiting:
            await asyncio.sleep(0.001)


async def test_an_abort_after_the_end_is_harmless(engine: VllmEngine) -> None:
    out, abort = submit(engine, grpc_call("Generate", bad_generate(max_tokens=1)))
    await out.ended()
    abort()
    assert out.finishes == ["length"]
