"""The parts of the `h2` edge that need no connection: frames, messages, headers, floods, and the order of output."""

from __future__ import annotations

import asyncio
import gzip
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from h2.exceptions import DenialOfServiceError, FrameTooLargeError, ProtocolError
from hpack import Decoder
from hyperframe.frame import DataFrame, Frame, GoAwayFrame, PingFrame, RstStreamFrame, SettingsFrame, WindowUpdateFrame
from hypothesis import given
from hypothesis import strategies as st

from router.errors import BadFraming, BodyTooLarge, ClientTooSlow
from router.ingress import h2_frames, h2_guard, h2_headers
from router.ingress.h2_frames import PREFACE, FrameCutter
from router.ingress.h2_guard import Bucket, Guard
from router.ingress.h2_messages import MessageCutter, decompressed
from router.ingress.h2_output import QUICK_BYTES, Output
from router.ingress.h2_wire import Wire
from tests.unit.h2_peer import framed

# -- frames

SETTINGS = SettingsFrame(0).serialize()


def parsed(data: bytes) -> Frame:
    frame, length = Frame.parse_frame_header(memoryview(data[:9]))
    frame.parse_body(memoryview(data[9 : 9 + length]))
    assert len(data) == 9 + length
    return frame


@given(st.lists(st.binary(max_size=50)), st.integers(1, 60))
def test_frames_are_cut_the_same_however_they_come(bodies: list[bytes], step: int) -> None:
    frames = [DataFrame(2 * number + 1, body).serialize() for number, body in enumerate(bodies)]
    data = PREFACE + SETTINGS + b"".join(frames)
    cutter = FrameCutter()
    seen = [frame for at in range(0, len(data), step) for _, _, _, frame in cutter.feed(data[at : at + step])]
    assert seen == [SETTINGS, *frames]
    assert not cutter.pending


def test_a_frames_size_is_judged_by_its_head() -> None:
    cutter = FrameCutter()
    list(cutter.feed(PREFACE + SETTINGS))
    with pytest.raises(FrameTooLargeError):
        list(cutter.feed(b"\x00\x40\x01" + bytes(6)))


def test_a_preface_may_come_in_pieces_and_must_be_right() -> None:
    cutter = FrameCutter()
    for at in range(len(PREFACE)):
        assert not list(cutter.feed(PREFACE[at : at + 1]))
    assert not cutter.ready
    assert len(list(cutter.feed(SETTINGS))) == 1
    assert cutter.ready
    with pytest.raises(ProtocolError):
        list(FrameCutter().feed(b"GET"))


def test_what_is_built_is_what_hyperframe_reads() -> None:
    data = parsed(h2_frames.MESSAGE_HEAD.pack(8 << 8, 7, 3) + b"abc")
    assert isinstance(data, DataFrame)
    assert (data.stream_id, data.data) == (7, b"\0\0\0\0\x03abc")
    reset = parsed(h2_frames.rst_stream_frame(9, 8))
    assert isinstance(reset, RstStreamFrame)
    assert (reset.stream_id, reset.error_code) == (9, 8)
    goaway = parsed(h2_frames.goaway_frame(5, 11, b"why"))
    assert isinstance(goaway, GoAwayFrame)
    assert (goaway.last_stream_id, goaway.error_code, goaway.additional_data) == (5, 11, b"why")
    ping = parsed(h2_frames.ping_frame(b"12345678", ack=True))
    assert isinstance(ping, PingFrame)
    assert (ping.opaque_data, set(ping.flags)) == (b"12345678", {"ACK"})
    window = parsed(h2_frames.window_update_frame(3, 70_000))
    assert isinstance(window, WindowUpdateFrame)
    assert (window.stream_id, window.window_increment) == (3, 70_000)
    assert h2_frames.window_increment(window.serialize(), 5) == 70_000


# -- messages


@given(st.lists(st.tuples(st.booleans(), st.binary(max_size=40))), st.integers(1, 50))
def test_messages_are_cut_the_same_however_they_come(expected: list[tuple[bool, bytes]], step: int) -> None:
    data = b"".join(framed(message, compressed=compressed) for compressed, message in expected)
    cutter = MessageCutter(40)
    seen = [message for at in range(0, len(data), step) for message in cutter.feed(data[at : at + step])]
    assert seen == expected
    assert cutter.held_bytes == 0


