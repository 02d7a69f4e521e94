"""A whole router over simulated replicas that sleep: who is woken, by what, and what clients and operators see."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from engine.replica import Replica
from engine.simulated import SimulatedEngine
from router.app import App
from router.load.account import Foresight
from router.options import (
    Config,
    GrpcOptions,
    HttpOptions,
    LaneOptions,
    MembershipOptions,
    PolicyOptions,
    StaticReplica,
)
from router.types import Load, Reason, Receipt, Request, Rpc
from tests.fakes import DEADLINE_S, SECRET, RecordingSink, eventually

pytestmark = [pytest.mark.timeout(120)]

MODEL = "sim"
BATCH = 10
ENGINE: dict[str, Any] = {"step_base_ms": 5.0, "prefill_ms_per_token": 0.0, "max_num_seqs": BATCH, "wake_ms": 30.0}
LONG = 4000
"""Tokens of an answer that outlasts the test."""


class CountingEngine(SimulatedEngine):
    """Knows how often it woke."""

    wakes = 0

    async def wake(self) -> None:
        await super().wake()
        self.wakes += 1


class Dormitory:
    """A router and two replicas, "a" and "b", that sleep after a moment."""

    def __init__(self, app: App, engines: dict[str, CountingEngine]) -> None:
        self.app = app
        self.engines = engines
        self._count = 0
        self._tasks: list[asyncio.Task[Any]] = []

    def ask(self, tokens: int = 2, **fields: Any) -> tuple[asyncio.Task[Any], RecordingSink]:
        """A streamed completion in the background."""
        self._count += 1
        body = {"model": MODEL, "prompt": "hello", "max_tokens": tokens, "stream": True, **fields}
        headers = (("content-type", "application/json"),)
        raw = json.dumps(body).encode()
        request = Request(f"r{self._count}", MODEL, Rpc.HTTP, "/v1/completions", raw, headers=headers)
        sink = RecordingSink()
        task = asyncio.create_task(self.app.dispatcher.run(request, sink))
        self._tasks.append(task)
        return task, sink

    async def whole(self, **fields: Any) -> tuple[str, Receipt]:
        """The text of an answer, and its receipt."""
        task, sink = self.ask(**fields)
        await asyncio.wait_for(task, DEADLINE_S)
        events = b"".join(sink.payloads).decode().split("\n\n")
        texts = [json.loads(event.removeprefix("data: "))["choices"][0]["text"] for event in events[:-2]]
        return "".join(texts), sink.receipts[-1]

    async def running(self, tokens: int = LONG) -> Receipt:
        """The receipt of a stream that has begun."""
        _, sink = self.ask(tokens)
        await asyncio.wait_for(sink.got_data.wait(), DEADLINE_S)
        return sink.receipts[-1]

    def asleep(self) -> int:
        """How many sleep, as the router knows."""
        return self.app.replicas.asleep().get(MODEL, 0)

    async def until_asleep(self, count: int) -> None:
        await eventually(lambda: self.asleep() == count)

    async def quiet(self) -> None:
        """Ends all streams."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


@asynccontextmanager
async def dormitory(
    folder: Path, policy: str = "cost", *, after_s: float = 0.05, lane: LaneOptions | None = None, **options: Any
) -> AsyncIterator[Dormitory]:
    secret = folder / "secret"
    secret.write_bytes(SECRET)
    replicas, records, engines = [], [], {}
    for name in ("a", "b"):
        engines[name] = engine = CountingEngine(ENGINE | options, MODEL)
        replica = Replica(name, engine, SECRET)
        replica.sleep_when_idle(after_s, 1)
        await replica.start()
        port = await replica.listen("127.0.0.1")
        replicas.append(replica)
        records.append(StaticReplica(name=name, port=port, secret_file=str(secret)))
    app = App(
        Config(
            http=HttpOptions(port=0),
            grpc=GrpcOptions(enabled=False),
            lane=lane or LaneOptions(),
            membership=MembershipOptions(kind="static", replicas=tuple(records)),
            policy=PolicyOptions(name=policy),
        )
    )
    await app.start()
    running = Dormitory(app, engines)
    try:
        await eventually(lambda: app.replicas.readiness().models.get(MODEL) == 2)
        yield running
    finally:
        await running.quiet()
        await app.stop(0)
        for replica in replicas:
            await replica.close()


async def get(app: App, path: str) -> str:
    async with httpx.AsyncClient() as client:
        answer = await client.get(f"http://127.0.0.1:{app.http_port}{path}", timeout=DEADLINE_S)
    return answer.text


async def shows(app: App, line: str) -> None:
    """Waits until the metrics have that line."""
    async with asyncio.timeout(DEADLINE_S):
        while line not in await get(app, "/metrics"):
            await asyncio.sleep(0.02)


