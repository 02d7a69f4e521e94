"""Aborts in every phase, over both protocols: the engine is emptied, and other streams go on."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
from kvlane.v1 import inference_pb2 as pb

from engine.vllm import VllmEngine
from router.lane.frames import Submit
from router.types import Load
from tests.integration.vllm_engine.asked import USER, Sampling, bad_generate
from tests.integration.vllm_fixtures import (
    DEADLINE_S,
    FOREIGN_WARNINGS,
    MODEL,
    RecordingOut,
    grpc_call,
    http_call,
    submit,
)

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.asyncio(loop_scope="package"),
    FOREIGN_WARNINGS,
]

LONG = 3000


async def settled(engine: VllmEngine) -> None:
    """Waits until the engine holds nothing any more."""
    async with asyncio.timeout(DEADLINE_S):
        while (load := engine.load()).running or load.waiting:
            await asyncio.sleep(0.0005)


def completion(stream: bool) -> Submit:
    body = {"model": MODEL, "prompt": "Hello", "max_tokens": LONG, "ignore_eos": True, "stream": stream}
    return http_call("/v1/completions", body)


def chat_completion(stream: bool) -> Submit:
    body = {"model": MODEL, "messages": USER, "max_tokens": LONG, "ignore_eos": True, "stream": stream}
    return http_call("/v1/chat/completions", body)


def long_generate() -> Submit:
    return grpc_call("Generate", bad_generate(max_tokens=LONG, ignore_eos=True))


def long_chat() -> Submit:
    request = pb.ChatRequest(
        messages=[pb.ChatMessage(role="user", content="x")], sampling=Sampling(max_tokens=LONG, ignore_eos=True)
    )
    return grpc_call("Chat", request)


async def nothing(engine: VllmEngine, out: RecordingOut) -> None:
    """Aborts before the stream's task has run at all."""


async def before_the_first_token(engine: VllmEngine, out: RecordingOut) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not engine.load().queued_prefill_tokens:
            await asyncio.sleep(0)
    assert not out.started.is_set()


async def mid_stream(engine: VllmEngine, out: RecordingOut) -> None:
    async with asyncio.timeout(DEADLINE_S):
        await out.started.wait()


async def while_it_runs(engine: VllmEngine, out: RecordingOut) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not engine.load().running:
            await asyncio.sleep(0.001)
    assert not out.started.is_set()


@pytest.mark.parametrize(
    ("make", "phase"),
    [
        pytest.param(make, phase, id=f"{name}, {phase.__name__}")
        for name, make, phases in [
            ("streamed completion", lambda: completion(True), (nothing, before_the_first_token, mid_stream)),
            ("whole completion", lambda: completion(False), (nothing, before_the_first_token, while_it_runs)),
            ("streamed chat", lambda: chat_completion(True), (nothing, before_the_first_token, mid_stream)),
            ("whole chat", lambda: chat_completion(False), (nothing, before_the_first_token, while_it_runs)),
            ("Generate", long_generate, (nothing, before_the_first_token, mid_stream)),
            ("Chat", long_chat, (nothing, before_the_first_token, mid_stream)),
        ]
        for phase in phases
    ],
)
async def test_an_abort_empties_the_engine(
    engine: VllmEngine, make: Callable[[], Submit], phase: Callable[[VllmEngine, RecordingOut], Any]
) -> None:
    times = []
    for _ in range(20):
        out, abort = submit(engine, make())
        await phase(engine, out)
        began = time.perf_counter()
        abort()
        pieces = len(out.pieces)
        await settled(engine)
        times.append(time.perf_counter() - began)
        assert len(out.pieces) == pieces
        assert not out.done.is_set()
        abort()  # Harmless.
    print(f"abort: median {statistics.median(times) * 1e3:.1f} ms, longest {max(times) * 1e3:.1f} ms")


async def scheduled(engine: VllmEngine, count: int) -> None:
    """Waits until the last step's own statistics say so: `load` counts without what was aborted, lost or not."""
    async with asyncio.timeout(DEADLINE_S):
        while engine._steps.running != count:
            await asyncio.sleep(0.0005)


@pytest.mark.parametrize(
    "make",
    [lambda: completion(True), lambda: completion(False), long_generate, long_chat],
    ids=["streamed completion", "whole completion", "Generate", "Chat"],
)
async def test_an_abort_takes_the_stream_out_of_the_scheduler_while_another_goes_on(
    engine: VllmEngine, make: Callable[[], Submit]
) -> None:
    other, stop_other = submit(engine, completion(True))
    times = []
    for _ in range(20):
        out, abort = submit(engine, make())
        await scheduled(engine, 2)
        began = time.perf_counter()
        abort()
        await scheduled(engine, 1)
        times.append(time.perf_counter() - began)
        assert not out.done.is_set()
        assert not other.done.is_set(), "it was the other stream that left the scheduler"
    stop_other()
    await settled(engine)
    print(f"out of the scheduler: median {statistics.median(times) * 1e3:.1f} ms, longest {max(times) * 1e3:.1f} ms")


async def test_an_abort_leaves_the_other_streams_alone(engine: VllmEngine) -> None:
    body = {"model": MODEL, "prompt": "Hello", "max_tokens": 100, "ignore_eos": True, "stream": True}
    other, _ = submit(engine, http_call("/v1/completions", body))
    out, abort = submit(engine, long_generate())
    await mid_stream(engine, out)
    abort()
    assert (await other.ended()).events()[-1]["choices"][0]["finish_reason"] == "length"


async def test_the_load_after_an_abort_is_told(engine: VllmEngine) -> None:
    out, abort = submit(engine, completion(True))
    await mid_stream(engine, out)
    loads: list[Load] = []
    engine.on_step(lambda: loads.append(engine.load()))
    abort()
    async with asyncio.timeout(DEADLINE_S):
        while not loads or loads[-1].running or loads[-1].waiting:
            await asyncio.sleep(0.001)


async def test_an_abort_after_the_end_is_harmless(engine: VllmEngine) -> None:
    out, abort = submit(engine, grpc_call("Generate", bad_generate(max_tokens=1)))
    await out.ended()
    abort()
    assert out.finishes == ["length"]
