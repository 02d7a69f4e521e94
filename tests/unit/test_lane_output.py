"""Large frames on a lane: the same bytes as small ones, in pieces, in order, and never broken into."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from router.lane import frames
from router.lane.client import Lane
from router.lane.frames import LARGE_BYTES, Submit
from router.lane.output import PIECE_BYTES, FrameOutput
from tests.fakes import DEADLINE_S, Fleet, RecordingSink, eventually, make_request

text = st.text(max_size=40)
submits = st.builds(
    Submit,
    stream=st.integers(0, 2**63),
    request_id=text,
    rpc=st.integers(0, 1),
    method=text,
    path=text,
    headers=st.lists(st.tuples(text, text), max_size=20).map(tuple),
    body=st.integers(1 << 16, 1 << 17).map(lambda size: b"b" * size),
    timeout_s=st.none() | st.floats(0, 1e6),
    priority=st.integers(-(2**31), 2**31),
    chain=st.binary(max_size=300),
    matched=st.integers(0, 2**31),
)


class Full(asyncio.Transport):
    """Takes what it is given and keeps a record of it."""

    def __init__(self) -> None:
        super().__init__()
        self.turns: list[list[bytes]] = [[]]

    def write(self, data: Any) -> None:
        self.turns[-1].append(bytes(data))

    @property
    def taken(self) -> bytes:
        return b"".join(b"".join(turn) for turn in self.turns)

    async def turn(self) -> None:
        self.turns.append([])
        await asyncio.sleep(0)


def output() -> tuple[FrameOutput, Full]:
    transport = Full()
    return FrameOutput(transport, asyncio.get_running_loop()), transport


@settings(derandomize=True, max_examples=200)
@given(submits)
def test_a_large_submit_has_the_bytes_of_a_small_one(submit: Submit) -> None:
    head, body, tail = frames.encode_large(submit)
    assert head + body + tail == frames.encode(submit)
    assert body is submit.body


async def test_a_large_frame_goes_out_in_pieces_and_what_comes_meanwhile_behind_it() -> None:
    out, transport = output()
    body = bytes(range(256)) * (3 * PIECE_BYTES // 256) + b"end"
    out.write(b"before")
    out.write_large((b"head", body, b"tail"))
    out.write(b"abort")
    out.write_large((b"second", body, b""))
    out.write(b"last")
    while not transport.taken.endswith(b"last"):
        await transport.turn()
    assert transport.taken == b"beforehead" + body + b"tailabort" + b"second" + body + b"last"
    assert max(sum(map(len, turn)) for turn in transport.turns) < 2 * PIECE_BYTES
    out.write(b"direct")
    assert transport.turns[-1][-1] == b"direct"


async def test_nothing_is_written_while_the_transport_is_full() -> None:
    out, transport = output()
    out.write_large((b"a" * 4 * PIECE_BYTES,))
    await transport.turn()
    out.pause()
    before = transport.taken
    for _ in range(3):
        await transport.turn()
    assert transport.taken == before
    out.resume()
    while len(transport.taken) < 4 * PIECE_BYTES:
        await transport.turn()


async def test_what_waits_for_a_lost_transport_is_forgotten() -> None:
    out, transport = output()
    out.write_large((b"a" * 4 * PIECE_BYTES,))
    out.close()
    out.write(b"more")
    await transport.turn()
    assert transport.taken == b""


async def _run(lane: Lane, request_id: str, body: bytes) -> None:
    request = msgspec.structs.replace(make_request(request_id), body=body)
    await lane.run(request, RecordingSink())


async def test_streams_with_large_and_small_bodies_arrive_whole_in_the_order_they_began() -> None:
    fleet = Fleet()
    try:
        engine = await fleet.add("a")
        await fleet.until(lambda: fleet.ready() == 1)
        (lane,) = fleet.router.lanes()
        bodies = [
            b"l" * (20 * LARGE_BYTES + 7),
            b"small",
            b"m" * LARGE_BYTES,
            b"n" * (LARGE_BYTES - 1),
            b"o" * (9 << 20),
        ]
        tasks = [asyncio.create_task(_run(lane, str(at), body)) for at, body in enumerate(bodies)]
        await eventually(lambda: len(engine.calls) == len(bodies))
        assert [call.body for call in engine.calls] == bodies
        for out in engine.outs:
            out.end("stop")
        await asyncio.wait_for(asyncio.gather(*tasks), DEADLINE_S)
    finally:
        await fleet.close()


async def test_a_large_stream_that_is_cancelled_at_once_is_aborted_after_it_arrived() -> None:
    fleet = Fleet()
    try:
        engine = await fleet.add("a")
        await fleet.until(lambda: fleet.ready() == 1)
        (lane,) = fleet.router.lanes()
        task = asyncio.create_task(_run(lane, "large", b"l" * (8 << 20)))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        await eventually(lambda: len(engine.calls) == 1 and fleet.replicas["a"].active == 0)
    finally:
        await fleet.close()


async def test_of_frames_that_may_wait_the_first_goes_at_once_and_the_others_in_one_write() -> None:
    out, transport = output()
    for frame in (b"one", b"two", b"three"):
        out.join(frame)
    assert transport.turns == [[b"one"]]
    await transport.turn()
    assert transport.turns == [[b"one"], [b"twothree"]]
    out.join(b"four")
    assert transport.turns[-1] == [b"twothree", b"four"], "a frame of another turn waited"
    await transport.turn()
    assert transport.taken == b"onetwothreefour"


async def test_frames_that_wait_are_written_once_they_are_many() -> None:
    out, transport = output()
    frames = [bytes([at]) * 3000 for at in range(40)]
    for frame in frames:
        out.join(frame)
    (written,) = transport.turns
    assert written[0] == frames[0]
    assert [len(each) for each in written[1:]] == [33_000] * 3, "11 frames are as many as may wait"
    await transport.turn()
    assert transport.taken == b"".join(frames)


async def test_nothing_overtakes_frames_that_wait() -> None:
    draw = random.Random(3)
    for _ in range(300):
        out, transport = output()
        said = b""
        for number in range(draw.randrange(2, 30)):
            frame = b"<%d>" % number * draw.choice([1, 1, 10, 3000])
            deed = draw.choice(["join", "join", "join", "write", "large", "turn", "full"])
            if deed == "join":
                out.join(frame)
            elif deed == "write":
                out.write(frame)
            elif deed == "large":
                out.write_large((frame, b"|" * (PIECE_BYTES + 5), b"."))
                frame += b"|" * (PIECE_BYTES + 5) + b"."
            elif deed == "turn":
                await transport.turn()
                continue
            else:
                out.pause()
                await transport.turn()
                out.resume()
                continue
            said += frame
        for _ in range(40):
            await transport.turn()
        assert transport.taken == said


async def test_what_waits_is_forgotten_with_the_lane() -> None:
    out, transport = output()
    out.join(b"one")
    out.join(b"two")
    out.close()
    out.join(b"three")
    out.write(b"four")
    await transport.turn()
    await transport.turn()
    assert transport.taken == b"one"
