"""What a replica with real vLLM tells of its KV cache, held against what vLLM finds cached.

A router's own parts ask: prefix stage and lane, over loopback. KV space is small, so blocks are evicted all the time.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from kvlane.v1 import inference_pb2 as pb

from engine.replica import Replica
from engine.tiny_model import make_tiny_model
from engine.vllm import VllmEngine
from router.errors import KvlaneError
from router.lane.carriers import SocketCarrier
from router.membership.base import ReplicaRecord
from router.options import LaneOptions, PrefixOptions
from router.prefix.prefixes import Prefixes
from router.replicas import Replicas
from router.types import CacheMode, Held, Load, Request, Rpc
from tests.fakes import SECRET, RecordingSink
from tests.integration.vllm_fixtures import DEADLINE_S, FOREIGN_WARNINGS, MODEL, running_engine

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.asyncio(loop_scope="module"),
    FOREIGN_WARNINGS,
]

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
RESPONSES = "/v1/responses"
GENERATE = "/kvlane.v1.Inference/Generate"
GRPC_CHAT = "/kvlane.v1.Inference/Chat"
ADAPTER = "adapter"
KV_TOKENS = 3072
BLOCK_BYTES = 64
"""A prefix block of the tiny model's text is shorter than the smallest KV block."""
WORDS = ("the", "harbour", "town", "wakes", "before", "sun", "how", "many", "requests", "what", "is", "of", "moon")
FRESH = itertools.count(1000)
"""Seeds of words that no try of a test has left in a cache."""
REPEATED = " the"
"""An answer of this word alone is tokenized as it was generated, which random weights' answers seldom are."""


