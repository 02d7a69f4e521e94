"""Requests that find no replica: over real lanes, with engines under the test's control that come up late."""

from __future__ import annotations

import asyncio
import errno
import gc
import logging
import random
import weakref
from collections.abc import AsyncIterator, Callable, Generator
from contextlib import asynccontextmanager

import msgspec
import pytest

from router.errors import (
    DeadlineExceeded,
    HoldFull,
    KvlaneError,
    ModelNotFound,
    NoReplica,
    ReplicaDraining,
    ReplicaLost,
    ShuttingDown,
)
from router.hold import LARGE_BODY_BYTES, LOOK_S, SLICE
from router.lane.frames import End
from router.membership.base import ReplicaRecord
from router.options import HoldOptions, LaneOptions
from router.replicas import HELD, Replicas
from router.types import Chain, Decision, Load, Reason, Request, Snapshot
from tests.fakes import DEADLINE_S, SECRET, RecordingSink, ScriptedEngine, eventually, make_request
from tests.unit.test_dispatch import Router, answer

ROOM = 10
"""What one scripted replica, with its batch of 8, is given."""


class FakeWaker:
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, int]] = []
        self.closed = False

    def wanted(self, model: str, held: int) -> None:
        self.told.append((model, held))

    async def close(self) -> None:
        self.closed = True


class Shortest:
    """The shortest queue, as any sane policy would."""

    def choose(self, request: Request, snapshot: Snapshot) -> Decision:
        least = min(snapshot.replicas, key=lambda view: (view.queue_depth, view.replica))
        return Decision(least.replica, Reason.SHORTEST_QUEUE)


class Holding(Router):
    """A router whose model `m` is scaled to zero."""

    def __init__(self, **hold: float | str) -> None:
        self.waker = FakeWaker()
        super().__init__(hold=HoldOptions(**hold), from_zero=("m",), waker=self.waker)  # type: ignore[arg-type]
        self.policy.choose = Shortest().choose  # type: ignore[method-assign]
        self.tasks: list[asyncio.Task[End]] = []

    def ask(self, request: Request, sink: RecordingSink | None = None) -> asyncio.Task[End]:
        task = asyncio.create_task(self.dispatcher.run(request, sink or RecordingSink()))
        self.tasks.append(task)
        return task

    async def held(self, *names: str, model: str = "m") -> list[asyncio.Task[End]]:
        """Requests of these names that wait, in that order."""
        before = self.waiting(model)
        tasks = [self.ask(make_request(name, model)) for name in names]
        await eventually(lambda: self.waiting(model) == before + len(names))
        return tasks

    def let_time_pass(self, seconds: float) -> None:
        now = self.hold._clock
        self.hold._clock = lambda: now() + seconds
        self.hold._look_soon()

    def waiting(self, model: str = "m") -> int:
        return len(self.hold.queues.get(model, ()))

    async def replica(self, name: str, model: str = "m", *, answers: bool = True) -> ScriptedEngine:
        engine = await self.fleet.add(name, model)
        if answers:
            engine.respond = answer
        return engine

    async def close(self) -> None:
        await self.hold.close()
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        await self.fleet.close()


@asynccontextmanager
async def holding(**hold: float | str) -> AsyncIterator[Holding]:
    router = Holding(**hold)
    try:
        yield router
    finally:
        await router.close()


def names(engine: ScriptedEngine) -> list[str]:
    return [call.request_id for call in engine.calls]


async def all_of(tasks: list[asyncio.Task[End]]) -> list[End]:
    async with asyncio.timeout(DEADLINE_S):
        return await asyncio.gather(*tasks)


async def test_requests_without_a_replica_run_in_their_order_once_there_is_one() -> None:
    async with holding() as router:
        asked = [f"r{i}" for i in range(3 * SLICE + 5)]
        tasks = await router.held(*asked)
        assert router.admission.in_flight == len(asked)
        engine = await router.replica("a")
        assert await all_of(tasks) == [End("stop")] * len(asked)
        assert names(engine) == asked
        assert router.notes.holds == [("m", "released")] * len(asked)
        assert (router.hold.queues, router.admission.in_flight, router.leases()) == ({}, 0, 0)


