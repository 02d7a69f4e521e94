"""Canonical prompt bytes: equal prompts have equal ones, continued conversations begin alike, and nothing raises."""

from __future__ import annotations

import base64
import json
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kvlane.v1 import inference_pb2 as pb

from router.prefix import window
from router.prefix.canonical import MAX_PROMPT_BYTES, Canonical, PieceKind, canonical
from router.types import Rpc

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
RESPONSES = "/v1/responses"
MESSAGES = "/v1/messages"
GENERATE = "/kvlane.v1.Inference/Generate"
GRPC_CHAT = "/kvlane.v1.Inference/Chat"
EMBED = "/kvlane.v1.Inference/Embed"
PATHS = [
    CHAT, COMPLETIONS, RESPONSES, MESSAGES, "/v1/embeddings", "/v2/embed", "/pooling", "/classify", "/score",
    "/v1/rerank", "/tokenize", "/inference/v1/generate",
]  # fmt: skip

SURROGATES: tuple[Literal["Cs"], ...] = ("Cs",)
texts = st.text(st.characters(exclude_categories=SURROGATES), max_size=60)
roles = st.sampled_from(["system", "user", "assistant", "tool", "developer", "judge"])
messages = st.lists(st.tuples(roles, texts), min_size=1, max_size=6)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=20,
)
FIELDS = [
    "messages", "prompt", "input", "system", "content", "role", "type", "text", "tools", "tool_calls", "function",
    "name", "arguments", "image_url", "url", "instructions", "documents", "query", "output", "call_id", "source",
]  # fmt: skip
body_like = st.recursive(
    st.none() | st.integers() | texts | st.sampled_from(["text", "message", "user", "tool_result", "function_call"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(FIELDS), inner, max_size=6),
    max_leaves=25,
)


def http(path: str, body: Any, **options: Any) -> Canonical | None:
    encoded = body if isinstance(body, bytes) else json.dumps(body).encode()
    return canonical(Rpc.HTTP, path, encoded, model=options.pop("model", "m"), **options)


def grpc(path: str, message: Any, **options: Any) -> Canonical | None:
    return canonical(Rpc.GRPC, path, message.SerializeToString(), model=options.pop("model", "m"), **options)


def chat(*turns: tuple[str, Any], **fields: Any) -> Canonical:
    found = http(CHAT, {"messages": [{"role": role, "content": content} for role, content in turns], **fields})
    assert found is not None
    return found


def data(path: str, body: Any) -> bytes:
    found = http(path, body)
    assert found is not None
    return found.data


def escaped(text: str) -> str:
    """Every character as the inside of a JSON string may have it: `\\u` and four digits."""
    units = text.encode("utf-16-be").hex()
    return "".join(f"\\u{units[i : i + 4]}" for i in range(0, len(units), 4))


# -- the form


def test_a_conversation_is_its_roles_and_texts_behind_marks() -> None:
    found = chat(("system", "Be brief."), ("user", "Grüße 🙂"))
    assert found.data == b"\xf5system\xf6Be brief.\xf5user\xf6" + "Grüße 🙂".encode()
    assert found.answer_prefix == b"\xf5assistant\xf6"
    assert found.prompt_bytes == len(found.data)


def test_a_text_prompt_is_its_text_and_the_answer_follows_it() -> None:
    found = http(COMPLETIONS, {"prompt": "Once upon\na time"})
    assert found is not None
    assert (found.data, found.answer_prefix) == (b"Once upon\na time", b"")


def test_token_ids_take_four_bytes_each() -> None:
    found = http(COMPLETIONS, {"prompt": [1, 256, 2**32 - 1]}, with_pieces=True)
    assert found is not None
    assert found.data == b"\1\0\0\0\0\1\0\0\xff\xff\xff\xff"
    assert [(piece.kind, piece.length) for piece in found.pieces] == [(PieceKind.TOKENS, 12)]


@pytest.mark.parametrize("ids", [[-1], [2**32], [1.5], [1, "a"], [1, None]])
def test_token_ids_that_are_none_make_no_prompt(ids: list[Any]) -> None:
    assert http(COMPLETIONS, {"prompt": ids}) is None


@pytest.mark.parametrize(
    ("several", "first"),
    [(["a", "b"], "a"), ([[1, 2], [3]], [1, 2]), (["a", 3], "a")],
)
def test_of_several_prompts_the_first_counts(several: Any, first: Any) -> None:
    assert http(COMPLETIONS, {"prompt": several}) == http(COMPLETIONS, {"prompt": first})


def test_one_text_part_is_the_same_as_the_text() -> None:
    part = {"type": "text", "text": "hello"}
    assert chat(("user", [part])) == chat(("user", "hello")) == chat(("user", ["hello"]))


def test_two_text_parts_are_not_their_joined_texts() -> None:
    parts = [{"type": "text", "text": "ab"}, {"type": "text", "text": "c"}]
    assert chat(("user", parts)).data != chat(("user", "abc")).data


def test_tool_calls_and_results_are_part_of_the_conversation() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    turns = [
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "2", "tool_call_id": "c1"},
    ]
    assert data(CHAT, {"messages": turns}) == (
        b'\xf5assistant\xf6\xf9add\xfa{"a": 1}\xf8c1'  # the call
        b"\xf5tool\xf62\xf8c1"
    )


