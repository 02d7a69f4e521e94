"""A step with very many outputs is delivered a part at a time, and several small ones that came at once together."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import pytest

from router.errors import KvlaneError, ReplicaLost
from router.lane import frames
from router.lane.client import DEAR, MOST_OUTPUTS, Lane, LaneRefused
from router.lane.frames import End, Output, Step, Welcome
from router.testing import make_request
from router.types import EngineInfo, Headers, Load, Receipt, Rpc

STREAMS = 3 * MOST_OUTPUTS + 10
AT_ONCE = MOST_OUTPUTS // DEAR
"""Answers that begin or end in one turn."""


class Pipe(asyncio.Transport):
    def __init__(self) -> None:
        super().__init__()
        self.reading = True
        self.gone = False

    def write(self, data: Any) -> None: ...

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True

    def is_closing(self) -> bool:
        return self.gone

    def abort(self) -> None:
        self.gone = True


class Owner:
    def __init__(self) -> None:
        self.lost: list[ReplicaLost] = []

    def lane_opened(self, lane: Lane) -> None: ...
    def lane_draining(self, lane: Lane) -> None: ...
    def first_output(self, waited_s: float, expected_s: float) -> None: ...
    def cache_reported(self, lane: Lane, report: frames.CacheReport) -> None: ...

    def lane_lost(self, lane: Lane, error: ReplicaLost) -> None:
        self.lost.append(error)


class Sink:
    started = True

    def __init__(self, log: list[tuple[int, bytes]], number: int) -> None:
        self._log = log
        self._number = number

    def routed(self, receipt: Receipt) -> None: ...
    def head(self, status: int, headers: Headers) -> None: ...

    def data(self, payload: bytes, tokens: int) -> None:
        self._log.append((self._number, payload))


class Bench:
    """A lane with `STREAMS` streams under way, and what was delivered on it."""

    def __init__(self) -> None:
        self.owner, self.pipe = Owner(), Pipe()
        self.delivered: list[tuple[int, bytes]] = []
        self.lane = Lane("a", b"secret", "test", self.owner)
        self.lane.connection_made(self.pipe)
        self.come(Welcome(frames.VERSION, "a", EngineInfo("sim", ()), Load()))
        self.tasks: list[asyncio.Task[End]] = []

    async def submit(self) -> None:
        self.tasks = [
            asyncio.create_task(self.lane.run(make_request(f"r{number}"), Sink(self.delivered, number)))
            for number in range(1, STREAMS + 1)
        ]
        await asyncio.sleep(0)

    def come(self, *what: frames.DownFrame) -> None:
        """These frames, in one read."""
        self.lane.data_received(b"".join(frames.encode(frame) for frame in what))

    async def caught_up(self) -> None:
        while not self.pipe.reading:
            await asyncio.sleep(0)

    async def outcomes(self) -> list[End | BaseException]:
        return await asyncio.gather(*self.tasks, return_exceptions=True)


def step(seq: int, payload: bytes, *, end: End | None = None, load: Load | None = None) -> Step:
    outputs = [Output(number, payload, 1, end) for number in range(1, STREAMS + 1)]
    return Step(seq, STREAMS, load or Load(running=STREAMS), outputs)


@pytest.fixture
async def bench() -> Bench:
    bench = Bench()
    await bench.submit()
    return bench


async def test_each_turn_of_the_loop_delivers_a_part_of_it(bench: Bench) -> None:
    bench.come(step(1, b"one"))
    seen = [len(bench.delivered)]
    assert not bench.pipe.reading
    while not bench.pipe.reading:
        await asyncio.sleep(0)
        seen.append(len(bench.delivered))
    assert seen == [MOST_OUTPUTS, 2 * MOST_OUTPUTS, 3 * MOST_OUTPUTS, STREAMS]
    assert bench.delivered == [(number, b"one") for number in range(1, STREAMS + 1)]
    assert bench.lane.steps == 1
    assert bench.lane.account.load == Load(running=STREAMS)
    bench.lane.close()
    await bench.outcomes()


@pytest.mark.parametrize("alone", [True, False], ids=["alone", "with another"])
@pytest.mark.parametrize("begins", [True, False], ids=["beginnings", "ends"])
async def test_of_answers_that_begin_or_end_a_turn_delivers_fewer(bench: Bench, begins: bool, alone: bool) -> None:
    head, end = (frames.Head(200, ()), None) if begins else (None, End("stop"))
    dear = [Output(number, b"x", 1, end, head) for number in range(1, 4 * AT_ONCE + 1)]
    load, seen = Load(running=5), []
    more = () if alone else (step(2, b"two"),)
    bench.come(Step(1, STREAMS, load, dear), *more)
    assert bench.lane.account.load == load
    while len(bench.delivered) < len(dear):
        seen.append(len(bench.delivered))
        await asyncio.sleep(0)
    assert seen[:3] == [AT_ONCE, 2 * AT_ONCE, 3 * AT_ONCE]
    await bench.caught_up()
    if alone:
        bench.come(step(2, b"two"))
        await bench.caught_up()
    assert bench.lane.steps == 2
    left = STREAMS if begins else STREAMS - len(dear)
    assert len(bench.delivered) == len(dear) + left
    bench.lane.close()
    await bench.outcomes()


@pytest.mark.parametrize("more", [0, 1])
async def test_as_many_as_a_turn_delivers_that_come_alone_wait_for_no_other_turn(bench: Bench, more: int) -> None:
    bench.come(
        Step(1, STREAMS, Load(), [Output(number, b"x", 1, End("stop")) for number in range(1, AT_ONCE + 1 + more)])
    )
    assert len(bench.delivered) == AT_ONCE
    assert bench.pipe.reading is not bool(more)
    await bench.caught_up()
    assert len(bench.delivered) == AT_ONCE + more
    bench.lane.close()
    await bench.outcomes()


async def test_a_few_that_end_among_many_that_go_on_are_delivered_at_once(bench: Bench) -> None:
    outputs = [Output(number, b"x", 1, End("stop") if number <= 5 else None) for number in range(1, 101)]
    bench.come(Step(1, STREAMS, Load(), outputs))
    assert len(bench.delivered) == 100
    assert bench.pipe.reading
    bench.lane.close()
    await bench.outcomes()


async def test_a_report_that_makes_no_sense_behind_many_ends_costs_the_lane_and_no_output(bench: Bench) -> None:
    def refuse(lane: Lane, report: frames.CacheReport) -> None:
        raise ValueError("no sense")

    bench.owner.cache_reported = refuse  # type: ignore[method-assign]
    ends = [Output(number, b"x", 1, End("stop")) for number in range(1, STREAMS + 1)]
    bench.come(Step(1, STREAMS, Load(), ends, frames.CacheReport(1)))
    while not bench.owner.lost:
        await asyncio.sleep(0)
    assert [type(error) for error in bench.owner.lost] == [LaneRefused]
    assert await bench.outcomes() == [End("stop")] * STREAMS


@pytest.mark.parametrize("size", [3, 2000], ids=["small frames", "large frames"])
async def test_what_comes_behind_it_waits_its_turn(bench: Bench, size: int) -> None:
    one, two, three = (letter * size for letter in (b"1", b"2", b"3"))
    bench.come(step(1, one), step(2, two))
    bench.come(Step(3, STREAMS, Load(running=7), [Output(5, three, 1)]), step(4, b"", end=End("stop")))
    assert len(bench.delivered) == MOST_OUTPUTS
    await bench.caught_up()
    everyone = range(1, STREAMS + 1)
    assert bench.delivered == [
        *((number, one) for number in everyone),
        *((number, two) for number in everyone),
        (5, three),
    ]
    assert await bench.outcomes() == [End("stop")] * STREAMS
    assert (bench.lane.steps, bench.lane.tokens) == (4, 2 * STREAMS + 1)


async def test_a_lane_that_is_lost_meanwhile_still_delivers_all_that_came(bench: Bench) -> None:
    bench.come(step(1, b"one"), step(2, b"two", end=End("stop")))
    bench.lane.connection_lost(None)
    assert len(bench.delivered) == 2 * STREAMS
    assert await bench.outcomes() == [End("stop")] * STREAMS
    delivered = list(bench.delivered)
    await asyncio.sleep(0)
    assert bench.delivered == delivered
    assert len(bench.owner.lost) == 1


async def test_a_lost_lanes_streams_fail_a_part_at_a_time(bench: Bench) -> None:
    bench.lane.connection_lost(None)
    assert bench.lane.streams == 0
    seen = [0]
    while seen[-1] < STREAMS:
        await asyncio.sleep(0)
        seen.append(sum(task.done() for task in bench.tasks))
    assert max(after - before for before, after in itertools.pairwise(seen)) <= AT_ONCE
    assert {type(each) for each in await bench.outcomes()} == {ReplicaLost}


async def test_a_stream_that_is_aborted_while_a_lost_lanes_streams_fail_stays_aborted(bench: Bench) -> None:
    bench.lane.connection_lost(None)
    bench.tasks[-1].cancel()
    outcomes = await bench.outcomes()
    assert type(outcomes[-1]) is asyncio.CancelledError
    assert {type(each) for each in outcomes[:-1]} == {ReplicaLost}


async def test_streams_whose_end_did_not_come_fail_with_the_lane(bench: Bench) -> None:
    bench.come(step(1, b"one"))
    bench.lane.connection_lost(None)
    assert len(bench.delivered) == STREAMS
    outcomes = await bench.outcomes()
    assert {type(each) for each in outcomes} == {ReplicaLost}


async def test_nonsense_behind_it_costs_the_lane_and_no_output(bench: Bench) -> None:
    bench.lane.data_received(frames.encode(step(1, b"one")) + b"\x03\x00\x00\x00abc")
    while not bench.owner.lost:
        await asyncio.sleep(0)
    assert [type(error) for error in bench.owner.lost] == [LaneRefused]
    assert len(bench.delivered) == STREAMS
    assert all(isinstance(each, KvlaneError) for each in await bench.outcomes())


async def test_a_stream_that_is_aborted_meanwhile_gets_nothing_more(bench: Bench) -> None:
    bench.come(step(1, b"one"))
    bench.tasks[-1].cancel()
    await bench.caught_up()
    assert len(bench.delivered) == STREAMS - 1
    bench.lane.close()
    await bench.outcomes()


def some(seq: int, payload: bytes, *numbers: int, end: End | None = None) -> Step:
    return Step(seq, STREAMS, Load(running=seq), [Output(number, payload, 1, end) for number in numbers])


async def test_steps_that_come_at_once_reach_each_sink_as_one(bench: Bench) -> None:
    bench.come(some(1, b"a", 1, 2), some(2, b"b", 2, 3), some(3, b"c", 2, 1, end=End("stop")), some(4, b"d", 3))
    assert bench.delivered == [(1, b"ac"), (2, b"abc"), (3, b"bd")]
    assert (bench.lane.steps, bench.lane.tokens, bench.lane.account.load.running) == (4, 7, 4)
    assert [await task for task in bench.tasks[:2]] == [End("stop")] * 2
    bench.lane.close()
    await bench.outcomes()


async def test_ends_of_many_late_steps_are_delivered_a_part_at_a_time(bench: Bench) -> None:
    each = AT_ONCE - 1
    steps = [some(at + 1, b"x", *range(each * at + 1, each * (at + 1) + 1), end=End("stop")) for at in range(20)]
    bench.come(*steps)
    seen = [len(bench.delivered)]
    while not bench.pipe.reading:
        await asyncio.sleep(0)
        seen.append(len(bench.delivered))
    assert max(after - before for before, after in itertools.pairwise([0, *seen])) <= AT_ONCE
    assert bench.delivered == [(number, b"x") for number in range(1, 20 * each + 1)]
    assert (bench.lane.steps, bench.lane.account.load.running) == (20, 20)
    bench.lane.close()
    await bench.outcomes()


async def test_late_steps_that_were_put_off_are_delivered_when_the_lane_is_lost(bench: Bench) -> None:
    steps = [some(at + 1, b"x", *range(10 * at + 1, 10 * at + 11), end=End("stop")) for at in range(20)]
    bench.come(*steps)
    assert len(bench.delivered) < 200
    bench.lane.connection_lost(None)
    assert len(bench.delivered) == 200
    outcomes = await bench.outcomes()
    assert outcomes[:200] == [End("stop")] * 200


async def test_other_frames_keep_their_place_among_steps(bench: Bench) -> None:
    bench.come(some(1, b"a", 1), some(2, b"b", 1), frames.Pong(1), some(3, b"c", 1), some(4, b"d", 1))
    assert bench.delivered == [(1, b"ab"), (1, b"cd")]
    bench.lane.close()
    await bench.outcomes()


async def test_an_answers_head_stands_before_its_payload_however_much_comes_at_once(bench: Bench) -> None:
    first = Output(1, b"a", 1, None, frames.Head(200, ()))
    bench.come(Step(1, STREAMS, Load(), [first]), some(2, b"b", 1), some(3, b"c", 1, end=End("stop")))
    assert bench.delivered == [(1, b"abc")]
    assert await bench.tasks[0] == End("stop")
    bench.lane.close()
    await bench.outcomes()


async def test_what_came_before_nonsense_is_delivered(bench: Bench) -> None:
    good = frames.encode(some(1, b"a", 1)) + frames.encode(some(2, b"b", 1))
    bench.lane.data_received(good + b"\x03\x00\x00\x00abc")
    assert bench.delivered == [(1, b"ab")]
    assert [type(error) for error in bench.owner.lost] == [LaneRefused]
    await bench.outcomes()


async def test_messages_of_a_grpc_stream_stay_apart() -> None:
    bench = Bench()
    task = asyncio.create_task(bench.lane.run(make_request("r", rpc=Rpc.GRPC), Sink(bench.delivered, 1)))
    await asyncio.sleep(0)
    bench.come(some(1, b"a", 1), some(2, b"b", 1), some(3, b"c", 1, end=End("stop")))
    assert bench.delivered == [(1, b"a"), (1, b"b"), (1, b"c")]
    assert await task == End("stop")
