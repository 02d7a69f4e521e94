"""Conversations with a router over real vLLM, and what any assignment of them could have found cached.

Everything is asked at temperature 0 with the token ids in the answer, so that what vLLM computed is known token by
token. The bound knows no replicas and no evictions: all that was ever computed, anywhere, counts as cached.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import re
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from typing import Any

import httpx
import msgspec

Message = dict[str, str]
Ask = Callable[["Load"], Awaitable[None]]

DEADLINE_S = 120.0
_ROUTE = re.compile(r"replica=([^;]+);policy=[^;]+;reason=[^;]+;queue=\d+;matched=(\d+)/\d+;cached=(\d+)/\d+")
_TEXT = (
    "the old harbour town wakes before sun boats come back with their nets full and people on quay call out prices of "
    "morning a router sends each request to server that will answer it first how many requests are running what still "
    "remembers words that came before is capital of France moon from earth please write short story about cat"
)
_ODD = (
    "naïve Straße",
    "東京は夜",
    "🙂👩‍👩‍👧",
    '{"a": [1, 2.5e-3]}',
    "  two  spaces\n\n\ttabs\r\n",
    "<|nothing|>",
    "\\n",
)
"""What templates and tokenizers stumble over."""


class Answered(msgspec.Struct, frozen=True):
    """One request: what the router expected, and what vLLM found and computed."""

    replica: str
    matched: int
    """Prefix blocks that the router believed to be held."""
    expected: int
    """Tokens that they stand for."""
    cached: int
    """Prompt tokens that vLLM found cached."""
    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    sent: int
    """When, in the order of all requests' beginnings and ends."""
    ended: int


class Record:
    """All requests with one cache salt, whichever routers they went through."""

    def __init__(self, salt: str) -> None:
        self.salt = salt
        self.answered: list[Answered] = []
        self.clock = itertools.count()


class Load:
    """Asks one router, a few requests at a time, and keeps what became of each."""

    def __init__(self, url: str, model: str, record: Record, at_once: int) -> None:
        self._record = record
        self._client = httpx.AsyncClient(base_url=url, timeout=DEADLINE_S)
        self._fixed = {"model": model, "cache_salt": record.salt, "temperature": 0, "return_token_ids": True}
        self._places = asyncio.Semaphore(at_once)

    async def __aenter__(self) -> Load:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.aclose()

    async def run(self, asks: Iterable[Ask]) -> None:
        """All of them, begun in this order."""

        async def within(ask: Ask) -> None:
            async with self._places:
                await ask(self)

        async with asyncio.TaskGroup() as group:
            for ask in asks:
                group.create_task(within(ask))

    async def chat(self, messages: list[Message], max_tokens: int, *, stream: bool = False) -> str:
        """The answer's text."""
        body: dict[str, Any] = {**self._fixed, "messages": messages, "max_tokens": max_tokens}
        if stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        sent = next(self._record.clock)
        response = await self._client.post("/v1/chat/completions", json=body)
        assert response.status_code == 200, response.text
        text, prompt, answer, usage = _streamed(response.text) if stream else _whole(response.json())
        route = _ROUTE.match(response.headers["x-kvlane-route"])
        assert route is not None, response.headers
        details = usage["prompt_tokens_details"]
        cached = details["cached_tokens"] if details else 0
        expected = route[1], int(route[2]), int(route[3])
        self._record.answered.append(
            Answered(*expected, cached or 0, prompt, answer, sent, next(self._record.clock)),
        )
        return text


def _whole(body: Any) -> tuple[str, tuple[int, ...], tuple[int, ...], Any]:
    choice = body["choices"][0]
    text = choice["message"]["content"] or ""
    return text, tuple(body["prompt_token_ids"]), tuple(choice["token_ids"]), body["usage"]


def _streamed(body: str) -> tuple[str, tuple[int, ...], tuple[int, ...], Any]:
    lines = body.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""], body[-300:]
    events = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    choices = [choice for event in events for choice in event["choices"]]
    text = "".join(choice["delta"].get("content") or "" for choice in choices)
    (prompt,) = [event["prompt_token_ids"] for event in events if event.get("prompt_token_ids")]
    answer = [token for choice in choices for token in choice.get("token_ids") or ()]
    return text, tuple(prompt), tuple(answer), events[-1]["usage"]


class Conversation:
    """Turns that each send all that was said before, with the answers as they came."""

    def __init__(self, seed: int, opening_words: int, turn_words: int, answer_tokens: int) -> None:
        self._random = random.Random(seed)
        self._turn_words = turn_words
        self._answer_tokens = answer_tokens
        self._stream = bool(seed % 2)
        self._messages = [said("system", words(self._random, opening_words))]

    async def turn(self, load: Load) -> None:
        self._messages.append(said("user", words(self._random, self._turn_words)))
        text = await load.chat(self._messages, self._answer_tokens, stream=self._stream)
        self._messages.append(said("assistant", text))


class Shared:
    """One system prompt with many users, who ask once each."""

    def __init__(self, seed: int, system_words: int, question_words: int, answer_tokens: int) -> None:
        self._random = random.Random(seed)
        self._question_words = question_words
        self._answer_tokens = answer_tokens
        self._system = said("system", words(self._random, system_words))

    async def question(self, load: Load) -> None:
        asked = said("user", words(self._random, self._question_words))
        await load.chat([self._system, asked], self._answer_tokens)


def said(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def words(chosen: random.Random, count: int) -> str:
    """Text of so many words, some of them odd."""
    plain = _TEXT.split()
    return " ".join(chosen.choice(_ODD if chosen.random() < 0.03 else plain) for _ in range(count))


def keys(token_ids: Sequence[int], block_tokens: int) -> Iterator[int]:
    """One for each full KV block, which stands for it and all before it."""
    last = 0
    for end in range(block_tokens, len(token_ids) + 1, block_tokens):
        last = hash((last, *token_ids[end - block_tokens : end]))
        yield last


def reachable(answered: Sequence[Answered], block_tokens: int) -> list[int]:
    """For each request, the most prompt tokens that it could have found cached on any replica.

    The longest run of whole KV blocks that requests sent before it had in their prompts, or in the answers that had
    ended; less the block of the last token, which vLLM computes in any case. A prompt counts from the moment it was
    sent, an answer without its last token, whose KV nobody computes.
    """
    sent = [(one.sent, number, False) for number, one in enumerate(answered)]
    ended = [(one.ended, number, True) for number, one in enumerate(answered)]
    computed: set[int] = set()
    most = [0] * len(answered)
    for _, number, over in sorted(sent + ended):
        one = answered[number]
        if over:
            computed.update(keys((*one.prompt, *one.answer[:-1]), block_tokens))
            continue
        known = sum(1 for _ in itertools.takewhile(computed.__contains__, keys(one.prompt[:-1], block_tokens)))
        most[number] = known * block_tokens
        computed.update(keys(one.prompt, block_tokens))
    return most


def reachable_there(answered: Sequence[Answered], block_tokens: int) -> list[tuple[Answered, int]]:
    """The same as if each replica were alone: where less was found, it was evicted or is still to be computed."""
    found = list[tuple[Answered, int]]()
    for replica in {one.replica for one in answered}:
        own = [one for one in answered if one.replica == replica]
        found += zip(own, reachable(own, block_tokens), strict=True)
    return found
