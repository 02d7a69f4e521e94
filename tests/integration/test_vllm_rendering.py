"""Streams rendered beside vLLM's server are byte for byte those that its server renders, on one real engine."""

from __future__ import annotations

import asyncio
import gc
import json
import random
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from engine.chunk_template import ChunkTemplate
from engine.tiny_model import make_tiny_model
from engine.vllm import VllmEngine
from engine.vllm_http import HttpStream
from router.lane.frames import Submit
from tests.integration.vllm_fixtures import (
    DEADLINE_S,
    FOREIGN_WARNINGS,
    MODEL,
    RecordingOut,
    ask,
    http_call,
    running_engine,
    submit,
)

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.asyncio(loop_scope="module"),
    FOREIGN_WARNINGS,
]

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
REQUESTS = 100
TEXTS = (
    "Hello", "naïve Straße", "東京は夜", "🙂👩‍👩‍👧", 'say "yes"\\no\n\t', "The old harbour town wakes before the sun.",
    " ", "\u0000\u001f\u2028", "<|im_end|>", "x" * 300, "What is the capital of France? " * 12,
)  # fmt: skip
_ID = re.compile(rb'"id":"(?:chat)?cmpl-[^"]*"')
_CREATED = re.compile(rb'"created":\d+')
_OF_ITS_OWN = re.compile(rb',"(?:prompt_tokens_details|metrics)":\{[^{}]*\}')
"""What was cached, and how long it all took."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models"))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def plain(model: Path) -> AsyncIterator[VllmEngine]:
    """Without parsers, as most models are served."""
    async with running_engine(model, enable_auto_tool_choice=False, tool_call_parser=None, max_num_seqs=32) as started:
        yield started


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def parsing(model: Path) -> AsyncIterator[VllmEngine]:
    """With a parser of tool calls, and all that vLLM can add to usage."""
    more = {"enable_prompt_tokens_details": True, "enable_per_request_metrics": True}
    async with running_engine(model, **more) as started:
        yield started


@contextmanager
def rendered() -> Iterator[list[bytes]]:
    """The events that were rendered beside vLLM's server."""
    events: list[bytes] = []
    render = ChunkTemplate.render

    def counting(self: ChunkTemplate, text: str, tokens: int) -> bytes:
        events.append(render(self, text, tokens))
        return events[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ChunkTemplate, "render", counting)
        yield events


async def by_server(engine: VllmEngine, call: Submit) -> RecordingOut:
    """The answer with all of it rendered by vLLM's server."""
    direct, engine._direct = engine._direct, None
    try:
        out, _ = submit(engine, call)
    finally:
        engine._direct = direct
    return await out.ended()


def events(out: RecordingOut) -> list[bytes]:
    """An answer's events as they were sent, without what differs from one request to the next."""
    body = _OF_ITS_OWN.sub(b"", _CREATED.sub(b'"created":0', _ID.sub(b'"id":""', out.body)))
    return [event + b"\n\n" for event in body.split(b"\n\n")[:-1]]


def joined(events: list[bytes]) -> tuple[str, set[str], list[str]]:
    """All text, the form of the events with text, and all others in order: the same where vLLM's server was behind and
    joined some tokens' events.
    """
    whole, forms, others = "", set(), []
    for event in events:
        form, text, more = taken_apart(event)
        whole += text
        if more:
            forms.add(form)
        else:
            others.append(form)
    return whole, forms, others


def taken_apart(event: bytes) -> tuple[str, str, bool]:
    """An event without its text, the text, and whether more text is to come; one with more to come without usage."""
    try:
        chunk = json.loads(event.removeprefix(b"data: "))
        (choice,) = chunk["choices"]
        holder, field = (choice["delta"], "content") if "delta" in choice else (choice, "text")
        text, holder[field] = holder[field], None
        if "role" in holder or not isinstance(text, str):
            raise ValueError
    except (ValueError, KeyError, TypeError):
        return event.decode(), "", False
    more = choice["finish_reason"] is None
    return json.dumps({**chunk, "usage": None} if more else chunk), text, more


