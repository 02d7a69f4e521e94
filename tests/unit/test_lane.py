"""Streams on lanes between a replica and a router, over real sockets, with an engine under the test's control."""

import asyncio
from collections.abc import AsyncIterator

import msgspec
import pytest

from router.errors import ClientTooSlow, InvalidRequest
from router.lane import frames
from router.lane.client import PACED_BYTES
from router.lane.frames import End
from router.types import Chain, Charge, Load
from tests.fakes import DEADLINE_S, Fleet, RecordingSink, eventually, make_request
from tests.unit.lanes import greet, lane_of, run, submitted


@pytest.fixture
async def fleet() -> AsyncIterator[Fleet]:
    fleet = Fleet()
    yield fleet
    await fleet.close()


async def test_output_reaches_the_sink_in_order_with_head_and_end(fleet: Fleet) -> None:
    engine = await fleet.add("a")
    await fleet.until(lambda: fleet.ready() == 1)
    sink = RecordingSink()
    task = await submitted(fleet, sink)
    out = engine.outs[0]
    out.head(200, [("content-type", "text/event-stream")])
    for i in range(5):
        out.data(b"data: %d\n\n" % i, 1)
    out.end("stop")
    assert await asyncio.wait_for(task, DEADLINE_S) == End("stop")
    assert sink.heads == [(200, (("content-type", "text/event-stream"),))]
    assert b"".join(sink.payloads) == b"".join(b"data: %d\n\n" % i for i in range(5))
    assert sink.tokens == 5
    assert (fleet.replicas["a"].active, lane_of(fleet).streams) == (0, 0)


async def test_all_streams_output_of_one_engine_step_travels_in_one_frame(fleet: Fleet) -> None:
    engine = await fleet.add("a")
    await fleet.until(lambda: fleet.ready() == 1)
    sinks = [RecordingSink() for _ in range(20)]
    tasks = [await submitted(fleet, sink, f"r{i}") for i, sink in enumerate(sinks)]
    lane = lane_of(fleet)
    await eventually(lambda: lane.account.view().unacked == 0 or lane.steps >= 0)
    before = lane.steps
    for _ in range(3):
        for out in engine.outs:
            out.data(b"x", 1)
        await asyncio.gather(*(sink.got_data.wait() for sink in sinks))
        for sink in sinks:
            sink.got_data.clear()
    assert lane.steps - before <= 4
    for out in engine.outs:
        out.end()
    await asyncio.gather(*tasks)
    assert all(sink.payloads == [b"x"] * 3 for sink in sinks)


async def test_urgent_output_is_on_the_wire_before_the_loop_turns(fleet: Fleet) -> None:
    engine = await fleet.add("a")
    await fleet.until(lambda: fleet.ready() == 1)
    sink = RecordingSink()
    task = await submitted(fleet, sink)
    lane = lane_of(fleet)
    before = lane.steps
    engine.outs[0].data(b"first", 1, urgent=True)
    engine.outs[0].data(b"second", 1)
    engine.outs[0].end()
    await task
    assert b"".join(sink.payloads) == b"firstsecond"
    assert lane.steps - before == 2


async def test_the_load_is_that_of_the_last_step_and_unacked_submits_count(fleet: Fleet) -> None:
    engine = await fleet.add("a")
    await fleet.until(lambda: fleet.ready() == 1)
    lane = lane_of(fleet)
    tasks = [asyncio.create_task(run(fleet, RecordingSink(), f"r{i}")) for i in range(3)]
    await asyncio.sleep(0)
    assert (lane.account.view().unacked, lane.account.view().leases, lane.account.view().queue_depth) == (3, 3, 3)
    await eventually(lambda: len(engine.calls) == 3)
    engine.current_load = Load(running=2, waiting=1)
    engine.step()
    await eventually(lambda: lane.account.view().unacked == 0)
    assert lane.account.view().queue_depth == 3
    engine.current_load = Load()
    for out in engine.outs:
        out.end()
    await asyncio.gather(*tasks)
    assert (lane.account.view().queue_depth, lane.account.view().leases) == (0, 0)


async def test_cancelling_the_request_aborts_it_in_the_engine_and_leaves_nothing(fleet: Fleet) -> None:
    engine = await fleet.add("a")
    await fleet.until(lambda: fleet.ready() == 1)
    sink = RecordingSink()
    task = await submitted(fleet, sink)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await eventually(lambda: engine.aborted == ["r1"])
    engine.outs[0].data(b"late", 1)
    engine.outs[0].end()
    lane = lane_of(fleet)
    assert (fleet.replicas["a"].active, lane.streams, lane.account.view().leases) == (0, 0, 0)
    assert sink.payloads == []


async def test_an_error_of_the_replica_keeps_its_class_message_and_param(fleet: Fleet) -> None:
    engine = await fleet.add("a")
    await fleet.until(lambda: fleet.ready() == 1)
    task = await submitted(fleet, RecordingSink())
    engine.outs[0].fail(InvalidRequest("too hot", param="temperature"))
    with pytest.raises(InvalidRequest, match="too hot") as caught:
        await task
    assert caught.value.param == "temperature"


async def test_a_failing_sink_aborts_its_own_stream_only(fleet: Fleet) -> None:
    engine = await fleet.add("a")
    await fleet.until(lambda: fleet.ready() == 1)
    slow, fine = RecordingSink(), RecordingSink()
    slow.error = ClientTooSlow("the client does not read")
    slow_task = await submitted(fleet, slow, "slow")
    fine_task = await submitted(fleet, fine, "fine")
    for out in engine.outs:
        out.data(b"1", 1)
    with pytest.raises(ClientTooSlow):
        await slow_task
    await eventually(lambda: engine.aborted == ["slow"])
    engine.outs[1].data(b"2", 1)
    engine.outs[1].end()
    await fine_task
    assert fine.payloads == [b"1", b"2"]