@pytest.mark.parametrize("policy", ["cost", "round-robin", "power-of-two", "prefix-affinity", "session"])
async def test_one_request_wakes_one_replica_and_the_other_sleeps_until_it_is_needed(
    tmp_path: Path, policy: str
) -> None:
    async with dormitory(tmp_path, policy) as running:
        await running.until_asleep(2)
        first = await running.running()
        assert (first.replica, first.asleep, first.expected_s) == ("a", True, 0.0)
        await running.until_asleep(1)
        for _ in range(7):
            receipt = await running.running()
            assert (receipt.replica, receipt.asleep) == ("a", False)
        assert running.engines["b"].asleep
        ninth = await running.running()  # As little room is left, the other one is woken; it is not waited for.
        assert (ninth.replica, ninth.asleep) == ("a", False)
        await eventually(lambda: running.engines["b"].wakes == 1)
        await shows(running.app, 'kvlane_wakes_total{cause="ahead"} 1.0')
        page = await get(running.app, "/metrics")
        assert 'kvlane_wakes_total{cause="request"} 1.0' in page
        assert "kvlane_wake_seconds_count 1.0" in page
        assert running.engines["a"].wakes == 1


async def test_a_burst_at_a_sleeping_fleet_wakes_as_many_as_it_fills(tmp_path: Path) -> None:
    async with dormitory(tmp_path) as running:
        await running.until_asleep(2)
        asked = [running.ask(LONG)[1] for _ in range(BATCH + 3)]
        await asyncio.wait_for(asyncio.gather(*(sink.got_data.wait() for sink in asked)), DEADLINE_S)
        served = [sink.receipts[-1].replica for sink in asked]
        assert served == ["a"] * BATCH + ["b"] * 3


@pytest.mark.slow
async def test_answers_are_the_same_after_sleep_and_operators_see_it(tmp_path: Path) -> None:
    async with dormitory(tmp_path, after_s=1.0) as running:
        await running.until_asleep(2)
        ready = json.loads(await get(running.app, "/readyz"))
        assert ready["ready"]
        assert ready["asleep"] == {MODEL: 2}
        assert 'kvlane_replicas_asleep{model="sim"} 2.0' in await get(running.app, "/metrics")
        text, receipt = await running.whole(tokens=20)
        assert ";asleep=1" in receipt.header()
        awake, receipt = await running.whole(tokens=20)
        assert ";asleep" not in receipt.header()
        await running.until_asleep(2)
        again, _ = await running.whole(tokens=20)
        assert text == awake == again


async def test_a_replica_that_does_not_wake_costs_no_request(tmp_path: Path) -> None:
    async with dormitory(tmp_path) as running:
        await running.until_asleep(2)
        running.engines["a"].wake = broken  # type: ignore[method-assign]
        _, receipt = await running.whole()
        assert (receipt.replica, receipt.reason) == ("b", Reason.RETRY)
        assert running.app.replicas.readiness().models == {MODEL: 1}


async def broken() -> None:
    raise RuntimeError("out of memory")


@pytest.mark.slow
async def test_a_replica_that_wakes_for_long_is_not_taken_for_lost(tmp_path: Path) -> None:
    pings = LaneOptions(ping_interval_s=0.05, ping_timeout_s=0.5)
    async with dormitory(tmp_path, lane=pings, wake_ms=1500.0) as running:
        await running.until_asleep(2)
        _, receipt = await running.whole()
        assert receipt.reason is not Reason.RETRY
        assert receipt.asleep


@pytest.mark.slow
async def test_what_is_learned_of_steps_does_not_hold_the_time_to_wake(tmp_path: Path) -> None:
    async with dormitory(tmp_path, wake_ms=400.0) as running:
        seen: list[float] = []
        watch_steps(running, seen.append)
        for _ in range(3):
            await running.until_asleep(2)
            await running.whole(tokens=20)
        assert seen
        assert max(seen) < 100.0  # A step takes 5 ms.


def watch_steps(running: Dormitory, tell: Callable[[float], None]) -> None:
    """Tells of every step's duration in milliseconds that the load model gets to know."""
    for lane in running.app.replicas.lanes():
        lane.account._foresight = Watched(lane.account._foresight, tell)


class Watched:
    """A foresight that tells of each step before it learns."""

    def __init__(self, foresight: Foresight, tell: Callable[[float], None]) -> None:
        self.news = foresight.news
        self.outlook = foresight.outlook
        self._learn = foresight.observe
        self._tell = tell

    def observe(self, load: Load, now: float) -> None:
        self._tell(load.step_ms)
        self._learn(load, now)