async def test_who_comes_while_others_wait_goes_behind_them() -> None:
    async with holding() as router:
        first = await router.held(*(f"r{i}" for i in range(ROOM + 1)))
        engine = await router.replica("a", answers=False)
        await eventually(lambda: len(engine.calls) == ROOM)
        late = await router.held("late")
        assert router.waiting() == 2
        engine.respond = answer
        for out in engine.outs:
            out.end()
        await all_of(first + late)
        assert names(engine)[-2:] == ["r10", "late"]


async def test_a_busy_replica_gets_no_more_than_it_has_room_for_and_others_spread_to_the_next_one() -> None:
    async with holding() as router:
        await router.held(*(f"r{i}" for i in range(30)))
        first = await router.replica("a", answers=False)
        await eventually(lambda: len(first.calls) == ROOM)
        first.busy(ROOM)
        await eventually(lambda: router.fleet.router.snapshot("m").replicas[0].unacked == 0)
        second = await router.replica("b", answers=False)
        await eventually(lambda: len(second.calls) == ROOM)
        assert (len(first.calls), router.waiting()) == (ROOM, 10)
        assert names(first) + names(second) == [f"r{i}" for i in range(20)]
        for out in first.outs[:4]:
            out.end()
        first.busy(ROOM - 4)
        await eventually(lambda: len(first.calls) == ROOM + 4)
        assert router.waiting() == 6


async def test_a_replica_that_others_keep_busy_still_gets_some_of_ours() -> None:
    async with holding() as router:
        await router.held(*(f"r{i}" for i in range(5)))
        engine = await router.fleet.add("a")
        engine.current_load = Load(running=500)
        await eventually(lambda: len(engine.calls) == 2)
        engine.busy(500)
        await eventually(lambda: router.fleet.router.snapshot("m").replicas[0].unacked == 0)
        assert router.waiting() == 3
        engine.outs[0].end()
        await eventually(lambda: len(engine.calls) == 3)


async def test_clients_that_gave_up_leave_at_once_and_the_others_keep_their_order() -> None:
    async with holding() as router:
        asked = [f"r{i}" for i in range(9)]
        tasks = await router.held(*asked)
        size = router.hold.queues["m"].bytes
        for task in tasks[::2]:
            task.cancel()
        await eventually(lambda: router.waiting() == 4)
        assert router.hold.queues["m"].bytes == size * 4 // 9
        assert router.notes.holds == [("m", "gave_up")] * 5
        assert router.admission.in_flight == 4
        engine = await router.replica("a")
        await all_of(tasks[1::2])
        assert names(engine) == asked[1::2]


async def test_a_clients_own_deadline_ends_its_waiting() -> None:
    async with holding() as router:
        with pytest.raises(DeadlineExceeded):
            await router.ask(make_request(timeout_s=0.05))
        assert (router.waiting(), router.notes.holds) == (0, [("m", "gave_up")])


async def test_after_the_holds_own_deadline_the_request_may_be_tried_again_later() -> None:
    async with holding(timeout_s=60.0) as router:
        (task,) = await router.held("r1")
        router.let_time_pass(60.0)
        with pytest.raises(NoReplica, match="`m` became ready within 60 s") as caught:
            await task
        assert (caught.value.name, caught.value.retry_after_s, caught.value.retryable) == ("no_replica", 5.0, True)
        assert router.notes.holds == [("m", "expired")]


async def test_many_that_expire_together_all_do() -> None:
    async with holding(timeout_s=60.0) as router:
        tasks = await router.held(*(f"r{i}" for i in range(3 * SLICE)))
        router.let_time_pass(60.0)
        async with asyncio.timeout(DEADLINE_S):
            ends = await asyncio.gather(*tasks, return_exceptions=True)
        assert {type(end) for end in ends} == {NoReplica}