def test_a_name_is_part_of_the_message_and_reasoning_is_not() -> None:
    plain = {"role": "user", "content": "x"}
    assert data(CHAT, {"messages": [plain | {"name": "Ann"}]}) == b"\xf5user\xf6x\xf7Ann"
    assert data(CHAT, {"messages": [plain | {"reasoning": "hm", "refusal": "no"}]}) == data(CHAT, {"messages": [plain]})


def test_a_refusal_part_is_text() -> None:
    assert chat(("assistant", [{"type": "refusal", "refusal": "no"}])) == chat(("assistant", "no"))


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}},
        {"type": "image_url", "image_url": {"url": "https://example.com/a.png", "detail": "high"}},
        {"type": "input_image", "image_url": "https://example.com/a.png"},
        {"image_url": "https:\\u002f/example.com/a.png"},
    ],
)
def test_a_picture_is_known_by_its_url_however_it_is_written(part: dict[str, Any]) -> None:
    body = json.dumps({"messages": [{"role": "user", "content": [part]}]}).replace("\\\\u", "\\u").encode()
    found = http(CHAT, body, with_pieces=True)
    plain = chat(("user", [{"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}]))
    assert found is not None
    assert found.data == plain.data
    assert [piece.kind for piece in found.pieces] == [PieceKind.MARK, PieceKind.MEDIA]


def test_media_count_by_their_content_alone() -> None:
    payload = base64.b64encode(b"picture").decode()
    by_url = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{payload}"}}
    by_source = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": payload}}
    sound = {"type": "input_audio", "input_audio": {"data": payload, "format": "wav"}}
    others = {"type": "input_audio", "input_audio": {"data": payload + "AAAA", "format": "wav"}}
    found = [data(CHAT, {"messages": [{"role": "user", "content": [part]}]}) for part in (by_url, sound, others)]
    assert found[0] == found[1] == data(MESSAGES, {"messages": [{"role": "user", "content": [by_source]}]})
    assert found[2] != found[1]


def test_media_with_an_id_are_known_by_it() -> None:
    part = {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}, "uuid": "u1"}
    bare = {"type": "image_url", "image_url": None, "uuid": "u1"}
    assert chat(("user", [part])) == chat(("user", [bare]))


def test_what_is_not_understood_ends_the_prompt_and_the_hope_for_its_answer() -> None:
    strange = [{"type": "text", "text": "look"}, {"type": "hologram", "hologram": {}}]
    found = chat(("user", "first"), ("user", strange), ("user", "later"))
    assert found.data == b"\xf5user\xf6first\xf5user\xf6look"
    assert found.prompt_bytes > len(found.data)
    assert found.answer_prefix is None


def test_an_answer_that_continues_the_last_message_follows_its_text() -> None:
    assert chat(("user", "x"), ("assistant", "y"), continue_final_message=True).answer_prefix == b""
    assert chat(("user", "x"), ("assistant", "y"), continue_final_message=False).answer_prefix == b"\xf5assistant\xf6"


# -- the same in every API


def test_a_conversation_may_change_its_api() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a":1}'}}
    chatted = http(
        CHAT,
        {
            "messages": [
                {"role": "system", "content": "Sys"},
                {"role": "user", "content": "Hi é"},
                {"role": "assistant", "content": "Well", "tool_calls": [call]},
                {"role": "tool", "content": "2", "tool_call_id": "c1"},
                {"role": "user", "content": "thanks"},
            ],
            "tools": [{"type": "function", "function": {"name": "add", "description": "d", "parameters": {"a": 1}}}],
        },
    )
    responded = http(
        RESPONSES,
        {
            "instructions": "Sys",
            "input": [
                {"role": "user", "content": [{"type": "input_text", "text": "Hi é"}]},
                {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Well"}]},
                {"type": "function_call", "name": "add", "arguments": '{"a":1}', "call_id": "c1"},
                {"type": "function_call_output", "call_id": "c1", "output": "2"},
                {"role": "user", "content": "thanks"},
            ],
            "tools": [{"type": "function", "name": "add", "description": "d", "parameters": {"a": 1}}],
        },
    )
    messaged = http(
        MESSAGES,
        {
            "system": [{"type": "text", "text": "x-anthropic-billing-header: 1"}, {"type": "text", "text": "Sys"}],
            "messages": [
                {"role": "user", "content": "Hi é"},
                {
                    "role": "assistant",
                    "content": [
                        {"type": "thinking", "thinking": "hm"},
                        {"type": "text", "text": "Well"},
                        {"type": "tool_use", "id": "c1", "name": "add", "input": {"a": 1}},
                    ],
                },
                {
                    "role": "user",
                    "content": [
                        {"type": "tool_result", "tool_use_id": "c1", "content": [{"type": "text", "text": "2"}]},
                        {"type": "text", "text": "thanks"},
                    ],
                },
            ],
            "tools": [{"name": "add", "description": "d", "input_schema": {"a": 1}}],
        },
    )
    called = grpc(
        GRPC_CHAT,
        pb.ChatRequest(
            messages=[
                pb.ChatMessage(role="system", content="Sys"),
                pb.ChatMessage(role="user", content="Hi é"),
                pb.ChatMessage(
                    role="assistant",
                    content="Well",
                    tool_calls=[pb.ToolCall(id="c1", name="add", arguments_json='{"a":1}')],
                ),
                pb.ChatMessage(role="tool", content="2", tool_call_id="c1"),
                pb.ChatMessage(role="user", content="thanks"),
            ],
            tools=[pb.Tool(name="add", description="d", parameters_json='{"a": 1}')],
        ),
    )
    assert chatted is not None
    assert chatted == responded == messaged == called


@given(texts)
@settings(derandomize=True, deadline=None)
def test_a_completion_is_the_same_over_both_protocols(text: str) -> None:
    assert http(COMPLETIONS, {"prompt": text}) == grpc(GENERATE, pb.GenerateRequest(text=text))


def test_token_ids_are_the_same_over_both_protocols() -> None:
    called = grpc(GENERATE, pb.GenerateRequest(token_ids=pb.TokenIds(ids=[5, 70_000])))
    assert (
        called
        == http(COMPLETIONS, {"prompt": [5, 70_000]})
        == http("/inference/v1/generate", {"token_ids": [5, 70_000]})
    )


def test_every_kind_of_request_has_a_prompt() -> None:
    turns = [{"role": "user", "content": "x"}]
    assert data("/v1/embeddings", {"input": "x"}) == data("/pooling", {"input": ["x"]}) == b"x"
    assert data("/v1/embeddings", {"messages": turns}) == data("/tokenize", {"messages": turns}) == b"\xf5user\xf6x"
    assert data("/tokenize", {"prompt": "x"}) == data("/v2/embed", {"texts": ["x"]}) == b"x"
    assert data("/v1/score", {"text_1": "q", "text_2": ["d", "e"]}) == b"q\xfcd"
    assert data("/rerank?x=1", {"query": "q", "documents": ["d", "e"]}) == b"q\xfcd"
    embedded = grpc(EMBED, pb.EmbedRequest(texts=["x", "y"]))
    assert embedded == http("/v1/embeddings", {"input": ["x", "y"]})


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/models", {}),
        ("/v1/audio/transcriptions", b"--boundary\r\n"),
        (CHAT, {"messages": []}),
        (CHAT, {"prompt": "x"}),
        (CHAT, {"messages": [{"content": "no role"}]}),
        (COMPLETIONS, {"prompt": None}),
        (COMPLETIONS, {"prompt_embeds": "AAAA"}),
        (RESPONSES, {"input": "x", "previous_response_id": "r1"}),
        (CHAT, b'{"messages":[{"role":"user","content":"\\ud800"}]}'),
        (CHAT, b""),
    ],
)
def test_what_has_no_prompt_that_can_be_read_has_no_canonical_form(path: str, body: Any) -> None:
    assert http(path, body) is None


# -- namespaces


def test_whatever_changes_the_rendering_is_in_the_namespace() -> None:
    plain = http(CHAT, {"messages": [{"role": "user", "content": "x"}]})
    assert plain is not None
    seen = {plain.namespace}
    for fields in (
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
        {"tools": [{"type": "function", "function": {"name": "g"}}]},
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"chat_template": "{{ x }}"},
        {"documents": [{"text": "d"}]},
        {"reasoning_effort": "high"},
        {"truncate_prompt_tokens": 5},
    ):
        found = http(CHAT, {"messages": [{"role": "user", "content": "x"}], **fields})
        assert found is not None
        assert found.data == plain.data
        seen.add(found.namespace)
    for options in ({"model": "other"}, {"cache_salt": "s"}, {"tenant": "s"}, {"lora": "s"}):
        found = http(CHAT, {"messages": [{"role": "user", "content": "x"}]}, **options)
        assert found is not None
        seen.add(found.namespace)
    assert len(seen) == 12


def test_absent_and_empty_shapes_are_the_same() -> None:
    bare = chat(("user", "x"))
    assert bare == chat(("user", "x"), tools=None) == chat(("user", "x"), tools=[], chat_template_kwargs={})


def test_a_lora_adapter_is_the_same_whether_it_is_the_model_or_beside_it() -> None:
    body = {"prompt": "x"}
    assert http(COMPLETIONS, body, model="base", lora="a") == http(COMPLETIONS, body, model="a")


@given(st.tuples(texts, texts, texts), st.tuples(texts, texts, texts))
@settings(derandomize=True, deadline=None, max_examples=150)
def test_different_names_never_make_one_namespace(one: tuple[str, str, str], other: tuple[str, str, str]) -> None:
    found = [
        http(COMPLETIONS, {"prompt": "x"}, model=model, cache_salt=salt, tenant=tenant)
        for model, salt, tenant in (one, other)
    ]
    assert found[0] is not None
    assert found[1] is not None
    assert (found[0].namespace == found[1].namespace) == (one == other)


def test_tools_are_the_same_in_any_white_space_and_with_any_escapes() -> None:
    tools = [{"type": "function", "function": {"name": "f", "description": "für"}}]
    turns = [{"role": "user", "content": "x"}]
    memo: dict[bytes, bytes] = {}
    found = {
        canonical(Rpc.HTTP, CHAT, json.dumps(body, **options).encode(), model="m", memo=memo).namespace  # type: ignore[union-attr]
        for body in ({"messages": turns, "tools": tools}, {"tools": tools, "messages": turns})
        for options in ({}, {"indent": 3}, {"ensure_ascii": False}, {"separators": (",", ":")})
    }
    assert len(found) == 1
    assert memo


# -- what holds for any conversation


@given(messages, texts, messages)
@settings(derandomize=True, deadline=None, max_examples=150)
def test_a_conversation_begins_its_continuation_answer_included(
    turns: list[tuple[str, str]], answer: str, more: list[tuple[str, str]]
) -> None:
    before = chat(*turns)
    after = chat(*turns, ("assistant", answer), *more)
    assert before.answer_prefix is not None
    assert after.data.startswith(before.data + before.answer_prefix + answer.encode())
    assert after.namespace == before.namespace


@given(messages)
@settings(derandomize=True, deadline=None, max_examples=100)
def test_escapes_and_white_space_make_no_difference(turns: list[tuple[str, str]]) -> None:
    body = {"model": "m", "messages": [{"role": role, "content": content} for role, content in turns]}
    forms = [
        json.dumps(body),
        json.dumps(body, ensure_ascii=False),
        json.dumps(body, indent=2),
        json.dumps(body, ensure_ascii=False, separators=(",", ":")),
        json.dumps(body).replace("/", "\\/"),
        json.dumps({"messages": [{"content": content, "role": role} for role, content in turns], "model": "m"}),
        '{"messages":[' + ",".join(f'{{"role":"{role}","content":"{escaped(said)}"}}' for role, said in turns) + "]}",
    ]
    assert len({data(CHAT, form.encode()) for form in forms}) == 1


@given(messages, messages)
@settings(derandomize=True, deadline=None, max_examples=150)
def test_different_conversations_have_different_bytes(one: list[tuple[str, str]], other: list[tuple[str, str]]) -> None:
    assert (chat(*one).data == chat(*other).data) == (one == other)


@given(messages, st.booleans())
@settings(derandomize=True, deadline=None, max_examples=100)
def test_pieces_cover_the_data_and_texts_are_the_clients(turns: list[tuple[str, str]], with_picture: bool) -> None:
    body = {"messages": [{"role": role, "content": content} for role, content in turns]}
    if with_picture:
        picture = {"type": "image_url", "image_url": {"url": "https://example.com"}}
        body["messages"].append({"role": "user", "content": [picture, {"type": "text", "text": "see"}]})  # type: ignore[dict-item]
    found = http(CHAT, body, with_pieces=True)
    assert found is not None
    place = 0
    for piece in found.pieces:
        assert piece.start == place
        assert piece.length > 0
        place += piece.length
    assert place == len(found.data)
    said = [
        found.data[piece.start : piece.start + piece.length].decode()
        for piece in found.pieces
        if piece.kind is PieceKind.TEXT
    ]
    assert said == [content for _, content in turns if content] + ["see"] * with_picture


# -- nothing raises


@given(st.sampled_from(PATHS), json_values)
@settings(derandomize=True, deadline=None, max_examples=150)
def test_no_json_raises(path: str, body: Any) -> None:
    http(path, body, with_pieces=True)


@given(st.sampled_from(PATHS), st.dictionaries(st.sampled_from(FIELDS), body_like, max_size=6))
@settings(derandomize=True, deadline=None, max_examples=150)
def test_no_body_that_is_almost_right_raises(path: str, body: dict[str, Any]) -> None:
    found = http(path, body, with_pieces=True)
    assert found is None or sum(piece.length for piece in found.pieces) == len(found.data)


@given(st.sampled_from(PATHS), st.binary(max_size=200))
@settings(derandomize=True, deadline=None, max_examples=100)
def test_no_bytes_raise(path: str, body: bytes) -> None:
    http(path, body)
    http(path, b'{"messages":[{"role":"user","content":"' + body + b'"}]}')


@given(st.sampled_from([GENERATE, GRPC_CHAT, EMBED]), st.binary(max_size=200))
@settings(derandomize=True, deadline=None, max_examples=150)
def test_no_bytes_raise_over_grpc(path: str, body: bytes) -> None:
    canonical(Rpc.GRPC, path, body, model="m", with_pieces=True)


# -- long bodies


def long_chat(length: int, **fields: Any) -> dict[str, Any]:
    turns = [{"role": "user" if i % 2 else "assistant", "content": f"{i} é\n" * 100} for i in range(length // 600)]
    return {"messages": turns, **fields}


@pytest.mark.parametrize("ensure_ascii", [True, False])
@pytest.mark.parametrize("limit", [200_000, 200_001, 200_013, 200_100, 201_234, 203_333])
def test_of_a_long_conversation_the_beginning_is_read(limit: int, ensure_ascii: bool) -> None:
    body = json.dumps(long_chat(600_000), ensure_ascii=ensure_ascii).encode()
    whole = http(CHAT, body)
    some = http(CHAT, body, max_bytes=limit)
    assert whole is not None
    assert some is not None
    assert whole.data.startswith(some.data)
    assert limit // 3 < len(some.data) < limit
    assert len(some.data) < some.prompt_bytes <= len(body)
    assert some.answer_prefix is None


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (COMPLETIONS, {"prompt": "é\n\\" * 100_000}),
        (COMPLETIONS, {"prompt": ["x" * 400_000, "y"]}),
        (COMPLETIONS, {"prompt": list(range(100_000))}),
        (COMPLETIONS, {"prompt": [list(range(100_000)), [1]]}),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "text", "text": "🙂é\n" * 50_000}]}]}),
        (MESSAGES, {"system": "s", "messages": [{"role": "user", "content": "x" * 400_000}]}),
        (RESPONSES, {"input": "x" * 400_000}),
        (RESPONSES, {"input": [{"role": "user", "content": "x" * 400_000}]}),
    ],
)
def test_of_a_long_prompt_the_beginning_is_read(path: str, body: dict[str, Any]) -> None:
    whole = http(path, body)
    some = http(path, body, max_bytes=150_000)
    assert whole is not None
    assert some is not None
    assert whole.data.startswith(some.data)
    assert len(some.data) > 30_000
    assert some.prompt_bytes > len(some.data)
    assert whole.namespace == some.namespace


