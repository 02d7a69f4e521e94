"""What the gRPC ingress makes of requests, output and errors, asked by real grpcio clients."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import grpc.aio
import pytest
import uvloop
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]
from kvlane.v1 import inference_pb2 as pb

from router import errors
from router.errors import KvlaneError, MethodNotAllowed, ModelNotFound, Overloaded, ReplicaLost
from router.types import Reason, Request, Rpc, Sink
from tests.unit import grpc_serving
from tests.unit.grpc_serving import (
    PROMPT,
    SERVICE,
    fails,
    hangs,
    message,
    receipt,
    says,
    serving,
    trailers,
    within,
)

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(params=["h2", "aio"], autouse=True)
def edge(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every test holds on both edges."""
    monkeypatch.setattr(grpc_serving, "EDGE", request.param)
    return str(request.param)


async def test_a_stream_arrives_in_order_after_its_route() -> None:
    words = [f"w{number}" for number in range(50)]
    async with serving(says(*words)) as served:
        call = served.generate(metadata=(("x-request-id", "mine"),))
        first, *rest = [response async for response in call]
        assert first == pb.GenerateResponse(
            route=pb.Route(replica="replica-1", policy="random", reason="random", queue_depth=3, request_id="mine")
        )
        assert [response.text for response in rest] == words
        assert dict(await call.initial_metadata())["x-request-id"] == "mine"
        assert await call.code() is grpc.StatusCode.OK


