"""Prompts of large bodies, read in slices: what reading them at once gives, for HTTP and for gRPC."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st
from kvlane.v1 import inference_pb2 as pb

from router import protobuf
from router.prefix import grpc_large, grpc_prompts, http_large, http_prompts, lists, window
from router.prefix.canonical import data_of, namespace_of
from router.prefix.draft import Draft
from router.prefix.hashing import Hasher
from router.prefix.window import drained
from router.types import Request, Rpc

CHAT, COMPLETIONS, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"
GENERATE_IDS, EMBEDDINGS, TOKENIZE = "/inference/v1/generate", "/v1/embeddings", "/tokenize"
GENERATE, GRPC_CHAT, EMBED = (f"/kvlane.v1.Inference/{method}" for method in ("Generate", "Chat", "Embed"))
NO_LIMIT = 1 << 20


@pytest.fixture(autouse=True)
def small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(window, "STRIDE", 128)
    monkeypatch.setattr(window, "LARGE_BYTES", 8)
    monkeypatch.setattr(lists, "SLICE_BYTES", 48)
    monkeypatch.setattr(lists, "_MOST_BYTES", 200)
    monkeypatch.setattr(protobuf, "SLICE_BYTES", 24)
    monkeypatch.setattr(protobuf, "SLICE_FIELDS", 3)
    monkeypatch.setattr(protobuf, "_SHORT", 8)
    monkeypatch.setattr(protobuf, "_LONG", 16)
    monkeypatch.setattr(protobuf, "_TEXT_SLICE_BYTES", 7)
    monkeypatch.setattr(grpc_large, "_AT_ONCE", 2)
    monkeypatch.setattr(grpc_large, "_PIECE_BYTES", 5)


def said(draft: Draft | None) -> tuple[Any, ...] | None:
    if draft is None:
        return None
    return draft.kind, draft.answer, data_of(draft), namespace_of(draft, "m", ""), draft.unread_bytes


def http_at_once(path: str, body: bytes, limit: int) -> tuple[Any, ...] | None:
    try:
        return said(http_prompts.READERS[path](body, limit))
    except (msgspec.MsgspecError, ValueError, OverflowError):
        return None


def http_in_slices(path: str, body: bytes, limit: int) -> tuple[Any, ...] | None:
    try:
        return said(drained(http_large.read(path, body, limit)))
    except (msgspec.MsgspecError, ValueError, OverflowError):
        return None


texts = st.text(st.sampled_from('a"\\,{}[]:é😀\n 1'), max_size=60)
ids = st.lists(st.integers(0, 70_000), max_size=60)
parts = st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": texts}) | texts, max_size=5)
calls = st.lists(
    st.fixed_dictionaries({"id": texts, "function": st.fixed_dictionaries({"name": texts, "arguments": texts})}),
    max_size=2,
)
roles = st.sampled_from(["system", "user", "assistant", "tool"])
messages = st.lists(
    st.fixed_dictionaries({"role": roles, "content": texts | parts}, optional={"tool_calls": calls, "name": texts}),
    max_size=12,
)
call_items = st.fixed_dictionaries({"type": st.just("function_call"), "name": texts, "arguments": texts})
items = st.lists(st.fixed_dictionaries({"role": roles, "content": texts | parts}) | call_items, max_size=12)
others = st.fixed_dictionaries(
    {},
    optional={
        "tools": st.lists(st.dictionaries(texts, texts, max_size=2), max_size=3),
        "system": texts,
        "instructions": texts,
        "x": st.lists(texts | ids, max_size=4) | st.dictionaries(st.sampled_from(["messages", "prompt"]), ids),
    },
)


@st.composite
def bodies(draw: st.DrawFn) -> tuple[str, bytes]:
    prompts = texts | st.lists(texts, min_size=1, max_size=4) | ids | st.lists(ids, min_size=1, max_size=4)
    path, field, value = draw(
        st.sampled_from(
            [
                (CHAT, "messages", messages),
                (MESSAGES, "messages", messages),
                (RESPONSES, "input", items),
                (COMPLETIONS, "prompt", prompts),
                (TOKENIZE, "prompt", prompts),
                (EMBEDDINGS, "input", prompts),
                (GENERATE_IDS, "token_ids", ids),
            ]
        )
    )
    members = [("model", "m"), (field, draw(value)), *draw(others).items()]
    separators = draw(st.sampled_from([(",", ":"), (", ", ": "), (" ,\n", " : ")]))
    body = dict(draw(st.permutations(members)))
    return path, json.dumps(body, ensure_ascii=draw(st.booleans()), separators=separators).encode()


@given(bodies())
@settings(derandomize=True, deadline=None, max_examples=600)
def test_in_slices_a_body_says_what_it_says_at_once(asked: tuple[str, bytes]) -> None:
    path, body = asked
    assert http_in_slices(path, body, NO_LIMIT) == http_at_once(path, body, NO_LIMIT)


@given(bodies(), st.integers(200, 700))
@settings(derandomize=True, deadline=None, max_examples=600)
def test_in_slices_the_beginning_of_a_body_says_nothing_else(asked: tuple[str, bytes], limit: int) -> None:
    path, body = asked
    at_once, in_slices = http_at_once(path, body, limit), http_in_slices(path, body, limit)
    whole = http_at_once(path, body, NO_LIMIT)
    if in_slices is not None and at_once is not None and whole is not None and whole[2].startswith(at_once[2]):
        assert whole[2].startswith(in_slices[2])


@pytest.mark.parametrize("limit", range(400, 430))
@pytest.mark.parametrize("ensure_ascii", [True, False])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        (COMPLETIONS, {"prompt": "é😀\n\\" * 100}),
        (COMPLETIONS, {"prompt": list(range(300))}),
        (COMPLETIONS, {"prompt": [list(range(300)), [1, 2]]}),
        (COMPLETIONS, {"prompt": [[1, 22, 333]] * 200}),
        (CHAT, {"messages": [{"role": "user", "content": "é 😀"}] * 50}),
    ],
)
def test_where_a_body_is_cut_does_not_depend_on_slices(path: str, body: Any, ensure_ascii: bool, limit: int) -> None:
    encoded = json.dumps(body, ensure_ascii=ensure_ascii).encode()
    assert http_in_slices(path, encoded, limit) == http_at_once(path, encoded, limit)


@pytest.mark.parametrize("limit", range(60, 140, 7))
def test_a_limit_that_is_shorter_than_long_media_cuts_at_the_same_place(limit: int) -> None:
    body = json.dumps({"messages": [{"role": "user", "content": f"turn {i}"} for i in range(50)]}).encode()
    at_once = http_at_once(CHAT, body, limit)
    assert at_once is not None
    assert http_in_slices(CHAT, body, limit) == at_once


@pytest.mark.parametrize(("path", "field", "prompt"), [(CHAT, "messages", []), (COMPLETIONS, "prompt", "hi")])
def test_others_run_between_two_tries_to_find_a_prompt(path: str, field: str, prompt: Any) -> None:
    decoys: Any = []
    for _ in range(6):
        decoys = {field: [decoys]}
    body = json.dumps({"x": decoys, field: prompt}).encode()
    slices = lists.find(body, field, http_prompts.prompt_body, NO_LIMIT)
    assert len([*slices]) == lists._TRIES
    assert http_in_slices(path, body, NO_LIMIT) == http_at_once(path, body, NO_LIMIT)


@given(st.sampled_from([*http_prompts.READERS]), st.binary(max_size=300), bodies(), st.integers(0, 400))
@settings(derandomize=True, deadline=None, max_examples=300)
def test_no_bytes_raise_anything_else(path: str, junk: bytes, asked: tuple[str, bytes], at: int) -> None:
    http_in_slices(path, junk, 200)
    http_in_slices(asked[0], asked[1][:at] + junk, 200)


# -- gRPC


def grpc_at_once(path: str, body: bytes) -> tuple[Any, ...] | None:
    try:
        return said(grpc_prompts.read(path, body, NO_LIMIT))
    except (DecodeError, ValueError):
        return None


def grpc_in_slices(path: str, body: bytes, limit: int = NO_LIMIT) -> tuple[Any, ...] | None:
    try:
        return said(drained(grpc_large.read(path, body, limit)))
    except (DecodeError, ValueError):
        return None


words = st.text(st.sampled_from('aé😀" '), max_size=30)
samplings = st.builds(
    pb.SamplingParams,
    stop=st.lists(words, max_size=5),
    stop_token_ids=st.lists(st.integers(0, 1 << 31), max_size=20),
    truncate_prompt_tokens=st.none() | st.integers(0, 9),
)
tool_calls = st.builds(pb.ToolCall, id=words, name=words, arguments_json=words)
turns = st.builds(
    pb.ChatMessage,
    role=st.sampled_from(["user", "assistant", "rôle"]),
    content=words,
    name=words,
    tool_call_id=words,
    tool_calls=st.lists(tool_calls, max_size=4),
)
tools = st.builds(
    pb.Tool, name=words, description=words, parameters_json=st.sampled_from(["", "{}", '{"a":[1,2,3,4,5]}'])
)
grpc_calls = st.one_of(
    st.tuples(st.just(GENERATE), st.builds(pb.GenerateRequest, text=words, sampling=samplings)),
    st.tuples(
        st.just(GENERATE),
        st.builds(
            pb.GenerateRequest,
            token_ids=st.builds(pb.TokenIds, ids=st.lists(st.integers(0, (1 << 32) - 1), max_size=60)),
            sampling=samplings,
        ),
    ),
    st.tuples(
        st.just(GRPC_CHAT),
        st.builds(
            pb.ChatRequest,
            messages=st.lists(turns, max_size=6),
            tools=st.lists(tools, max_size=5),
            sampling=samplings,
            chat_template_kwargs_json=st.sampled_from(["", "{}", '{"enable_thinking": false}']),
        ),
    ),
    st.tuples(st.just(EMBED), st.builds(pb.EmbedRequest, texts=st.lists(words, max_size=6))),
)


@given(grpc_calls)
@settings(derandomize=True, deadline=None, max_examples=600)
def test_in_slices_a_message_says_what_it_says_at_once(asked: tuple[str, Any]) -> None:
    path, message = asked
    body = message.SerializeToString()
    assert grpc_in_slices(path, body) == grpc_at_once(path, body)


@given(grpc_calls, st.integers(4, 100))
@settings(derandomize=True, deadline=None, max_examples=300)
def test_of_a_long_message_the_beginning_is_read(asked: tuple[str, Any], limit: int) -> None:
    path, message = asked
    whole, some = (
        grpc_at_once(path, message.SerializeToString()),
        grpc_in_slices(path, message.SerializeToString(), limit),
    )
    if whole is None:
        assert some is None
    else:
        assert some is not None
        assert whole[2].startswith(some[2][:limit])
        assert len(some[2]) >= min(len(whole[2]), limit // 4 * 4)
        assert some[3] == whole[3]
        assert (some[4] > 0) == (len(some[2]) < len(whole[2])) or path == GRPC_CHAT


@given(st.sampled_from([GENERATE, GRPC_CHAT, EMBED]), st.binary(max_size=200))
@settings(derandomize=True, deadline=None, max_examples=400)
def test_no_bytes_raise_anything_else_over_grpc(path: str, body: bytes) -> None:
    grpc_in_slices(path, body)


def test_long_tools_hash_as_they_do_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("grpc_large", "draft"):
        monkeypatch.setattr(f"router.prefix.{module}.MAX_SHAPE_BYTES", 40)
    tool = pb.Tool(name="née", description='look "up" é😀', parameters_json='{"a": [1, 2]}')
    body = pb.ChatRequest(messages=[pb.ChatMessage(role="user", content="hi")], tools=[tool] * 3).SerializeToString()
    assert grpc_in_slices(GRPC_CHAT, body) == grpc_at_once(GRPC_CHAT, body)


@pytest.mark.parametrize("rpc", [Rpc.HTTP, Rpc.GRPC])
def test_a_chain_made_in_slices_is_the_one_made_at_once(rpc: Rpc) -> None:
    said = [("user" if i % 2 else "assistant", f"{i} é\n" * 20) for i in range(1000)]
    if rpc is Rpc.HTTP:
        body = json.dumps({"messages": [{"role": role, "content": text} for role, text in said]}).encode()
    else:
        body = pb.ChatRequest(
            messages=[pb.ChatMessage(role=role, content=text) for role, text in said]
        ).SerializeToString()
    asked = Request("r", "m", rpc, CHAT if rpc is Rpc.HTTP else GRPC_CHAT, body)
    hasher = Hasher(64, 100_000)
    chain = hasher.chain(asked)
    assert chain is not None
    assert chain == drained(hasher.chain_in_slices(asked))
