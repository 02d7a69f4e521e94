"""What a stream writes within one frame travels as one output, and as the same bytes from both twins."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import lane_stream
from engine.lane_stream import (
    HELD_OUTPUT_BYTES,
    JOINED_PAYLOAD_BYTES,
    MAX_PAYLOAD_BYTES,
    STEP_PAYLOAD_BYTES,
    STREAM_BACKLOG_BYTES,
    LaneStream,
    Outbox,
)
from router.compiled import part
from router.errors import ClientTooSlow, InvalidRequest, ReplicaLost
from router.lane import frames
from router.lane.frames import CacheReport, End, FrameSplitter, Head, Output, Step
from router.types import Load
from tests.twins import resident_kb

COMPILED = part("engine._lane_stream")
LOAD = Load(3, 1, 70_000, 0.5, 12.25, 1e9, 300, 4e4, 2, 1 << 20)
REPORT = CacheReport(4, True, b"12345678", b"1234", b"", prompt_bytes=9)
needs_both = pytest.mark.skipif(COMPILED is None, reason="engine._lane_stream is not compiled, or left out")


class Lane:
    """Keeps what goes out on it."""

    def __init__(self, twin: Any) -> None:
        self._twin = twin
        self.outbox: Outbox = twin.Outbox(self)
        self.raw: list[bytes] = []
        self.flushes_due = 0
        self.forgotten: list[int] = []
        self.late = False
        """Urgent output is not sent at once."""
        self.backlog = False

    def stream(self, id: int, joins: bool = True) -> LaneStream:
        made: LaneStream = self._twin.LaneStream(self, self.outbox, id, joins)
        return made

    def flush_soon(self) -> None:
        self.flushes_due += 1

    def urge(self) -> None:
        if self.late:
            self.outbox.urgent = True
        else:
            self.flush()

    def held_back(self) -> None:
        self.backlog = True

    def forget(self, stream: LaneStream) -> None:
        stream.over = True
        self.forgotten.append(stream.id)

    def flush(self, report: CacheReport | None = None) -> None:
        self.outbox.due = self.outbox.urgent = False
        self.raw.append(self.outbox.take(len(self.raw) + 1, 300, LOAD, report))

    def frames(self) -> list[list[Output]]:
        """What went out, and then all that waits."""
        self.flush()
        while self.outbox:
            self.flush()
        splitter = FrameSplitter(frames.MAX_FRAME_BYTES)
        steps = [frames.decode_down(body) for raw in self.raw for body in splitter.feed(raw)]
        found = []
        for step in steps:
            assert isinstance(step, Step | frames.LargeStep)
            assert step.load == LOAD
            found.append([Output(o.stream, bytes(o.payload), o.tokens, o.end, o.head) for o in step.outputs])
        return found

    def outputs(self) -> list[Output]:
        return [output for frame in self.frames() for output in frame]


@pytest.fixture(params=["python", pytest.param("compiled", marks=needs_both)])
def lane(request: pytest.FixtureRequest) -> Lane:
    return Lane(lane_stream if request.param == "python" else COMPILED)


def test_a_whole_answer_within_one_frame_is_one_output(lane: Lane) -> None:
    stream = lane.stream(7)
    stream.head(200, [("a", "b")])
    stream.data(b"one", 1)
    stream.data(b"two", 2)
    stream.end("stop")
    assert lane.frames() == [[Output(7, b"onetwo", 3, End("stop"), Head(200, (("a", "b"),)))]]
    assert (lane.forgotten, lane.flushes_due) == ([7], 1)


def test_what_comes_after_a_frame_is_an_output_of_its_own(lane: Lane) -> None:
    stream = lane.stream(7)
    stream.data(b"one", 1)
    lane.flush()
    stream.data(b"two", 1)
    lane.flush(REPORT)
    stream.end()
    assert lane.frames() == [[Output(7, b"one", 1)], [Output(7, b"two", 1)], [Output(7, end=End())]]
    last_but_one = frames.decode_down(lane.raw[1][4:])
    assert isinstance(last_but_one, Step)
    assert (last_but_one.seq, last_but_one.acked, last_but_one.cache) == (2, 300, REPORT)


def test_streams_do_not_join_each_other(lane: Lane) -> None:
    stream, other = lane.stream(7), lane.stream(9)
    for payload in (b"a", b"b"):
        stream.data(payload, 1)
        other.data(payload, 1)
    other.fail(ReplicaLost("gone"))
    assert lane.outputs() == [
        Output(7, b"ab", 2),
        Output(9, b"ab", 2, End("", "replica_lost", "gone")),
    ]


def test_grpc_messages_stay_apart_and_the_last_takes_the_end_along(lane: Lane) -> None:
    stream = lane.stream(8, joins=False)
    stream.data(b"one", 1)
    stream.data(b"two", 1)
    stream.end("length")
    assert lane.outputs() == [Output(8, b"one", 1), Output(8, b"two", 1, End("length"))]


def test_urgent_output_takes_along_what_waits_of_its_stream(lane: Lane) -> None:
    stream = lane.stream(7)
    stream.data(b"role", 0)
    stream.data(b"token", 1, urgent=True)
    stream.data(b"next", 1)
    assert [[output.payload for output in frame] for frame in lane.frames()] == [[b"roletoken"], [b"next"]]


def test_what_is_urgent_and_late_goes_with_the_next_output(lane: Lane) -> None:
    stream = lane.stream(7)
    lane.late = True
    stream.data(b"token", 1, urgent=True)
    assert (lane.raw, lane.outbox.urgent) == ([], True)
    lane.late = False
    lane.stream(8).data(b"other", 1)
    assert len(lane.raw) == 1
    assert not lane.outbox.urgent


def test_much_that_waits_is_not_copied_for_ever(lane: Lane) -> None:
    stream = lane.stream(7)
    for _ in range(3):
        stream.data(bytes(JOINED_PAYLOAD_BYTES), 1)
    assert [len(output.payload) for output in lane.outputs()] == [JOINED_PAYLOAD_BYTES] * 3


def test_a_long_payload_goes_in_pieces_with_its_tokens_once(lane: Lane) -> None:
    stream = lane.stream(7)
    stream.head(200, ())
    stream.data(bytes(MAX_PAYLOAD_BYTES + 1), 5)
    stream.end()
    outputs = lane.outputs()
    assert [len(output.payload) for output in outputs] == [MAX_PAYLOAD_BYTES, 1]
    assert [output.tokens for output in outputs] == [5, 0]
    assert [output.head is not None for output in outputs] == [True, False]
    assert outputs[-1].end == End()


def test_nothing_is_written_after_the_end(lane: Lane) -> None:
    stream = lane.stream(7)
    stream.end()
    stream.data(b"late", 1)
    stream.fail(ReplicaLost("late"))
    assert lane.outputs() == [Output(7, end=End())]


def test_a_backlog_goes_out_in_frames_of_their_size(lane: Lane) -> None:
    streams = [lane.stream(id) for id in range(1, 8)]
    for stream in streams:
        stream.data(bytes(STEP_PAYLOAD_BYTES // 3), 1)
    assert lane.outbox.waiting() == [(id, STEP_PAYLOAD_BYTES // 3) for id in range(1, 8)]
    lane.flush()
    streams[5].end()  # Its output waits under another frame: no joining.
    streams[6].data(b"more", 1)
    assert [[output.stream for output in frame] for frame in lane.frames()] == [[1, 2, 3, 4], [5, 6, 7, 6, 7]]


def test_one_that_holds_back_too_much_ends(lane: Lane) -> None:
    stopped: list[int] = []
    stream = lane.stream(7)
    stream.stop = lambda: stopped.append(7)
    lane.outbox.paused = True
    for _ in range(40):
        stream.data(bytes(1 << 20), 1)
    assert (lane.backlog, lane.forgotten, stopped, stream.over) == (True, [7], [7], True)
    outputs = lane.outputs()
    assert outputs[-1].end is not None
    assert outputs[-1].end.error == ClientTooSlow.name
    assert sum(output.tokens for output in outputs) == 16


@pytest.mark.slow
def test_empty_messages_that_are_held_back_count_too(lane: Lane) -> None:
    stream = lane.stream(7, joins=False)
    lane.outbox.paused = True
    while not stream.over:
        stream.data(b"", 0)
    most = STREAM_BACKLOG_BYTES // HELD_OUTPUT_BYTES + 2
    assert sum(len(frame) for frame in lane.frames()) in range(most - 2, most + 1)


def test_what_waits_on_a_lost_lane_is_dropped(lane: Lane) -> None:
    stream = lane.stream(7)
    stream.data(b"one", 1)
    lane.outbox.clear()
    assert len(lane.outbox) == 0
    stream.data(b"two", 1)
    assert lane.outputs() == [Output(7, b"two", 1)]


def test_an_error_that_quotes_half_a_character_holds_up_nobody(lane: Lane) -> None:
    lane.stream(7).fail(InvalidRequest("no \ud800 here", param="\udfff"))
    lane.stream(8).data(b"fine", 1)
    first, second = lane.outputs()
    assert first.end == End("", "invalid_request", "no ? here", "?")
    assert second.payload == b"fine"


def test_a_reason_of_half_a_character_holds_up_nobody(lane: Lane) -> None:
    lane.stream(7).end("\ud800")
    lane.stream(8).end("stopped\u00e9")
    assert [output.end for output in lane.outputs()] == [End("?"), End("stopped\u00e9")]


def test_payloads_may_be_any_bytes_and_nothing_else(lane: Lane) -> None:
    lane.stream(7).data(bytearray(b"abc"), 1)  # type: ignore[arg-type]
    for other in (5, "abc", [1, 2], None):
        with pytest.raises(TypeError):
            lane.stream(8).data(other, 1)  # type: ignore[arg-type]
    assert lane.outputs() == [Output(7, b"abc", 1)]


@needs_both
def test_a_backlogs_room_is_given_back() -> None:
    def use() -> None:
        lane = Lane(COMPILED)
        kept.append(lane)
        stream = lane.stream(7, joins=False)
        for _ in range(50_000):
            stream.data(b"", 0)
        lane.flush()

    kept: list[Lane] = []
    use()
    gc.collect()
    before = resident_kb()
    for _ in range(60):
        use()
    assert resident_kb() - before < 70_000  # Of 2.4 MB each time.


@needs_both
def test_nothing_is_made_without_its_lane() -> None:
    for kind in (COMPILED.LaneStream, COMPILED.Outbox):
        with pytest.raises(TypeError):
            kind.__new__(kind)


SIZES = st.sampled_from([0, 1, 2, 200, 255, 256, 65_535, 65_536, STEP_PAYLOAD_BYTES])
NUMBERS = st.sampled_from([0, 1, 127, 128, 255, 256, 65_535, 65_536, (1 << 32) - 1, 1 << 32, 1 << 40, -1, -33, -200])
ACTS = st.one_of(
    st.tuples(st.just("data"), st.integers(0, 3), SIZES, NUMBERS, st.booleans()),
    st.tuples(st.just("head"), st.integers(0, 3)),
    st.tuples(st.just("end"), st.integers(0, 3), st.text(max_size=40)),
    st.tuples(st.just("fail"), st.integers(0, 3), st.text(max_size=40)),
    st.tuples(st.just("put"), NUMBERS.filter(lambda n: n >= 0), SIZES),
    st.tuples(st.just("flush"), st.booleans()),
    st.tuples(st.just("pause"), st.booleans()),
    st.tuples(st.just("late"), st.booleans()),
    st.tuples(st.just("clear")),
    st.tuples(st.just("many"), st.integers(10, 70)),
)


@needs_both
@settings(deadline=None)
@given(st.lists(ACTS, max_size=30))
def test_both_give_the_same_bytes(acts: list[tuple[Any, ...]]) -> None:
    twins = [Lane(lane_stream), Lane(COMPILED)]
    streams = [[lane.stream(id, id != 300) for id in (1, 200, 300, 70_000)] for lane in twins]
    for act in acts:
        for lane, own in zip(twins, streams, strict=True):
            _do(act, lane, own)
        assert _seen(twins[0], streams[0]) == _seen(twins[1], streams[1])
    assert twins[0].frames() == twins[1].frames()
    assert twins[0].raw == twins[1].raw


def _do(act: tuple[Any, ...], lane: Lane, streams: list[LaneStream]) -> None:
    match act:
        case ("data", which, size, tokens, urgent):
            streams[which].data(bytes(size), tokens, urgent=urgent)
        case ("head", which):
            streams[which].head(200, [("content-type", "text/event-stream")])
        case ("end", which, finish):
            streams[which].end(finish)
        case ("fail", which, message):
            streams[which].fail(ReplicaLost(message))
        case ("put", id, size):
            lane.outbox.put(Output(id, bytes(size), 1))
        case ("flush", told):
            lane.flush(REPORT if told else None)
        case ("pause", paused):
            lane.outbox.paused = paused
        case ("late", late):
            lane.late = late
        case ("clear",):
            lane.outbox.clear()
        case ("many", count):
            for id in range(count):
                lane.outbox.put(Output(id, b"x", id))


def _seen(lane: Lane, streams: list[LaneStream]) -> tuple[object, ...]:
    box = lane.outbox
    mine = [(stream.id, stream.over, stream.backlog) for stream in streams]
    flags = (box.frame, box.due, box.urgent, box.paused, lane.flushes_due, lane.backlog)
    return mine, flags, list(box.waiting()), lane.forgotten, len(lane.raw)


def _leak_nothing(use: Callable[[], None]) -> None:
    use()
    gc.collect()
    before = resident_kb()
    for _ in range(300):
        use()
    gc.collect()
    # 300 times half a megabyte, where it were kept. What malloc keeps for later depends on the tests before.
    assert resident_kb() - before < 75_000


@pytest.mark.slow
def test_neither_keeps_what_went_out(lane: Lane) -> None:
    kind = type(lane.outbox)
    twin = sys.modules[kind.__module__]

    def use() -> None:
        other = Lane(twin)
        for id in range(20):
            stream = other.stream(id)
            stream.head(200, (("a", "b" * 1000),))
            stream.data(bytes(10_000), 1)
            stream.data(bytes(10_000), 1)
            stream.end("stop")
        other.flush()
        other.stream(30).data(bytes(100_000), 1)

    _leak_nothing(use)