async def compare(engine: VllmEngine, path: str, body: dict[str, Any]) -> tuple[RecordingOut, int, bool]:
    """Asks both ways, and compares if some was rendered beside the server; the answer, how many events were, and
    whether the two are the same event for event.
    """
    call = http_call(path, {"model": MODEL, **body})
    server = await by_server(engine, call)
    with rendered() as beside:
        ours = await ask(engine, call)
    same = [name for name in server.headers if name != "date"]
    assert (ours.status, [ours.headers.get(name) for name in same]) == (
        server.status,
        [server.headers[name] for name in same],
    ), body
    assert (ours.failures, ours.finishes) == (server.failures, server.finishes), body
    mine, theirs = events(ours), events(server)
    if ours.status == 200 and not beside:
        pass  # It was the server both times, and what it joins and which choice comes first is chance.
    elif mine != theirs:  # It joins what came while it was behind, too.
        (text, forms, others), (their_text, their_forms, their_others) = joined(mine), joined(theirs)
        assert (text, others) == (their_text, their_others), body
        assert forms <= their_forms or their_forms <= forms, body
    return ours, len(beside), bool(beside) and mine == theirs


# -- requests of all sorts


def sampling(rng: random.Random) -> dict[str, Any]:
    """Sampling fields, each now and then. Same answers both times: greedy, or with a seed."""
    may: dict[str, Any] = {
        "min_tokens": rng.randint(0, 6),
        "ignore_eos": rng.random() < 0.5,
        "stop": rng.choice(["e", [" t", "zzz"], ["\n", "th", "o"], []]),
        "stop_token_ids": rng.sample(range(3, 500), rng.choice([1, 40, 150])),
        "include_stop_str_in_output": rng.random() < 0.5,
        "logit_bias": {str(rng.randrange(500)): rng.choice([-100, 5, 100])},
        "repetition_penalty": 1.3,
        "presence_penalty": rng.choice([-1.5, 1.5]),
        "frequency_penalty": 0.7,
        "skip_special_tokens": False,
        "spaces_between_special_tokens": False,
        "allowed_token_ids": rng.sample(range(500), 30),
        "bad_words": ["the", "e"],
        "top_k": rng.choice([0, 1, 20]),
        "top_p": 0.8,
        "min_p": 0.1,
        "n": 1,
        "user": "somebody",
        "cache_salt": "salt",
        "priority": 0,
        "truncate_prompt_tokens": rng.randint(1, 40),
        "unknown_field": {"a": [1]},
        "request_id": f"r{rng.randrange(1 << 30)}",
        "stream_interval": rng.choice([1, 3]),
        "session_id": "s",
    }
    chosen = {name: value for name, value in may.items() if rng.random() < 0.12}
    randomness = {"temperature": 0} if rng.random() < 0.5 else {"temperature": 1.0, "seed": rng.randrange(1 << 20)}
    return {"max_tokens": rng.choice([1, 2, 3, 8, 24]), "stream": True, **randomness, **chosen} | rng.choice(
        [
            {},
            {"stream_options": None},
            {"stream_options": {"include_usage": True}},
            {"stream_options": {"include_usage": False}},
            {"stream_options": {"include_usage": True, "continuous_usage_stats": True}},
            {"stream_options": {"include_usage": False, "continuous_usage_stats": True}},
        ]
    )


def other(rng: random.Random) -> dict[str, Any]:
    """Now and then what is not plain text, and what vLLM refuses."""
    some: list[dict[str, Any]] = [
        *[{}] * 12,
        {"n": 2, "seed": 1, "temperature": 1.0},
        {"return_token_ids": True},
        {"max_tokens": 0},
        {"max_tokens": -1},
        {"max_tokens": 10**6},
        {"temperature": -1},
        {"stop": 7},
        {"stream_options": 3},
        {"logit_bias": {"x": 1}},
        {"model": "no-such-model"},
        {"response_format": {"type": "json_object"}, "max_tokens": 4},
    ]
    return rng.choice(some)