@pytest.mark.parametrize(("data", "error"), [(b"\0\0\0\0\x29", BodyTooLarge), (b"\x02\0\0\0\0", BadFraming)])
def test_a_message_that_cannot_be_taken_is_refused_by_its_prefix(data: bytes, error: type[Exception]) -> None:
    with pytest.raises(error):
        MessageCutter(40).feed(data)


@given(st.binary(max_size=200))
def test_any_bytes_decompress_or_are_refused(data: bytes) -> None:
    assert decompressed(gzip.compress(data), "gzip", 200) == data
    for encoding in ("gzip", "deflate", "identity"):
        try:
            decompressed(data, encoding, 200)
        except (BadFraming, BodyTooLarge):
            pass


# -- headers


@given(st.text(max_size=50))
def test_a_grpc_message_is_plain_and_comes_back(text: str) -> None:
    from urllib.parse import unquote_to_bytes

    told = h2_headers.percent_encoded(text)
    assert told.isascii()
    assert told.isprintable()
    assert told == told.strip()
    assert unquote_to_bytes(told) == text.encode(errors="replace")


def test_blocks_leave_the_peers_table_as_it_is() -> None:
    decoder: Any = Decoder()
    trailers = (("kvlane-error", "x"), ("grpc-status-details-bin", b"\0\1\2"))
    for _ in range(3):
        assert ("x-request-id", "a" * 128) in decoder.decode(h2_headers.opening("a" * 128))
        assert decoder.decode(h2_headers.OK) == [("grpc-status", "0")]
        block = h2_headers.status(grpc.StatusCode.NOT_FOUND, "no", trailers, alone=False)
        assert decoder.decode(block) == [
            *(("grpc-status", "5"), ("grpc-message", "no"), ("kvlane-error", "x")),
            ("grpc-status-details-bin", "AAEC"),
        ]
    assert not decoder.header_table.dynamic_entries


# -- floods


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_a_bucket_lets_its_burst_pass_and_then_its_rate() -> None:
    clock = Clock()
    bucket = Bucket(3, 10.0, clock)
    assert [bucket.take() for _ in range(4)] == [True, True, True, False]
    clock.now += 0.2
    assert [bucket.take() for _ in range(3)] == [True, True, False]
    clock.now += 1000
    assert [bucket.take() for _ in range(4)] == [True, True, True, False]


def test_pings_are_counted_as_grpc_counts_them() -> None:
    clock = Clock()
    guard = Guard(10, clock)
    for _ in range(50):
        guard.ping()
        clock.now += h2_guard.PING_INTERVAL_S + 0.1
    guard.ping()
    guard.ping()
    guard.ping()
    guard.sent()
    for _ in range(3):
        guard.ping()
    with pytest.raises(DenialOfServiceError):
        guard.ping()


# -- output


class FakeTransport(asyncio.Transport):
    """Keeps what is written, and may be full."""

    def __init__(self) -> None:
        super().__init__()
        self.written: list[bytes] = []
        self.on_write: Callable[[], None] = lambda: None
        self.aborted = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.written.append(bytes(data))
        self.on_write()

    def get_write_buffer_size(self) -> int:
        return sum(map(len, self.written))

    def is_closing(self) -> bool:
        return self.aborted

    def abort(self) -> None:
        self.aborted = True

    def can_write_eof(self) -> bool:
        return False

    def pause_reading(self) -> None: ...
    def resume_reading(self) -> None: ...


class Rig:
    """A connection's sending half, and streams on it."""

    def __init__(self, window: int = 1 << 20) -> None:
        self.transport = FakeTransport()
        self.retired: list[int] = []
        self.wire = Wire(asyncio.get_running_loop(), self.retired.append, lambda: None, 16 << 20)
        self.wire.window = window
        self.wire.connect(self.transport)

    def output(self, stream: int, window: int = 65535, limit: int = 1 << 20) -> Output:
        output = Output(self.wire, stream, window, limit)
        output.open(b"")
        return output

    def frames(self) -> list[Frame]:
        data, found = b"".join(self.transport.written), []
        while data:
            size = 9 + int.from_bytes(data[:3], "big")
            found.append(parsed(data[:size]))
            data = data[size:]
        return found

    def sent(self, stream: int) -> bytes:
        return b"".join(f.data for f in self.frames() if isinstance(f, DataFrame) and f.stream_id == stream)


async def test_what_many_streams_send_in_one_turn_leaves_in_one_write() -> None:
    rig = Rig()
    outputs = [rig.output(stream) for stream in range(1, 201, 2)]
    for output in outputs:
        output.send(b"one")
        output.send(b"two")
        output.end(b"")
    assert rig.transport.written == []
    await asyncio.sleep(0)
    assert len(rig.transport.written) == 1
    assert all(rig.sent(stream) == framed(b"one") + framed(b"two") for stream in range(1, 201, 2))
    assert rig.retired == list(range(1, 201, 2))
    assert rig.wire.window == (1 << 20) - 100 * 16


