"""A replica's sleep over real lanes: when it falls asleep, what wakes it, and what becomes of the streams that wait."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from engine.replica import Replica
from router.errors import ConfigError, KvlaneError, ReplicaFailed, ReplicaLost
from router.lane.client import Lane
from router.lane.frames import End
from router.membership.base import ReplicaRecord
from router.types import Load
from tests.fakes import DEADLINE_S, SECRET, Fleet, RecordingSink, ScriptedEngine, eventually, make_request

SOON_S = 0.01


class SleepyScripted(ScriptedEngine):
    """Sleeps and wakes when the test lets it."""

    def __init__(self) -> None:
        super().__init__()
        self.nights: list[int] = []
        """The levels it was told to sleep at."""
        self.wakes = 0
        self.may_sleep = asyncio.Event()
        self.may_sleep.set()
        self.may_wake = asyncio.Event()
        self.failure: Exception | None = None
        """What sleeping or waking raises."""
        self.asleep = False

    def submit(self, call: Any, out: Any) -> Any:
        assert not self.asleep, "a stream for a sleeping engine"
        return super().submit(call, out)

    async def sleep(self, level: int) -> None:
        self.asleep = True
        self.nights.append(level)
        await self.may_sleep.wait()
        if self.failure is not None:
            raise self.failure

    async def wake(self) -> None:
        self.wakes += 1
        await self.may_wake.wait()
        if self.failure is not None:
            raise self.failure
        self.asleep = False


class Bed(Fleet):
    """One replica that sleeps when idle, and the router's lane to it."""

    replica: Replica

    def __init__(self) -> None:
        super().__init__()
        self.engine = self.engines["a"] = SleepyScripted()

    async def start(self, after_s: float = SOON_S, level: int = 1) -> None:
        self.replica = self.replicas["a"] = Replica("a", self.engine, SECRET)
        self.replica.sleep_when_idle(after_s, level)
        await self.replica.start()
        port = await self.replica.listen("127.0.0.1")
        self.list({"a": ReplicaRecord("a", "127.0.0.1", port, SECRET)})
        await self.until(lambda: self.ready() == 1)

    @property
    def lane(self) -> Lane:
        return self.router.lanes()[0]

    def load(self) -> Load:
        """As the router knows it."""
        return self.lane.account.load

    async def asleep(self) -> None:
        """Waits until the engine sleeps and the router knows it."""
        await eventually(lambda: bool(self.engine.nights) and self.load().asleep)

    def ask(self, name: str = "r1") -> tuple["asyncio.Task[End]", RecordingSink]:
        sink = RecordingSink()

        async def run() -> End:
            with self.router.lease("a") as lane:
                return await lane.run(make_request(name), sink)

        return asyncio.create_task(run()), sink


@pytest.fixture
async def bed() -> AsyncIterator[Bed]:
    bed = Bed()
    yield bed
    await bed.close()


async def ended(task: "asyncio.Task[End]") -> End:
    return await asyncio.wait_for(task, DEADLINE_S)


async def test_an_idle_replica_sleeps_and_says_so_at_once(bed: Bed) -> None:
    bed.engine.may_sleep.clear()
    await bed.start(level=2)
    await bed.asleep()  # While it is still falling asleep.
    assert bed.engine.nights == [2]
    assert bed.router.asleep() == {"m": 1}
    assert bed.router.readiness().ready


async def test_streams_for_a_sleeping_replica_wake_it_once_and_go_on_in_order(bed: Bed) -> None:
    await bed.start()
    await bed.asleep()
    asked = [bed.ask(f"r{i}")[0] for i in range(5)]
    await eventually(lambda: bed.load().waiting == 5)  # No engine step tells of them.
    assert bed.load().asleep
    assert bed.lane.account.unacked == 0
    assert not bed.engine.calls
    bed.engine.may_wake.set()
    await eventually(lambda: len(bed.engine.calls) == 5 and not bed.load().asleep)
    assert bed.engine.wakes == 1
    assert [call.request_id for call in bed.engine.calls] == [f"r{i}" for i in range(5)]
    for out in bed.engine.outs:
        out.end("stop")
    assert [await ended(task) for task in asked] == [End("stop")] * 5
    await eventually(lambda: len(bed.engine.nights) == 2)


async def test_a_stream_that_comes_while_it_falls_asleep_waits_for_both(bed: Bed) -> None:
    bed.engine.may_sleep.clear()
    bed.engine.may_wake.set()
    await bed.start()
    await bed.asleep()
    task, _ = bed.ask()
    await eventually(lambda: bed.replica.active == 1)
    assert not bed.engine.wakes
    bed.engine.may_sleep.set()
    await eventually(lambda: bool(bed.engine.outs))
    bed.engine.outs[0].end()
    await ended(task)


