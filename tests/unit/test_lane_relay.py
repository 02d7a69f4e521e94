"""The short way of plain steps beside the Python one: whatever comes, nobody can tell which of them took it."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router import compiled
from router.errors import ClientTooSlow, KvlaneError, ReplicaLost
from router.ingress import http_response
from router.lane import client, frames
from router.lane.frames import CacheReport, End, Head, Output, Step
from router.lane.meter import FrameMeter
from router.load import model
from router.pool import Pool
from router.types import Charge, EngineInfo, Headers, Load, Receipt, Request, Rpc
from tests.twins import resident_kb
from tests.unit.pythonic import pythonic

pytestmark = pytest.mark.skipif(
    compiled.part("router.lane._relay") is None, reason="router.lane._relay is not compiled, or left out"
)
_, TWIN_MODEL, _, TWIN_CLIENT, TWIN_RESPONSE = pythonic(
    [
        "router.lane.relay",
        "router.load.model",
        "router.load.account",
        "router.lane.client",
        "router.ingress.http_response",
    ]
)
INFO = EngineInfo("sim", (), max_num_seqs=8, kv_blocks=100, kv_block_tokens=16)
REQUESTS = {kind: Request("r", "m", rpc, "/", b"") for kind, rpc in (("http", Rpc.HTTP), ("grpc", Rpc.GRPC))}
KINDS = ("open", "open", "grpc", "sized", "held", "fails", "odd", "closes", "aborts")


class Loop(asyncio.SelectorEventLoop):
    """Its clock is set by hand."""

    now = 100.0

    def time(self) -> float:
        return self.now


class Pipe(asyncio.Transport):
    def __init__(self, log: list[Any]) -> None:
        super().__init__()
        self._log = log

    def write(self, data: Any) -> None:
        self._log.append(("up", bytes(data)))

    def pause_reading(self) -> None: ...
    def resume_reading(self) -> None: ...

    def is_closing(self) -> bool:
        return False

    def abort(self) -> None:
        self._log.append("aborted")


class Reader:
    """A client's connection."""

    def __init__(self, log: list[Any], number: int, *, flowing: bool) -> None:
        self._log, self._number, self.flowing = log, number, flowing

    def write_now(self, data: bytes) -> None:
        self._log.append((self._number, "now", data))

    def write(self, data: bytes | memoryview) -> None:
        self._log.append((self._number, "write", bytes(data)))

    def socket(self) -> int:
        return -1

    def check_room(self) -> None: ...
    def answered(self, exchange: Any, *, close: bool) -> None: ...
    def cut(self) -> None: ...


class Sink:
    """Does what its kind says at its third payload."""

    started = True

    def __init__(self, world: World, lane: int, number: int, kind: str) -> None:
        self._world, self._lane, self._number, self._kind = world, lane, number, kind
        self._left = 3

    def routed(self, receipt: Receipt) -> None: ...

    def head(self, status: int, headers: Headers) -> None:
        self._world.log.append((self._number, "head", status, headers))

    def data(self, payload: bytes, tokens: int) -> None:
        assert type(payload) is bytes
        world = self._world
        world.log.append((self._number, payload, tokens))
        self._left -= 1
        if self._left:
            return
        if self._kind == "fails":
            raise ClientTooSlow("too slow")
        if self._kind == "odd":
            raise ValueError("a defect")
        if self._kind == "closes":
            world.lanes[self._lane].close()
        if self._kind == "aborts":  # The streams on both sides of it, as far as `run` can.
            streams = world.lanes[self._lane]._streams
            for other in (self._number - 1, self._number + 1):
                streams.pop(other, None)