async def test_both_windows_are_charged_on_the_short_way_and_on_the_long_one() -> None:
    rig = Rig(window=50_000)
    output = rig.output(1, window=40_000)
    output.send(b"x" * QUICK_BYTES)
    output.send(b"x" * (QUICK_BYTES + 1))
    await asyncio.sleep(0)
    sent = 2 * QUICK_BYTES + 1 + 10
    assert (rig.wire.window, output.window) == (50_000 - sent, 40_000 - sent)
    assert rig.sent(1) == framed(b"x" * QUICK_BYTES) + framed(b"x" * (QUICK_BYTES + 1))


@given(st.lists(st.integers(0, 9000), max_size=8), st.lists(st.integers(1, 20_000), max_size=12), st.integers(0, 2**20))
def test_messages_come_out_whole_in_order_and_never_beyond_a_window(
    sizes: list[int], steps: list[int], connection_window: int
) -> None:
    async def main() -> None:
        rig = Rig(window=connection_window)
        output = rig.output(1, window=0)
        whole = b""
        allowed = 0
        for number, size in enumerate(sizes):
            output.send(bytes([number]) * size)
            whole += framed(bytes([number]) * size)
        output.end(b"")
        for step in steps:
            output.window += step
            allowed += step
            output.resume()
            await asyncio.sleep(0)
            data = rig.sent(1)
            assert data == whole[: min(allowed, connection_window)]
            assert output.unread_bytes == len(whole) - len(data)
        assert (rig.retired == [1]) == (rig.sent(1) == whole)

    asyncio.run(main())


async def test_a_full_transport_stops_the_streams_and_its_emptying_lets_them_take_turns() -> None:
    rig = Rig()
    rig.transport.on_write = lambda: rig.wire.flow(False)
    outputs = {stream: rig.output(stream, window=1 << 20) for stream in (1, 3)}
    for stream, output in outputs.items():
        output.send(bytes([stream]) * 200_000)
    await asyncio.sleep(0)
    assert rig.sent(1) == b""  # Their heads filled it.
    for _ in range(20):
        rig.wire.flow(True)
        await asyncio.sleep(0)
    order = [frame.stream_id for frame in rig.frames() if isinstance(frame, DataFrame)]
    assert order[:8] == [1, 3] * 4
    assert all(len(rig.sent(stream)) == 200_005 for stream in outputs)


async def test_too_much_unread_is_refused_and_a_message_that_is_out_in_part_is_finished() -> None:
    rig = Rig()
    output = rig.output(1, window=10, limit=1000)
    output.send(b"a" * 900)
    await asyncio.sleep(0)
    output.send(b"b" * 900)
    with pytest.raises(ClientTooSlow):
        output.send(b"c")
    output.drop()
    output.end(b"")
    assert rig.retired == []
    output.window += 5000
    output.resume()
    await asyncio.sleep(0)
    assert rig.sent(1) == framed(b"a" * 900)
    assert rig.retired == [1]


async def test_only_the_first_end_counts() -> None:
    rig = Rig()
    output = rig.output(1, window=0)
    output.send(b"a")
    output.end(b"first")
    output.end(b"second")
    output.window = 100
    output.resume()
    await asyncio.sleep(0)
    assert rig.transport.written[-1].endswith(b"first")


async def test_a_dead_output_sends_nothing_and_lets_its_waiter_go() -> None:
    rig = Rig()
    output = rig.output(1, window=3)
    await asyncio.sleep(0)
    output.send(b"abc")
    waiting = asyncio.create_task(output.flushed(60))
    await asyncio.sleep(0)
    output.kill()
    assert await waiting
    output.send(b"x" * QUICK_BYTES * 2)
    output.send(b"x")
    output.end(b"")
    await asyncio.sleep(0)
    assert rig.sent(1) == framed(b"abc")[:3]
    assert not rig.wire.waiting
    assert rig.retired == []


async def test_a_client_that_reads_nothing_is_cut_off_once_it_owes_too_much() -> None:
    rig = Rig()
    rig.wire.flow(False)
    for _ in range(5000):
        rig.wire.say(bytes(1000))
    assert rig.transport.aborted
    assert rig.transport.get_write_buffer_size() < 1_100_000
