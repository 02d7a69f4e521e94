"""What a simulated engine tells of its KV cache, as the router's prefix stage understands it."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
from kvlane.v1 import inference_pb2 as pb

from router.lane.frames import CacheReport, Submit, pack_chain
from router.options import PrefixOptions
from router.prefix.prefixes import Prefixes
from router.types import CacheMode, Held, Request, Rpc
from tests.unit.test_simulated_engine import CHAT, COMPLETIONS, GENERATE, GRPC_CHAT, Bench, Out

BLOCK_TOKENS = 16
WORDS = ("the", "harbour", "town", "wakes", "before", "sun", "how", "many", "requests", "what", "is", "of", "moon")


class Routed(Bench):
    """An engine on a virtual clock, and one router's knowledge of its cache."""

    def __init__(self, **options: Any) -> None:
        super().__init__(block_tokens=BLOCK_TOKENS, **options)
        self.prefixes = Prefixes(PrefixOptions(block_bytes=64), self.clock.time)
        self.prefixes.opened("a", self.engine.info())
        self.cursor = self.engine.cache().cursor()
        self.reports: list[CacheReport] = []

    def learn(self) -> None:
        """The router gets what there is to be told."""
        while (report := self.cursor.take()) is not None:
            self.reports.append(report)
            assert self.prefixes.reported("a", report)

    def held(self, rpc: Rpc, path: str, body: bytes) -> Held:
        """What the router believes of a prompt."""
        view = self.prefixes.view("sim-model", self.prefixes.chain(Request("r", "sim-model", rpc, path, body)))
        return view.held.get("a", Held(0, 0))

    def route(self, rpc: Rpc, path: str, body: bytes) -> Out:
        """Submits as a router does: with the chain, and with what it believes to be held."""
        self.learn()
        chain = self.prefixes.chain(Request("r", "sim-model", rpc, path, body))
        assert chain is not None
        out, stream = Out(self.clock), next(self.streams)
        call = Submit(stream, f"r{stream}", rpc, "POST", path, (), body)
        call = msgspec.structs.replace(call, chain=pack_chain(chain), matched=self.held(rpc, path, body).blocks)
        self.abort = self.engine.submit(call, out)
        return out

    def chat(self, messages: Sequence[dict[str, str]], tokens: int = 20) -> dict[str, Any]:
        """Runs a chat to its end."""
        out = self.route(Rpc.HTTP, CHAT, chat_body(messages, tokens))
        self.clock.run()
        answer: dict[str, Any] = json.loads(out.body)
        return answer


def chat_body(messages: Sequence[dict[str, str]], tokens: int = 20) -> bytes:
    return json.dumps({"model": "sim-model", "messages": messages, "max_tokens": tokens}).encode()


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def some_words(seed: int, count: int) -> str:
    chosen = random.Random(seed)
    return " ".join(chosen.choice(WORDS) for _ in range(count))


def cached(answer: dict[str, Any]) -> int:
    tokens: int = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
    return tokens


async def test_a_prompts_blocks_are_told_with_its_first_token() -> None:
    bench = Routed()
    body = chat_body([said("user", some_words(1, 100))])
    bench.route(Rpc.HTTP, CHAT, body)
    assert bench.held(Rpc.HTTP, CHAT, body).blocks == 0
    seen: list[int] = []

    def step() -> None:
        bench.learn()
        seen.append(bench.held(Rpc.HTTP, CHAT, body).blocks)

    bench.engine.on_step(step)
    bench.clock.run()
    chain = bench.prefixes.chain(Request("r", "sim-model", Rpc.HTTP, CHAT, body))
    assert chain is not None
    # The last full prefix block may end behind the last full KV block.
    assert seen[0] in (len(chain.blocks), len(chain.blocks) - 1)


