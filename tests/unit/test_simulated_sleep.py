"""The simulated engine's sleep, on a virtual clock: its cache is empty afterwards, and to wake takes its time."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from engine.base import Engine, SleepyEngine
from router.errors import ReplicaFailed
from router.types import Rpc
from tests.fakes import eventually
from tests.unit.test_simulated_engine import CHAT
from tests.unit.test_simulated_reports import Routed, chat_body

MESSAGES = [{"role": "user", "content": "the harbour town wakes before the sun " * 12}]


async def passed(bench: Routed, work: Coroutine[Any, Any, None]) -> float:
    """Runs it while the clock goes on; the seconds that it took."""
    began, task = bench.clock.now, asyncio.create_task(work)
    await eventually(lambda: task.done() or bench.clock.pending > 0)
    while not task.done():
        bench.clock.run()
        await asyncio.sleep(0)
    await task
    return bench.clock.now - began


async def test_its_cache_is_empty_after_sleep_and_routers_know_it() -> None:
    bench = Routed(wake_ms=2500.0, time_scale=2.0)
    engine: Engine = bench.engine
    assert isinstance(engine, SleepyEngine)
    before = bench.chat(MESSAGES)
    bench.learn()
    assert bench.held(Rpc.HTTP, CHAT, chat_body(MESSAGES, 20)).blocks
    assert await passed(bench, engine.sleep(1)) == 0.0
    bench.learn()
    assert not bench.held(Rpc.HTTP, CHAT, chat_body(MESSAGES, 20)).blocks
    assert bench.engine.load().kv_usage == 0.0
    assert await passed(bench, engine.wake()) == 5.0
    again = bench.chat(MESSAGES)
    assert again["choices"] == before["choices"]
    assert not again["usage"]["prompt_tokens_details"]["cached_tokens"]
    bench.learn()
    assert bench.held(Rpc.HTTP, CHAT, chat_body(MESSAGES, 20)).blocks


async def test_it_takes_nothing_while_it_sleeps() -> None:
    bench = Routed()
    await bench.engine.sleep(1)
    refused = bench.route(Rpc.HTTP, CHAT, chat_body(MESSAGES, 20))
    assert [type(error) for error in refused.errors] == [ReplicaFailed]


async def test_one_that_dies_meanwhile_does_not_wake() -> None:
    bench = Routed()
    await bench.engine.sleep(1)
    bench.engine.fail()
    with pytest.raises(ReplicaFailed):
        await passed(bench, bench.engine.wake())


async def test_what_an_aborted_request_computed_is_gone_too() -> None:
    bench = Routed(step_base_ms=100.0)
    bench.route(Rpc.HTTP, CHAT, chat_body(MESSAGES, 20))
    bench.clock.run(bench.clock.now + 0.05)
    bench.abort()
    assert await passed(bench, bench.engine.sleep(1)) > 0.0  # The step under way ends first.
    bench.learn()
    assert not bench.held(Rpc.HTTP, CHAT, chat_body(MESSAGES, 20)).blocks
