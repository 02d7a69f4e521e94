"""Large gRPC requests read in slices: the facts and the errors of reading them at once."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kvlane.v1 import inference_pb2 as pb

from router import protobuf
from router.errors import InvalidRequest
from router.ingress import grpc_large, grpc_requests
from router.ingress.grpc_requests import Caller
from router.types import Request

AT_ONCE: dict[str, Any] = {
    "Generate": grpc_requests.generate_request,
    "Chat": grpc_requests.chat_request,
    "Embed": grpc_requests.embed_request,
}
CALLER = Caller((("x-session-id", "s"),), 3.0)


@pytest.fixture(autouse=True)
def small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protobuf, "SLICE_BYTES", 24)
    monkeypatch.setattr(protobuf, "SLICE_FIELDS", 3)
    monkeypatch.setattr(protobuf, "_SHORT", 8)
    monkeypatch.setattr(protobuf, "_LONG", 16)
    monkeypatch.setattr(protobuf, "_TEXT_SLICE_BYTES", 7)


def at_once(method: str, body: bytes) -> Request | str:
    try:
        request: Request = AT_ONCE[method](body, CALLER, lambda: "new")
        return request
    except InvalidRequest as error:
        return f"{error.message} {error.param}"


def in_slices(method: str, body: bytes) -> Request | str:
    slices = grpc_large.read(method, body, CALLER, lambda: "new")
    try:
        while True:
            next(slices)
    except StopIteration as end:
        request: Request = end.value
        return request
    except InvalidRequest as error:
        return f"{error.message} {error.param}"


words = st.text(st.sampled_from("aé😀"), max_size=20)
names = st.sampled_from(["", "m", "tiny"])
routings = st.builds(pb.RoutingParams, lora=names, cache_salt=st.sampled_from(["", "s"]), priority=st.integers(0, 3))
turns = st.builds(
    pb.ChatMessage,
    role=st.sampled_from(["user", "a role of its own", ""]),
    content=words,
    tool_calls=st.lists(st.builds(pb.ToolCall, id=words, name=words, arguments_json=words), max_size=3),
)
ids = st.lists(st.integers(0, 70_000), max_size=30)
calls: Any = st.one_of(
    st.tuples(st.just("Generate"), st.builds(pb.GenerateRequest, model=names, text=words, routing=routings)),
    st.tuples(
        st.just("Generate"),
        st.builds(pb.GenerateRequest, model=names, token_ids=st.builds(pb.TokenIds, ids=ids), routing=routings),
    ),
    st.tuples(
        st.just("Chat"),
        st.builds(pb.ChatRequest, model=names, messages=st.lists(turns, max_size=6), routing=routings),
    ),
    st.tuples(
        st.just("Embed"), st.builds(pb.EmbedRequest, model=names, texts=st.lists(words, max_size=6), routing=routings)
    ),
)


@given(calls, st.none() | calls)
@settings(derandomize=True, deadline=None, max_examples=800)
def test_facts_and_errors_are_those_of_reading_at_once(asked: tuple[str, Any], more: tuple[str, Any] | None) -> None:
    method, message = asked
    body = message.SerializeToString()
    if more is not None and more[0] == method:  # Messages that stand one behind the other are one message.
        body += more[1].SerializeToString()
    assert in_slices(method, body) == at_once(method, body)


@pytest.mark.parametrize("method", [*AT_ONCE])
@pytest.mark.parametrize(
    "content", [b"caf\xc3\xa9 " * 6, b"caf\xc3\xa9 " * 6 + b"\xff", b"caf\xc3" * 9, b"\xed\xa0\x80" * 9]
)
def test_long_texts_have_to_be_utf_8(method: str, content: bytes) -> None:
    inner = {"Generate": content, "Chat": b"\x0a\x04user" + protobuf.sized(2, content), "Embed": content}[method]
    body = protobuf.sized(1, b"m") + protobuf.sized(2, inner)
    assert in_slices(method, body) == at_once(method, body)


@given(st.sampled_from([*AT_ONCE]), st.binary(max_size=100))
@settings(derandomize=True, deadline=None, max_examples=300)
def test_bytes_that_are_no_message_raise_nothing_else(method: str, junk: bytes) -> None:
    in_slices(method, junk)
    in_slices(method, protobuf.sized(1, b"m") + junk)


@pytest.mark.parametrize("field", ["model", "routing"])
def test_a_model_or_a_routing_of_kilobytes_is_refused(field: str) -> None:
    message = pb.GenerateRequest(model="m", text="hi", routing=pb.RoutingParams(lora="l"))
    if field == "model":
        message.model = "m" * 100
    else:
        message.routing.lora = "l" * 100
    assert in_slices("Generate", message.SerializeToString()) == f"{field} is too long {field}"


@pytest.mark.parametrize(
    ("method", "field"),
    [
        ("Chat", b"\x12\x00"),
        ("Chat", protobuf.sized(2, b"\x2a\x00" * 30)),
        ("Generate", b"\x78\x01"),
        ("Generate", protobuf.sized(3, b"\x08\x01" * 30)),
        ("Generate", protobuf.sized(4, b"\x08\x01" * 30)),
        ("Embed", b"\x12\x00"),
    ],
    ids=["messages", "calls", "unknown", "token ids", "sampling", "texts"],
)
def test_more_fields_than_a_request_can_have_are_refused(
    monkeypatch: pytest.MonkeyPatch, method: str, field: bytes
) -> None:
    monkeypatch.setattr(grpc_large, "MAX_FIELDS", 100)
    body = protobuf.sized(1, b"m") + field * 100
    assert in_slices(method, body) == "the request has more than 100 fields None"


def test_as_many_fields_as_a_request_can_have_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpc_large, "MAX_FIELDS", 100)
    body = pb.EmbedRequest(model="m", texts=["a"] * 90 + ["a long text of its own"] * 9).SerializeToString()
    assert in_slices("Embed", body) == at_once("Embed", body)


@pytest.mark.parametrize(
    "head",
    [b"\x02", b"\x82\x80\x00", b"\xfa\xff\xff\xff\x7f", b"\x92\x80\x80\x80\x80\x00"],
    ids=["number 0", "number 0, padded", "a number of more than 29 bits", "a tag of more than five bytes"],
)
def test_long_fields_have_to_have_a_number(head: bytes) -> None:
    inner = pb.GenerateRequest(model="n", text="a text that is long").SerializeToString()
    body = pb.GenerateRequest(model="m", text="hi").SerializeToString() + head + bytes([len(inner)]) + inner
    assert in_slices("Generate", body) == at_once("Generate", body)


def test_groups_are_refused() -> None:
    body = pb.GenerateRequest(model="m", text="hi").SerializeToString() + b"\x7b\x7c"
    assert in_slices("Generate", body) == "the request is no valid kvlane.v1.GenerateRequest None"