async def test_who_has_waited_its_time_and_finds_busy_replicas_waits_there() -> None:
    async with holding(timeout_s=60.0) as router:
        await router.held(*(f"r{i}" for i in range(ROOM + 3)))
        engine = await router.replica("a", answers=False)
        await eventually(lambda: len(engine.calls) == ROOM)
        router.let_time_pass(60.0)
        await eventually(lambda: len(engine.calls) == ROOM + 3)
        assert names(engine) == [f"r{i}" for i in range(ROOM + 3)]


async def test_bounds_refuse_with_the_time_to_come_again() -> None:
    async with holding(max_requests=2, max_bytes=7) as router:
        await router.held("r1", "r2")
        with pytest.raises(HoldFull, match="2 requests wait") as caught:
            await router.ask(make_request("r3"))
        assert (caught.value.name, caught.value.retry_after_s) == ("hold_full", 5.0)
        big = msgspec.structs.replace(make_request("r4", "m"), body=b"{      }")
        with pytest.raises(HoldFull):
            await router.ask(big)
        assert router.notes.holds == [("m", "refused")] * 2
        assert router.admission.in_flight == 2
        assert router.notes.outcomes == ["hold_full", "hold_full"]


async def test_models_do_not_wait_for_each_other() -> None:
    router = Router(hold=HoldOptions(), from_zero=("m", "n"))
    tasks = {m: asyncio.create_task(router.dispatcher.run(make_request(m, m), RecordingSink())) for m in ("m", "n")}
    await eventually(lambda: router.hold.queues.keys() == {"m", "n"})
    engine = await router.fleet.add("a", "n")
    engine.respond = answer
    assert await asyncio.wait_for(tasks["n"], DEADLINE_S) == End("stop")
    assert router.hold.queues.keys() == {"m"}
    tasks["m"].cancel()
    await asyncio.gather(tasks["m"], return_exceptions=True)
    await router.fleet.close()


async def test_an_unknown_model_is_not_held() -> None:
    async with holding(enabled="always") as router:
        with pytest.raises(ModelNotFound):
            await router.ask(make_request(model="nobody"))


async def test_adapters_of_a_model_that_scaled_to_zero_are_held_and_the_waker_is_told_of_their_base() -> None:
    async with holding() as router:
        await router.fleet.add("a", adapters=("lora",))
        await router.fleet.until(lambda: router.fleet.ready() == 1)
        router.fleet.list({})
        await router.fleet.replicas["a"].close()
        await router.fleet.until(lambda: router.fleet.ready() == 0)
        await router.held("r1", "r2", model="lora")
        await router.held("r3")
        assert router.hold.limit_s("lora") == HoldOptions().timeout_s
        assert router.waker.told[-1] == ("m", 3)


async def test_a_model_and_its_adapters_share_their_replicas_room_and_take_turns() -> None:
    models = ("m", "one", "two", "three")
    async with holding() as router:
        await router.fleet.add("a", adapters=models[1:])
        await router.fleet.until(lambda: router.fleet.ready() == 1)
        router.fleet.list({})
        await router.fleet.replicas["a"].close()
        await router.fleet.until(lambda: router.fleet.ready() == 0)
        for model in models:
            await router.held(*(f"{model} {i}" for i in range(2 * ROOM)), model=model)
        engine = await router.fleet.add("b", adapters=models[1:])
        await eventually(lambda: len(engine.calls) >= ROOM)
        await asyncio.sleep(3 * LOOK_S)
        assert len(engine.calls) == ROOM
        engine.respond = answer
        for out in engine.outs:
            out.end("stop")
        assert await all_of(router.tasks) == [End("stop")] * len(router.tasks)
        assert {name.split()[0] for name in names(engine)[: len(models) * ROOM]} == set(models)
        for model in models:
            assert [name for name in names(engine) if name.startswith(model)] == [
                f"{model} {i}" for i in range(2 * ROOM)
            ]


async def test_the_waker_is_told_how_many_wait_until_nobody_does() -> None:
    async with holding() as router:
        tasks = await router.held("r1", "r2", "r3")
        await eventually(lambda: router.waker.told[-1:] == [("m", 3)])
        tasks[0].cancel()
        await eventually(lambda: router.waker.told[-1] == ("m", 2))
        await router.replica("a")
        await all_of(tasks[1:])
        await eventually(lambda: router.waker.told[-1] == ("m", 0))
        told = len(router.waker.told)
        await all_of([router.ask(make_request("r4"))])
        assert len(router.waker.told) == told
    assert router.waker.closed


