"""`kvlane serve` under load while its workers die and its configuration is read again."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest

from loadtests.processes import MODEL, engines
from tests.integration.ray_local import alive, until, wait_until
from tests.integration.served import Load, Served, serving

pytestmark = pytest.mark.slow

ENDED = "kvlane_requests_total"
COUNTS = ("_total", "_count", "_sum", "_bucket")
OK = 'kvlane_reloads_total{outcome="ok"}'


@pytest.fixture(scope="module")
def addresses() -> Iterator[list[dict[str, Any]]]:
    """Two simulated replicas whose streams of 40 tokens take a fifth of a second."""
    with engines(2, {"step_base_ms": 5.0, "prefill_ms_per_token": 0.0}) as (_, found):
        yield found


@pytest.fixture
def served(tmp_path: Path, addresses: list[dict[str, Any]]) -> Iterator[Served]:
    with serving(tmp_path, addresses) as found:
        yield found


def ended(metrics: dict[str, float]) -> float:
    return sum(value for name, value in metrics.items() if name.startswith(ENDED))


async def later(served: Served) -> dict[str, float]:
    return await asyncio.to_thread(served.metrics)


async def test_reloads_under_load_break_no_stream_and_refuse_no_connection(served: Served) -> None:
    load, first = Load(served), served.workers()
    async with load.running():
        await load.more()
        for workers in (2, 1, 3):  # More and fewer of them, too.
            served.write(workers=workers)
            before = served.workers()
            await asyncio.to_thread(served.reload)
            await load.more()
            await until(lambda before=before: not before & served.workers(), "the old workers have finished")
    assert load.broken == []
    metrics = served.metrics()
    assert metrics[OK] == 3
    assert metrics['kvlane_workers{state="ready"}'] == metrics["kvlane_workers_counted"] == 3
    # What those workers counted that are gone is among it.
    assert ended(metrics) == sum(load.whole.values())
    assert not any(map(alive, first))


async def test_a_stream_in_flight_goes_on_at_its_old_worker(served: Served) -> None:
    body = {"model": MODEL, "prompt": "x", "max_tokens": 2500, "stream": True}
    url = f"http://127.0.0.1:{served.http}/v1/completions"
    before = served.workers()
    async with httpx.AsyncClient(timeout=60) as client, client.stream("POST", url, json=body) as answer:
        lines = answer.aiter_lines()
        await anext(lines)
        await asyncio.to_thread(served.reload)
        await until(lambda: len(before & served.workers()) == 1, "the one without a stream has finished")
        rest = [line async for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    assert sum(line.startswith("data: {") for line in rest) >= 2499
    await until(lambda: not before & served.workers(), "the old worker has finished")


def test_a_reload_takes_what_is_new_in_the_file(tmp_path: Path, addresses: list[dict[str, Any]]) -> None:
    body = {"model": MODEL, "prompt": "x", "max_tokens": 1}
    with serving(tmp_path, addresses, '[policy]\nname = "random"', workers=1) as served:
        for policy in ("random", "round-robin"):
            served.write(f'[policy]\nname = "{policy}"', workers=1)
            served.reload()
            answer = httpx.post(f"http://127.0.0.1:{served.http}/v1/completions", json=body, timeout=30)
            assert f"policy={policy};" in answer.headers["x-kvlane-route"]


def test_a_configuration_that_is_wrong_is_refused_and_the_old_one_goes_on(served: Served) -> None:
    workers = served.workers()
    served.config.write_text("workers = 0\n[http]\nprot = 1\n")
    served.reload()
    metrics = served.metrics()
    assert metrics['kvlane_reloads_total{outcome="refused"}'] == 1
    assert metrics[OK] == 0
    assert served.workers() == workers
    assert "reload refused, the configuration in use stays: " in served.log()
    assert "did you mean 'port'?" in served.log()
    assert "Traceback" not in served.log()


def test_a_configuration_that_cannot_be_served_leaves_the_old_workers(served: Served) -> None:
    workers = served.workers()
    served.write(secret="nowhere")
    served.reload()
    assert served.metrics()['kvlane_reloads_total{outcome="failed"}'] == 1
    assert served.workers() == workers
    served.write(f"[policy]\nname = {json.dumps('random')}")
    served.reload()
    assert served.metrics()[OK] == 1


async def test_a_worker_that_is_killed_costs_its_own_streams_alone_and_no_count(served: Served) -> None:
    load, seen = Load(served), [await later(served)]
    async with load.running():
        await load.more()
        seen.append(await later(served))
        killed = min(served.workers())
        os.kill(killed, signal.SIGKILL)
        for _ in range(10):
            await load.more(2)
            seen.append(await later(served))
        await until(lambda: len(served.workers()) == 2, "another worker is there")
        await until(lambda: served.log().count("ready") > 4, "it is ready")
        await load.more()
        seen.append(await later(served))
    # Each client had one request there at most, and one more where its next one found the connection closed; none where
    # the worker happened to have no stream just then.
    assert len(load.broken) <= 2 * 16, load.broken
    assert killed not in served.workers()
    for earlier, following in pairwise(seen):
        counts = [name for name in earlier if name.partition("{")[0].endswith(COUNTS)]
        assert [name for name in counts if following.get(name, 0.0) < earlier[name]] == []
    assert seen[-1]["kvlane_worker_restarts_total"] == 1
    assert seen[-1]["kvlane_workers_counted"] == 2


def test_a_worker_that_does_not_answer_is_not_counted_and_what_it_had_counted_stays(served: Served) -> None:
    body = {"model": MODEL, "prompt": "x", "max_tokens": 1}
    for _ in range(20):
        httpx.post(f"http://127.0.0.1:{served.http}/v1/completions", json=body, timeout=30).raise_for_status()
    before = served.metrics(served.admin)
    assert ended(before) == 20
    stuck = max(served.workers())  # Not the first, whose admin port is asked.
    os.kill(stuck, signal.SIGSTOP)
    try:
        metrics = served.metrics(served.admin)
    finally:
        os.kill(stuck, signal.SIGCONT)
    assert ended(metrics) == 20
    assert (before["kvlane_workers_counted"], metrics["kvlane_workers_counted"]) == (2, 1)
    wait_until(lambda: served.metrics()["kvlane_workers_counted"] == 2, "it answers again")
