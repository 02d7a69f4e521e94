"""Chains: what router and replica make of canonical bytes, block by block and turn by turn."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any, Literal

import msgspec
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from kvlane.v1 import inference_pb2 as pb

from router.prefix.canonical import MAX_PROMPT_BYTES, Canonical, canonical
from router.prefix.hashing import Hasher, chain_of, extend
from router.types import Chain, Request, Rpc
from tests.twins import twins

both = twins("router.prefix._chats")

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
SURROGATES: tuple[Literal["Cs"], ...] = ("Cs",)
texts = st.text(st.characters(exclude_categories=SURROGATES), max_size=200)
turns = st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), texts), min_size=1, max_size=5)
block_sizes = st.sampled_from([16, 17, 64, 128, 241, 256])


def request(path: str, body: Any, **fields: Any) -> Request:
    encoded = body if isinstance(body, bytes) else json.dumps(body).encode()
    made = Request("r", "m", Rpc.HTTP, path, encoded)
    return msgspec.structs.replace(made, **fields)


def conversation(said: list[tuple[str, str]]) -> Request:
    return request(CHAT, {"messages": [{"role": role, "content": content} for role, content in said]})


def form(asked: Request) -> Canonical:
    found = canonical(
        asked.rpc, asked.path, asked.body, model=asked.model, lora=asked.lora, cache_salt=asked.cache_salt
    )
    assert found is not None
    return found


def chain(asked: Request, block_bytes: int = 64, max_bytes: int = MAX_PROMPT_BYTES) -> Chain:
    found = Hasher(block_bytes, max_bytes).chain(asked)
    assert found is not None
    return found


def by_definition(seed: int, data: bytes, block_bytes: int) -> list[int]:
    """The chain as the module's docstring defines it."""
    hashes = []
    for start in range(0, len(data) - block_bytes + 1, block_bytes):
        seed = xxhash.xxh3_64_intdigest(data[start : start + block_bytes], seed)
        hashes.append(seed)
    return hashes


@pytest.mark.parametrize("block_bytes", [16, 240, 241, 256, 512])
@pytest.mark.parametrize("blocks", [0, 1, 2, 63, 64, 65, 127, 128, 129, 500])
@pytest.mark.parametrize("more", [0, 1, 15])
def test_a_chain_is_what_its_definition_says(block_bytes: int, blocks: int, more: int) -> None:
    data = bytes(i * 7 % 251 for i in range(blocks * block_bytes + more))
    prompt = Canonical(b"name", data, len(data))
    found = chain_of(prompt, block_bytes, MAX_PROMPT_BYTES)
    seed = xxhash.xxh3_64_intdigest(b"name")
    assert found == Chain(block_bytes, seed, tuple(by_definition(seed, data, block_bytes)), len(data))
    assert len(found.blocks) == blocks


def test_no_block_has_the_hash_0(monkeypatch: pytest.MonkeyPatch) -> None:
    def weak(data: bytes, seed: int = 0) -> int:
        return (sum(data) + seed) % 3

    monkeypatch.setattr("router.prefix.hashing.xxh3_64_intdigest", weak)
    data = bytes(range(200)) * 3
    whole, _ = extend(2, b"", data, 16)
    assert set(whole) == {1, 2}
    first, rest = extend(2, b"", data[:100], 16)
    assert first + extend(first[-1], rest, data[100:], 16)[0] == whole


def test_a_chain_never_changes_between_versions() -> None:
    """Routers and replicas of different versions work together, so these numbers stay."""
    asked = request(CHAT, {"messages": [{"role": "user", "content": "0123456789" * 5}]}, cache_salt="salt")
    assert chain(asked, 16) == Chain(
        16, 9296032297309791158, (6504171398612919738, 5572406885044867761, 9263144646384171197), 56
    )


