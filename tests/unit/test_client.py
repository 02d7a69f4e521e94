"""The typed client, against the real gRPC ingress."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import msgspec
import pytest
from kvlane.client import Client, Delta, Embeddings, KvlaneCallError, Model, Route, RouteCandidate, Routing, Usage
from kvlane.v1 import inference_pb2 as pb

from router.dispatch import EXPLAIN_HEADER
from router.errors import ModelNotFound, ReplicaLost
from router.types import Candidate, Request, Sink
from tests.unit.grpc_serving import Script, Served, fails, hangs, receipt, says, serving, until, within

pytestmark = pytest.mark.timeout(60)


@asynccontextmanager
async def connected(script: Script) -> AsyncIterator[tuple[Client, Served]]:
    async with serving(script) as served, Client(served.target, metadata=(("x-session-id", "s"),)) as client:
        yield client, served


async def test_generate_yields_typed_deltas() -> None:
    async def script(request: Request, sink: Sink) -> None:
        sink.routed(receipt(request))
        top = [pb.TokenLogprob(token_id=7, logprob=-0.5, rank=1, text="a")]
        logprobs = [pb.PositionLogprobs(chosen=top[0], top=top)]
        sink.data(pb.GenerateResponse(text="a", token_ids=[7], logprobs=logprobs).SerializeToString(), 1)
        usage = pb.Usage(prompt_tokens=3, completion_tokens=1, cached_tokens=2)
        sink.data(pb.GenerateResponse(finish_reason="stop", stop_reason="7", usage=usage).SerializeToString(), 0)

    async with connected(script) as (client, _):
        route, first, last = [delta async for delta in client.generate("tiny", "hi")]
    assert route == Delta(route=Route("replica-1", "random", "random", 3, "made-0"))
    assert (first.text, first.token_ids, first.finish_reason) == ("a", (7,), None)
    assert (first.logprobs[0].chosen.text, first.logprobs[0].top[0].rank) == ("a", 1)
    assert last == Delta(finish_reason="stop", stop_reason="7", usage=Usage(3, 1, 2))


async def test_a_call_that_asks_for_it_gets_all_candidates_of_its_route() -> None:
    candidates = (Candidate("replica-1", 3, 5, 400, 0.25, 1.5), Candidate("replica-2", 0))

    async def script(request: Request, sink: Sink) -> None:
        made = receipt(request)
        if EXPLAIN_HEADER in request.headers:
            made = msgspec.structs.replace(made, matched=5, blocks=8, score=1.5, candidates=candidates)
        sink.routed(made)
        sink.data(pb.GenerateResponse(text="a").SerializeToString(), 1)

    async with serving(script) as served, Client(served.target, metadata=(EXPLAIN_HEADER,)) as client:
        first, *_ = [delta async for delta in client.generate("tiny", "hi")]
    route = first.route
    assert route is not None
    assert (route.matched_blocks, route.prompt_blocks, route.score) == (5, 8, 1.5)
    assert route.candidates == (
        RouteCandidate("replica-1", 3, 5, 400, 0.25, 1.5),
        RouteCandidate("replica-2", 0, 0, 0, 0.0, None),
    )


async def test_generate_sends_what_it_is_given() -> None:
    async with connected(says("a")) as (client, served):
        routing = Routing(lora="lora-a", cache_salt="salt", session_id="mine", priority=1, request_id="r1")
        stream = client.generate(
            "tiny",
            [1, 2],
            routing=routing,
            timeout_s=30,
            max_tokens=5,
            temperature=0.0,
            stop=["x"],
            logit_bias={3: -1.0},
            choice=["yes", "no"],
        )
        assert [delta.text async for delta in stream] == ["", "a"]
    (seen,) = served.dispatch.requests
    assert pb.GenerateRequest.FromString(seen.body) == pb.GenerateRequest(
        model="tiny",
        token_ids=pb.TokenIds(ids=[1, 2]),
        sampling=pb.SamplingParams(
            max_tokens=5, temperature=0.0, stop=["x"], logit_bias={3: -1.0}, choice=pb.Choices(values=["yes", "no"])
        ),
        routing=pb.RoutingParams(lora="lora-a", cache_salt="salt", session_id="mine", priority=1, request_id="r1"),
    )
    assert (seen.session_id, seen.headers, seen.request_id) == ("mine", (("x-session-id", "s"),), "r1")
    assert seen.timeout_s is not None


async def test_chat_takes_dicts_or_messages_and_yields_deltas() -> None:
    async def script(request: Request, sink: Sink) -> None:
        sink.routed(receipt(request))
        sink.data(pb.ChatResponse(content="hello", finish_reason="stop").SerializeToString(), 1)

    call = {"id": "c1", "name": "f", "arguments_json": "{}"}
    turns: list[Any] = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "tool_calls": [call]},
        pb.ChatMessage(role="tool", content="42", tool_call_id="c1"),
    ]
    schema = {"type": "object"}
    async with connected(script) as (client, served):
        stream = client.chat(
            "tiny",
            turns,
            chat_template_kwargs={"enable_thinking": False},
            json_schema=schema,
            tools=[pb.Tool(name="f")],
        )
        assert [(delta.text, delta.finish_reason) async for delta in stream] == [("", None), ("hello", "stop")]
        with pytest.raises(ValueError, match="colour"):
            client.chat("tiny", [{"role": "user", "colour": "red"}])
    sent = pb.ChatRequest.FromString(served.dispatch.requests[0].body)
    assert [turn.role for turn in sent.messages] == ["user", "assistant", "tool"]
    assert sent.messages[1].tool_calls[0].name == "f"
    assert json.loads(sent.sampling.json_schema) == schema
    assert json.loads(sent.chat_template_kwargs_json) == {"enable_thinking": False}
    assert sent.tools[0].name == "f"


async def test_embed_and_models_answer() -> None:
    async def script(request: Request, sink: Sink) -> None:
        assert pb.EmbedRequest.FromString(request.body).dimensions == 2
        sink.routed(receipt(request))
        response = pb.EmbedResponse(embeddings=[pb.Embedding(values=[1, 2])], usage=pb.Usage(prompt_tokens=4))
        sink.data(response.SerializeToString(), 0)

    async with connected(script) as (client, _):
        assert await client.embed("tiny", ["text"], dimensions=2) == Embeddings(
            ((1.0, 2.0),), Usage(4, 0, 0), Route("replica-1", "random", "random", 3, "made-0")
        )
        assert await client.models() == [Model("lora-a", "tiny", 64, 1), Model("tiny", "", 64, 2)]


async def test_failures_carry_the_routers_own_words() -> None:
    async with connected(fails(ModelNotFound("no such model"))) as (client, served):
        with pytest.raises(KvlaneCallError) as caught:
            await anext(client.generate("tiny", "hi", routing=Routing(request_id="r1")))
        error = caught.value
        assert (error.status, error.name, error.message) == (
            grpc.StatusCode.NOT_FOUND,
            "model_not_found",
            "no such model",
        )
        assert (error.retryable, error.request_id) == (False, "r1")
        assert str(error) == "NOT_FOUND (model_not_found): no such model"
        served.dispatch.script = fails(ReplicaLost("gone"))
        with pytest.raises(KvlaneCallError) as caught:
            await client.embed("tiny", ["text"])
        assert (caught.value.name, caught.value.retryable) == ("replica_lost", True)


async def test_an_unreachable_router_is_a_retryable_failure_without_a_name() -> None:
    async with connected(says()) as (_, served):
        target = served.target
    async with Client(target) as client:
        with pytest.raises(KvlaneCallError) as caught:
            await client.models(timeout_s=10)
    assert (caught.value.status, caught.value.name) == (grpc.StatusCode.UNAVAILABLE, "")
    assert caught.value.retryable


async def test_a_deadline_is_a_call_error() -> None:
    async with connected(hangs("a")) as (client, served):
        stream = client.generate("tiny", "hi", timeout_s=0.2)
        with pytest.raises(KvlaneCallError) as caught:
            _ = [delta async for delta in stream]
        assert caught.value.status is grpc.StatusCode.DEADLINE_EXCEEDED
        await within(served.dispatch.cancelled.wait())


async def test_a_cancelled_stream_is_a_call_error_for_whoever_waits_on_it() -> None:
    async with connected(hangs("a")) as (client, served):
        stream = client.generate("tiny", "hi")
        assert [(await anext(stream)).text for _ in range(2)] == ["", "a"]
        waiting = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0)
        stream.cancel()
        with pytest.raises(KvlaneCallError) as caught:
            await within(waiting)
        assert (caught.value.status, caught.value.retryable) == (grpc.StatusCode.CANCELLED, False)
        await within(served.dispatch.cancelled.wait())


async def test_closing_the_client_ends_its_calls_as_call_errors_and_refuses_new_ones() -> None:
    async with connected(hangs("a")) as (client, served):
        stream = client.generate("tiny", "hi")
        assert [(await anext(stream)).text for _ in range(2)] == ["", "a"]
        calls = [asyncio.ensure_future(anext(stream)), asyncio.ensure_future(client.embed("tiny", ["text"]))]
        await until(lambda: len(served.dispatch.requests) == 2)
        await client.close()
        for call in calls:
            with pytest.raises(KvlaneCallError) as caught:
                await within(call)
            assert caught.value.status is grpc.StatusCode.CANCELLED
        for begin in (lambda: anext(client.generate("tiny", "hi")), client.models, lambda: client.embed("tiny", ["t"])):
            with pytest.raises(KvlaneCallError) as caught:
                await within(begin())
            assert caught.value.status is grpc.StatusCode.CANCELLED


async def test_cancelling_the_task_that_waits_stays_a_cancel() -> None:
    async with connected(hangs("a")) as (client, served):
        for begin in (lambda: anext(client.generate("tiny", "hi")), lambda: client.embed("tiny", ["text"])):
            served.dispatch.script = hangs()
            served.dispatch.running.clear()
            waiting = asyncio.ensure_future(begin())
            await within(served.dispatch.running.wait())
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await within(waiting)


async def test_leaving_a_stream_early_cancels_the_request() -> None:
    async with connected(hangs("a", "b")) as (client, served):
        async with client.generate("tiny", "hi") as stream:
            async for delta in stream:
                if delta.text == "a":
                    break
        await within(served.dispatch.cancelled.wait())


async def test_a_stream_that_is_forgotten_cancels_the_request() -> None:
    async with connected(hangs("a", "b")) as (client, served):
        async for delta in client.generate("tiny", "hi"):
            if delta.text == "a":
                break
        await within(served.dispatch.cancelled.wait())