async def test_the_next_turn_is_known_to_be_held_over_the_last_answer() -> None:
    bench = Routed()
    messages = [said("system", some_words(1, 60)), said("user", some_words(2, 30))]
    first = bench.chat(messages, 80)
    bench.learn()
    messages += [said("assistant", first["choices"][0]["message"]["content"]), said("user", some_words(3, 30))]
    held = bench.held(Rpc.HTTP, CHAT, chat_body(messages))
    whole = first["usage"]["total_tokens"]
    assert held.tokens > first["usage"]["prompt_tokens"] + 40
    second = bench.chat(messages)
    assert whole - 2 * BLOCK_TOKENS <= cached(second) <= whole
    assert abs(held.tokens - cached(second)) <= 2 * BLOCK_TOKENS


async def test_what_routers_expect_agrees_with_what_is_found_cached_under_eviction() -> None:
    bench = Routed(kv_blocks=160, max_model_len=2048, max_num_seqs=8)
    chosen = random.Random(7)
    system = some_words(0, 80)
    conversations = [[said("system", system)] for _ in range(12)]
    for turn in range(80):
        messages = conversations[chosen.randrange(len(conversations))]
        if len(messages) > 9:
            del messages[1:]
        messages.append(said("user", some_words(turn, chosen.randrange(5, 40))))
        answer = bench.chat(messages, chosen.randrange(1, 40))
        messages.append(said("assistant", answer["choices"][0]["message"]["content"]))
    bench.learn()
    status = bench.prefixes.status()
    assert any(report.evicted for report in bench.reports)
    assert status.compared == 80
    assert status.off == 0
    assert status.replicas["a"].mode is CacheMode.EXACT


async def test_requests_that_run_at_once_are_told_as_single_ones_are() -> None:
    bench = Routed(kv_blocks=400, max_model_len=4096, max_num_seqs=8)
    shared = some_words(0, 120)
    bench.chat([said("system", shared)])
    for turn in range(40):
        bench.route(Rpc.HTTP, CHAT, chat_body([said("system", shared), said("user", some_words(turn, 50))]))
    bench.clock.run()
    bench.learn()
    status = bench.prefixes.status()
    assert (status.compared, status.off) == (41, 0)


@pytest.mark.parametrize("kind", ["text", "ids", "grpc text", "grpc ids", "grpc chat"])
async def test_every_kind_of_prompt_is_known_when_it_comes_again(kind: str) -> None:
    bench = Routed()
    text, ids = some_words(1, 100), list(range(150))
    rpc, path, body = {
        "text": (Rpc.HTTP, COMPLETIONS, json.dumps({"model": "sim-model", "prompt": text, "max_tokens": 4}).encode()),
        "ids": (Rpc.HTTP, COMPLETIONS, json.dumps({"model": "sim-model", "prompt": ids, "max_tokens": 4}).encode()),
        "grpc text": (Rpc.GRPC, GENERATE, generate(text=text)),
        "grpc ids": (Rpc.GRPC, GENERATE, generate(token_ids=pb.TokenIds(ids=ids))),
        "grpc chat": (
            Rpc.GRPC,
            GRPC_CHAT,
            pb.ChatRequest(
                messages=[pb.ChatMessage(role="user", content=text)], sampling=pb.SamplingParams(max_tokens=4)
            ).SerializeToString(),
        ),
    }[kind]
    for _ in range(2):
        assert not bench.route(rpc, path, body).errors
        bench.clock.run()
    bench.learn()
    assert bench.held(rpc, path, body).tokens >= 110
    status = bench.prefixes.status()
    assert (status.compared, status.off) == (2, 0)


def generate(**prompt: Any) -> bytes:
    return pb.GenerateRequest(sampling=pb.SamplingParams(max_tokens=4), **prompt).SerializeToString()


