"""The compiled way of plain chats and texts beside the Python one: the same chain of whatever body."""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from router.compiled import VARIABLE
from router.prefix.hashing import Hasher
from router.prefix.http_prompts import CHAT_PATH, TEXT_PATH
from router.prefix.window import LARGE_BYTES
from router.types import Chain, Request, Rpc
from tests.twins import built

CHATS = "router.prefix._chats"


def hashers(block_bytes: int = 8, max_bytes: int = 1 << 20) -> tuple[Hasher, Hasher]:
    """One in Python, one compiled."""
    built(CHATS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, "0")
        python = Hasher(block_bytes, max_bytes)
    compiled = Hasher(block_bytes, max_bytes)
    assert python._chats is None
    assert compiled._chats is not None
    return python, compiled


def chat(body: bytes | dict[str, Any], **fields: Any) -> Request:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return Request("r", "m", Rpc.HTTP, CHAT_PATH, raw, **fields)


def completion(body: bytes | dict[str, Any], **fields: Any) -> Request:
    return msgspec.structs.replace(chat(body, **fields), path=TEXT_PATH)


Asked = list[tuple[dict[str, Any], int, str, str]]
"""Bodies, how much is cut off their end, cache salts and LoRAs."""


def both_make_the_same(ask: Callable[..., Request], asked: Asked, block_bytes: int, max_bytes: int) -> None:
    python, compiled = hashers(block_bytes, max_bytes)
    for body, cut, salt, lora in asked:
        for ascii_only in (True, False):
            raw = json.dumps(body, ensure_ascii=ascii_only).encode(errors="surrogatepass")
            for part in (raw, raw[: len(raw) - cut]):  # The second time a seed is known.
                request = ask(part, cache_salt=salt, lora=lora)
                assert repr(compiled.chain(request)) == repr(python.chain(request))


texts = st.text(max_size=40) | st.text("abc ", max_size=80) | st.sampled_from(["\ud800", "\x00", "é" * 20, ""])
roles = st.sampled_from(["system", "user", "assistant", "tool", "developer", "function", "critic", "", "ü"])
parts = st.lists(
    st.fixed_dictionaries({"type": st.just("text"), "text": texts})
    | texts
    | st.fixed_dictionaries({"type": st.just("image_url"), "image_url": st.fixed_dictionaries({"url": texts})}),
    max_size=3,
)
calls = st.lists(
    st.fixed_dictionaries({"id": texts, "function": st.fixed_dictionaries({"name": texts, "arguments": texts})}),
    max_size=2,
)
messages = st.fixed_dictionaries(
    {"role": roles},
    optional={"content": texts | parts | st.none() | st.integers(), "name": texts, "tool_call_id": texts | st.none()}
    | {"tool_calls": calls | st.none(), "reasoning": texts},
)
plain = st.fixed_dictionaries({"role": roles, "content": texts})
bodies = st.fixed_dictionaries(
    {"messages": st.lists(plain, max_size=6) | st.lists(messages, max_size=4) | st.none()},
    optional={
        "model": texts,
        "stream": st.booleans(),
        "tools": st.lists(st.fixed_dictionaries({"function": st.fixed_dictionaries({"name": texts})}), max_size=2),
        "continue_final_message": st.booleans(),
        "chat_template": texts,
        "documents": st.none() | st.lists(texts, max_size=1),
    },
)


@settings(deadline=None)
@given(
    st.lists(st.tuples(bodies, st.integers(0, 40), st.sampled_from(["", "s"]), st.sampled_from(["", "l"])), max_size=6),
    st.sampled_from([1, 8, 100]),
    st.sampled_from([0, 20, 1 << 20]),
)
@example([({"messages": [{"role": "user", "content": "x" * 30}]}, 0, "", "")] * 3, 8, 1 << 20)
def test_both_make_the_same_chain_of_any_chat(asked: Asked, block_bytes: int, max_bytes: int) -> None:
    both_make_the_same(chat, asked, block_bytes, max_bytes)


prompts = st.fixed_dictionaries(
    {"prompt": texts | st.text(max_size=300) | st.lists(st.integers(0, 99), max_size=9) | st.lists(texts, max_size=2)},
    optional={
        "model": texts,
        "stream": st.booleans(),
        "chat_template": texts | st.none(),
        "add_special_tokens": st.booleans() | st.none(),
        "documents": st.none() | st.lists(texts, max_size=1),
    },
)


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(prompts, st.integers(0, 40), st.sampled_from(["", "s"]), st.sampled_from(["", "l"])), max_size=6
    ),
    st.sampled_from([1, 8, 100]),
    st.sampled_from([0, 20, 1 << 20]),
)
@example([({"prompt": "x" * 30}, 0, "", "")] * 3, 8, 1 << 20)
def test_both_make_the_same_chain_of_any_completion(asked: Asked, block_bytes: int, max_bytes: int) -> None:
    both_make_the_same(completion, asked, block_bytes, max_bytes)