@pytest.mark.parametrize("loop_factory", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_streams_and_cancels_work_on_both_event_loops(loop_factory: Callable[[], asyncio.AbstractEventLoop]) -> None:
    async def main() -> None:
        async with serving(hangs("a", "b")) as served:
            call = served.generate()
            assert [(await within(call.read())).text for _ in range(3)] == ["", "a", "b"]
            call.cancel()
            await within(served.dispatch.cancelled.wait())

    with asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(main())


async def test_a_sync_client_reads_a_stream() -> None:
    def read(target: str) -> list[str]:
        with grpc.insecure_channel(target) as channel:
            method: Any = channel.unary_stream(
                f"{SERVICE}Generate", response_deserializer=pb.GenerateResponse.FromString
            )
            return [response.text for response in method(PROMPT.SerializeToString(), timeout=10)]

    async with serving(says("a", "b")) as served:
        assert await asyncio.to_thread(read, served.target) == ["", "a", "b"]


async def test_chat_goes_the_same_way() -> None:
    async def script(request: Request, sink: Sink) -> None:
        assert request.path == "/kvlane.v1.Inference/Chat"
        sink.routed(receipt(request))
        sink.data(pb.ChatResponse(content="hello", finish_reason="stop").SerializeToString(), 1)

    async with serving(script) as served:
        method: Any = served.channel.unary_stream(
            f"{SERVICE}Chat",
            request_serializer=pb.ChatRequest.SerializeToString,
            response_deserializer=pb.ChatResponse.FromString,
        )
        turns = [pb.ChatMessage(role="user", content="hi")]
        route, answer = [response async for response in method(pb.ChatRequest(model="tiny", messages=turns))]
        assert route.route.replica == "replica-1"
        assert (answer.content, answer.finish_reason) == ("hello", "stop")


async def test_the_request_keeps_its_bytes_and_gives_routing_what_it_says() -> None:
    request = pb.GenerateRequest(
        model="tiny",
        token_ids=pb.TokenIds(ids=[1, 2, 3]),
        routing=pb.RoutingParams(lora="lora-a", cache_salt="salt", session_id="s1", priority=-2, request_id="r1"),
    )
    metadata = (("x-request-id", "other"), ("traceparent", "00-ab-cd-01"), ("x-session-id", "s2"), ("x-secret", "no"))
    async with serving(says("a")) as served:
        async for _ in served.generate(request, metadata=metadata, timeout=30):
            pass
    (seen,) = served.dispatch.requests
    assert seen.body == request.SerializeToString()
    assert (seen.rpc, seen.path, seen.model) == (Rpc.GRPC, "/kvlane.v1.Inference/Generate", "tiny")
    assert (seen.request_id, seen.session_id) == ("r1", "s1")
    assert (seen.lora, seen.cache_salt, seen.priority) == ("lora-a", "salt", -2)
    assert seen.headers == (("x-request-id", "other"), ("traceparent", "00-ab-cd-01"), ("x-session-id", "s2"))
    assert seen.timeout_s is not None
    assert 20 < seen.timeout_s <= 31  # gRPC rounds up.


async def test_metadata_names_request_and_session_where_the_message_does_not() -> None:
    async with serving(says("a")) as served:
        async for _ in served.generate(metadata=(("x-request-id", "r2"), ("x-session-id", "s2"))):
            pass
        async for _ in served.generate():
            pass
    named, nameless = served.dispatch.requests
    assert (named.request_id, named.session_id, named.timeout_s) == ("r2", "s2", None)
    assert nameless.request_id == "made-0"


async def test_a_retry_leaves_only_the_last_route() -> None:
    async def script(request: Request, sink: Sink) -> None:
        sink.routed(receipt(request, "dead"))
        assert not sink.started
        sink.routed(receipt(request, "alive", Reason.RETRY))
        sink.data(message("a"), 1)
        assert sink.started

    async with serving(script) as served:
        responses = [response async for response in served.generate()]
    assert [(response.route.replica, response.text) for response in responses] == [("alive", ""), ("", "a")]


async def test_a_stream_without_output_still_tells_its_route() -> None:
    async with serving(says()) as served:
        (only,) = [response async for response in served.generate()]
        assert only.route.replica == "replica-1"


async def test_embed_answers_once_with_the_route_of_the_try_that_succeeded() -> None:
    async def script(request: Request, sink: Sink) -> None:
        sink.routed(receipt(request, "dead"))
        sink.data(pb.EmbedResponse(embeddings=[pb.Embedding(values=[9])]).SerializeToString(), 0)
        assert not sink.started
        sink.routed(receipt(request, "alive"))
        response = pb.EmbedResponse(embeddings=[pb.Embedding(values=[1, 2])], usage=pb.Usage(prompt_tokens=4))
        sink.data(response.SerializeToString(), 0)

    async with serving(script) as served:
        response = await served.embed("text")
    assert response.route.replica == "alive"
    assert [list(embedding.values) for embedding in response.embeddings] == [[1, 2]]
    assert response.usage.prompt_tokens == 4


@pytest.mark.parametrize("answers", [0, 2])
async def test_embed_fails_when_the_replica_does_not_answer_exactly_once(answers: int) -> None:
    async with serving(says(*["x"] * answers)) as served:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await served.embed("text")
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    assert trailers(caught.value)["kvlane-error"] == "replica_failed"


async def test_models_lists_the_fleet() -> None:
    async with serving(says()) as served:
        method: Any = served.channel.unary_unary(f"{SERVICE}Models", response_deserializer=pb.ModelsResponse.FromString)
        response = await method(b"")
    assert [(each.name, each.parent, each.max_model_len, each.ready_replicas) for each in response.models] == [
        ("lora-a", "tiny", 64, 1),
        ("tiny", "", 64, 2),
    ]


def _all_errors(cls: type[KvlaneError]) -> Iterator[type[KvlaneError]]:
    # Subclasses that other tests define are none of ours.
    if cls.__module__ == errors.__name__:
        yield cls
    for sub in cls.__subclasses__():
        yield from _all_errors(sub)


@pytest.mark.parametrize("kind", list(_all_errors(KvlaneError)), ids=lambda kind: kind.__name__)
async def test_each_error_gets_its_status_name_and_retryability(kind: type[KvlaneError]) -> None:
    error = MethodNotAllowed("why", allow=("GET",)) if kind is MethodNotAllowed else kind("why")
    async with serving(fails(error)) as served:
        seen = await served.error("Generate", PROMPT.SerializeToString(), metadata=(("x-request-id", "mine"),))
    assert (seen.code(), seen.details()) == (grpc.StatusCode[kind.grpc_status], "why")
    assert trailers(seen)["kvlane-error"] == kind.name
    assert trailers(seen)["kvlane-retryable"] == ("1" if kind.retryable else "0")
    assert trailers(seen)["x-request-id"] == "mine"
    status = status_pb2.Status.FromString(trailers(seen)["grpc-status-details-bin"])
    assert (status.code, status.message) == (seen.code().value[0], "why")
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    assert (info.reason, info.domain, info.metadata["fault"]) == (kind.name.upper(), "kvlane", kind.fault)


async def test_details_name_the_field_at_fault_and_when_to_retry() -> None:
    async with serving(fails(Overloaded("full", param="model", retry_after_s=1.5))) as served:
        seen = await served.error("Generate", PROMPT.SerializeToString())
    status = status_pb2.Status.FromString(trailers(seen)["grpc-status-details-bin"])
    _, fields, retry = status.details
    bad, delay = error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
    assert fields.Unpack(bad)
    assert retry.Unpack(delay)
    assert bad.field_violations[0].field == "model"
    assert delay.retry_delay.ToMilliseconds() == 1500


@pytest.mark.parametrize("text", ["é" * 50_000, "\U0001f600" * 5_000, "line\nbreak \x00 \ud800"])
async def test_an_error_message_of_any_length_and_content_reaches_the_client(text: str) -> None:
    async with serving(fails(ModelNotFound(text))) as served:
        seen = await served.error("Generate", PROMPT.SerializeToString())
    assert seen.code() is grpc.StatusCode.NOT_FOUND
    assert (seen.details() or "")[:4] == text[:4]


async def test_output_before_an_error_reaches_the_client_first() -> None:
    async with serving(fails(ReplicaLost("gone"), "a", "b")) as served:
        call = served.generate()
        assert [(await within(call.read())).text for _ in range(3)] == ["", "a", "b"]
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await within(call.read())
    assert (caught.value.code(), caught.value.details()) == (grpc.StatusCode.UNAVAILABLE, "gone")


async def test_an_error_before_any_output_is_a_status_alone() -> None:
    async with serving(fails(ReplicaLost("gone"))) as served:
        call = served.generate()
        with pytest.raises(grpc.aio.AioRpcError):
            await call.read()
        assert "x-request-id" not in dict(await call.initial_metadata())


@pytest.mark.parametrize("texts", [(), ("a",)])
async def test_a_defect_is_internal_and_logged_once_with_its_traceback(
    texts: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(fails(ZeroDivisionError("secret"), *texts)) as served:
        seen = await served.error("Generate", PROMPT.SerializeToString())
    assert (seen.code(), seen.details()) == (grpc.StatusCode.INTERNAL, "internal error")
    (record,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert record.exc_info is not None
    assert record.exc_info[0] is ZeroDivisionError


BAD = {
    "no protobuf": ("Generate", b"\xff\xff\xff", "the request is no valid kvlane.v1.GenerateRequest"),
    "bad utf-8": ("Generate", b"\x0a\x01\xff", "the request is no valid kvlane.v1.GenerateRequest"),
    "no bytes": ("Generate", b"", "the request names no model"),
    "no model": ("Generate", pb.GenerateRequest(text="hi").SerializeToString(), "the request names no model"),
    "no prompt": ("Generate", pb.GenerateRequest(model="m").SerializeToString(), "the prompt is empty"),
    "empty text": ("Generate", pb.GenerateRequest(model="m", text="").SerializeToString(), "the prompt is empty"),
    "no ids": (
        "Generate",
        pb.GenerateRequest(model="m", token_ids=pb.TokenIds()).SerializeToString(),
        "the prompt is empty",
    ),
    "no messages": ("Chat", pb.ChatRequest(model="m").SerializeToString(), "the conversation is empty"),
    "no role": (
        "Chat",
        pb.ChatRequest(model="m", messages=[pb.ChatMessage(content="a")]).SerializeToString(),
        "messages[0] has no role",
    ),
    "no texts": ("Embed", pb.EmbedRequest(model="m").SerializeToString(), "there is nothing to embed"),
    "empty item": ("Embed", pb.EmbedRequest(model="m", texts=["a", ""]).SerializeToString(), "texts[1] is empty"),
    "bad models": ("Models", b"\xff", "the request is no valid kvlane.v1.ModelsRequest"),
}


@pytest.mark.parametrize("case", BAD)
async def test_a_bad_request_is_refused_without_a_traceback(case: str, caplog: pytest.LogCaptureFixture) -> None:
    method, body, text = BAD[case]
    caplog.set_level(logging.INFO)
    async with serving(says("a")) as served:
        seen = await served.error(method, body)
        assert [response.text async for response in served.generate()] == ["", "a"]
    assert seen.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert (seen.details() or "").startswith(text)
    assert trailers(seen)["kvlane-error"] == "invalid_request"
    (line,) = [record for record in caplog.records if record.name.startswith("router")]
    assert line.exc_info is None
    assert line.getMessage().startswith(f"{method} ")
    assert served.refused == [("grpc", "invalid_request")]


async def test_only_what_never_reached_dispatch_counts_as_refused() -> None:
    async with serving(fails(ReplicaLost("gone"))) as served:
        await served.error("Generate", PROMPT.SerializeToString())
        assert served.refused == []
        await served.error("Embed", b"")
        assert served.refused == [("grpc", "invalid_request")]


@pytest.mark.parametrize("bad", ["a b", "x" * 129, "x" * 5000])
async def test_a_request_id_that_is_not_valid_is_replaced_and_never_an_error(bad: str) -> None:
    routed = pb.GenerateRequest(model="tiny", text="a", routing=pb.RoutingParams(request_id=bad))
    async with serving(fails(ReplicaLost("gone"))) as served:
        for body, metadata, expected in (
            (PROMPT, (("x-request-id", bad),), "made-0"),
            (routed, (), "made-1"),
            (routed, (("x-request-id", "mine"),), "mine"),
            (pb.GenerateRequest(text="a"), (("x-request-id", bad),), "made-2"),
        ):
            seen = await served.error("Generate", body.SerializeToString(), metadata=metadata)
            assert trailers(seen)["x-request-id"] == expected
    assert [request.request_id for request in served.dispatch.requests] == ["made-0", "made-1", "mine"]
    assert [request.headers for request in served.dispatch.requests] == [(), (), (("x-request-id", "mine"),)]


async def test_what_a_client_sends_cannot_forge_or_flood_the_log(caplog: pytest.LogCaptureFixture) -> None:
    async def script(request: Request, sink: Sink) -> None:
        raise ModelNotFound(f"The model `{request.model}` does not exist.")

    caplog.set_level(logging.INFO, "router.ingress")
    async with serving(script) as served:
        for model in ("x\n2026-01-01 ERROR forged", "m" * 10_000, "m" * 100_000):
            await served.error("Generate", pb.GenerateRequest(model=model, text="a").SerializeToString())
    lines = [record.getMessage() for record in caplog.records]
    assert [name for line in lines for name in ("model_not_found", "invalid_request") if name in line] == [
        *["model_not_found"] * 2,
        "invalid_request",
    ]
    assert all("\n" not in line and len(line) < 500 for line in lines)


async def test_a_call_without_a_message_is_refused() -> None:
    async with serving(says("a")) as served:
        for method in ("Generate", "Chat", "Embed", "Models"):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await within(served.channel.stream_stream(SERVICE + method)(iter(())).read())
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_an_unknown_method_is_unimplemented() -> None:
    async with serving(says("a")) as served:
        assert (await served.error("Nope", b"")).code() is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize(("model", "named", "lora"), [("lora-a", "", "lora-a"), ("tiny", "", ""), ("tiny", "x", "x")])
async def test_an_adapter_that_is_asked_for_by_its_name_is_the_requests_lora(model: str, named: str, lora: str) -> None:
    async with serving(says("a")) as served:
        request = pb.GenerateRequest(model=model, text="hi", routing=pb.RoutingParams(lora=named))
        async for _ in served.generate(request):
            pass
    (routed,) = served.dispatch.requests
    assert (routed.model, routed.lora) == (model, lora)
