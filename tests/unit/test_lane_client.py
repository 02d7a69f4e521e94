"""The router's end of a lane alone, fed with frames: cache reports, snapshots, last payloads, counts."""

import asyncio

from router.errors import ReplicaFailed, ReplicaLost
from router.lane import frames
from router.lane.client import Lane
from router.lane.frames import CacheReport, End
from router.types import EngineInfo, Load
from tests.fakes import SECRET, RecordingSink, make_request


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