def test_a_plain_text_is_hashed_without_the_python(monkeypatch: pytest.MonkeyPatch) -> None:
    _, compiled = hashers()
    request = completion({"prompt": "x" * 50, "max_tokens": 3, "stream": True})
    chain = compiled.chain(request)
    monkeypatch.setattr("router.prefix.hashing.read", None)
    assert compiled.chain(request) == chain
    assert chain is not None
    assert len(chain.blocks) == 6


@settings(deadline=None)
@given(st.binary(max_size=200))
@example(b"")
@example(b"null")
@example(b'{"messages": [{"role": "user", "content": "\xff"}]}')
def test_both_make_the_same_of_bytes_that_are_no_chat(body: bytes) -> None:
    python, compiled = hashers()
    for request in (chat(body), chat(b'{"messages": [' + body), completion(body), completion(b'{"prompt": "' + body)):
        assert repr(compiled.chain(request)) == repr(python.chain(request))


@pytest.mark.parametrize("count", [1, 255, 256, 257, 9000])
def test_both_make_the_same_of_many_messages(count: int) -> None:
    python, compiled = hashers()
    said = [{"role": "user", "content": f"number {number}"} for number in range(count)]
    for request in (chat({"messages": said}), chat({"messages": said, "tools": []})):
        chain = compiled.chain(request)
        assert chain is not None
        assert chain.blocks
        assert chain == python.chain(request)


class Nobody:
    def chain(self, request: Request) -> Chain | None:
        raise AssertionError("asked")

    text_chain = chain


def test_what_is_no_short_post_is_left_to_the_python() -> None:
    python, compiled = hashers()
    compiled._chats = Nobody()  # type: ignore[assignment]
    body = {"messages": [{"role": "user", "content": "x" * LARGE_BYTES}]}
    for request in (
        chat(body),
        chat({"messages": [{"role": "user", "content": "x" * 50}]}, method="GET"),
        completion({"prompt": "x" * LARGE_BYTES}),
        completion({"prompt": "x" * 50}, method="GET"),
        Request("r", "m", Rpc.GRPC, CHAT_PATH, b""),
        Request("r", "m", Rpc.HTTP, f"{CHAT_PATH}?a=b", b'{"messages": [{"role": "user", "content": "xxxxxxxx"}]}'),
    ):
        assert compiled.chain(request) == python.chain(request)


def test_no_block_has_the_hash_0(monkeypatch: pytest.MonkeyPatch) -> None:
    def weak(data: bytes, seed: int = 0) -> int:
        return (sum(data) + seed) % 3

    python, compiled = hashers()
    requests = (
        chat({"messages": [{"role": "user", "content": "abcdefghijk" * 40}]}),
        completion({"prompt": "abcdefghijk" * 40}),
    )
    for request in requests:
        assert compiled.chain(request) == python.chain(request)  # The seed is known from now on.
    for module in ("router.prefix.hashing", CHATS):
        monkeypatch.setattr(f"{module}.xxh3_64_intdigest", weak)
    for request in requests:
        chain = compiled.chain(request)
        assert chain == python.chain(request)
        assert chain is not None
        assert set(chain.blocks) == {1, 2}


@pytest.mark.slow
def test_a_hundred_thousand_chats_keep_no_memory() -> None:
    _, compiled = hashers()
    kinds = [
        chat({"messages": [{"role": "user", "content": "x" * 500}, {"role": "assistant", "content": "é" * 100}]}),
        chat({"messages": [{"role": "user", "content": "x" * 500}], "tools": [{"function": {"name": "f"}}]}),
        chat(b'{"messages": [{"role": "user", "content": "xx'),
        chat(b'{"messages": [{"role": "user", "content": ["\xc3\xa9"], "name": "n"}]}'),
        completion({"prompt": "x\u00e9" * 300}),
        completion({"prompt": [1, 2, 3], "n": 2}),
        completion(b'{"prompt": "xx'),
    ]

    def run(rounds: int) -> int:
        for number in range(rounds):
            compiled.chain(kinds[number % len(kinds)])
        gc.collect()
        return sys.getallocatedblocks()

    counts = [run(rounds) for rounds in (10_000, 30_000, 60_000)]
    assert max(after - before for before, after in pairwise(counts)) < 1000