class World:
    """Two replicas of one model, their lanes, and streams of all kinds on each."""

    def __init__(self, clients: ModuleType, models: ModuleType, responses: ModuleType) -> None:
        self.log: list[Any] = []
        self.loop = Loop()
        self.fleet = models.new_fleet()
        self.meter = FrameMeter()
        self.responses = responses
        self.tasks: list[asyncio.Task[End]] = []
        self.exchanges: list[Any] = []
        self.lanes: list[Any] = []

        async def opened() -> None:
            for name in ("a", "b"):
                foresee: Callable[[EngineInfo], Any] = lambda info: self.fleet.foresight()  # noqa: E731
                lane = clients.Lane(name, b"s", "test", self, foresee, self.meter)
                lane.connection_made(Pipe(self.log))
                lane.data_received(frames.encode(frames.Welcome(frames.VERSION, name, INFO, Load())))
                self.lanes.append(lane)

        self.loop.run_until_complete(opened())
        self.pool = Pool(self.lanes)
        self.pool.watch()
        for lane in (0, 1):
            for kind in KINDS:
                self.submit(lane, kind)

    def lane_opened(self, lane: Any) -> None: ...
    def lane_draining(self, lane: Any) -> None: ...

    def lane_lost(self, lane: Any, error: ReplicaLost) -> None:
        self.log.append(("lost", type(error).__name__, error.message))

    def first_output(self, waited_s: float, expected_s: float) -> None:
        self.log.append(("first", waited_s, expected_s))

    def cache_reported(self, lane: Any, report: CacheReport) -> None:
        self.log.append(report)
        if report.seq == 13:
            raise ValueError("unlucky")

    def sink(self, lane: int, kind: str) -> Any:
        number = len(self.tasks)
        if kind not in ("open", "sized", "held"):
            return Sink(self, lane, self.lanes[lane]._last_stream + 1, kind)
        envelope = self.responses.Envelope("r", "POST", "/", False, True, "", lambda: "")
        exchange = self.responses.Exchange(Reader(self.log, number, flowing=kind != "held"), envelope)
        length = (("content-length", "40"),) if kind == "sized" else ()
        exchange.head(200, (("content-type", "text/event-stream"), *length))
        exchange.data(b"first", 1)
        self.exchanges.append(exchange)
        return exchange

    def submit(self, lane: int, kind: str) -> None:
        request = REQUESTS["grpc" if kind == "grpc" else "http"]
        charge = Charge(10 + len(self.tasks), 0.1 * len(self.tasks))
        run = self.lanes[lane].run(request, self.sink(lane, kind), charge, 0.5)
        self.tasks.append(self.loop.create_task(run))
        self.turn()

    def turn(self) -> None:
        self.loop.call_soon(self.loop.stop)
        self.loop.run_forever()

    def come(self, lane: int, data: bytes) -> None:
        try:
            self.lanes[lane].data_received(data)
        except Exception as error:
            self.log.append(("raised", type(error).__name__, str(error)))

    def look(self, lane: int) -> str:
        """What a decision would see."""
        account, snapshot = self.lanes[lane].account, self.pool.snapshot("m", self.loop.now)
        # First what needs no views, then these.
        briefs = [
            (one.queue_depth, one.asleep, one.expects_s(snapshot.now, 100, 30)) for one in map(snapshot.brief, "ab")
        ]
        numbers = getattr(snapshot.pool, "numbers", None)
        told = None if numbers is None else list(memoryview(numbers).cast("d"))
        room, terms = self.pool.room(), [float(term) for view in snapshot.replicas for term in view.terms]
        assert told is None or repr(told) == repr(terms)
        return repr((self.fleet.version, briefs, room, terms, account.view(), account.load, account.unacked))

    def everything(self) -> str:
        """All that was done and learned."""
        fleet = self.fleet
        seen = [fleet.version, fleet.now, fleet.budget]
        for fit in (fleet.prefill, fleet.decode):
            seen += [fit.coefficients, fit.steps]
        for lane in self.lanes:
            seen += [lane.tokens, lane.steps, lane.streams, lane._heard, lane.oldest_s()]
        seen += [self.look(0), self.look(1), self.meter.sizes, self.meter.bytes, self.meter.batches, self.meter.outputs]
        seen += [(exchange._open, exchange.started, exchange.done) for exchange in self.exchanges]
        return repr((self.log, seen))

    def close(self) -> list[str]:
        for task in self.tasks:
            task.cancel()
        outcomes = self.loop.run_until_complete(asyncio.gather(*self.tasks, return_exceptions=True))
        self.loop.close()
        return [repr(outcome) for outcome in outcomes]