class Router:
    """Prefix stage and lane of one router."""

    def __init__(self) -> None:
        self.prefixes = Prefixes(PrefixOptions(block_bytes=BLOCK_BYTES), asyncio.get_running_loop().time)
        self.replicas = Replicas("test", SocketCarrier(), LaneOptions(), caches=self.prefixes)
        self.gaps: list[int] = []
        """For each request with usage: KV blocks found cached beyond those expected."""

    def held(self, request: Request) -> Held:
        view = self.prefixes.view(MODEL, self.prefixes.chain(request))
        return view.held.get("a", Held(0, 0))

    async def send(self, request: Request) -> RecordingSink:
        """Sends a request as dispatch does."""
        prefix = self.prefixes.view(MODEL, self.prefixes.chain(request))
        charge, sink = self.prefixes.charge(prefix, prefix.at("a")), RecordingSink()
        async with asyncio.timeout(DEADLINE_S):
            with self.replicas.lease("a") as lane, self.prefixes.hold("a", prefix.chain):
                await lane.run(request, sink, charge)
        return sink

    async def post(self, path: str, **fields: Any) -> Any:
        """Posts JSON; the answer, which is no error."""
        request = http(path, **fields)
        sink = await self.send(request)
        assert sink.heads[0][0] == 200, sink.payloads
        return b"".join(sink.payloads) if fields.get("stream") else json.loads(b"".join(sink.payloads))

    async def learns_of(self, request: Request) -> None:
        """Waits until the replica has reported something of this prompt."""
        async with asyncio.timeout(DEADLINE_S):
            while not self.held(request).blocks:
                await asyncio.sleep(0.01)

    async def chat(self, messages: list[dict[str, str]], block_tokens: int, **fields: Any) -> Any:
        """A chat, compared with what was expected of it."""
        expected = self.held(http(CHAT, messages=messages, **fields)).tokens // block_tokens
        answer = await self.post(CHAT, messages=messages, temperature=0, **fields)
        found = cached(answer)
        assert found % block_tokens == 0
        self.gaps.append(found // block_tokens - expected)
        return answer

    async def settled(self, compared: int) -> None:
        """Waits until the replica has told of so many comparisons since the lane opened."""
        async with asyncio.timeout(DEADLINE_S):
            while self.prefixes.status().compared < compared:
                await asyncio.sleep(0.01)


class Stack:
    """A replica on real vLLM."""

    def __init__(self, engine: VllmEngine, replica: Replica, port: int) -> None:
        self.engine = engine
        self.replica = replica
        self.port = port

    @property
    def block_tokens(self) -> int:
        return self.engine.info().kv_block_tokens

    @asynccontextmanager
    async def router(self) -> AsyncIterator[Router]:
        """A router that knows all that the replica has to tell at first."""
        router = Router()
        router.replicas.listed({"a": ReplicaRecord("a", "127.0.0.1", self.port, SECRET)})
        try:
            async with asyncio.timeout(DEADLINE_S):
                while router.prefixes.mode("a") is not CacheMode.EXACT:
                    await asyncio.sleep(0.01)
            yield router
        finally:
            await router.replicas.close()


def http(path: str, **fields: Any) -> Request:
    body = json.dumps({"model": MODEL, **fields}).encode()
    headers = (("content-type", "application/json"), ("content-length", str(len(body))))
    lora = fields.get("model", MODEL) if fields.get("model", MODEL) != MODEL else ""
    return Request(
        "r", MODEL, Rpc.HTTP, path, body, headers=headers, lora=lora, cache_salt=fields.get("cache_salt", "")
    )


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def some_words(seed: int, count: int) -> str:
    chosen = random.Random(seed)
    return " ".join(chosen.choice(WORDS) for _ in range(count))


def cached(answer: Any) -> int:
    details = answer["usage"]["prompt_tokens_details"]
    return int(details["cached_tokens"] or 0) if details else 0


def write_adapter(directory: Path) -> Path:
    """A LoRA adapter with random weights for the tiny model."""
    import torch
    from safetensors.torch import save_file

    directory.mkdir()
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": MODEL,
        "r": 8,
        "lora_alpha": 16,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": ["q_proj"],
    }
    (directory / "adapter_config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(1)
    weights = {}
    for layer in range(2):
        name = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        weights[f"{name}.lora_A.weight"] = torch.randn(8, 128, generator=generator)
        weights[f"{name}.lora_B.weight"] = torch.randn(128, 8, generator=generator)
    save_file(weights, directory / "adapter_model.safetensors")
    return directory


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("models")
    return make_tiny_model(folder), write_adapter(folder / ADAPTER)


@asynccontextmanager
async def stack_of(model: Path, block_tokens: int, **args: Any) -> AsyncIterator[Stack]:
    blocks = KV_TOKENS // block_tokens
    async with running_engine(
        model,
        block_size=block_tokens,
        num_gpu_blocks_override=blocks,
        max_model_len=1024,
        enable_prompt_tokens_details=True,
        **args,
    ) as engine:
        replica = Replica("a", engine, SECRET)
        engine.on_step(replica.load_changed)
        yield Stack(engine, replica, await replica.listen("127.0.0.1"))
        await replica.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stack(models: tuple[Path, Path]) -> AsyncIterator[Stack]:
    """KV blocks of 32 tokens."""
    async with stack_of(models[0], 32) as stack:
        yield stack


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def coarse(models: tuple[Path, Path]) -> AsyncIterator[Stack]:
    """KV blocks of 128 tokens, vLLM's default on CPU, and an adapter."""
    lora = {"enable_lora": True, "max_lora_rank": 8, "lora_modules": [f"{ADAPTER}={models[1]}"]}
    async with stack_of(models[0], 128, **lora) as stack:
        yield stack


async def converse(router: Router, block_tokens: int, rounds: int, seed: int) -> None:
    """Many conversations with one system prompt, more than the KV cache holds, a few at a time."""
    chosen = random.Random(seed)
    system = some_words(seed, 60)
    conversations = [[said("system", system)] for _ in range(12)]

    async def turn(number: int, messages: list[dict[str, str]]) -> None:
        if len(messages) > 9:
            del messages[1:]
        messages.append(said("user", some_words(seed + number, chosen.randrange(5, 40))))
        forced = {"allowed_token_ids": [THE[0]]} if number % 2 else {}
        answer = await router.chat(messages, block_tokens, max_tokens=chosen.randrange(1, 24), **forced)
        messages.append(said("assistant", answer["choices"][0]["message"]["content"] or ""))

    for round in range(rounds):
        picked = chosen.sample(range(len(conversations)), 4)
        await asyncio.gather(*(turn(round * 100 + one, conversations[one]) for one in picked))


THE: list[int] = []
"""The token id of `REPEATED`; set by the fixture below."""


@pytest.fixture(scope="module", autouse=True)
def the_word(models: tuple[Path, Path]) -> None:
    from transformers import AutoTokenizer

    THE[:] = AutoTokenizer.from_pretrained(models[0]).encode(REPEATED, add_special_tokens=False)
    assert len(THE) == 1


async def check_agreement(stack: Stack) -> None:
    size = stack.block_tokens
    async with stack.router() as router:
        await converse(router, size, 30, seed=1)
        await router.settled(120)
        first = router.prefixes.status()
        assert (first.gaps, first.replicas["a"].mode) == (0, CacheMode.EXACT)
        evicted = stack.engine._cache._identity.counts.removed
        assert evicted > 50 * 32 // size
        assert first.off <= first.compared // 100, router.gaps
        agreeing = sum(abs(gap) <= 1 for gap in router.gaps)
        assert agreeing >= 0.99 * len(router.gaps), router.gaps
        # A second router, which saw nothing of all that.
        async with stack.router() as other:
            assert other.prefixes.status().blocks == router.prefixes.status().blocks
            await converse(other, size, 8, seed=2)
            await converse(other, size, 2, seed=1)
            await other.settled(40)
            status = other.prefixes.status()
            assert status.off == 0, other.gaps
            assert all(abs(gap) <= 1 for gap in other.gaps), other.gaps


async def test_expected_and_found_blocks_agree_while_blocks_are_evicted(stack: Stack) -> None:
    await check_agreement(stack)


async def test_they_agree_with_kv_blocks_of_128_tokens_too(coarse: Stack) -> None:
    await check_agreement(coarse)


async def test_the_next_turn_is_expected_to_be_held_over_the_last_answer(stack: Stack) -> None:
    size = stack.block_tokens
    async with stack.router() as router:
        messages = [said("user", some_words(77, 60))]
        answer = await router.chat(messages, size, max_tokens=200, allowed_token_ids=THE)
        content = answer["choices"][0]["message"]["content"]
        assert content == REPEATED * 200
        messages += [said("assistant", content), said("user", "and then?")]
        async with asyncio.timeout(DEADLINE_S):
            while router.held(http(CHAT, messages=messages)).tokens < answer["usage"]["prompt_tokens"] + 100:
                await asyncio.sleep(0.01)
        second = await router.chat(messages, size, max_tokens=2)
        assert abs(router.gaps[-1]) <= 1
        assert cached(second) > answer["usage"]["prompt_tokens"] + 100


async def test_every_api_ties_its_prompts(stack: Stack) -> None:
    messages, text = [said("user", some_words(5, 90))], some_words(6, 90)
    ids = list(range(3, 203))
    short = pb.SamplingParams(max_tokens=3)
    asks = [
        http(CHAT, messages=messages, max_tokens=3),
        http(CHAT, messages=messages, max_tokens=3, stream=True),
        http(COMPLETIONS, prompt=text, max_tokens=3),
        http(COMPLETIONS, prompt=text, max_tokens=3, stream=True),
        http(COMPLETIONS, prompt=ids, max_tokens=3),
        http(RESPONSES, input=some_words(7, 90), max_output_tokens=3),
        http(RESPONSES, input=some_words(7, 90), max_output_tokens=3, stream=True),
        grpc(GENERATE, pb.GenerateRequest(model=MODEL, text=some_words(8, 90), sampling=short)),
        grpc(GENERATE, pb.GenerateRequest(model=MODEL, token_ids=pb.TokenIds(ids=ids), sampling=short)),
        grpc(GRPC_CHAT, pb.ChatRequest(model=MODEL, messages=[pb.ChatMessage(**messages[0])], sampling=short)),
    ]
    async with stack.router() as router:
        for request in asks:
            before = router.prefixes.status().compared
            for _ in range(2):
                sink = await router.send(request)
                assert not sink.heads or sink.heads[0][0] == 200, sink.payloads
            await router.settled(before + 2)
            held, chain = router.held(request), router.prefixes.chain(request)
            assert chain is not None
            assert held.blocks >= len(chain.blocks) - 2, request.path
        assert router.prefixes.status().off == 0


def grpc(path: str, message: Any) -> Request:
    return Request("r", MODEL, Rpc.GRPC, path, message.SerializeToString())


async def test_several_answers_or_prompts_in_one_request_mislead_nobody(stack: Stack) -> None:
    first, second = some_words(11, 90), some_words(12, 90)
    asks: list[dict[str, Any]] = [
        # The router hashes a request's first prompt alone, so the second one is known from here only.
        {"path": COMPLETIONS, "prompt": second, "max_tokens": 8},
        {"path": CHAT, "messages": [said("user", first)], "n": 3, "max_tokens": 8},
        {"path": COMPLETIONS, "prompt": [first, second], "max_tokens": 8},
        {"path": COMPLETIONS, "prompt": first, "n": 2, "max_tokens": 8, "stream": True},
        {"path": COMPLETIONS, "prompt": second, "use_beam_search": True, "n": 2, "max_tokens": 4},
        {"path": COMPLETIONS, "prompt": second, "prompt_logprobs": 1, "max_tokens": 4},
        {"path": COMPLETIONS, "prompt": second, "vllm_xargs": {"kv_cache_report_mode": "full"}, "max_tokens": 4},
    ]
    async with stack.router() as router:
        for _ in range(2):
            for fields in asks:
                await router.post(**fields)
        for text in (first, second):
            await router.post(COMPLETIONS, prompt=text, max_tokens=2)
        assert router.prefixes.status().off == 0
        await converse(router, stack.block_tokens, 8, seed=3)  # evicts what they left
        assert all(abs(gap) <= 1 for gap in router.gaps), router.gaps
        assert router.prefixes.status().off == 0


async def test_a_cache_salt_keeps_equal_prompts_apart(stack: Stack) -> None:
    messages = [said("user", some_words(next(FRESH), 90))]
    async with stack.router() as router:
        plain = await router.chat(messages, stack.block_tokens, max_tokens=2)
        await router.learns_of(http(CHAT, messages=messages))
        answers = []
        for salt, known in (("one", False), ("one", True), ("two", False)):
            salted = http(CHAT, messages=messages, max_tokens=2, cache_salt=salt)
            assert (router.held(salted).blocks > 0) is known
            answers.append(await router.chat(messages, stack.block_tokens, max_tokens=2, cache_salt=salt))
            await router.learns_of(salted)
        assert cached(plain) == 0
        assert [cached(answer) > 0 for answer in answers] == [False, True, False]
        assert all(abs(gap) <= 1 for gap in router.gaps), router.gaps


async def test_an_adapter_keeps_equal_prompts_apart(coarse: Stack) -> None:
    messages = [said("user", some_words(next(FRESH), 150))]
    async with coarse.router() as router:
        for model in (MODEL, ADAPTER):
            asking = http(CHAT, messages=messages, model=model)
            assert router.held(asking).blocks == 0
            found = []
            for _ in range(2):
                found.append(cached(await router.chat(messages, coarse.block_tokens, max_tokens=2, model=model)))
                await router.learns_of(asking)
            assert found[0] == 0
            assert found[1] > 0
        assert all(abs(gap) <= 1 for gap in router.gaps), router.gaps
        assert router.prefixes.status().off == 0


async def test_a_reset_of_the_cache_is_told_though_no_step_follows(stack: Stack) -> None:
    messages = [said("user", some_words(41, 90))]
    async with stack.router() as router:
        await router.chat(messages, stack.block_tokens, max_tokens=2)
        await router.learns_of(http(CHAT, messages=messages))
        async with asyncio.timeout(DEADLINE_S):
            while not await stack.engine._engine.reset_prefix_cache():
                await asyncio.sleep(0.01)  # vLLM frees the last request's blocks with its next turn
            while router.held(http(CHAT, messages=messages)).blocks:
                await asyncio.sleep(0.01)
        assert cached(await router.chat(messages, stack.block_tokens, max_tokens=2)) == 0
        await router.learns_of(http(CHAT, messages=messages))
        assert cached(await router.chat(messages, stack.block_tokens, max_tokens=2)) > 0
        assert [abs(gap) <= 1 for gap in router.gaps] == [True] * 3
        assert router.prefixes.mode("a") is CacheMode.EXACT


@pytest.mark.parametrize("level", [1, 2])
async def test_a_replica_that_slept_says_the_same_and_its_cache_is_empty(
    stack: Stack, monkeypatch: pytest.MonkeyPatch, level: int
) -> None:
    messages = [said("user", some_words(43 + level, 90))]
    asking = http(CHAT, messages=messages)
    wake, replica = stack.engine.wake, stack.replica

    async def wake_slowly() -> None:
        await asyncio.sleep(2.0)  # As a GPU's memory is filled.
        await wake()

    for name in ("sleeper", "submit", "load"):
        monkeypatch.setattr(replica, name, getattr(replica, name))  # To be as before at the end.
    monkeypatch.setattr(stack.engine, "wake", wake_slowly)
    async with stack.router() as router:
        before = await router.chat(messages, stack.block_tokens, max_tokens=16)
        await router.learns_of(asking)
        replica.sleep_when_idle(0.1, level)
        sleeper = replica.sleeper
        assert sleeper is not None
        sleeper.idle()
        (lane,) = router.replicas.lanes()
        async with asyncio.timeout(DEADLINE_S):
            while not (lane.account.load.asleep and await stack.engine._engine.is_sleeping()):
                await asyncio.sleep(0.01)
            while router.held(asking).blocks:
                await asyncio.sleep(0.01)
        await replica.check_health()
        monkeypatch.setattr(sleeper, "_after_s", 3600.0)  # One night is enough.
        after = await router.chat(messages, stack.block_tokens, max_tokens=16)
        assert after["choices"][0]["message"] == before["choices"][0]["message"]
        assert cached(after) == 0
        assert stack.engine.load().step_ms < 2000.0  # The time to wake is in no step.
        assert router.prefixes.mode("a") is CacheMode.EXACT
        assert not sleeper.asleep
        assert not lane.account.load.asleep
        assert not await stack.engine._engine.is_sleeping()
        await sleeper.close()


async def test_the_load_counts_uncached_prompt_tokens_alone(stack: Stack) -> None:
    loads: list[Load] = []
    async with stack.router() as router:
        long = some_words(51, 220)
        stack.engine.on_step(lambda: loads.append(stack.engine.load()))
        first = await router.post(COMPLETIONS, prompt=long, max_tokens=5)
        tokens = first["usage"]["prompt_tokens"]
        assert sum(load.step_prefill_tokens for load in told_once(loads)) == tokens
        prefill = next(load for load in loads if load.step_prefill_tokens)
        assert prefill.step_prefill_pairs == pytest.approx(tokens * tokens / 2)
        assert prefill.step_decodes == 0
        decode = loads[-1]
        assert (decode.step_prefill_tokens, decode.step_decodes) == (0, 1)
        assert tokens < decode.step_context_tokens <= tokens + 5
        # Again, with all but the last block cached: that is what it queues, from the moment the engine has it.
        loads.clear()
        task = asyncio.create_task(router.post(COMPLETIONS, prompt=long + " moon", max_tokens=5))
        queued = 0
        async with asyncio.timeout(DEADLINE_S):
            while not queued:
                await asyncio.sleep(0)
                queued = stack.engine.load().queued_prefill_tokens
        second = await task
        left = second["usage"]["prompt_tokens"] - cached(second)
        assert left <= 2 * stack.block_tokens
        assert queued == left
        assert sum(load.step_prefill_tokens for load in told_once(loads)) == left
        assert stack.engine.load().queued_prefill_tokens == 0
        assert stack.engine.load().queued_prefill_pairs == 0


def told_once(loads: list[Load]) -> list[Load]:
    """Without the same step's load told again."""
    return [load for load, before in zip(loads, [None, *loads], strict=False) if load != before]


async def test_aborted_requests_leave_nothing_behind_in_the_load(stack: Stack) -> None:
    async with stack.router() as router:
        tasks = [
            asyncio.create_task(router.post(COMPLETIONS, prompt=some_words(60 + i, 150), max_tokens=400, stream=True))
            for i in range(6)
        ]
        async with asyncio.timeout(DEADLINE_S):
            while not stack.engine.load().running:
                await asyncio.sleep(0.01)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        async with asyncio.timeout(DEADLINE_S):
            while (load := stack.engine.load()).running or load.waiting:
                await asyncio.sleep(0.01)
        assert (load.queued_prefill_tokens, load.queued_prefill_pairs) == (0, 0)
        work = stack.engine._cache.work
        assert work is not None
        assert (work._all, work._waiting, work._decoding_context) == ({}, {}, 0)
        await converse(router, stack.block_tokens, 4, seed=5)
        assert all(abs(gap) <= 1 for gap in router.gaps), router.gaps


async def test_a_message_that_is_no_event_batch_costs_the_exactness_and_nothing_else(stack: Stack) -> None:
    async with stack.router() as router:
        await router.chat([said("user", some_words(71, 90))], stack.block_tokens, max_tokens=2)
        stack.engine._cache._received(10**9, b"")
        async with asyncio.timeout(DEADLINE_S):
            # First the batches before it are asked for again.
            while "not an event batch" not in router.prefixes.status().replicas["a"].cause:
                await asyncio.sleep(0.01)
        assert router.prefixes.mode("a") is CacheMode.APPROXIMATE
        await router.post(CHAT, messages=[said("user", "hi")], max_tokens=2)


async def test_requests_that_vllm_refuses_are_not_followed(coarse: Stack) -> None:
    async with coarse.router() as router:
        sink = await router.send(http(COMPLETIONS, prompt=some_words(81, 2000), max_tokens=2))
        assert sink.heads[0][0] == 400
        with pytest.raises(KvlaneError):
            await router.send(grpc(GENERATE, pb.GenerateRequest(model="nobody", text="x")))
        work = coarse.engine._cache.work
        assert work is not None
        assert not work._all