async def test_no_stream_in_flight_is_disturbed(bed: Bed) -> None:
    await bed.start()
    await bed.asleep()
    bed.engine.may_wake.set()
    task, _ = bed.ask()
    await eventually(lambda: bool(bed.engine.outs))
    sleeper = bed.replica.sleeper
    assert sleeper is not None
    await eventually(lambda: sleeper._timer is None)  # It has looked, and let the engine be.
    assert len(bed.engine.nights) == 1
    bed.engine.outs[0].end()
    await ended(task)
    await eventually(lambda: len(bed.engine.nights) == 2)


async def test_a_waiting_stream_that_is_aborted_never_reaches_the_engine(bed: Bed) -> None:
    await bed.start()
    await bed.asleep()
    asked = [bed.ask(f"r{i}")[0] for i in range(3)]
    await eventually(lambda: bed.load().waiting == 3)
    asked[1].cancel()
    await eventually(lambda: bed.load().waiting == 2)
    with pytest.raises(asyncio.CancelledError):
        await asked[1]
    bed.engine.may_wake.set()
    await eventually(lambda: len(bed.engine.calls) == 2)
    assert [call.request_id for call in bed.engine.calls] == ["r0", "r2"]
    asked[2].cancel()  # One that waited is aborted in the engine once it is there.
    await eventually(lambda: bed.engine.aborted == ["r2"])
    bed.engine.outs[0].end()
    await ended(asked[0])
    assert bed.replica.active == 0


async def test_where_all_that_waited_have_left_it_goes_back_to_sleep(bed: Bed) -> None:
    await bed.start()
    await bed.asleep()
    task, _ = bed.ask()
    await eventually(lambda: bed.engine.wakes == 1)
    task.cancel()
    await eventually(lambda: bed.replica.active == 0)
    bed.engine.may_wake.set()
    await eventually(lambda: len(bed.engine.nights) == 2)
    assert not bed.engine.calls


async def test_a_deadline_passes_while_the_replica_wakes(bed: Bed) -> None:
    await bed.start()
    await bed.asleep()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await bed.ask()[0]
    await eventually(lambda: bed.replica.active == 0 and bed.load().waiting == 0)


@pytest.mark.parametrize("at", ["sleep", "wake"])
async def test_an_engine_that_does_not_wake_fails_its_streams_and_its_health(bed: Bed, at: str) -> None:
    if at == "sleep":
        bed.engine.may_sleep.clear()
    await bed.start()
    await bed.asleep()
    task, _ = bed.ask()
    await eventually(lambda: bed.load().waiting == 1)
    await bed.replica.check_health()
    bed.engine.failure = RuntimeError("out of memory")
    bed.engine.may_sleep.set()
    bed.engine.may_wake.set()
    with pytest.raises(ReplicaLost, match="out of memory") as caught:
        await ended(task)
    assert caught.value.retryable
    with pytest.raises(ReplicaFailed, match="out of memory"):
        await bed.replica.check_health()
    await bed.until(lambda: bed.ready() == 0)  # It draws no more requests until it is replaced.


async def test_an_engine_that_dies_while_it_wakes_keeps_nobody_waiting(bed: Bed) -> None:
    await bed.start()
    await bed.asleep()
    task, _ = bed.ask()
    await eventually(lambda: bed.engine.wakes == 1)
    bed.engine.is_dead = True
    bed.engine.step()
    with pytest.raises(ReplicaLost, match="died"):
        await ended(task)
    await bed.until(lambda: bed.ready() == 0)


async def test_an_engine_that_dies_under_very_many_waiting_streams_ends_each_of_them(bed: Bed) -> None:
    await bed.start()
    await bed.asleep()
    asked = [bed.ask(f"r{i}")[0] for i in range(400)]
    await eventually(lambda: bed.load().waiting == 400)
    bed.engine.is_dead = True
    bed.engine.step()
    ends = await asyncio.wait_for(asyncio.gather(*asked, return_exceptions=True), DEADLINE_S)
    assert {type(end) for end in ends} == {ReplicaLost}
    assert bed.replica.active == 0


async def test_an_engine_that_dies_while_it_wakes_for_its_last_streams_does_not_hold_up_the_drain(bed: Bed) -> None:
    await bed.start()
    await bed.asleep()
    task, _ = bed.ask()
    await eventually(lambda: bed.engine.wakes == 1)
    draining = asyncio.create_task(bed.replica.drain(3600.0))
    await bed.until(lambda: bed.ready() == 0)
    bed.engine.is_dead = True
    bed.engine.step()
    with pytest.raises(ReplicaLost, match="died"):
        await ended(task)
    assert await asyncio.wait_for(draining, DEADLINE_S) == 0


