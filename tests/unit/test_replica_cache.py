"""What a replica tells each router of its KV cache: sessions over a transport in memory, a ledger under control."""

import asyncio
import struct
from typing import Any

import pytest

from engine.cache_ledger import CacheLedger
from engine.cache_report import CacheFeed
from engine.replica import URGENT_GAP_S, LaneSession, Replica
from router.lane import frames
from router.lane.frames import CacheReport, Hello, Resync, Step, Submit, Welcome
from router.types import CacheMode, Chain, Rpc
from tests.fakes import SECRET, ScriptedEngine

BLOCK = 16


class CachingEngine(ScriptedEngine):
    """Its feed is the test's."""

    def __init__(self, **limits: int) -> None:
        super().__init__()
        self.ledger = CacheLedger(BLOCK)
        self.feed: CacheFeed = CacheFeed(self.ledger, CacheMode.EXACT, **limits)

    def holds(self, *blocks: int) -> None:
        """Prefix blocks are held, each in a KV block of its own."""
        keys = [block + 1000 for block in blocks]
        ends = [BLOCK * (i + 1) for i in range(len(blocks))]
        self.ledger.prompt(Chain(256, 0, blocks, 256 * len(blocks)), keys, ends)
        for key in keys:
            self.ledger.stored(key)

    def evicts(self, block: int) -> None:
        self.ledger.evicted(block + 1000)


class MemoryTransport(asyncio.Transport):
    """Keeps what the session writes."""

    def __init__(self, session: LaneSession) -> None:
        super().__init__()
        self.session = session
        self.written: list[frames.DownFrame] = []
        self.pause_at: int | None = None
        """Frames after which the router stops reading."""
        self._splitter = frames.FrameSplitter(frames.MAX_FRAME_BYTES)

    def write(self, data: Any) -> None:
        self.written += [frames.decode_down(body) for body in self._splitter.feed(bytes(data))]
        if self.pause_at is not None and len(self.written) >= self.pause_at:
            self.pause_at = None
            self.session.pause_writing()

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None: ...

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default

    def close(self) -> None: ...

    def abort(self) -> None: ...


class Router:
    """The other end of a session: applies reports as the index would."""

    def __init__(self, replica: Replica) -> None:
        self.session = LaneSession(replica)
        self.transport = MemoryTransport(self.session)
        self.session.connection_made(self.transport)
        (challenge,) = self.transport.written
        assert isinstance(challenge, frames.Challenge)
        self._greeting = Hello(frames.VERSION, frames.prove(SECRET, challenge.nonce, "r"), "r")
        self.held: dict[int, int] = {}
        self.reports: list[CacheReport] = []

    def greet(self) -> None:
        self.send(self._greeting)

    def send(self, frame: frames.UpFrame) -> None:
        self.session.data_received(frames.encode(frame))

    async def steps(self) -> list[Step]:
        """The steps since the last call, once the loop has turned; their reports are applied."""
        await asyncio.sleep(0)
        written, self.transport.written = self.transport.written, []
        steps = [frame for frame in written if isinstance(frame, Step)]
        for step in steps:
            if step.cache is not None:
                self._apply(step.cache)
        return steps

    def _apply(self, report: CacheReport) -> None:
        assert report.seq == (self.reports[-1].seq if self.reports else 0) + 1
        self.reports.append(report)
        if report.snapshot:
            self.held.clear()
        for block in hashes(report.evicted):
            self.held.pop(block, None)
        depths = struct.unpack(f"<{len(report.depths) // 4}I", report.depths)
        self.held.update(zip(hashes(report.stored), depths, strict=True))


def hashes(packed: bytes) -> tuple[int, ...]:
    return struct.unpack(f"<{len(packed) // 8}Q", packed)


@pytest.fixture
async def engine() -> CachingEngine:
    return CachingEngine()


def joined(engine: ScriptedEngine) -> tuple[Replica, Router]:
    """A replica and a router whose lane is open."""
    replica = Replica("a", engine, SECRET)
    engine.on_step(replica.load_changed)
    router = Router(replica)
    router.greet()
    return replica, router


def submit(stream: int) -> Submit:
    return Submit(stream, f"r{stream}", Rpc.HTTP, "POST", "/v1/completions", (), b"{}")


