"""Lanes between a replica and a router, over real sockets, with an engine under the test's control."""

import asyncio
from collections.abc import AsyncIterator

import msgspec
import pytest

from engine.replica import Replica
from router.errors import ClientTooSlow, InvalidRequest, ReplicaDraining, ReplicaFailed, ReplicaLost
from router.lane import frames
from router.lane.client import PACED_BYTES, Lane
from router.lane.frames import CacheReport, End
from router.types import Chain, Charge, EngineInfo, Load
from tests.fakes import DEADLINE_S, SECRET, Fleet, RecordingSink, eventually, make_request


@pytest.fixture
async def fleet() -> AsyncIterator[Fleet]:
    fleet = Fleet()
    yield fleet
    await fleet.close()


def lane_of(fleet: Fleet, replica: str = "a") -> Lane:
    (lane,) = [lane for lane in fleet.router.lanes() if lane.replica == replica]
    return lane


async def run(fleet: Fleet, sink: RecordingSink, request_id: str = "r1") -> End:
    with fleet.router.lease("a") as lane:
        return await lane.run(make_request(request_id), sink)


async def submitted(fleet: Fleet, sink: RecordingSink, request_id: str = "r1") -> asyncio.Task[End]:
    """A request that the engine has."""
    engine = fleet.engines["a"]
    before = len(engine.calls)
    task = asyncio.create_task(run(fleet, sink, request_id))
    await eventually(lambda: len(engine.calls) > before)
    return task


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