async def test_only_a_replacement_is_bridged_for_models_that_never_scale_to_zero() -> None:
    waker = FakeWaker()
    router = Router(hold=HoldOptions(), waker=waker, no_replica_wait_s=0.1)
    await router.replicas("a")
    await router.fleet.replicas["a"].close()
    await router.fleet.until(lambda: router.fleet.ready() == 0)
    assert router.hold.limit_s("m") == 0.1
    with pytest.raises(NoReplica):
        await router.dispatcher.run(make_request(), RecordingSink())
    await eventually(lambda: waker.told == [("m", 1), ("m", 0)])
    assert router.notes.holds == [("m", "expired")]
    await router.fleet.close()


async def test_where_nothing_is_bridged_nothing_waits() -> None:
    router = Router(hold=HoldOptions(enabled="never"), from_zero=("m",), no_replica_wait_s=0.0)
    with pytest.raises(NoReplica, match="is ready"):
        await router.dispatcher.run(make_request(), RecordingSink())
    assert router.notes.holds == []


async def test_a_replica_lost_before_its_first_byte_sends_its_requests_back_into_the_hold() -> None:
    async with holding() as router:
        tasks = await router.held("r1", "r2")
        engine = await router.replica("a", answers=False)
        await eventually(lambda: len(engine.calls) == 2)
        await router.fleet.replicas["a"].close()
        await eventually(lambda: router.waiting() == 2)
        again = await router.replica("b")
        await all_of(tasks)
        assert names(again) == ["r1", "r2"]
        assert router.notes.retries == ["replica_lost"] * 2


async def test_who_only_finds_the_replica_that_failed_it_is_told_of_that_failure() -> None:
    async with holding() as router:
        (task,) = await router.held("r1")
        engine = await router.replica("a", answers=False)
        engine.respond = lambda call, out: out.fail(ReplicaLost("a blip"))
        with pytest.raises(ReplicaLost, match="a blip"):
            await asyncio.wait_for(task, DEADLINE_S)
        assert router.waiting() == 0


async def test_a_large_prompt_is_read_once_and_only_when_there_is_a_replica_and_nobody_overtakes_it() -> None:
    async with holding() as router:
        large = msgspec.structs.replace(make_request("large"), body=b'{"model":"m"}' + b" " * LARGE_BODY_BYTES)
        task = router.ask(large)
        await eventually(lambda: router.waiting() == 1)
        (small,) = await router.held("small")
        assert router.notes.hashes == 0
        engine = await router.replica("a")
        await all_of([task, small])
        assert names(engine) == ["large", "small"]
        assert router.notes.hashes == 2


async def test_a_replica_that_goes_while_a_prompt_is_read_leaves_the_request_its_turn() -> None:
    async with holding() as router:
        reading, hashed = asyncio.Event(), router.prefixes.chain_in_slices

        def slowly(request: Request) -> Generator[None, None, Chain | None]:
            reading.set()
            while router.fleet.ready():
                yield
            return (yield from hashed(request))

        router.prefixes.chain_in_slices = slowly  # type: ignore[method-assign]
        large = msgspec.structs.replace(make_request("large"), body=b'{"model":"m"}' + b" " * LARGE_BODY_BYTES)
        task = router.ask(large)
        await eventually(lambda: router.waiting() == 1)
        (small,) = await router.held("small")
        await router.replica("a")
        await asyncio.wait_for(reading.wait(), DEADLINE_S)
        await router.fleet.replicas["a"].close()
        await eventually(lambda: router.hold.queues["m"].called == 0)
        assert router.waiting() == 2
        engine = await router.replica("b")
        await all_of([task, small])
        assert names(engine) == ["large", "small"]


