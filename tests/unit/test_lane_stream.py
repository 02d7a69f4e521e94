"""What a stream writes within one frame travels as one output."""

from __future__ import annotations

import pytest

from engine.lane_stream import JOINED_PAYLOAD_BYTES, MAX_PAYLOAD_BYTES, LaneStream
from router.errors import ReplicaLost
from router.lane.frames import End, Head, Output


class Lane:
    """Keeps what is put on it."""

    def __init__(self) -> None:
        self.frame = 0
        self.paused = False
        self.outputs: list[Output] = []
        self.urged = 0
        self.forgotten: list[LaneStream] = []

    def put(self, output: Output) -> None:
        self.outputs.append(output)

    def urge(self) -> None:
        self.urged += 1
        self.flush()

    def flush(self) -> None:
        self.frame += 1

    def held_back(self) -> None:
        pass

    def forget(self, stream: LaneStream) -> None:
        stream.over = True
        self.forgotten.append(stream)


@pytest.fixture
def lane() -> Lane:
    return Lane()


@pytest.fixture
def http(lane: Lane) -> LaneStream:
    return LaneStream(lane, 7, joins=True)


@pytest.fixture
def grpc(lane: Lane) -> LaneStream:
    return LaneStream(lane, 8, joins=False)


def test_a_whole_answer_within_one_frame_is_one_output(lane: Lane, http: LaneStream) -> None:
    http.head(200, [("a", "b")])
    http.data(b"one", 1)
    http.data(b"two", 2)
    http.end("stop")
    assert lane.outputs == [Output(7, b"onetwo", 3, End("stop"), Head(200, (("a", "b"),)))]
    assert lane.forgotten == [http]


def test_what_comes_after_a_frame_is_an_output_of_its_own(lane: Lane, http: LaneStream) -> None:
    http.data(b"one", 1)
    lane.flush()
    http.data(b"two", 1)
    lane.flush()
    http.end()
    assert lane.outputs == [Output(7, b"one", 1), Output(7, b"two", 1), Output(7, end=End())]


def test_streams_do_not_join_each_other(lane: Lane, http: LaneStream) -> None:
    other = LaneStream(lane, 9, joins=True)
    for payload in (b"a", b"b"):
        http.data(payload, 1)
        other.data(payload, 1)
    other.fail(ReplicaLost("gone"))
    assert [(output.stream, output.payload) for output in lane.outputs] == [(7, b"ab"), (9, b"ab")]
    assert [output.end for output in lane.outputs] == [None, End("", "replica_lost", "gone")]


def test_grpc_messages_stay_apart_and_the_last_takes_the_end_along(lane: Lane, grpc: LaneStream) -> None:
    grpc.data(b"one", 1)
    grpc.data(b"two", 1)
    grpc.end("length")
    assert lane.outputs == [Output(8, b"one", 1), Output(8, b"two", 1, End("length"))]


def test_urgent_output_takes_along_what_waits_of_its_stream(lane: Lane, http: LaneStream) -> None:
    http.data(b"role", 0)
    http.data(b"token", 1, urgent=True)
    http.data(b"next", 1)
    assert lane.urged == 1
    assert [output.payload for output in lane.outputs] == [b"roletoken", b"next"]


def test_much_that_waits_is_not_copied_for_ever(lane: Lane, http: LaneStream) -> None:
    for _ in range(3):
        http.data(bytes(JOINED_PAYLOAD_BYTES), 1)
    assert [len(output.payload) for output in lane.outputs] == [JOINED_PAYLOAD_BYTES] * 3


def test_a_long_payload_goes_in_pieces_with_its_tokens_once(lane: Lane, http: LaneStream) -> None:
    http.head(200, ())
    http.data(bytes(MAX_PAYLOAD_BYTES + 1), 5)
    http.end()
    assert [len(output.payload) for output in lane.outputs] == [MAX_PAYLOAD_BYTES, 1]
    assert [output.tokens for output in lane.outputs] == [5, 0]
    assert [output.head is not None for output in lane.outputs] == [True, False]
    assert lane.outputs[-1].end == End()


def test_nothing_is_written_after_the_end(lane: Lane, http: LaneStream) -> None:
    http.end()
    http.data(b"late", 1)
    http.fail(ReplicaLost("late"))
    assert lane.outputs == [Output(7, end=End())]