def completion(rng: random.Random) -> tuple[str, dict[str, Any]]:
    prompt: Any = rng.choice(TEXTS)
    if rng.random() < 0.2:
        prompt = rng.choice([[rng.randrange(3, 500) for _ in range(5)], [prompt], [prompt, "two"], "", []])
    some: list[dict[str, Any]] = [{"echo": True}, {"logprobs": 2}, {"suffix": "x"}, {"add_special_tokens": False}]
    more = rng.choice([*[{}] * 6, *some])
    return COMPLETIONS, {"prompt": prompt, **sampling(rng), **other(rng), **more}


def chat(rng: random.Random) -> tuple[str, dict[str, Any]]:
    messages: list[dict[str, Any]] = [{"role": "system", "content": rng.choice(TEXTS)}] if rng.random() < 0.4 else []
    for _ in range(rng.randint(0, 2)):
        messages += [
            {"role": "user", "content": rng.choice(TEXTS)},
            {"role": "assistant", "content": rng.choice(TEXTS)},
        ]
    parts = [{"type": "text", "text": rng.choice(TEXTS)}, {"type": "text", "text": rng.choice(TEXTS)}]
    messages.append({"role": "user", "content": rng.choice([rng.choice(TEXTS), parts])})
    tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
    some: list[dict[str, Any]] = [
        *[{}] * 8,
        {"max_tokens": None, "max_completion_tokens": 5},
        {"add_generation_prompt": False},
        {"add_generation_prompt": False, "echo": True},
        {"add_generation_prompt": False, "continue_final_message": True},
        {"continue_final_message": True},
        {"logprobs": True, "top_logprobs": 2},
        {"tools": [tool], "tool_choice": "none"},
        {"tools": [tool]},
        {"tool_choice": "none"},
        {"include_reasoning": False},
        {"parallel_tool_calls": False},
        {"return_prompt_text": True},
        {"chat_template_kwargs": {"prefill": "The"}},
        {"messages": []},
        {"messages": [{"role": "user"}]},
        {"messages": "hello"},
    ]
    return CHAT, {"messages": messages, **sampling(rng), **other(rng), **rng.choice(some)}


@pytest.mark.parametrize("make", [completion, chat])
async def test_all_sorts_of_requests_are_answered_with_the_servers_bytes(plain: VllmEngine, make: Any) -> None:
    rng = random.Random(2026)
    total = exact = 0
    for _ in range(REQUESTS):
        _, beside, same = await compare(plain, *make(rng))
        total += beside
        exact += same
    assert total > REQUESTS, "too few of them were rendered beside the server to say anything"
    assert exact, "none of them was without joins"


