"""How lanes and their streams end: drained, lost, silent, closed, dead, or too slow for what is sent."""

import asyncio
from collections.abc import AsyncIterator

import msgspec
import pytest

from engine.replica import Replica
from router import compiled
from router.errors import ClientTooSlow, ReplicaDraining, ReplicaLost
from router.lane import frames
from router.lane.frames import End
from router.types import Load
from tests.fakes import DEADLINE_S, Fleet, RecordingSink, eventually, make_request
from tests.twins import built
from tests.unit.lanes import lane_of, submitted


@pytest.fixture
async def fleet() -> AsyncIterator[Fleet]:
    fleet = Fleet()
    yield fleet
    await fleet.close()


async def test_a_draining_replica_refuses_new_streams_retryably_and_finishes_the_old(fleet: Fleet) -> None:
    engine = await fleet.add("a")
    await fleet.until(lambda: fleet.ready() == 1)
    lane = lane_of(fleet)
    sink = RecordingSink()
    task = await submitted(fleet, sink)
    drain = asyncio.create_task(fleet.replicas["a"].drain(DEADLINE_S))
    await fleet.until(lambda: fleet.ready() == 0)
    with pytest.raises(ReplicaDraining) as caught:
        await lane.run(make_request("late"), RecordingSink())
    assert caught.value.retryable
    assert not drain.done()
    engine.outs[0].data(b"whole", 1)
    engine.outs[0].end("stop")
    assert await task == End("stop")
    assert await asyncio.wait_for(drain, DEADLINE_S) == 0


async def test_a_drain_that_runs_out_of_time_tells_how_many_streams_it_cut(fleet: Fleet) -> None:
    await fleet.add("a")
    await fleet.until(lambda: fleet.ready() == 1)
    task = await submitted(fleet, RecordingSink())
    assert await fleet.replicas["a"].drain(0.01) == 1
    await fleet.replicas["a"].close()
    with pytest.raises(ReplicaLost):
        await task


@pytest.mark.parametrize("kind", ["python", "compiled"])
async def test_output_that_cannot_be_encoded_ends_the_lane_and_the_next_one_works(
    fleet: Fleet, kind: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if kind == "python":
        monkeypatch.setenv(compiled.VARIABLE, "0")
    else:
        built("engine._lane_stream")
    engine = await fleet.add("a")
    await fleet.until(lambda: fleet.ready() == 1)
    first = lane_of(fleet)
    tasks = [await submitted(fleet, RecordingSink(), f"r{i}") for i in range(2)]
    engine.outs[0].head(200, [("half", "\ud800")])
    engine.outs[0].data(b"x", 1)
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(result) for result in results] == [ReplicaLost] * 2
    assert "no frame can be made" in caplog.text
    await eventually(lambda: sorted(engine.aborted) == ["r0", "r1"])
    await fleet.until(lambda: fleet.ready() == 1 and lane_of(fleet) is not first)
    task = await submitted(fleet, RecordingSink(), "r2")
    engine.outs[-1].end("stop")
    assert await task == End("stop")
    assert fleet.replicas["a"].active == 0


async def test_losing_the_lane_fails_all_its_streams_and_aborts_them_in_the_engine(fleet: Fleet) -> None:
    engine = await fleet.add("a")
    await fleet.until(lambda: fleet.ready() == 1)
    tasks = [await submitted(fleet, RecordingSink(), f"r{i}") for i in range(3)]
    lane = lane_of(fleet)
    lane.close()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(result) for result in results] == [ReplicaLost] * 3
    assert lane.account.view().leases == 0
    await eventually(lambda: sorted(engine.aborted) == ["r0", "r1", "r2"])
    await fleet.until(lambda: fleet.ready() == 1)
    assert lane_of(fleet) is not lane


async def test_a_silent_replica_is_pinged_and_then_given_up() -> None:
    fleet = Fleet(ping_interval_s=1000.0)

    async def mute(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(frames.encode(frames.Challenge(frames.VERSION, b"n")))
        await reader.readexactly(4)
        engine = fleet.engines["a"]
        writer.write(frames.encode(frames.Welcome(frames.VERSION, "mute", engine.info(), Load())))
        await reader.read()
        writer.close()

    await fleet.add("a")
    server = await asyncio.start_server(mute, "127.0.0.1", 0)
    async with server:
        record = msgspec.structs.replace(fleet.records["a"], replica="mute", port=server.sockets[0].getsockname()[1])
        fleet.list({"a": fleet.records["a"], "mute": record})
        await fleet.until(lambda: fleet.ready() == 2)
        lane = lane_of(fleet, "mute")
        task = asyncio.create_task(lane.run(make_request(), RecordingSink()))
        await asyncio.sleep(0)
        for _ in range(4):
            lane.tick(2.0, 5.0)
        with pytest.raises(ReplicaLost, match="silent"):
            await task
        await fleet.close()


async def test_closing_a_replica_sends_what_it_still_holds(fleet: Fleet) -> None:
    engine = await fleet.add("a")
    await fleet.until(lambda: fleet.ready() == 1)
    sink = RecordingSink()
    task = await submitted(fleet, sink)
    engine.outs[0].data(b"last", 1)
    engine.outs[0].end("stop")
    await fleet.replicas["a"].close()
    assert await task == End("stop")
    assert sink.payloads == [b"last"]
    assert engine.closed


def test_a_replica_says_whether_its_engine_is_healthy() -> None:
    async def check() -> None:
        fleet = Fleet()
        engine = await fleet.add("a")
        replica: Replica = fleet.replicas["a"]
        await replica.check_health()
        engine.is_dead = True
        with pytest.raises(Exception, match="dead"):
            await replica.check_health()
        await fleet.close()

    asyncio.run(check())


async def test_a_dead_engine_takes_its_replica_out_of_the_pool(fleet: Fleet) -> None:
    engine = await fleet.add("a")
    await fleet.until(lambda: fleet.ready() == 1)
    engine.is_dead = True
    engine.step()
    await fleet.until(lambda: fleet.ready() == 0)


async def test_a_backlog_stays_bounded_over_many_pauses(fleet: Fleet) -> None:
    engine = await fleet.add("a")
    await fleet.until(lambda: fleet.ready() == 1)
    task = await submitted(fleet, RecordingSink())
    (session,) = fleet.replicas["a"]._sessions
    for _ in range(40):
        session.pause_writing()
        for _ in range(6):
            engine.outs[0].data(bytes(1 << 20), 1)
        session.resume_writing()
        session.pause_writing()
        if engine.aborted:
            break
    assert engine.aborted == ["r1"]
    session.resume_writing()
    with pytest.raises(ClientTooSlow):
        await task


async def test_closing_sends_what_a_slow_router_has_not_read_yet(fleet: Fleet) -> None:
    engine = await fleet.add("a")
    await fleet.until(lambda: fleet.ready() == 1)
    sink = RecordingSink()
    task = await submitted(fleet, sink)
    (session,) = fleet.replicas["a"]._sessions
    session.pause_writing()
    for _ in range(5):
        engine.outs[0].data(bytes(2 << 20), 1)
    engine.outs[0].end("stop")
    assert await fleet.replicas["a"].drain(DEADLINE_S) == 0
    await fleet.replicas["a"].close()
    assert await task == End("stop")
    assert len(b"".join(sink.payloads)) == 10 << 20