async def test_an_engine_that_raises_at_submit_fails_that_stream(
    fleet: Fleet, caplog: pytest.LogCaptureFixture
) -> None:
    engine = await fleet.add("a")
    await fleet.until(lambda: fleet.ready() == 1)

    def broken(call: frames.Submit, out: object) -> None:
        raise RuntimeError("a defect")

    engine.respond = broken
    with pytest.raises(Exception, match="did not take") as caught:
        await run(fleet, RecordingSink())
    assert caught.value.name == "replica_failed"  # type: ignore[attr-defined]
    assert fleet.replicas["a"].active == 0


@pytest.mark.slow
async def test_a_body_of_many_megabytes_arrives_whole(fleet: Fleet) -> None:
    engine = await fleet.add("a")
    await fleet.until(lambda: fleet.ready() == 1)
    body = bytes(range(256)) * (80 << 12)
    sink = RecordingSink()
    request = msgspec.structs.replace(make_request(), body=body)
    with fleet.router.lease("a") as lane:
        task = asyncio.create_task(lane.run(request, sink))
        await eventually(lambda: bool(engine.calls))
        assert engine.calls[0].body == body
        engine.outs[0].data(body, 0)
        engine.outs[0].end()
        await asyncio.wait_for(task, DEADLINE_S)
    assert b"".join(sink.payloads) == body


async def test_the_end_of_one_routers_stream_lowers_the_load_that_another_sees(fleet: Fleet) -> None:
    engine = await fleet.add("a")
    await fleet.until(lambda: fleet.ready() == 1)
    _reader, writer = await greet(fleet)
    lane = lane_of(fleet)
    writer.write(frames.encode(frames.Submit(1, "r", 0, "POST", "/", (), b"")))
    await eventually(lambda: bool(engine.calls))
    engine.current_load = Load(running=1)
    engine.step()
    await eventually(lambda: lane.account.load.running == 1)
    engine.current_load = Load()  # after the last step, as with an engine that renders later
    engine.outs[0].end()
    await eventually(lambda: lane.account.load.running == 0)
    writer.close()


async def test_a_submit_carries_its_chain_and_is_charged_until_a_step_counts_it(fleet: Fleet) -> None:
    engine = await fleet.add("a")
    await fleet.until(lambda: fleet.ready() == 1)
    lane = lane_of(fleet)
    charge = Charge(tokens=90, pairs=4050.0, chain=Chain(16, 7, (1, 2, 3), 50), matched=2)
    task = asyncio.create_task(lane.run(make_request(), RecordingSink(), charge))
    await asyncio.sleep(0)
    view = lane.account.view()
    assert (view.unacked, view.unacked_tokens, view.unacked_pairs) == (1, 90, 4050.0)
    await eventually(lambda: bool(engine.calls))
    assert (frames.unpack_chain(engine.calls[0].chain), engine.calls[0].matched) == (charge.chain, 2)
    engine.step()
    await eventually(lambda: lane.account.view().unacked == 0)
    view = lane.account.view()
    assert (view.unacked_tokens, view.unacked_pairs) == (0, 0.0)
    engine.outs[0].end()
    await task


class LargeSink(RecordingSink):
    """One that takes large payloads without a copy."""

    def __init__(self) -> None:
        super().__init__()
        self.large_payloads: list[memoryview] = []

    def large(self, payload: memoryview, tokens: int) -> None:
        self.large_payloads.append(payload)
        self.data(bytes(payload), tokens)


@pytest.mark.parametrize("sink", [RecordingSink(), LargeSink()], ids=["plain", "large"])
async def test_large_and_small_outputs_of_one_frame_reach_their_sinks(fleet: Fleet, sink: RecordingSink) -> None:
    engine = await fleet.add("a")
    await fleet.until(lambda: fleet.ready() == 1)
    other, large = LargeSink(), bytes(frames.LARGE_BYTES)
    tasks = [await submitted(fleet, sink), await submitted(fleet, other, "r2")]
    engine.outs[0].head(200, [("content-length", "9")])
    engine.outs[0].data(large, 3)
    engine.outs[1].data(b"small", 1)
    for out in engine.outs:
        out.end("stop")
    assert await asyncio.wait_for(asyncio.gather(*tasks), DEADLINE_S) == [End("stop"), End("stop")]
    assert (sink.payloads, sink.tokens, sink.heads) == ([large], 3, [(200, (("content-length", "9"),))])
    assert [type(payload) for payload in (*sink.payloads, *other.payloads)] == [bytes, bytes]
    assert (other.payloads, other.large_payloads) == ([b"small"], [])
    if isinstance(sink, LargeSink):
        assert [len(payload) for payload in sink.large_payloads] == [len(large)]


async def test_a_large_read_leaves_the_loop_to_others_before_the_next(fleet: Fleet) -> None:
    await fleet.add("a")
    await fleet.until(lambda: fleet.ready() == 1)
    lane = lane_of(fleet)
    assert lane._transport is not None
    frame = frames.encode(frames.Step(1, 0, Load(), [frames.Output(1, bytes(2 * PACED_BYTES))]))
    lane.data_received(frame[: PACED_BYTES + 1])
    assert not lane._transport.is_reading()
    await asyncio.sleep(0)
    assert lane._transport.is_reading()
    lane.data_received(frame[PACED_BYTES + 1 :])
    assert lane.steps == 1