async def test_a_parser_of_tool_calls_changes_nothing_of_that(parsing: VllmEngine) -> None:
    rng = random.Random(7)
    total = exact = 0
    for _ in range(REQUESTS // 2):
        _, beside, same = await compare(parsing, *chat(rng))
        total += beside
        exact += same
    assert total > REQUESTS // 2
    assert exact


PLAIN_TOKENS = 12
PLAIN = {"temperature": 0, "max_tokens": PLAIN_TOKENS, "ignore_eos": True, "stream": True}
MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (COMPLETIONS, {"prompt": "Hello"}),
        (COMPLETIONS, {"prompt": "Hello", "echo": True}),
        (CHAT, {"messages": MESSAGES}),
    ],
)
@pytest.mark.parametrize("options", [None, {"include_usage": True, "continuous_usage_stats": True}])
async def test_most_tokens_of_plain_text_are_rendered_beside_the_server(
    plain: VllmEngine, path: str, body: dict[str, Any], options: Any
) -> None:
    out, beside, _ = await compare(plain, path, body | PLAIN | {"stream_options": options})
    assert beside >= PLAIN_TOKENS / 2  # All but the first and the last, unless the server was late with the first ones.
    assert out.events()[-1 if options is None else -2]["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (COMPLETIONS, {"prompt": "Hello", "n": 2, "temperature": 1}),
        (COMPLETIONS, {"prompt": ["Hello", "there"]}),
        (COMPLETIONS, {"prompt": "Hello", "logprobs": 1}),
        (COMPLETIONS, {"prompt": "Hello", "return_token_ids": True}),
        (COMPLETIONS, {"prompt": "Hello", "stream": False}),
        (COMPLETIONS, {"prompt": "Hello", "stream_interval": 4}),
        (CHAT, {"messages": MESSAGES, "n": 2, "temperature": 1}),
        (CHAT, {"messages": MESSAGES, "logprobs": True}),
        (CHAT, {"messages": MESSAGES, "return_token_ids": True}),
        ("/v1/responses", {"input": "hi", "max_tokens": None, "max_output_tokens": 12}),
    ],
)
async def test_what_is_more_than_text_is_the_servers(plain: VllmEngine, path: str, body: dict[str, Any]) -> None:
    with rendered() as beside:
        out = await ask(plain, http_call(path, {"model": MODEL, **PLAIN, **body}))
    assert out.status == 200, out.body
    assert not beside


async def test_tools_that_may_be_called_are_the_servers(parsing: VllmEngine) -> None:
    tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
    for choice, expected in (("auto", False), ("none", True)):
        body = {"messages": MESSAGES, "tools": [tool], "tool_choice": choice}
        _, beside, _ = await compare(parsing, CHAT, PLAIN | body)
        assert bool(beside) is expected


SILENT = {"allowed_token_ids": [162, 150, 160, 40, 41], "temperature": 1.0, "seed": 5, "max_tokens": 40}
"""Letters, and bytes that are none before others have come."""


async def test_tokens_without_text_are_in_the_usage_of_the_next_event(parsing: VllmEngine) -> None:
    usage = {"include_usage": True, "continuous_usage_stats": True}
    body = {"messages": MESSAGES, **PLAIN, **SILENT, "stream_options": usage}
    out, beside, _ = await compare(parsing, CHAT, body)
    pieces = out.events()[1:-1]
    assert PLAIN_TOKENS < beside < len(pieces) < 40
    counts = [piece["usage"]["completion_tokens"] for piece in pieces]
    assert counts == sorted(set(counts))
    assert counts[-1] == 40


async def test_text_that_is_held_back_at_first_does_not_leave_the_stream_to_the_server(parsing: VllmEngine) -> None:
    body = {"messages": MESSAGES, **PLAIN, "max_tokens": 60, "stop": ["Observation:"]}
    _, beside, _ = await compare(parsing, CHAT, body)
    assert beside > 30


@pytest.mark.parametrize("begun", [True, False])
async def test_an_abort_ends_the_request_in_the_engine_and_its_output(plain: VllmEngine, begun: bool) -> None:
    await compare(plain, COMPLETIONS, {"prompt": "Hello", **PLAIN})  # Shows its head, if it is the first.
    call = http_call(COMPLETIONS, {"model": MODEL, "prompt": "Hello", **PLAIN, "max_tokens": 3000})
    states = plain._engine.output_processor.request_states
    with rendered() as beside:
        out, abort = submit(plain, call)
        async with asyncio.timeout(DEADLINE_S):
            while not (len(beside) > 3 if begun else states):
                await asyncio.sleep(0)
            abort()
            pieces = len(out.pieces)
            while states:
                await asyncio.sleep(0)
    # The engine core hears of it too: a stream after it has the batch for itself.
    steps: list[int] = []
    plain.on_step(lambda: steps.append(plain.load().step_decodes))
    await ask(plain, http_call(COMPLETIONS, {"model": MODEL, "prompt": "Hello", **PLAIN}))
    assert max(steps[2:]) == 1
    assert len(out.pieces) == pieces
    assert not out.done.is_set()