async def test_a_router_gets_a_snapshot_right_behind_the_welcome(engine: CachingEngine) -> None:
    engine.holds(1, 2, 3)
    _, router = joined(engine)
    assert isinstance(router.transport.written[1], Welcome)
    (step,) = await router.steps()
    assert step.cache is not None
    assert step.cache.snapshot
    assert router.held == {1: 16, 2: 32, 3: 48}


async def test_changes_travel_in_the_step_of_the_output_that_came_with_them(engine: CachingEngine) -> None:
    _, router = joined(engine)
    await router.steps()
    router.send(submit(1))
    engine.holds(1, 2)
    engine.outs[0].data(b"x", 1)
    (step,) = await router.steps()
    assert [output.payload for output in step.outputs] == [b"x"]
    assert router.held == {1: 16, 2: 32}


async def test_urgent_output_takes_the_changes_along(engine: CachingEngine) -> None:
    _, router = joined(engine)
    await router.steps()
    router.send(submit(1))
    engine.holds(1)
    engine.outs[0].data(b"x", 1, urgent=True)
    step = router.transport.written[-1]
    assert isinstance(step, Step)
    assert step.cache is not None
    assert hashes(step.cache.stored) == (1,)


async def test_urgent_output_right_behind_another_waits_for_the_turn_of_the_loop(engine: CachingEngine) -> None:
    _, router = joined(engine)
    await router.steps()
    now = 5.0
    router.session.clock = lambda: now
    for stream in (1, 2, 3):
        router.send(submit(stream))
        engine.outs[-1].data(b"x", 1, urgent=True)
        if stream == 2:
            now += URGENT_GAP_S
    payloads = [[(output.stream, output.payload) for output in step.outputs] for step in await router.steps()]
    assert [each for each in payloads if each] == [[(1, b"x")], [(2, b"x"), (3, b"x")]]


async def test_urgent_output_that_had_to_wait_goes_with_the_first_output_after_that(engine: CachingEngine) -> None:
    _, router = joined(engine)
    await router.steps()
    now = 5.0
    router.session.clock = lambda: now
    for stream in (1, 2, 3, 4):
        router.send(submit(stream))
    engine.outs[0].data(b"x", 1, urgent=True)
    engine.outs[1].data(b"x", 1, urgent=True)
    engine.outs[2].data(b"x", 1)
    now += URGENT_GAP_S
    engine.outs[3].data(b"x", 1)
    payloads = [
        [output.stream for output in step.outputs] for step in router.transport.written if isinstance(step, Step)
    ]
    assert [each for each in payloads if each] == [[1], [2, 3, 4]]
    engine.outs[3].data(b"x", 1)
    now += URGENT_GAP_S
    engine.outs[2].data(b"x", 1)
    assert not any(isinstance(step, Step) and len(step.outputs) == 2 for step in router.transport.written)


async def test_an_idle_replica_tells_of_evictions_without_a_step_of_its_engine(engine: CachingEngine) -> None:
    engine.holds(1, 2)
    _, router = joined(engine)
    await router.steps()
    engine.evicts(2)
    (step,) = await router.steps()
    assert not step.outputs
    assert router.held == {1: 16}
    assert await router.steps() == []


async def test_an_unchanged_cache_adds_nothing_to_a_step(engine: CachingEngine) -> None:
    engine.holds(1)
    _, router = joined(engine)
    await router.steps()
    router.send(submit(1))
    engine.outs[0].data(b"x", 1)
    (step,) = await router.steps()
    assert step.cache is None


async def test_a_resync_is_answered_with_a_snapshot_though_nothing_changed(engine: CachingEngine) -> None:
    engine.holds(1, 2)
    _, router = joined(engine)
    await router.steps()
    router.send(Resync(1))
    (step,) = await router.steps()
    assert step.cache is not None
    assert step.cache.snapshot
    assert router.held == {1: 16, 2: 32}


async def test_a_router_that_joins_later_knows_what_the_first_one_knows(engine: CachingEngine) -> None:
    replica, first = joined(engine)
    engine.holds(1, 2, 3)
    await first.steps()
    engine.evicts(3)
    second = Router(replica)
    second.greet()
    await first.steps()
    await second.steps()
    assert first.held == second.held == {1: 16, 2: 32}
    engine.holds(9)
    await first.steps()
    await second.steps()
    assert first.held == second.held == {1: 16, 2: 32, 9: 16}