def worlds() -> tuple[World, World]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(compiled.VARIABLE, "0")
        theirs = World(TWIN_CLIENT, TWIN_MODEL, TWIN_RESPONSE)
    return World(client, model, http_response), theirs


# -- what comes

small = st.integers(0, 200)
payloads = st.one_of(st.just(b"x" * 15), st.binary(max_size=300), st.just(b"y" * 70_000))
plain = st.builds(Output, st.integers(1, 12), payloads, st.integers(0, 3))
ends = st.one_of(st.none(), st.builds(End, st.just("stop")), st.just(End("", "ReplicaFailed", "broke")))
heads = st.one_of(st.none(), st.just(Head(200, (("content-type", "text/event-stream"),))))
outputs = st.one_of(
    plain, plain, plain, st.builds(Output, st.integers(0, 12), payloads, st.integers(-1, 1 << 41), ends, heads)
)
milliseconds = st.sampled_from([0.0, 3.0, 5.0, 5.5, 6.25, 40.0])
loads = st.builds(
    Load,
    small,
    small,
    st.sampled_from([0, 0, 500, 70_000]),
    st.floats(0.0, 1.0),
    milliseconds,
    st.floats(0.0, 1e7),
    st.sampled_from([0, 0, 300, 5000]),
    st.floats(0.0, 1e7),
    small,
    st.integers(0, 100_000),
    st.sampled_from([False] * 9 + [True]),
)
odd_loads = st.builds(
    Load,
    st.integers(-(1 << 62), 1 << 62),
    small,
    st.integers(-5, 1 << 50),
    st.floats(),
    st.floats(),
    st.floats(),
    small,
    st.floats(),
    small,
    small,
)
reports = st.sampled_from([None] * 9 + [CacheReport(3), CacheReport(13), CacheReport(4, snapshot=True)])
steps = st.builds(
    Step, small, st.integers(0, 14), st.one_of(loads, loads, loads, odd_loads), st.lists(outputs, max_size=5), reports
)
plain_steps = st.builds(Step, small, st.integers(0, 14), loads, st.lists(plain, min_size=1, max_size=5))


@st.composite
def loose(draw: st.DrawFn) -> bytes:
    """A step whose items are what MessagePack calls something else, and more or fewer of them."""
    whole = msgspec.msgpack.decode(frames.encode(draw(plain_steps))[4:])
    place: list[Any] = whole
    for _ in range(draw(st.integers(0, 2))):
        inner = [item for item in place if isinstance(item, list) and item]
        if inner:
            place = draw(st.sampled_from(inner))
    at = draw(st.integers(0, len(place)))
    item: Any = draw(
        st.sampled_from([None, 0, 1, -1, 1.0, 0.5, 1 << 40, (1 << 40) + 1, 1 << 63, True, "text", b"bytes", [], {}])
    )
    if draw(st.booleans()):
        place[at : at + 1] = [item]
    else:
        del place[at:]
    body = msgspec.msgpack.encode(whole)
    return len(body).to_bytes(4, "little") + body


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    data = bytearray(frames.encode(draw(plain_steps)))
    at = draw(st.integers(0, len(data) - 1))
    how = draw(st.sampled_from(["set", "set", "cut", "add"]))
    if how == "set":
        data[at] = draw(
            st.sampled_from([0, 1, 0x7F, 0x80, 0x90, 0x91, 0x95, 0x9F, 0xC0, 0xC2, 0xC4, 0xC6, 0xCB, 0xCF, 0xDC])
        )
    elif how == "cut":
        del data[at : at + draw(st.integers(1, 9))]
    else:
        data[at:at] = draw(st.binary(min_size=1, max_size=4))
    if at >= 4 and draw(st.booleans()) and len(data) >= 4:
        data[:4] = (len(data) - 4).to_bytes(4, "little")
    return bytes(data)