async def test_nothing_is_left_of_streams_that_are_over(plain: VllmEngine) -> None:
    def alive() -> int:
        gc.collect()
        return sum(isinstance(each, HttpStream) for each in gc.get_objects())

    for _ in range(3):
        await ask(plain, http_call(COMPLETIONS, {"model": MODEL, "prompt": "Hello", **PLAIN}))
    async with asyncio.timeout(DEADLINE_S):
        while alive():
            await asyncio.sleep(0)


async def test_stop_strings_across_tokens_end_the_stream_at_the_same_byte(plain: VllmEngine) -> None:
    body = {"prompt": "Hello", **PLAIN, "max_tokens": 40, "stream": False}
    text = (await ask(plain, http_call(COMPLETIONS, {"model": MODEL, **body}))).json()["choices"][0]["text"]
    for start in range(4, min(40, len(text) - 5), 3):
        for include in (False, True):
            stop = {"stop": [text[start : start + 5]], "include_stop_str_in_output": include, "max_tokens": 40}
            out, _, _ = await compare(plain, COMPLETIONS, {"prompt": "Hello", **PLAIN, **stop})
            assert out.events()[-1]["choices"][0]["finish_reason"] == "stop"


async def test_many_streams_at_once_lose_and_mix_up_nothing(plain: VllmEngine) -> None:
    async def one(token: int) -> None:
        tokens = 20 + token % 37
        body = {"prompt": f"stream {token}", **PLAIN, "max_tokens": tokens, "allowed_token_ids": [token]}
        options = {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}
        out = await ask(plain, http_call(COMPLETIONS, {"model": MODEL, **body, **options}))
        *pieces, usage = out.events()
        counts = [piece["usage"]["completion_tokens"] for piece in pieces]
        assert counts == sorted(set(counts))
        assert counts[-1] == usage["usage"]["completion_tokens"] == tokens
        assert "".join(piece["choices"][0]["text"] for piece in pieces) == chr(token - 3 + 0x21) * tokens

    with rendered() as beside:
        async with asyncio.timeout(DEADLINE_S):
            await asyncio.gather(*(one(token) for token in range(20, 84)))
    assert len(beside) > 64 * 20


async def test_streams_go_past_the_framework_and_all_else_through_it(plain: VllmEngine) -> None:
    await compare(plain, COMPLETIONS, {"prompt": "Hello", **PLAIN})  # Shows its head, if it is the first.
    through: list[Any] = []
    app = plain._app

    async def counted(scope: Any, receive: Any, send: Any) -> None:
        through.append(scope["path"])
        await app(scope, receive, send)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plain, "_app", counted)
        for body in (PLAIN, PLAIN | {"logprobs": 1}, PLAIN | {"n": 2, "temperature": 1}):
            await ask(plain, http_call(COMPLETIONS, {"model": MODEL, "prompt": "Hello", **body}))
        assert not through
        for body in (PLAIN | {"stream": False}, PLAIN | {"max_tokens": -1}, PLAIN | {"model": "no-such-model"}):
            await ask(plain, http_call(COMPLETIONS, {"model": MODEL, "prompt": "Hello", **body}))
        assert len(through) == 3


async def test_with_the_option_off_the_server_renders_all(model: Path) -> None:
    engine = VllmEngine(str(model), MODEL, {"max_num_seqs": 8, "block_size": 32}, fast_rendering=False)
    await engine.start()
    try:
        with rendered() as beside:
            out = await ask(engine, http_call(COMPLETIONS, {"model": MODEL, "prompt": "Hello", **PLAIN}))
        assert out.events()[-1]["choices"][0]["finish_reason"] == "length"
        assert not beside
    finally:
        await engine.close()