async def test_answers_to_token_prompts_go_on_as_tokens() -> None:
    bench = Routed()
    ids = list(range(100))
    body = pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=ids), sampling=pb.SamplingParams(max_tokens=100)
    ).SerializeToString()
    out = bench.route(Rpc.GRPC, GENERATE, body)
    bench.clock.run()
    bench.learn()
    for piece in out.pieces:
        ids += pb.GenerateResponse.FromString(piece).token_ids
    again = pb.GenerateRequest(token_ids=pb.TokenIds(ids=[*ids, 1, 2, 3])).SerializeToString()
    assert bench.held(Rpc.GRPC, GENERATE, again).tokens >= 180


async def test_a_cache_salt_keeps_equal_prompts_apart() -> None:
    bench = Routed()
    messages = [said("user", some_words(1, 100))]
    bench.chat(messages)
    body = json.dumps({"model": "sim-model", "messages": messages, "max_tokens": 4, "cache_salt": "s"}).encode()
    chain = bench.prefixes.chain(Request("r", "sim-model", Rpc.HTTP, CHAT, body, cache_salt="s"))
    bench.learn()
    assert bench.prefixes.view("sim-model", chain).held == {}


async def test_text_that_ends_within_a_token_is_not_continued() -> None:
    bench = Routed()
    text = some_words(1, 80)
    text = text[: len(text) // 4 * 4 + 2]
    body = json.dumps({"model": "sim-model", "prompt": text, "max_tokens": 90}).encode()
    out = bench.route(Rpc.HTTP, COMPLETIONS, body)
    bench.clock.run()
    bench.learn()
    text += json.loads(out.body)["choices"][0]["text"]
    again = json.dumps({"model": "sim-model", "prompt": text, "max_tokens": 9}).encode()
    assert bench.held(Rpc.HTTP, COMPLETIONS, again).tokens <= 400 // 4
    assert not bench.route(Rpc.HTTP, COMPLETIONS, again).errors
    bench.clock.run()
    bench.learn()
    assert bench.prefixes.status().off == 0


@pytest.mark.parametrize(
    ("chain", "matched", "why"),
    [
        (None, 0, "another chain"),
        (b"no chain", 0, "a chain of 8 bytes"),
        (bytes(24), 0, "a chain of blocks of 0 bytes"),
        (None, -1, "-1 blocks"),
    ],
)
async def test_a_chain_of_another_body_is_left_aside(
    chain: bytes | None, matched: int, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    bench = Routed()
    body = chat_body([said("user", some_words(1, 100))])
    other = bench.prefixes.chain(Request("r", "m", Rpc.HTTP, CHAT, chat_body([said("user", some_words(2, 100))])))
    packed, out = pack_chain(other) if chain is None else chain, Out(bench.clock)
    bench.engine.submit(Submit(1, "r1", Rpc.HTTP, "POST", CHAT, (), body, chain=packed, matched=matched), out)
    bench.clock.run()
    bench.learn()
    assert bench.prefixes.status().blocks == 0
    assert why in caplog.text
    assert out.ends
    assert bench.engine.load().running == 0


async def test_an_aborted_request_is_not_compared_and_its_blocks_stay() -> None:
    bench = Routed()
    body = chat_body([said("user", some_words(1, 100))], 50)
    bench.route(Rpc.HTTP, CHAT, body)
    bench.abort()
    bench.clock.run()
    bench.route(Rpc.HTTP, CHAT, body)
    bench.clock.run(until=bench.clock.now + 0.025)
    bench.abort()
    bench.clock.run()
    bench.learn()
    assert bench.prefixes.status().compared == 1
    assert bench.held(Rpc.HTTP, CHAT, body).blocks > 0


async def test_without_prefix_caching_nothing_is_reported_but_that() -> None:
    bench = Routed(prefix_caching=False)
    bench.chat([said("user", some_words(1, 100))])
    bench.learn()
    status = bench.prefixes.status()
    assert status.replicas["a"].mode is CacheMode.OFF
    assert bench.engine.cache().cause == "prefix caching is off in the simulated engine"
    assert (status.blocks, status.compared) == (0, 0)