whole = steps.map(frames.encode)
data = st.one_of(
    plain_steps.map(frames.encode),
    plain_steps.map(frames.encode),
    whole,
    st.lists(whole, min_size=2, max_size=4).map(b"".join),
    loose(),
)
lane_of = st.integers(0, 1)
deeds = st.one_of(
    st.tuples(st.just("come"), lane_of, data),
    st.tuples(st.just("come"), lane_of, data),
    st.tuples(st.just("come"), lane_of, data),
    st.tuples(st.just("cut"), lane_of, data, st.integers(0, 400)),
    st.tuples(st.just("again"), lane_of, plain_steps.map(frames.encode), st.integers(2, 80)),
    st.tuples(st.just("look"), lane_of),
    st.tuples(st.just("submit"), lane_of, st.sampled_from(KINDS)),
    st.tuples(st.just("cancel"), st.integers(0, 17)),
    st.tuples(st.just("flow"), st.integers(0, 5)),
    st.tuples(st.just("lease"), lane_of),
    st.tuples(st.just("turn")),
)


def do(world: World, deed: Any) -> object:
    world.loop.now += 0.004
    match deed:
        case ("come", lane, data):
            world.come(lane, data)
        case ("cut", lane, data, at):
            world.come(lane, data[:at])
            world.come(lane, data[at:])
        case ("again", lane, data, times):
            for _ in range(times):
                world.loop.now += 0.004
                world.come(lane, data)
        case ("look", lane):
            return world.look(lane)
        case ("submit", lane, kind):
            try:
                world.submit(lane, kind)
            except KvlaneError as error:
                return repr(error)
        case ("cancel", number):
            world.tasks[number].cancel()
            world.turn()
        case ("flow", number):
            exchange = world.exchanges[number]
            exchange._output.flowing = not exchange._output.flowing
            exchange.flow()
        case ("lease", lane):
            world.lanes[lane].account.leased(1)
        case ("turn",):
            world.turn()
    return None


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Defects of sinks are logged, and these have many."""
    logging.getLogger("router").setLevel(logging.CRITICAL)
    yield
    logging.getLogger("router").setLevel(logging.NOTSET)


def check(all_deeds: list[Any]) -> None:
    both = worlds()
    for deed in all_deeds:
        ours, theirs = [do(world, deed) for world in both]
        assert ours == theirs, deed
    ours, theirs = [(world.everything(), world.close()) for world in both]
    assert ours == theirs


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(deeds, max_size=25))
def test_nobody_can_tell_which_way_steps_went(all_deeds: list[Any]) -> None:
    check(all_deeds)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(mutated(), st.lists(deeds, max_size=3))
def test_broken_frames_break_the_lane_alike(broken: bytes, then: list[Any]) -> None:
    check([("come", 0, frames.encode(Step(1, 1, Load(), []))), ("come", 0, broken), *then])


# -- that the short way is taken at all


class Seen:
    """Notes what did not go the short way: frames that came alone, and reads of anything else."""

    def __init__(self, lane: Any) -> None:
        self.ways: list[str] = []
        self._read, self._alone = lane._read, lane._alone
        lane._read, lane._alone = self.read, self.alone

    def read(self, data: bytes) -> None:
        self.ways.append("read")
        self._read(data)

    def alone(self, body: bytes) -> object:
        self.ways.append("alone")
        return self._alone(body)


def opened() -> tuple[World, Any, Seen]:
    world = World(client, model, http_response)
    lane = world.lanes[0]
    lane.data_received(frames.encode(Step(1, 9, Load(), [])))
    return world, lane, Seen(lane)


PLAIN = Step(1, 9, Load(1, step_ms=3.0, step_decodes=1), [Output(1, b"abc", 1), Output(3, b"m", 1)])


def test_a_plain_step_that_comes_alone_goes_the_short_way() -> None:
    world, lane, seen = opened()
    lane.data_received(frames.encode(PLAIN))
    assert seen.ways == []
    assert world.log[-3:] == [(0, "now", b"3\r\nabc\r\n"), ("first", 0.0, 0.5), (3, b"m", 1)]
    assert lane.account.load == PLAIN.load
    world.close()


@pytest.mark.parametrize(
    "data",
    [
        frames.encode(Step(1, 9, Load(asleep=True), [])),
        frames.encode(Step(1, 9, Load(), [Output(1, b"x", 1, End("stop"))])),
        frames.encode(Step(1, 9, Load(), [Output(1, b"x", 1, None, Head(200, ()))])),
        frames.encode(Step(1, 9, Load(), [], CacheReport(1))),
        frames.encode(Step(1, 9, Load(-1), [])),
        frames.encode(Step(1, 9, Load(step_ms=1e200), [])),
        frames.encode(Step(1, 9, Load(), [Output(99)] * 257)),
        frames.encode(frames.Pong(1)),
    ],
    ids=["asleep", "end", "head", "report", "negative", "slow", "many", "pong"],
)
def test_what_else_comes_alone_is_taken_without_cutting_it_up(data: bytes) -> None:
    world, lane, seen = opened()
    lane.data_received(data)
    assert seen.ways == ["alone"]
    for _ in range(3):
        world.turn()
    steps = lane.steps
    lane.data_received(frames.encode(PLAIN))
    assert lane.steps == steps + 1
    world.close()


@pytest.mark.parametrize(
    "data",
    [
        frames.encode(Step(1, 9, Load(), [Output(1, b"x" * (128 << 10), 1)])),
        frames.encode(PLAIN) * 2,
        bytearray(frames.encode(PLAIN)),
    ],
    ids=["large", "two", "no bytes"],
)
def test_all_else_goes_the_long_way(data: bytes) -> None:
    world, lane, seen = opened()
    lane.data_received(data)
    assert seen.ways == ["read"]
    world.turn()
    world.close()


def test_behind_a_step_that_takes_several_turns_frames_wait() -> None:
    world, lane, seen = opened()
    lane.data_received(frames.encode(Step(2, 9, Load(), [Output(99)] * 600)))
    lane.data_received(frames.encode(PLAIN))
    assert seen.ways == ["alone", "read"]
    assert (0, "now", b"3\r\nabc\r\n") not in world.log
    for _ in range(4):
        world.turn()
    assert (0, "now", b"3\r\nabc\r\n") in world.log
    world.close()


def test_what_follows_a_frame_in_pieces_waits_for_its_rest() -> None:
    world, lane, seen = opened()
    frame = frames.encode(PLAIN)
    lane.data_received(frame[:9])
    lane.data_received(frame[9:])
    lane.data_received(frame)
    assert (seen.ways, lane.steps) == (["read", "read"], 3)
    world.close()


def test_a_step_of_the_short_way_is_learned_from() -> None:
    world, lane, _ = opened()
    for number in range(32):
        lane.data_received(frames.encode(Step(1, 9, Load(1, step_ms=3.0 + number, step_decodes=1), [])))
    assert world.fleet.decode.steps == 32
    world.close()


@pytest.mark.parametrize("count", [2**63, 2**64 - 1, -(2**63)])
def test_whatever_a_replica_counts_adds_up(count: int) -> None:
    world, lane, seen = opened()
    before = lane.tokens
    lane.data_received(frames.encode(Step(1, 9, Load(), [Output(1, b"x", count)])))
    lane.data_received(frames.encode(Step(2, 9, Load(), [Output(1, b"x", 2**40)])))
    assert (lane.tokens - before, seen.ways) == (count + 2**40, ["alone"])
    world.close()


def test_streams_and_loads_leave_nothing_behind() -> None:
    world, lane, _ = opened()
    frame = frames.encode(
        Step(1, 9, Load(1, step_ms=3.0, step_decodes=1), [Output(1, b"x" * 500, 1), Output(77, b"y", 1)])
    )
    world.log = _Nothing()
    world.exchanges[0]._output._log = world.log
    for _ in range(2000):
        lane.data_received(frame)
    gc.collect()
    before = resident_kb()
    for number in range(400_000):
        lane.data_received(frame)
        if not number % 1000:
            lane.account.view()
    assert resident_kb() - before < 4096  # KiB.
    world.close()


@pytest.mark.slow
def test_a_lane_of_python_alone_stands_the_same_tests() -> None:
    files = [f"tests/unit/test_lane_{name}.py" for name in ("client", "ends", "slices", "stream")]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files, "tests/unit/test_lane.py"]
    run = subprocess.run(
        command, env=os.environ | {compiled.VARIABLE: "0"}, capture_output=True, text=True, timeout=200
    )
    assert run.returncode == 0, run.stdout


class _Nothing(list[Any]):
    def append(self, item: object) -> None: ...