async def test_a_failure_to_take_one_stream_keeps_it_from_none_of_the_others(bed: Bed) -> None:
    await bed.start()
    await bed.asleep()
    asked = [bed.ask(f"r{i}")[0] for i in range(3)]
    await eventually(lambda: bed.load().waiting == 3)

    def respond(call: Any, out: Any) -> None:
        if call.request_id == "r1":
            raise RuntimeError("no")
        out.end("stop")

    bed.engine.respond = respond
    bed.engine.may_wake.set()
    assert await ended(asked[0]) == await ended(asked[2]) == End("stop")
    with pytest.raises(ReplicaFailed):
        await ended(asked[1])


async def test_a_sleeping_replica_drains_at_once_and_in_its_sleep(bed: Bed) -> None:
    await bed.start()
    await bed.asleep()
    assert await asyncio.wait_for(bed.replica.drain(3600.0), DEADLINE_S) == 0
    await bed.replica.check_health()
    await bed.replica.close()
    assert (bed.engine.wakes, bed.engine.closed) == (0, True)


async def test_a_replica_that_drains_does_not_fall_asleep_over_it(bed: Bed) -> None:
    await bed.start(after_s=0.2)
    await bed.replica.drain(0.0)
    sleeper = bed.replica.sleeper
    assert sleeper is not None
    await eventually(lambda: sleeper._timer is None)
    assert not bed.engine.nights


async def test_to_close_while_it_wakes_fails_what_waits(bed: Bed) -> None:
    await bed.start()
    await bed.asleep()
    task, _ = bed.ask()
    await eventually(lambda: bed.engine.wakes == 1)
    await asyncio.wait_for(bed.replica.close(), DEADLINE_S)
    with pytest.raises(KvlaneError):
        await ended(task)
    assert bed.engine.closed
    assert not [task for task in asyncio.all_tasks() if task.get_name() == "sleep"]


async def test_a_replica_that_was_closed_with_a_stream_in_flight_does_not_sleep_any_more(bed: Bed) -> None:
    await bed.start()
    await bed.asleep()
    bed.engine.may_wake.set()
    task, _ = bed.ask()
    await eventually(lambda: bool(bed.engine.outs))
    await bed.replica.close()
    with pytest.raises(KvlaneError):
        await ended(task)
    sleeper = bed.replica.sleeper
    assert sleeper is not None
    await eventually(lambda: bed.replica.active == 0)
    assert sleeper._timer is None


async def test_a_router_wakes_it_ahead_of_any_stream(bed: Bed) -> None:
    woke: list[tuple[float | None, bool]] = []
    bed.router.woke = lambda waited_s, told: woke.append((waited_s, told))
    await bed.start(after_s=0.2)
    await bed.asleep()
    bed.engine.may_wake.set()
    for _ in range(3):
        bed.lane.wake()  # Harmless when repeated.
    await eventually(lambda: bool(woke))
    assert woke == [(None, True)]
    await eventually(lambda: len(bed.engine.nights) == 2)
    assert bed.engine.wakes == 1


async def test_the_router_is_told_how_long_its_oldest_stream_waited(bed: Bed) -> None:
    woke: list[tuple[float | None, bool]] = []
    bed.router.woke = lambda waited_s, told: woke.append((waited_s, told))
    await bed.start()
    await bed.asleep()
    tasks = [bed.ask(f"r{i}")[0] for i in range(2)]
    await eventually(lambda: bed.load().waiting == 2)
    bed.engine.may_wake.set()
    await eventually(lambda: bool(woke))
    ((waited_s, told),) = woke
    assert waited_s is not None
    assert waited_s > 0
    assert not told
    for out in bed.engine.outs:
        out.end()
    await asyncio.gather(*tasks)


async def test_a_new_lane_is_welcomed_with_the_word_that_the_replica_sleeps(bed: Bed) -> None:
    await bed.start()
    await bed.asleep()
    records = bed.records
    bed.list({})
    bed.list(records)
    other = Fleet()
    other.list(records)
    await other.until(lambda: other.ready() == 1)
    assert other.router.asleep() == {"m": 1}
    assert bed.engine.wakes == 0
    await other.close()


def test_an_engine_that_cannot_sleep_is_refused() -> None:
    with pytest.raises(ConfigError, match="cannot sleep"):
        Replica("a", ScriptedEngine(), SECRET).sleep_when_idle(1.0, 1)