async def test_a_long_snapshot_goes_out_in_parts_in_one_turn_of_the_loop() -> None:
    engine = CachingEngine(part_blocks=4)
    engine.holds(*range(1, 11))
    _, router = joined(engine)
    steps = await router.steps()
    assert [len(hashes(step.cache.stored)) for step in steps if step.cache is not None] == [4, 4, 2]
    assert [report.snapshot for report in router.reports] == [True, False, False]
    assert len(router.held) == 10


async def test_parts_of_a_snapshot_wait_while_the_router_does_not_read() -> None:
    engine = CachingEngine(part_blocks=4)
    engine.holds(*range(1, 11))
    _, router = joined(engine)
    router.transport.pause_at = len(router.transport.written) + 1
    assert len(await router.steps()) == 1
    assert await router.steps() == []
    engine.evicts(10)  # not sent yet, or sent and taken back: either way it must not remain
    router.session.resume_writing()
    await router.steps()
    assert sorted(router.held) == list(range(1, 10))


async def test_changes_while_the_router_does_not_read_come_once_and_net(engine: CachingEngine) -> None:
    engine.holds(1, 2)
    _, router = joined(engine)
    await router.steps()
    router.session.pause_writing()
    engine.holds(5)
    engine.evicts(2)
    engine.evicts(5)
    assert await router.steps() == []
    router.session.resume_writing()
    (step,) = await router.steps()
    assert step.cache is not None
    assert hashes(step.cache.stored) == ()
    assert router.held == {1: 16}


async def test_a_replica_that_lost_its_events_says_so_and_takes_its_blocks_back(engine: CachingEngine) -> None:
    engine.holds(1, 2)
    _, router = joined(engine)
    await router.steps()
    engine.feed.set_mode(CacheMode.APPROXIMATE, "event batches 3 to 4 were lost")
    (step,) = await router.steps()
    assert step.cache is not None
    assert (step.cache.mode, step.cache.cause) == ("approximate", "event batches 3 to 4 were lost")
    assert router.held == {}


async def test_comparisons_go_out_with_the_next_step(engine: CachingEngine) -> None:
    _, router = joined(engine)
    await router.steps()
    router.send(submit(1))
    engine.feed.seen(1000, 250)
    engine.feed.compared(off=True)
    engine.feed.compared(off=False)
    engine.outs[0].data(b"x", 1)
    await router.steps()
    report = router.reports[-1]
    assert (report.prompt_bytes, report.prompt_tokens, report.compared, report.off) == (1000, 250, 2, 1)


async def test_a_lost_lane_stops_reading_the_feed(engine: CachingEngine) -> None:
    _, router = joined(engine)
    await router.steps()
    router.session.connection_lost(None)
    engine.holds(1, 2)
    assert await router.steps() == []
    engine.feed.set_mode(CacheMode.APPROXIMATE, "x")
    assert await router.steps() == []


async def test_an_engine_that_tells_nothing_of_its_cache_sends_no_reports() -> None:
    engine = ScriptedEngine()
    _, router = joined(engine)
    assert await router.steps() == []
    router.send(Resync(0))
    assert await router.steps() == []


async def test_output_goes_on_where_the_cache_cannot_be_reported(
    engine: CachingEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.holds(1)
    _, router = joined(engine)
    await router.steps()
    router.send(submit(1))

    def broken(block: int) -> int:
        raise RuntimeError("a defect")

    monkeypatch.setattr(engine.ledger, "depth", broken)
    engine.holds(2)
    engine.outs[0].data(b"x", 1)
    (step,) = await router.steps()
    assert [output.payload for output in step.outputs] == [b"x"]
    assert step.cache is not None
    # What the router knew is void, and it knows why.
    assert (step.cache.snapshot, step.cache.mode) == (True, "approximate")
    assert step.cache.cause == "the replica failed to report"
    engine.outs[0].data(b"y", 1)
    (step,) = await router.steps()
    assert [output.payload for output in step.outputs] == [b"y"]
    assert step.cache is None