async def test_closing_ends_all_that_waits_with_a_retryable_error() -> None:
    async with holding() as router:
        tasks = await router.held("r1", "r2")
        await router.hold.close()
        for task in tasks:
            with pytest.raises(ShuttingDown):
                await task
        with pytest.raises(ShuttingDown):
            await router.ask(make_request())
        assert router.waker.told == [("m", 2), ("m", 0)]


async def test_a_defect_of_the_waker_costs_no_request(caplog: pytest.LogCaptureFixture) -> None:
    async with holding() as router:

        def broken(model: str, held: int) -> None:
            raise RuntimeError("a defect")

        router.waker.wanted = broken  # type: ignore[method-assign]
        tasks = await router.held("r1")
        await router.replica("a")
        await all_of(tasks)
    assert any("looked after" in record.message for record in caplog.records)


async def test_the_log_tells_when_a_model_begins_to_hold_and_when_nobody_waits_any_more(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO, "router.hold"):
        async with holding() as router:
            tasks = await router.held("r1", "r2", "r3")
            await router.replica("a")
            await all_of(tasks)
    begin, end = [record.getMessage() for record in caplog.records if record.name == "router.hold"]
    assert begin == "model m: no replica is ready; requests for it are held"
    assert end.startswith("model m: nobody is held any more, after 3 requests and ")


async def test_sinks_that_want_it_are_told_at_intervals_that_they_wait() -> None:
    class Patient(RecordingSink):
        told = 0

        def waiting(self, request: Request) -> None:
            self.told += 1
            if self.told == 2:
                raise KvlaneError("a defect that must not end the others")

    async with holding(comment_interval_s=0.02) as router:
        sinks = [Patient(), Patient()]
        tasks = [router.ask(make_request(f"r{i}"), sink) for i, sink in enumerate(sinks)]
        await eventually(lambda: router.waiting() == 2)
        tasks += await router.held("deaf")
        await eventually(lambda: min(sink.told for sink in sinks) >= 4)
        engine = await router.replica("a")
        await all_of(tasks)
        assert names(engine) == ["r0", "r1", "deaf"]
        assert [sink.payloads for sink in sinks] == [[b"hello"], [b"hello"]]


@pytest.mark.parametrize("served", [True, False])
async def test_held_requests_leave_nothing_to_the_garbage_collector(served: bool) -> None:
    async with holding(timeout_s=60.0) as router:
        sink = RecordingSink()
        left = weakref.ref(sink)
        gc.disable()
        try:
            task = asyncio.create_task(router.dispatcher.run(make_request(), sink))
            await eventually(lambda: router.waiting() == 1)
            if served:
                await router.replica("a")
            else:
                router.let_time_pass(60.0)
            await asyncio.wait([task], timeout=DEADLINE_S)
            assert (task.exception() is None) is served
            del sink, task
            await asyncio.sleep(0)
            assert left() is None
        finally:
            gc.enable()


@pytest.mark.parametrize("seed", range(4))
async def test_whatever_comes_and_goes_each_request_ends_once_and_nothing_is_left(seed: int) -> None:
    rng = random.Random(seed)
    async with holding() as router:
        up: list[str] = []

        def finish() -> None:
            for name in up:
                for out in router.fleet.engines[name].outs:
                    if rng.random() < 0.5:
                        out.data(b"hello", 1)
                        out.end()

        for step in range(120):
            kind = rng.choice("aaaacuudf")
            if kind == "a":
                for _ in range(rng.randrange(1, 6)):
                    router.ask(make_request(f"r{len(router.tasks)}"))
            elif kind == "c" and router.tasks:
                rng.choice(router.tasks).cancel()
            elif kind == "u" and len(up) < 2:
                await router.replica(f"e{step}", answers=False)
                up.append(f"e{step}")
                await router.fleet.until(lambda: router.fleet.ready() == len(up))
            elif kind == "d" and up:
                await router.fleet.replicas[up.pop(rng.randrange(len(up)))].close()
            elif kind == "f":
                finish()
            for _ in range(rng.randrange(4)):
                await asyncio.sleep(0)
        await router.replica("last")
        for name in up:
            router.fleet.engines[name].respond = answer
        async with asyncio.timeout(DEADLINE_S):
            while not all(task.done() for task in router.tasks):
                finish()
                await asyncio.sleep(0.001)
        lost = [e for task in router.tasks if not task.cancelled() and (e := task.exception()) is not None]
        assert {type(error) for error in lost} <= {ReplicaLost, ReplicaDraining}  # Of three tries each.
        assert len(router.notes.outcomes) + sum(task.cancelled() for task in router.tasks) >= len(router.tasks)
        assert (router.hold.queues, router.hold._holding.bytes, router.admission.in_flight) == ({}, 0, 0)
        await eventually(lambda: router.leases() == 0)