def test_what_comes_after_the_beginning_of_a_long_body_is_never_looked_at() -> None:
    """So no body can cost more than its first `max_bytes` do."""
    body = json.dumps(long_chat(600_000)).encode()
    some = http(CHAT, body, max_bytes=200_000)
    assert some is not None
    for rest in (b"[" * 400_000, b"\xff" * 400_000, b'"' * 400_000, b"{}," * 130_000):
        assert http(CHAT, (body[:200_000] + rest)[: len(body)], max_bytes=200_000) is not None
    changed = http(CHAT, body[:200_000] + b"#" * (len(body) - 200_000), max_bytes=200_000)
    assert changed == some


def test_no_more_parts_are_read_than_anybody_needs() -> None:
    body = b'{"messages":[' + b'{"role":"a"},' * 70_000 + b'{"role":"a"}]}'
    found = http(CHAT, body, with_pieces=True)
    assert found is not None
    assert len(found.pieces) < 17_000
    assert found.answer_prefix is None
    crowded = pb.ChatRequest(messages=[pb.ChatMessage(role="a")] * 70_000)
    called = grpc(GRPC_CHAT, crowded)
    assert called is not None
    assert called.data == found.data
    assert called.answer_prefix is None


@pytest.mark.parametrize("ensure_ascii", [True, False])
def test_long_media_do_not_count_against_the_limit_and_hash_as_short_ones_do(ensure_ascii: bool) -> None:
    payload = base64.b64encode(bytes(range(256)) * 2000).decode()
    turns = [
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{payload}"}}]},
        {"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": payload, "format": "wav"}}]},
        {"role": "user", "content": "What is it?"},
    ]
    body = json.dumps({"messages": turns}, ensure_ascii=ensure_ascii).encode()
    assert len(body) > 1_300_000
    found = http(CHAT, body, max_bytes=10_000)
    assert found is not None
    assert found.data.endswith(b"What is it?")
    assert found.answer_prefix is not None
    assert len(found.data) < 100
    # The same without the short cut for long media.
    direct = canonical(Rpc.HTTP, CHAT, body.replace(b"base64,", b"base64,\\u0041", 1), model="m")
    again = canonical(Rpc.HTTP, CHAT, body.replace(b"base64,", b"base64,A", 1), model="m")
    assert direct == again


def test_a_text_that_looks_like_media_stays_a_text() -> None:
    text = "QUJD" * 100_000
    body = json.dumps({"messages": [{"role": "user", "content": text}]}).encode()
    assert window.without_media(body) is body
    assert data(CHAT, body) == b"\xf5user\xf6" + text.encode()


def test_the_default_limit_lets_ordinary_prompts_through_whole() -> None:
    body = long_chat(MAX_PROMPT_BYTES // 4)
    found = http(CHAT, body)
    assert found is not None
    assert found.prompt_bytes == len(found.data)
