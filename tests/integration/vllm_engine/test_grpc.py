"""gRPC calls of a real vLLM engine: what the fields do, and what is refused."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

import pytest
from kvlane.v1 import inference_pb2 as pb

from engine.tiny_model import CONTEXT_TOKENS
from engine.vllm import VllmEngine
from router.errors import InvalidRequest, KvlaneError, ModelNotFound, NotSupported, PathNotFound
from tests.integration.vllm_engine.asked import SCHEMA, TOOLS, Sampling, bad_generate
from tests.integration.vllm_fixtures import (
    ENGINE_ARGS,
    FOREIGN_WARNINGS,
    MODEL,
    ask,
    grpc_call,
    http_call,
    post,
    submit,
)

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.asyncio(loop_scope="package"),
    FOREIGN_WARNINGS,
]


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


async def test_prompt_logprobs_come_once_though_the_choices_begin_apart(engine: VllmEngine) -> None:
    """The engine has a place for one choice; the other begins later, and brings the prompt's logprobs again."""
    long = {"model": MODEL, "prompt": "x", "max_tokens": 2000, "ignore_eos": True, "stream": True}
    busy = [submit(engine, http_call("/v1/completions", long)) for _ in range(ENGINE_ARGS["max_num_seqs"] - 1)]
    try:
        await asyncio.gather(*(out.started.wait() for out, _ in busy))
        messages = await generate(engine, "Hello there", n=2, max_tokens=5, ignore_eos=True, prompt_logprobs=1)
    finally:
        for _, abort in busy:
            abort()
    assert sum(len(message.prompt_logprobs) for message in messages) == messages[-1].usage.prompt_tokens
    assert len(messages[0].prompt_logprobs) == messages[-1].usage.prompt_tokens
    for index in (0, 1):
        assert sum(len(message.token_ids) for message in messages if message.index == index) == 5


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