def test_the_hasher_makes_the_chain_of_the_canonical_form() -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    said = {"messages": [{"role": "user", "content": "hello " * 40}]}
    for asked in (
        request(CHAT, said),
        request(CHAT, {**said, "tools": tools}),
        request(CHAT, said, lora="adapter", cache_salt="s"),
        request(COMPLETIONS, {"prompt": [1, 2, 3] * 30}),
        request(COMPLETIONS, {"prompt": "text " * 40}),
    ):
        hasher = Hasher(64, MAX_PROMPT_BYTES)
        expected = chain_of(form(asked), 64, MAX_PROMPT_BYTES)
        assert hasher.chain(asked) == expected
        assert hasher.chain(asked) == expected  # with what the first call left behind


def test_what_has_no_prompt_has_no_chain() -> None:
    hasher = Hasher(256, MAX_PROMPT_BYTES)
    assert hasher.chain(request("/v1/models", b"", method="GET")) is None
    assert hasher.chain(request(CHAT, {"messages": [{"role": "user", "content": "x"}]}, method="DELETE")) is None
    assert hasher.chain(request(CHAT, b"\x00")) is None
    assert hasher.chain(request(CHAT, b'{"messages":[{"role":"u"}],"tools":' + b"[" * 60_000 + b"}")) is None


def test_a_short_prompt_has_a_chain_without_blocks() -> None:
    assert chain(conversation([("user", "hi")]), 256).blocks == ()


def test_no_block_lies_past_the_limit_and_the_length_is_the_whole_prompts() -> None:
    asked = request(COMPLETIONS, {"prompt": "x" * 1000})
    assert len(chain(asked, 64, 500).blocks) == 7
    assert chain(asked, 64, 500).prompt_bytes == 1000
    assert chain(asked, 64).blocks[:7] == chain(asked, 64, 500).blocks
    assert chain(asked, 64, 10).blocks == ()


@given(turns, texts, turns, block_sizes)
@settings(derandomize=True, deadline=None, max_examples=150)
def test_the_next_turns_chain_extends_this_ones(
    said: list[tuple[str, str]], answer: str, more: list[tuple[str, str]], block_bytes: int
) -> None:
    before = chain(conversation(said), block_bytes)
    after = chain(conversation([*said, ("assistant", answer), *more]), block_bytes)
    assert after.blocks[: len(before.blocks)] == before.blocks


@given(turns, texts, turns, block_sizes, st.lists(st.integers(0, 200), max_size=4))
@settings(derandomize=True, deadline=None, max_examples=150)
def test_a_chain_extended_over_the_answer_is_the_beginning_of_the_next_turns(
    said: list[tuple[str, str]], answer: str, more: list[tuple[str, str]], block_bytes: int, cuts: list[int]
) -> None:
    """However the answer's bytes are cut into pieces on their way."""
    asked = form(conversation(said))
    assert asked.answer_prefix is not None
    now = chain_of(asked, block_bytes, MAX_PROMPT_BYTES)
    blocks, rest = list(now.blocks), asked.data[len(now.blocks) * block_bytes :]
    written = asked.answer_prefix + answer.encode()
    places = [0, *sorted(min(cut, len(written)) for cut in cuts), len(written)]
    for start, end in pairwise(places):
        new, rest = extend(blocks[-1] if blocks else now.seed, rest, written[start:end], block_bytes)
        blocks += new
    after = chain(conversation([*said, ("assistant", answer), *more]), block_bytes)
    assert list(after.blocks[: len(blocks)]) == blocks
    assert len(blocks) == (len(asked.data) + len(written)) // block_bytes
    assert len(rest) < block_bytes


@given(texts, texts, block_sizes)
@settings(derandomize=True, deadline=None, max_examples=100)
def test_a_completion_goes_on_where_its_answer_ends(prompt: str, answer: str, block_bytes: int) -> None:
    asked = form(request(COMPLETIONS, {"prompt": prompt}))
    assert asked.answer_prefix == b""
    blocks, _ = extend(chain_of(asked, block_bytes, MAX_PROMPT_BYTES).seed, asked.data, answer.encode(), block_bytes)
    assert list(chain(request(COMPLETIONS, {"prompt": prompt + answer}), block_bytes).blocks) == blocks


