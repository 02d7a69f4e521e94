"""The form of a stream's events: the same bytes as pydantic makes of vLLM's models, whatever the text."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from engine.chunk_template import ChunkTemplate


class Usage(BaseModel):
    prompt_tokens: int = 0
    total_tokens: int = 0
    completion_tokens: int | None = 0


class Choice(BaseModel):
    index: int = 0
    text: str
    logprobs: Any = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    token_ids: list[int] | None = None


class Delta(BaseModel):
    role: str | None = None
    content: str | None = None
    reasoning: str | None = None


class ChatChoice(BaseModel):
    index: int = 0
    delta: Delta
    logprobs: Any = None
    finish_reason: str | None = None


class Chunk(BaseModel):
    id: str
    object: str = "text_completion"
    created: int = 1
    model: str
    choices: list[Any]
    usage: Usage | None = None
    system_fingerprint: str | None = None


def event(chunk: Chunk) -> bytes:
    """As vLLM's server writes it."""
    return f"data: {chunk.model_dump_json(exclude_unset=True)}\n\n".encode()


def completion(text: str, *, model: str = "m", usage: tuple[int, int] | None = None, **choice: Any) -> bytes:
    made = Chunk(id="cmpl-1", model=model, choices=[Choice(index=0, text=text, logprobs=None, **choice)])
    return event(with_usage(made, usage))


def chat(text: str, *, model: str = "m", usage: tuple[int, int] | None = None, **choice: Any) -> bytes:
    made = Chunk(id="chatcmpl-1", model=model, choices=[ChatChoice(index=0, delta=Delta(content=text), **choice)])
    return event(with_usage(made, usage))


def with_usage(chunk: Chunk, usage: tuple[int, int] | None) -> Chunk:
    if usage is not None:
        prompt, tokens = usage
        chunk.usage = Usage(prompt_tokens=prompt, total_tokens=prompt + tokens, completion_tokens=tokens)
    return chunk


TEXTS = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from('"\\\b\f\n\r\t\0\x1f\x7f\u2028/<🙂\uffff'))
MAKERS = pytest.mark.parametrize("make", [completion, chat])


@MAKERS
@given(first=TEXTS, text=TEXTS, model=TEXTS)
def test_an_event_differs_from_the_one_before_in_its_text_alone(make: Any, first: str, text: str, model: str) -> None:
    template = ChunkTemplate.of(make(first, model=model))
    assert template is not None
    assert template.render(text, 1) == make(text, model=model)


@MAKERS
@given(first=TEXTS, pieces=st.lists(st.tuples(TEXTS, st.integers(0, 9))), begun=st.integers(1, 99), model=TEXTS)
def test_usage_counts_on(make: Any, first: str, pieces: list[tuple[str, int]], begun: int, model: str) -> None:
    template = ChunkTemplate.of(make(first, model=model, usage=(17, begun)))
    assert template is not None
    for text, tokens in pieces:
        begun += tokens
        assert template.render(text, tokens) == make(text, model=model, usage=(17, begun))


def test_every_character_is_written_as_pydantic_writes_it() -> None:
    template = ChunkTemplate.of(completion("x"))
    assert template is not None
    for start in range(0, 0x110000, 0x800):
        if start != 0xD800:  # Surrogates.
            text = "".join(map(chr, range(start, start + 0x800)))
            assert template.render(text, 1) == completion(text)


@pytest.mark.parametrize(
    "text",
    [
        '"text":"',
        '"choices":[{"index":0,"text":"',
        '"delta":{"content":"',
        '"usage":{"prompt_tokens":17',
        "\n\n",
        "data: ",
    ],
)
@MAKERS
def test_a_text_that_looks_like_an_event_changes_nothing(make: Any, text: str) -> None:
    template = ChunkTemplate.of(make(text, usage=(17, 1), model=text))
    assert template is not None
    assert template.render(text * 2, 1) == make(text * 2, usage=(17, 2), model=text)


def test_a_lone_surrogate_is_refused_as_pydantic_refuses_it() -> None:
    template = ChunkTemplate.of(completion("x"))
    assert template is not None
    with pytest.raises(UnicodeEncodeError):
        template.render("\ud800", 1)


ROLE = event(Chunk(id="1", model="m", choices=[ChatChoice(index=0, delta=Delta(role="assistant", content=""))]))
TWO = event(Chunk(id="1", model="m", choices=[Choice(text="a"), Choice(index=1, text="b")]))


@pytest.mark.parametrize(
    "other",
    [
        b"",
        b"data: [DONE]\n\n",
        b": keep-alive\n\n",
        b"data: {}\n\n",
        b"data: []\n\n",
        b'data: {"choices":[]}\n\n',
        b'data: {"choices":[1]}\n\n',
        b'data: {"choices":[{"delta":1}]}\n\n',
        b'data: {"choices":[{"index":0,"text":null}]}\n\n',
        b'data: {"choices": [{"index":0, "text":"x"}]}\n\n',
        b'data: {"choices":[{"index":0,"text":"\\u0041"}]}\n\n',
        b'data: {"error":{"message":"no","code":400}}\n\n',
        ROLE,
        TWO,
        completion("x").removesuffix(b"\n"),
        completion("x") + completion("y"),
        completion("x", finish_reason="stop"),
        completion("x", stop_reason=7),
        completion("x", token_ids=[1]),
        completion("x").replace(b'"index":0', b'"index":1'),
        completion("x").replace(b'"logprobs":null', b'"logprobs":{"tokens":["x"]}'),
        completion("x").replace(b'"model":"m"', b'"model":"m","system_fingerprint":"f"'),
        completion("x", usage=(5, 1)).replace(b'"total_tokens":6', b'"total_tokens":7'),
        completion("x", usage=(5, 1)).replace(b'"total_tokens"', b'"cached":0,"total_tokens"'),
        completion("x", usage=(5, 1)).replace(b"}}\n\n", b',"completion_tokens_details":{"reasoning_tokens":0}}}\n\n'),
        event(Chunk(id="1", model="m", choices=[ChatChoice(delta=Delta(content="x", reasoning=None))])),
    ],
)
def test_what_may_not_stay_as_it_is_makes_no_template(other: bytes) -> None:
    assert ChunkTemplate.of(other) is None


def test_no_damaged_event_makes_a_template_that_would_not_render_it_again() -> None:
    rng = random.Random(5)
    whole = chat('a "quoted" text', usage=(17, 3))
    for _ in range(5000):
        damaged = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            damaged[rng.randrange(len(damaged))] = rng.choice(b'"{}[]:,0123\\ax\xff')
        template = ChunkTemplate.of(bytes(damaged))
        if template is not None:
            text = json.loads(damaged.removeprefix(b"data: "))["choices"][0]["delta"]["content"]
            assert template.render(text, 0) == bytes(damaged)
