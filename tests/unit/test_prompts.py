"""The prompt in a submit: taken only with a chain that is its own, whatever comes."""

from __future__ import annotations

import json
import struct
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kvlane.v1 import inference_pb2 as pb

from engine.prompts import ForeignChain, expected_tokens, is_off, open_blocks, prompt_of
from router.lane.frames import FrameError, Submit, pack_chain, unpack_chain
from router.prefix.hashing import Hasher
from router.types import Chain, Request, Rpc

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
TEXT = "The harbour town wakes before the sun. " * 4


def submit(path: str, body: dict[str, Any], *, block_bytes: int = 16, most: int = 1 << 20, matched: int = 0) -> Submit:
    """As a router sends it."""
    data = json.dumps(body).encode()
    chain = Hasher(block_bytes, most).chain(Request("r", "m", Rpc.HTTP, path, data))
    assert chain is not None
    return Submit(1, "r", Rpc.HTTP, "POST", path, (), data, chain=pack_chain(chain), matched=matched)


def chat(*contents: Any) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"model": "m", "messages": [{"role": roles[i % 2], "content": c} for i, c in enumerate(contents)]}


def test_the_routers_chain_of_the_same_body_is_taken() -> None:
    call = submit(CHAT, chat(TEXT))
    prompt = prompt_of(call)
    assert prompt is not None
    assert prompt.chain == unpack_chain(call.chain)
    assert len(prompt.chain.blocks) * 16 + len(prompt.rest) == len(prompt.data)
    assert not prompt.tokens_given
    assert not prompt.has_media


def test_a_submit_without_a_chain_has_no_prompt() -> None:
    assert prompt_of(Submit(1, "r", Rpc.HTTP, "GET", "/v1/models", (), b"")) is None


def test_a_continued_chain_is_that_of_the_next_turn() -> None:
    prompt = prompt_of(submit(CHAT, chat(TEXT)))
    following = prompt_of(submit(CHAT, chat(TEXT, "An answer of some words.", "More?")))
    assert prompt is not None
    assert following is not None
    more = prompt.continued(b"An answer of some words.")
    assert more
    assert following.chain.blocks[: len(prompt.chain.blocks) + len(more)] == (*prompt.chain.blocks, *more)


def test_a_chain_that_does_not_reach_the_prompts_end_does_not_go_on() -> None:
    prompt = prompt_of(submit(CHAT, chat(TEXT), most=64))
    assert prompt is not None
    assert prompt.answer_prefix is None
    assert prompt.continued(b"x" * 100) == []


@pytest.mark.parametrize(
    ("rpc", "path", "body"),
    [
        (Rpc.HTTP, CHAT, json.dumps(chat(*["é\n" * 1000] * 80)).encode()),
        (
            Rpc.GRPC,
            "/kvlane.v1.Inference/Chat",
            pb.ChatRequest(
                model="m", messages=[pb.ChatMessage(role="user", content="a turn " * 300)] * 60
            ).SerializeToString(),
        ),
    ],
)
@pytest.mark.parametrize("most", [16 << 10, 64 << 10])
def test_of_a_large_body_a_router_may_hash_less(rpc: Rpc, path: str, body: bytes, most: int) -> None:
    chain = Hasher(256, most).chain(Request("r", "m", rpc, path, body))
    assert chain is not None
    prompt = prompt_of(Submit(1, "r", rpc, "POST", path, (), body, chain=pack_chain(chain)))
    assert prompt is not None
    assert prompt.chain == chain
    assert len(chain.blocks) > 20
    assert prompt.continued(b"x" * 1000) == []


def test_tokens_and_media_are_told_apart() -> None:
    tokens = prompt_of(submit(COMPLETIONS, {"model": "m", "prompt": list(range(40))}))
    assert tokens is not None
    assert tokens.tokens_given
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    media = prompt_of(submit(CHAT, chat([{"type": "text", "text": TEXT}, image])))
    assert media is not None
    assert media.has_media


@pytest.mark.parametrize("block_bytes", [0, 1, 15])
def test_chains_of_blocks_that_no_router_makes_are_none(block_bytes: int) -> None:
    packed = struct.pack("<3Q", block_bytes, 100, 7)
    with pytest.raises(FrameError, match="blocks of"):
        unpack_chain(packed)
    with pytest.raises(ForeignChain):
        prompt_of(Submit(1, "r", Rpc.HTTP, "POST", CHAT, (), json.dumps(chat(TEXT)).encode(), chain=packed))


def test_fewer_than_no_blocks_believed_to_be_held_make_it_foreign() -> None:
    with pytest.raises(ForeignChain, match="-3 blocks"):
        prompt_of(submit(CHAT, chat(TEXT), matched=-3))


def test_another_bodys_chain_is_foreign() -> None:
    call, other = submit(CHAT, chat(TEXT)), submit(CHAT, chat("x" * len(TEXT)))
    with pytest.raises(ForeignChain, match="another chain"):
        prompt_of(msgspec.structs.replace(call, chain=other.chain))


@settings(derandomize=True, max_examples=300, deadline=None)
@given(
    head=st.tuples(*[st.integers(0, (1 << 64) - 1) | st.integers(0, 300)] * 3),
    blocks=st.lists(st.integers(0, (1 << 64) - 1), max_size=12),
    cut=st.integers(0, 9),
    genuine=st.booleans(),
    matched=st.integers(-(1 << 63), (1 << 63) - 1) | st.integers(-20, 20),
    body=st.binary(max_size=60) | st.just(json.dumps(chat(TEXT)).encode()),
)
def test_no_submit_raises_anything_else(
    head: tuple[int, ...], blocks: list[int], cut: int, genuine: bool, matched: int, body: bytes
) -> None:
    packed = struct.pack(f"<{3 + len(blocks)}Q", *head, *blocks)
    if genuine:
        packed = submit(CHAT, chat(TEXT)).chain
    packed = packed[: len(packed) - cut]
    call = Submit(1, "r", Rpc.HTTP, "POST", CHAT, (), body, chain=packed, matched=matched)
    try:
        prompt = prompt_of(call)
    except ForeignChain:
        return
    if prompt is not None:
        ends = tuple(range(4, 4 * len(prompt.chain.blocks) + 1, 4))
        open_blocks(prompt.chain, ends, 40, 16)
        expected_tokens(matched, ends, 40, 16)
        prompt.continued(b"answer" * 10)


def test_open_blocks_are_those_behind_the_last_full_kv_block() -> None:
    assert open_blocks(Chain(16, 0, (1, 2, 3, 4), 64), [4, 8, 12, 14], 14, 4) == ((4,), (14,))
    assert open_blocks(Chain(16, 0, (1, 2), 32), [4, 8], 8, 4) == ((), ())


@pytest.mark.parametrize(("matched", "expected"), [(0, (0, 4)), (1, (4, 8)), (2, (8, 12)), (3, (12, 16)), (4, None)])
def test_what_should_be_found_lies_between_what_is_held_and_what_is_not(
    matched: int, expected: tuple[int, int] | None
) -> None:
    # The last token is computed in any case, so of 18 tokens 16 can be found.
    assert expected_tokens(matched, [5, 9, 13], 18, 4) == expected


def test_a_difference_of_one_kv_block_is_not_off() -> None:
    assert not is_off((8, 12), 4, 4)
    assert not is_off((8, 12), 16, 4)
    assert is_off((8, 12), 0, 4)
    assert is_off((8, 12), 20, 4)