@given(turns, st.tuples(texts, texts, texts), st.tuples(texts, texts, texts))
@settings(derandomize=True, deadline=None, max_examples=100)
def test_chains_of_different_namespaces_have_nothing_in_common(
    said: list[tuple[str, str]], one: tuple[str, str, str], other: tuple[str, str, str]
) -> None:
    asked = conversation([*said, ("user", "x" * 64)])
    found = [
        chain(msgspec.structs.replace(asked, model=model or "m", lora=lora, cache_salt=salt), 16)
        for model, lora, salt in (one, other)
    ]
    names = [(lora or model or "m", salt) for model, lora, salt in (one, other)]
    if names[0] == names[1]:
        assert found[0] == found[1]
    else:
        assert found[0].seed != found[1].seed
        assert not set(found[0].blocks) & set(found[1].blocks)


def test_chains_of_different_kinds_and_shapes_have_nothing_in_common() -> None:
    text = "x" * 512
    said = {"messages": [{"role": "user", "content": text}]}
    ids = {"prompt": [int.from_bytes(b"xxxx", "little")] * 128}
    found = [
        chain(request(COMPLETIONS, {"prompt": text}), 16),
        chain(request(COMPLETIONS, ids), 16),
        chain(request("/v1/embeddings", {"input": text}), 16),
        chain(request(CHAT, said), 16),
        chain(request(CHAT, {**said, "tools": [{"name": "f"}]}), 16),
        chain(request("/tokenize", said), 16),
    ]
    assert form(request(COMPLETIONS, ids)).data == text.encode()
    every = [block for one in found for block in one.blocks]
    assert len(set(every)) == len(every)


@given(turns, st.integers(0, 4), texts, block_sizes)
@settings(derandomize=True, deadline=None, max_examples=100)
def test_a_change_changes_every_block_from_its_own_on_and_none_before(
    said: list[tuple[str, str]], place: int, text: str, block_bytes: int
) -> None:
    changed = list(said)
    place %= len(said)
    changed[place] = (said[place][0], text + said[place][1])
    one, other = form(conversation(said)), form(conversation(changed))
    same = next((i for i, (a, b) in enumerate(zip(one.data, other.data, strict=False)) if a != b), None)
    if same is None:
        same = min(len(one.data), len(other.data))
    before, after = (chain_of(each, block_bytes, MAX_PROMPT_BYTES).blocks for each in (one, other))
    kept = same // block_bytes
    assert before[:kept] == after[:kept]
    assert not set(before[kept:]) & set(after[kept:])


def test_a_conversation_keeps_its_chain_when_it_moves_to_grpc() -> None:
    said = [("system", "s" * 100), ("user", "ü" * 100)]
    message = pb.ChatRequest(model="m", messages=[pb.ChatMessage(role=role, content=text) for role, text in said])
    called = Request("r", "m", Rpc.GRPC, "/kvlane.v1.Inference/Chat", message.SerializeToString())
    assert chain(called) == chain(conversation(said))


@given(st.binary(max_size=300), st.sampled_from([CHAT, COMPLETIONS, "/v1/responses", "/kvlane.v1.Inference/Chat"]))
@settings(derandomize=True, deadline=None, max_examples=150)
def test_no_bytes_raise(body: bytes, path: str) -> None:
    for rpc in Rpc:
        Hasher(16, 1000).chain(request(path, body, rpc=rpc))


def test_what_is_kept_between_requests_is_bounded() -> None:
    hasher = Hasher(16, MAX_PROMPT_BYTES)
    for number in range(3000):
        body = {"messages": [{"role": "user", "content": "x"}]}
        hasher.chain(request(CHAT, body, cache_salt=f"salt {number}"))
        if number % 10 == 0:
            hasher.chain(request(CHAT, {**body, "tools": [{"name": f"f{number}"}]}))
    assert len(hasher._seeds) <= 1024
    assert len(hasher._shapes) <= 256
