"""What a real vLLM engine says of itself: its model and limits, its health and load."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from engine.tiny_model import CONTEXT_TOKENS
from engine.vllm import VllmEngine
from router.types import Load
from tests.integration.vllm_fixtures import ENGINE_ARGS, FOREIGN_WARNINGS, MODEL, http_call, submit

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.asyncio(loop_scope="package"),
    FOREIGN_WARNINGS,
]


async def test_info_names_the_model_its_routes_and_its_limits(engine: VllmEngine, model: Path) -> None:
    info = engine.info()
    assert info.kind == "vllm"
    assert [(card.name, card.parent, card.max_model_len) for card in info.models] == [(MODEL, "", CONTEXT_TOKENS)]
    routes = {(route.path, method) for route in info.routes for method in route.methods}
    assert {
        ("/v1/chat/completions", "POST"),
        ("/v1/completions", "POST"),
        ("/v1/models", "GET"),
        ("/v1/responses/{response_id}", "GET"),
        ("/tokenize", "POST"),
    } <= routes
    assert (info.max_num_seqs, info.kv_blocks, info.kv_block_tokens) == (8, 1024, 32)
    assert info.prefix_caching
    assert info.version.startswith("0.32")


async def test_a_living_engine_is_healthy(engine: VllmEngine) -> None:
    await engine.check_health()


async def test_streams_beyond_the_batch_wait_and_all_leave_the_counts(engine: VllmEngine) -> None:
    loads: list[Load] = []
    engine.on_step(lambda: loads.append(engine.load()))
    body = {"model": MODEL, "prompt": "Hello", "max_tokens": 64, "ignore_eos": True}
    outs = [submit(engine, http_call("/v1/completions", body))[0] for _ in range(12)]
    assert engine.load().waiting == 12
    await asyncio.gather(*(out.ended() for out in outs))
    assert max(load.running for load in loads) == ENGINE_ARGS["max_num_seqs"]
    assert any((load.running, load.waiting) == (8, 4) for load in loads)
    assert all(load.running + load.waiting <= 12 for load in loads)
    assert max(load.kv_usage for load in loads) > 0
    assert max(load.step_ms for load in loads) > 0
    assert (engine.load().running, engine.load().waiting) == (0, 0)


async def test_waiting_prompts_count_as_queued_prefill(engine: VllmEngine) -> None:
    body = {"model": MODEL, "prompt": "The old harbour town. " * 40, "max_tokens": 200, "ignore_eos": True}
    outs = [submit(engine, http_call("/v1/completions", body | {"cache_salt": str(i)}))[0] for i in range(12)]
    most = 0
    while not all(out.done.is_set() for out in outs):
        most = max(most, engine.load().queued_prefill_tokens)
        await asyncio.sleep(0.001)
    assert most > 100
    assert engine.load().queued_prefill_tokens == 0