async def test_readiness_counts_a_model_that_may_be_held_once_membership_has_told_what_there_is() -> None:
    router = Holding()
    assert not router.fleet.router.readiness().ready
    router.fleet.list({})
    ready = router.fleet.router.readiness()
    assert (ready.ready, ready.models, ready.held) == (True, {"m": 0}, {"m": "scaled to zero, requests are held"})
    assert [(one.card.name, one.ready_replicas, one.announced) for one in router.fleet.router.models()] == [
        ("m", 0, False)
    ]
    await router.replica("a")
    await router.fleet.until(lambda: router.fleet.ready() == 1)
    assert router.fleet.router.readiness().held is msgspec.UNSET
    await router.close()


async def test_it_is_not_ready_before_each_replica_that_is_there_was_tried() -> None:
    router = Holding()
    await router.replica("a")
    assert not router.fleet.router.readiness().ready
    await router.fleet.until(lambda: router.fleet.router.readiness().ready)
    assert router.fleet.ready() == 1
    await router.close()


async def test_it_is_not_ready_while_all_replicas_that_are_there_turn_it_away() -> None:
    router = Holding()
    await router.fleet.add("a", secret=b"not its secret")
    record = router.fleet.records["a"]
    await eventually(lambda: router.fleet.router.troubles.counts["secret"] >= 2)
    assert not router.fleet.router.readiness().ready
    router.fleet.list({"a": msgspec.structs.replace(record, secret=SECRET)})
    await router.fleet.until(lambda: router.fleet.router.readiness().ready)
    assert router.fleet.ready() == 1
    await router.close()


async def test_it_is_ready_once_the_replica_that_turned_it_away_is_listed_no_more() -> None:
    router = Holding()
    await router.fleet.add("a", secret=b"not its secret")
    await eventually(lambda: router.fleet.router.troubles.counts["secret"] >= 1)
    router.fleet.list({})
    assert router.fleet.router.readiness().held == {"m": HELD}
    await router.close()


async def test_a_replica_that_is_listed_and_gone_does_not_keep_it_unready() -> None:
    router = Holding()
    await router.replica("a")
    await router.fleet.replicas["a"].close()
    await router.fleet.until(lambda: router.fleet.router.readiness().ready)
    assert router.fleet.router.troubles.counts["unreachable"] >= 1
    await router.close()


class Nowhere:
    """Makes the lane before it connects, as uvloop does, and then reaches nobody."""

    def __init__(self, *, hangs: bool) -> None:
        self._hangs = hangs

    async def connect(self, record: ReplicaRecord, protocol: Callable[[], asyncio.Protocol]) -> asyncio.BaseTransport:
        protocol()
        if self._hangs:
            await asyncio.sleep(DEADLINE_S)
        raise ConnectionRefusedError(errno.ECONNREFUSED, "refused")


@pytest.mark.parametrize("hangs", [False, True])
async def test_a_replica_that_cannot_be_reached_does_not_keep_it_unready(*, hangs: bool) -> None:
    options = LaneOptions(connect_timeout_s=0.05, reconnect_min_s=0.01, reconnect_max_s=0.05)
    replicas = Replicas("test", Nowhere(hangs=hangs), options, held=("m",))
    replicas.listed({"a": ReplicaRecord("a", "127.0.0.1", 1, SECRET)})
    await eventually(lambda: replicas.readiness().ready)
    assert replicas.readiness().lanes == {"a": "timed out" if hangs else "Connection refused"}
    await replicas.close()