async def test_a_lane_without_the_secret_is_refused_and_never_ready(
    fleet: Fleet, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    engine = await fleet.add("a", secret=b"wrong")
    await eventually(lambda: "does not know this replica's secret" in caplog.text and "refused the lane" in caplog.text)
    assert fleet.ready() == 0
    assert engine.calls == []


async def connect(fleet: Fleet) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection("127.0.0.1", fleet.records["a"].port)


async def read_frame(reader: asyncio.StreamReader) -> frames.DownFrame:
    length = int.from_bytes(await asyncio.wait_for(reader.readexactly(4), DEADLINE_S), "little")
    return frames.decode_down(await asyncio.wait_for(reader.readexactly(length), DEADLINE_S))


async def greet(fleet: Fleet) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await connect(fleet)
    challenge = await read_frame(reader)
    assert isinstance(challenge, frames.Challenge)
    writer.write(frames.encode(frames.Hello(frames.VERSION, frames.prove(SECRET, challenge.nonce, "raw"), "raw")))
    assert isinstance(await read_frame(reader), frames.Welcome)
    return reader, writer


async def test_a_router_of_another_version_is_refused_by_name(fleet: Fleet) -> None:
    await fleet.add("a")
    reader, writer = await connect(fleet)
    challenge = await read_frame(reader)
    assert isinstance(challenge, frames.Challenge)
    writer.write(frames.encode(frames.Hello(99, frames.prove(SECRET, challenge.nonce, "raw"), "raw")))
    refused = await read_frame(reader)
    assert isinstance(refused, frames.Refused)
    assert refused.code == "version"
    assert "99" in refused.message
    assert await asyncio.wait_for(reader.read(), DEADLINE_S) == b""
    writer.close()


async def test_a_replica_of_another_version_is_not_used(fleet: Fleet, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")

    async def other_version(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(frames.encode(frames.Challenge(99, b"nonce")))
        await reader.read()
        writer.close()

    server = await asyncio.start_server(other_version, "127.0.0.1", 0)
    async with server:
        record = msgspec.structs.replace((await _record(fleet)), replica="old", port=server.sockets[0].getsockname()[1])
        fleet.list({"old": record})
        await eventually(lambda: "lane version 99" in caplog.text)
        assert fleet.ready() == 0
        await fleet.router.close()


async def _record(fleet: Fleet) -> frames.msgspec.Struct:  # type: ignore[name-defined]
    await fleet.add("a")
    return fleet.records["a"]


@pytest.mark.parametrize(
    "sent",
    [
        b"\x00\x00\x00\x00",
        b"\xff\xff\xff\xff",
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        frames.encode(frames.Ping(1)),
        frames.encode(frames.Submit(1, "r", 0, "POST", "/", (), b"")),
    ],
    ids=["empty frame", "4 GB frame", "http", "ping before hello", "submit before hello"],
)
async def test_whoever_does_not_speak_the_protocol_is_refused_and_harms_nobody(fleet: Fleet, sent: bytes) -> None:
    engine = await fleet.add("a")
    await fleet.until(lambda: fleet.ready() == 1)
    task = await submitted(fleet, RecordingSink())
    reader, writer = await connect(fleet)
    writer.write(sent)
    await asyncio.wait_for(reader.read(), DEADLINE_S)
    writer.close()
    engine.outs[0].end()
    await task
    assert len(engine.calls) == 1


async def test_a_stream_id_that_does_not_rise_breaks_the_lane(fleet: Fleet) -> None:
    await fleet.add("a")
    reader, writer = await greet(fleet)
    submit = frames.encode(frames.Submit(5, "r", 0, "POST", "/", (), b""))
    writer.write(submit + submit)
    got = [await read_frame(reader)]
    while not isinstance(got[-1], frames.Refused):
        got.append(await read_frame(reader))
    assert got[-1].code == "protocol"
    assert await asyncio.wait_for(reader.read(), DEADLINE_S) == b""
    writer.close()


async def test_a_router_that_does_not_read_loses_the_overflowing_stream_only() -> None:
    fleet = Fleet()
    engine = await fleet.add("a")
    await fleet.router.close()
    reader, writer = await greet(fleet)
    writer.write(frames.encode(frames.Submit(1, "big", 0, "POST", "/", (), b"")))
    writer.write(frames.encode(frames.Submit(2, "small", 0, "POST", "/", (), b"")))
    await eventually(lambda: len(engine.calls) == 2)
    writer.transport.pause_reading()  # type: ignore[attr-defined]
    big, small = engine.outs
    for _ in range(200):
        if "big" in engine.aborted:
            break
        big.data(bytes(1 << 20), 1)
        await asyncio.sleep(0)
    assert engine.aborted == ["big"]
    small.data(b"fine", 1)
    small.end()
    writer.transport.resume_reading()  # type: ignore[attr-defined]
    ends: dict[int, End] = {}
    payload = b""
    while len(ends) < 2:
        frame = await read_frame(reader)
        if isinstance(frame, frames.Step | frames.LargeStep):
            ends |= {output.stream: output.end for output in frame.outputs if output.end}
            payload += b"".join(output.payload for output in frame.outputs if output.stream == 2)
    assert ends[1].error == "client_too_slow"
    assert ends[2].error == ""
    assert payload == b"fine"
    writer.close()
    await fleet.close()


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


async def test_a_ping_is_answered(fleet: Fleet) -> None:
    await fleet.add("a")
    reader, writer = await greet(fleet)
    writer.write(frames.encode(frames.Ping(42)))
    assert await read_frame(reader) == frames.Pong(42)
    writer.close()


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


async def test_a_hello_nested_thousands_deep_is_refused(fleet: Fleet) -> None:
    await fleet.add("a")
    reader, writer = await connect(fleet)
    body = b"\x92\x02" + b"\x91" * 4000
    writer.write(len(body).to_bytes(4, "little") + body)
    await read_frame(reader)
    assert isinstance(await read_frame(reader), frames.Refused)
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


class Listener:
    """Whoever opened a lane; remembers."""

    def __init__(self) -> None:
        self.waits: list[tuple[float, float]] = []
        self.reports: list[CacheReport] = []
        self.lost: list[ReplicaLost] = []
        self.refuses = False

    def lane_opened(self, lane: Lane) -> None: ...
    def lane_draining(self, lane: Lane) -> None: ...

    def lane_lost(self, lane: Lane, error: ReplicaLost) -> None:
        self.lost.append(error)

    def first_output(self, waited_s: float, expected_s: float) -> None:
        self.waits.append((waited_s, expected_s))

    def cache_reported(self, lane: Lane, report: CacheReport) -> None:
        if self.refuses:
            raise ValueError("odd")
        self.reports.append(report)


class Written(asyncio.Transport):
    """Keeps what was written."""

    def __init__(self) -> None:
        super().__init__()
        self.data = b""

    def write(self, data: bytes) -> None:  # type: ignore[override]
        self.data += data

    def abort(self) -> None: ...

    def frames(self) -> list[frames.UpFrame]:
        return [frames.decode_up(body) for body in frames.FrameSplitter().feed(self.data)]


def open_lane(listener: Listener) -> tuple[Lane, Written]:
    lane, transport = Lane("a", SECRET, "test", listener), Written()
    lane.connection_made(transport)
    lane.data_received(frames.encode(frames.Welcome(frames.VERSION, "a", EngineInfo("x", ()), Load())))
    return lane, transport


def step(seq: int, report: CacheReport | None = None, *outputs: frames.Output) -> bytes:
    return frames.encode(frames.Step(seq, seq, Load(), list(outputs), report))


async def test_a_cache_report_comes_after_the_outputs_of_its_step() -> None:
    listener = Listener()
    lane, _ = open_lane(listener)
    sink = RecordingSink()
    task = asyncio.create_task(lane.run(make_request(), sink, expected_s=0.25))
    await asyncio.sleep(0)
    reported_after: list[int] = []
    listener.cache_reported = lambda lane, report: reported_after.append(sink.tokens)  # type: ignore[method-assign]
    lane.data_received(step(1, CacheReport(1), frames.Output(1, b"x", 3, End())))
    assert await task == End()
    assert reported_after == [3]
    ((waited_s, expected_s),) = listener.waits
    assert (expected_s, waited_s >= 0) == (0.25, True)


async def test_a_snapshot_is_asked_for_once_until_it_comes() -> None:
    listener = Listener()
    lane, transport = open_lane(listener)
    lane.data_received(step(1, CacheReport(4)))
    lane.resync()
    lane.resync()
    lane.data_received(step(2, CacheReport(6)))
    lane.resync()
    assert transport.frames() == [frames.Resync(4)]
    lane.data_received(step(3, CacheReport(7, snapshot=True)))
    lane.resync()
    assert transport.frames() == [frames.Resync(4), frames.Resync(7)]
    lane.close()
    lane.resync()
    assert len(transport.frames()) == 2


async def test_a_cache_report_without_sense_costs_the_replica_its_lane() -> None:
    listener = Listener()
    listener.refuses = True
    lane, _ = open_lane(listener)
    lane.data_received(step(1, CacheReport(1, stored=b"odd")))
    (error,) = listener.lost
    assert "cache report" in error.message


class EndingSink(RecordingSink):
    """Tells last payloads apart."""

    def __init__(self) -> None:
        super().__init__()
        self.lasts: list[bytes] = []

    def last(self, payload: bytes, tokens: int) -> None:
        self.lasts.append(payload)


async def test_a_sink_is_told_which_payload_is_the_last_where_nothing_went_wrong() -> None:
    lane, _ = open_lane(Listener())
    sinks = [EndingSink(), EndingSink(), EndingSink()]
    tasks = [asyncio.create_task(lane.run(make_request(), sink)) for sink in sinks]
    await asyncio.sleep(0)
    lane.data_received(step(1, None, *(frames.Output(stream, b"one", 1) for stream in (1, 2, 3))))
    failed = End("", "replica_failed", "no more")
    ends = [frames.Output(1, b"two", 1, End("stop")), frames.Output(2, b"two", 1, failed), frames.Output(3, b"two", 1)]
    lane.data_received(step(2, None, *ends, frames.Output(3, b"", 0, End("stop"))))
    found = await asyncio.gather(*tasks, return_exceptions=True)
    assert [sink.lasts for sink in sinks] == [[b"two"], [], []]
    assert [b"".join(sink.payloads) for sink in sinks] == [b"one", b"onetwo", b"onetwo"]
    assert found[0] == found[2] == End("stop")
    assert isinstance(found[1], ReplicaFailed)


async def test_tokens_are_counted_and_a_request_sees_its_own_steps_load() -> None:
    lane, _ = open_lane(Listener())
    task = asyncio.create_task(lane.run(make_request(), RecordingSink()))
    await asyncio.sleep(0)
    assert lane.account.view().queue_depth == 1
    load = Load(running=3)
    outputs = [frames.Output(1, b"a", 2), frames.Output(9, b"b", 5), frames.Output(1, b"c", 1, End())]
    lane.data_received(frames.encode(frames.Step(1, 1, load, outputs)))
    assert lane.tokens == 3, "those of a stream that is not there do not count"
    assert lane.account.view().queue_depth == 3
    assert await task == End()


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
