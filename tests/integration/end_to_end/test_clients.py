"""The official client and gRPC's, as users have them."""

from __future__ import annotations

import asyncio
import json
import statistics
from typing import Any

import grpc
import httpx
import openai
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from kvlane.client import Client, KvlaneCallError
from kvlane.v1 import inference_pb2 as pb

from tests.integration.end_to_end.sending import ABORT_DEADLINE_S, DEADLINE_S, LONG, MESSAGES, SCHEMA, TOOLS, eventually
from tests.integration.stack import Stack
from tests.integration.vllm_fixtures import MODEL

pytestmark = [pytest.mark.vllm, pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]


# -- the official client


def test_the_official_client_streams_a_chat_with_usage(client: openai.OpenAI) -> None:
    with client.chat.completions.create(
        model=MODEL,
        messages=MESSAGES,  # type: ignore[arg-type]
        max_tokens=16,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    ) as stream:
        chunks = list(stream)
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 16
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


def test_the_official_client_gets_tools_logprobs_and_choices(client: openai.OpenAI) -> None:
    forced = client.chat.completions.create(
        model=MODEL,
        messages=MESSAGES,  # type: ignore[arg-type]
        tools=TOOLS,  # type: ignore[arg-type]
        tool_choice={"type": "function", "function": {"name": "weather"}},
        temperature=0,  # Sampled, random weights' arguments may be null, or longer than that.
        max_tokens=200,
    )
    (call,) = forced.choices[0].message.tool_calls or ()
    assert call.type == "function"
    assert call.function.name == "weather"
    assert json.loads(call.function.arguments) is not None
    answer = client.chat.completions.create(
        model=MODEL,
        messages=MESSAGES,  # type: ignore[arg-type]
        n=2,
        logprobs=True,
        top_logprobs=2,
        max_tokens=4,
        extra_body={"ignore_eos": True},
    )
    assert len(answer.choices) == 2
    assert answer.choices[1].logprobs is not None
    assert len(answer.choices[1].logprobs.content or []) == 4


def test_the_official_client_gets_text_completions_and_the_model_list(client: openai.OpenAI) -> None:
    whole = client.completions.create(model=MODEL, prompt="Once", max_tokens=5, temperature=0)
    with client.completions.create(model=MODEL, prompt="Once", max_tokens=5, temperature=0, stream=True) as stream:
        assert "".join(chunk.choices[0].text for chunk in stream) == whole.choices[0].text
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL


def test_the_official_client_raises_its_own_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.completions.create(model="nobody", prompt="x")
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model=MODEL, input="x")
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model=MODEL, prompt="x", temperature=-3)


def test_structured_output_keeps_to_its_schema(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL,
        messages=MESSAGES,  # type: ignore[arg-type]
        max_tokens=100,
        temperature=0,
        response_format={"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}},
    )
    value = json.loads(answer.choices[0].message.content or "")
    assert set(value) == {"name", "old"}


# -- gRPC


def post(stack: Stack, path: str, body: dict[str, Any]) -> Any:
    return httpx.post(stack.http + path, json=body, timeout=DEADLINE_S).json()


async def test_a_grpc_client_streams_generate_and_chat(stack: Stack) -> None:
    async with Client(stack.grpc) as client:
        deltas = [d async for d in client.generate(MODEL, "Once upon", max_tokens=8, temperature=0, ignore_eos=True)]
        assert deltas[0].route is not None
        assert deltas[0].route.replica
        assert sum(len(d.token_ids) for d in deltas) == 8
        assert deltas[-1].usage is not None
        assert deltas[-1].usage.completion_tokens == 8
        texts = {"".join([d.text async for d in client.generate(MODEL, "Once upon", max_tokens=8, temperature=0)])}
        body = {"model": MODEL, "prompt": "Once upon", "max_tokens": 8, "temperature": 0}
        http = await asyncio.to_thread(post, stack, "/v1/completions", body)
        assert texts == {http["choices"][0]["text"]}
        chat = [d async for d in client.chat(MODEL, [{"role": "user", "content": "Hi"}], max_tokens=6, temperature=0)]
        body = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 6, "temperature": 0}
        http = await asyncio.to_thread(post, stack, "/v1/chat/completions", body)
        assert "".join(d.text for d in chat) == http["choices"][0]["message"]["content"]
        assert [model.name for model in await client.models()] == [MODEL]


def test_a_plain_grpc_client_finds_health_and_reflection(stack: Stack) -> None:
    with grpc.insecure_channel(stack.grpc) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for service in ("", "kvlane.v1.Inference"):
            answer = health.Check(health_pb2.HealthCheckRequest(service=service), timeout=DEADLINE_S)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
        asked = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
        (listed,) = reflection.ServerReflectionInfo(asked, timeout=DEADLINE_S)
        assert "kvlane.v1.Inference" in [service.name for service in listed.list_services_response.service]
        generate = channel.unary_stream(
            "/kvlane.v1.Inference/Generate",
            request_serializer=pb.GenerateRequest.SerializeToString,
            response_deserializer=pb.GenerateResponse.FromString,
        )
        request = pb.GenerateRequest(model=MODEL, text="Hi", sampling=pb.SamplingParams(max_tokens=4, ignore_eos=True))
        messages = list(generate(request, timeout=DEADLINE_S))
        assert messages[0].route.replica
        assert messages[-1].usage.completion_tokens == 4


@pytest.mark.parametrize("timeout_s", [0.05, 0.5])
async def test_a_deadline_on_a_long_generation_ends_it_in_the_engine(stack: Stack, timeout_s: float) -> None:
    took, seen = [], 0

    async def generate(rpc: Client) -> None:
        async for _ in rpc.generate(MODEL, "Once", max_tokens=LONG, ignore_eos=True, timeout_s=timeout_s):
            pass

    async with Client(stack.grpc) as rpc:
        for _ in range(20):
            call = asyncio.create_task(generate(rpc))
            await asyncio.to_thread(eventually, lambda call=call: call.done() or stack.holds(1))
            seen += not call.done()
            with pytest.raises(KvlaneCallError) as caught:
                await call
            assert caught.value.status is grpc.StatusCode.DEADLINE_EXCEEDED
            took.append(await asyncio.to_thread(eventually, stack.idle, ABORT_DEADLINE_S))
    # On a busy machine it may pass before the engine has begun: the shorter one often, the longer one hardly ever.
    assert seen >= (15 if timeout_s > 0.1 else 1)
    print(
        f"idle after a deadline of {timeout_s * 1000:.0f} ms: median {statistics.median(took) * 1000:.0f} ms "
        f"of {len(took)}, {seen} of them seen in the engine before"
    )
