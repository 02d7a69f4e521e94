"""The router's side of a lane.

Job: submit streams to one replica and hand each step's output to the streams' sinks. Rule: nothing here awaits between
a step's arrival and its sinks, and a failing sink ends its own stream only. A `Lane` owns its streams' state and the
account of its replica's load; whoever opened it (`router.replicas`) owns the lane.
"""

from __future__ import annotations

import asyncio
import logging
import operator
import ssl
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Final, Protocol, cast

from router.errors import KvlaneError, ReplicaLost, from_wire
from router.lane import frames
from router.lane.frames import (
    Abort,
    CacheReport,
    Draining,
    End,
    FrameError,
    LargeOutput,
    LargeStep,
    Output,
    Pong,
    Resync,
    Step,
    Submit,
    Welcome,
    pack_chain,
)
from router.lane.meter import SAMPLE, FrameMeter
from router.lane.output import FrameOutput
from router.lane.relay import Relay, Stream
from router.lane.tls import explain
from router.load.account import Account, Blind, Foresight, new_account
from router.types import NO_CHARGE, Charge, EngineInfo, Request, Rpc, Sink

log = logging.getLogger(__name__)


PACED_BYTES: Final = 128 << 10
"""After a read of so many, other lanes and clients get their turn: libuv would take up to 32 reads of 256 kB in one go,
and to take in 256 kB of a large frame was measured to take 0.3 ms."""


MOST_OUTPUTS: Final = 256
"""Delivered in one turn of the event loop: to write so many was measured to take 2 to 4 ms."""


DEAR: Final = 16
"""How many outputs one counts for that begins or ends its answer: to write a head, to let a request's task run to its
end and to count it take as long as to hand on ten chunks and more."""


class LaneRefused(ReplicaLost):
    """The replica does not want this router: other lane version, wrong secret, no trust or broken protocol."""

    def __init__(self, message: str, *, code: str = "protocol") -> None:
        super().__init__(message)
        self.code = code
        """As in `frames.Refused`, or ``tls``."""


class LaneClosed(ReplicaLost):
    """This side closed the lane."""


class LaneListener(Protocol):
    """Who opened the lane."""

    def lane_opened(self, lane: Lane) -> None:
        """The replica said welcome; `lane.welcome` is set."""

    def lane_draining(self, lane: Lane) -> None:
        """The replica takes no new streams."""

    def lane_lost(self, lane: Lane, error: ReplicaLost) -> None:
        """The lane is gone; all its streams have been failed."""

    def first_output(self, waited_s: float, expected_s: float) -> None:
        """A stream's first output came `waited_s` after its submit; `expected_s` is what `run` was told."""

    def cache_reported(self, lane: Lane, report: CacheReport) -> None:
        """The replica said how its KV cache changed. The load and the outputs of that step have been taken already.

        Raises `ValueError` for a report that makes no sense, which costs the replica its lane.
        """


def _blind(info: EngineInfo) -> Foresight:
    return Blind()


class Lane(Relay, asyncio.Protocol):
    """One open lane; connect it to a carrier's transport."""

    account: Account
    """What the replica has to do, as this router knows it; there from the welcome on."""

    def __init__(
        self,
        replica: str,
        secret: bytes,
        router: str,
        listener: LaneListener,
        foresee: Callable[[EngineInfo], Foresight] = _blind,
        meter: FrameMeter | None = None,
    ) -> None:
        """`foresee` gives what the load model knows of the engine that answers; `meter` samples its frames."""
        self.replica = replica
        self.welcome: Welcome | None = None
        self.steps = 0
        self.tokens = 0
        self.reached = False
        """Whether anybody took the connection."""
        self.silent = True
        """Whether the replica has said nothing at all."""
        self.told_to_wake = False
        self._secret = secret
        self._router = router
        self._listener = listener
        self._loop = asyncio.get_running_loop()
        self._splitter = frames.FrameSplitter(limit=frames.MAX_FRAME_BYTES)
        self._streams = {}
        self._foresee = foresee
        self._meter = meter or FrameMeter()
        self._last_stream = 0
        self._last_report = 0
        self._resyncing = False
        self._heard = True
        self._silent_s = 0.0
        self._error: ReplicaLost | None = None
        self._transport: asyncio.Transport | None = None
        self._output: FrameOutput | None = None
        self._behind: deque[memoryview] | None = None
        """Frames that wait behind a step with very many outputs; None while there is none under way."""
        self._rest: tuple[Step | LargeStep, int] | None = None
        """That step, and how many of its outputs were delivered."""

    # -- for dispatch

    def lease(self) -> Lease:
        """A charge on this replica, held until the request ends."""
        return Lease(self)

    async def run(self, request: Request, sink: Sink, charge: Charge = NO_CHARGE, expected_s: float = 0.0) -> End:
        """Submits a stream and returns when it ended whole.

        `charge` counts against the replica until its load includes the stream; `expected_s` is when the first output is
        expected, 0 where nobody knows. Raises the `KvlaneError` that the stream ended with: the replica's own,
        `ReplicaLost` with the lane, or what the sink raised. When the caller is cancelled the stream is aborted in the
        engine.
        """
        output = self._output
        if output is None or self.welcome is None:
            raise self._error or ReplicaLost(f"no lane to replica {self.replica}")
        self._last_stream = stream_id = self._last_stream + 1
        self.account.submitted(stream_id, charge)
        loop = self._loop
        stream = self._streams[stream_id] = Stream(
            sink, loop.create_future(), loop.time(), expected_s, request.rpc == Rpc.HTTP
        )
        submit = Submit(
            stream_id,
            request.request_id,
            request.rpc,
            request.method,
            request.path,
            request.headers,
            request.body,
            request.timeout_s,
            request.priority,
            pack_chain(charge.chain),
            charge.matched,
        )
        if len(request.body) < frames.LARGE_BYTES:
            output.join(frames.encode(submit))
        else:
            output.write_large(frames.encode_large(submit))
        try:
            end = await stream.done
        finally:
            if self._streams.pop(stream_id, None) is not None and self._output is not None:
                self._output.write(frames.encode(Abort(stream_id)))
        if end.error:
            raise from_wire(end.error, end.message, end.param)
        return end

    # -- for the lane's owner

    @property
    def streams(self) -> int:
        """Streams in flight."""
        return len(self._streams)

    def tick(self, elapsed_s: float, timeout_s: float) -> None:
        """Pings a silent replica; gives the lane up after `timeout_s` of silence. Call it at regular times."""
        if self._output is None or self.welcome is None:
            return
        if self._heard:
            self._heard, self._silent_s = False, 0.0
            return
        self._silent_s += elapsed_s
        if self._silent_s > timeout_s:
            self._lose(ReplicaLost(f"replica {self.replica} was silent for {self._silent_s:.0f} s"))
        else:
            self._output.write(frames.encode(frames.Ping(self.steps)))

    def resync(self) -> None:
        """A cache report was missed: asks for a snapshot, once until it comes."""
        if self._output is not None and not self._resyncing:
            self._resyncing = True
            self._output.write(frames.encode(Resync(self._last_report)))

    def wake(self) -> None:
        """Has a replica that sleeps wake, though nothing is sent there yet; `account` says whether one does."""
        if self._output is not None and self.account.load.asleep:
            self.told_to_wake = True
            self._output.write(frames.encode(frames.Wake()))

    def oldest_s(self) -> float | None:
        """How long the oldest stream without any output has been in flight; None where there is none."""
        since = next((stream.began for stream in self._streams.values() if stream.began), None)
        return None if since is None else self._loop.time() - since

    def close(self) -> None:
        """Closes the lane; its streams fail."""
        self._lose(LaneClosed(f"the lane to replica {self.replica} was closed"))

    # -- the transport's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.reached = True
        self._transport = cast("asyncio.Transport", transport)  # Carriers open these, by what they do if not by type.
        self._output = FrameOutput(self._transport, self._loop)

    def pause_writing(self) -> None:
        if self._output is not None:
            self._output.pause()

    def resume_writing(self) -> None:
        if self._output is not None:
            self._output.resume()

    def _read(self, data: bytes) -> None:
        """Whatever arrives, unless it is a plain step that the relay knows how to take."""
        if len(data) > PACED_BYTES and self._transport is not None:
            self._transport.pause_reading()
            self._loop.call_soon(self._read_on)
        try:
            bodies = self._splitter.feed(data)
            if self._behind is not None:
                self._behind.extend(bodies)
            else:
                self._take(bodies)
        except FrameError as error:
            self._broken(error)

    def _at_rest(self) -> bool:
        """Whether a frame may begin with the next data, and nothing waits to be taken before it."""
        return self._behind is None and self._splitter.empty

    def _read_on(self) -> None:
        if self._transport is not None and not self._transport.is_closing() and self._behind is None:
            self._transport.resume_reading()

    def _alone(self, body: bytes) -> None:
        """A frame that came with nothing before or behind it, as most do."""
        try:
            if not self.steps % SAMPLE:
                self._meter.frame(len(body))
            frame = frames.decode_down(body)
            if type(frame) is Step and DEAR * len(frame.outputs) <= MOST_OUTPUTS:
                self._deliver(frame.outputs)
                self._stepped(frame)
            elif isinstance(frame, Step | LargeStep) and _portion(frame.outputs, 0) < len(frame.outputs):
                self._put_off(())
                self._go_on(frame, 0)
            else:
                self._received(frame)
        except FrameError as error:
            self._broken(error)

    def _take(self, bodies: Sequence[memoryview]) -> None:
        """Frames in their order; of more than one turn's part only the first, and the rest in later turns."""
        late: list[Step] = []
        dear = 0
        for at, body in enumerate(bodies, 1):
            if not self.steps % SAMPLE:
                self._meter.frame(len(body))
            try:
                frame = frames.decode_down(body)
            except FrameError:
                self._stepped_together(late)
                raise
            whole = not isinstance(frame, Step | LargeStep) or _portion(frame.outputs, 0) == len(frame.outputs)
            if type(frame) is Step and (late or at < len(bodies)) and whole:
                dear += DEAR * sum(map(_is_dear, frame.outputs))
                if late and dear > MOST_OUTPUTS:
                    self._stepped_together(late)
                    self._put_off(bodies[at - 1 :])
                    self._loop.call_soon(self._go_on_behind)
                    return
                late.append(frame)
                continue
            self._stepped_together(late)
            late, dear = [], 0
            if not whole:
                self._put_off(bodies[at:])
                self._go_on(cast("Step | LargeStep", frame), 0)
                return
            self._received(frame)
        self._stepped_together(late)

    def _put_off(self, bodies: Sequence[memoryview]) -> None:
        """Reads no more until these frames were taken."""
        self._behind = deque(bodies)
        if self._transport is not None and not self._transport.is_closing():
            self._transport.pause_reading()

    def _fail(self, streams: Iterator[Stream], error: ReplicaLost) -> None:
        """Ends these, a part in each turn: each tells its client, or goes elsewhere."""
        for stream in islice(streams, MOST_OUTPUTS // DEAR):
            if not stream.done.done():
                stream.done.set_exception(ReplicaLost(error.message))
        if operator.length_hint(streams):
            self._loop.call_soon(self._fail, streams, error)

    def _stepped_together(self, steps: Sequence[Step]) -> None:
        """Steps that came at once, for the loop was late: what they have of one stream goes to its sink as one."""
        if not steps:
            return
        last = steps[-1]
        whole = last if len(steps) == 1 else Step(last.seq, last.acked, last.load, _joined(steps, self._streams))
        self._deliver(whole.outputs)
        for step in steps:
            self._stepped(step)

    def _go_on(self, step: Step | LargeStep, at: int) -> None:
        """Some more outputs of a step with very many, then what came behind it."""
        if self._behind is None:
            return  # The lane is lost, and all of it was delivered then.
        end = _portion(step.outputs, at)
        self._rest = (step, end)
        self._deliver(step.outputs[at:end])
        behind = self._behind
        if behind is None:
            return
        if not at:  # Whoever asks before the rest is out is told of this load.
            self._count(step)
        if end < len(step.outputs):
            self._loop.call_soon(self._go_on, step, end)
            return
        self._rest = None
        try:
            self._learn(step)
        except FrameError as error:
            self._behind = None
            self._broken(error)
        self._go_on_behind()

    def _go_on_behind(self) -> None:
        """What came behind all that."""
        behind, self._behind = self._behind, None
        if behind is None:
            return
        try:
            self._take(list(behind))
        except FrameError as error:
            self._broken(error)
        self._read_on()

    def _catch_up(self) -> None:
        """Delivers at once what was put off, for nothing comes after it."""
        rest, behind = self._rest, self._behind
        self._rest = self._behind = None
        if rest is not None:
            step, at = rest
            self._deliver(step.outputs[at:])
        try:
            for body in behind or ():
                frame = frames.decode_down(body)
                if isinstance(frame, Step | LargeStep):
                    self._deliver(frame.outputs)
        except FrameError as error:
            log.warning("replica %s: what came last on a lost lane cannot be read: %s", self.replica, error)

    def _broken(self, error: FrameError) -> None:
        self._lose(LaneRefused(f"replica {self.replica} broke the lane protocol: {error}"))

    def connection_lost(self, exc: Exception | None) -> None:
        if isinstance(exc, ssl.SSLError) or (self.silent and self._is_tls()):
            # A side of TLS 1.3 that is refused hears of it only after it took the lane for open, if at all.
            why = explain(exc) if exc else "it closed a new lane without a word, as where it does not trust a router"
            self._lose(LaneRefused(f"replica {self.replica} refused the lane (tls): {why}", code="tls"))
            return
        self._lose(ReplicaLost(f"the lane to replica {self.replica} was lost" + (f": {exc}" if exc else "")))

    def _is_tls(self) -> bool:
        return self._transport is not None and self._transport.get_extra_info("ssl_object") is not None

    # -- frames from the replica

    def _received(self, frame: frames.DownFrame) -> None:
        if type(frame) is Step or type(frame) is LargeStep:
            self._deliver(frame.outputs)
            self._stepped(frame)
        elif type(frame) is Pong:
            pass
        elif type(frame) is Draining:
            self._listener.lane_draining(self)
        elif type(frame) is Welcome:
            self._welcomed(frame)
        elif type(frame) is frames.Challenge:
            self._challenged(frame)
        elif type(frame) is frames.Refused:
            text = f"replica {self.replica} refused the lane ({frame.code}): {frame.message}"
            self._lose(LaneRefused(text, code=frame.code))

    def _deliver(self, outputs: Sequence[Output] | Sequence[LargeOutput]) -> None:
        """Hands outputs of one step to their streams' sinks."""
        large = bool(outputs) and type(outputs[0]) is LargeOutput
        streams, tokens = self._streams, 0
        for output in outputs:
            stream = streams.get(output.stream)
            if stream is None:  # aborted meanwhile
                continue
            try:
                if output.head is not None:
                    stream.sink.head(output.head.status, output.head.headers)
                if output.payload:
                    if stream.began:
                        self._began(stream)
                    tokens += output.tokens
                    if large and len(output.payload) >= frames.LARGE_BYTES:
                        _hand_over(stream, output)
                    else:
                        payload = bytes(output.payload) if large else output.payload
                        last = output.end
                        if last is None or last.error:
                            stream.data(payload, output.tokens)  # type: ignore[arg-type]
                        else:
                            stream.last(payload, output.tokens)  # type: ignore[arg-type]
            except Exception as error:
                self._failed(stream, error)
            else:
                if output.end is not None:
                    del streams[output.stream]
                    if not stream.done.done():
                        stream.done.set_result(output.end)
        self.tokens += tokens

    def _began(self, stream: Stream) -> None:
        """Its first output is here."""
        self._listener.first_output(self._loop.time() - stream.began, stream.expected_s)
        stream.began = 0.0

    def _stepped(self, step: Step | LargeStep) -> None:
        """After a step's output: no token waits for it, and nobody asks before the loop goes on."""
        self._count(step)
        self._learn(step)

    def _count(self, step: Step | LargeStep) -> None:
        self.steps += 1
        if not self.steps % SAMPLE:
            self._meter.step(len(step.outputs))
        self.account.stepped(step.load, step.acked, self._loop.time())

    def _learn(self, step: Step | LargeStep) -> None:
        if step.cache is not None:
            self._reported(step.cache)

    def _reported(self, report: CacheReport) -> None:
        if report.snapshot:
            self._resyncing = False
        try:
            self._listener.cache_reported(self, report)
        except ValueError as error:
            raise FrameError(f"a cache report that makes no sense: {error}") from error
        self._last_report = report.seq

    def _failed(self, stream: Stream, error: Exception) -> None:
        """Its sink did not take an output."""
        if not isinstance(error, KvlaneError):
            log.error("a sink failed", exc_info=error)
        if not stream.done.done():
            stream.done.set_exception(error)  # `run` still finds the stream in flight and aborts it
        stream.deafen(_DEAF)

    def _challenged(self, challenge: frames.Challenge) -> None:
        self.silent = False
        if challenge.version != frames.VERSION:
            self._lose(
                LaneRefused(
                    f"replica {self.replica} speaks lane version {challenge.version}, this router {frames.VERSION}",
                    code="version",
                )
            )
        elif self._output is not None:
            proof = frames.prove(self._secret, challenge.nonce, self._router)
            self._output.write(frames.encode(frames.Hello(frames.VERSION, proof, self._router)))

    def _welcomed(self, welcome: Welcome) -> None:
        self.welcome = welcome
        self.account = new_account(self.replica, welcome.info, welcome.load, self._foresee(welcome.info))
        self._relays(self.account, self._loop.time)
        self._listener.lane_opened(self)
        if welcome.draining:
            self._listener.lane_draining(self)

    def _lose(self, error: ReplicaLost) -> None:
        transport, self._transport = self._transport, None
        output, self._output = self._output, None
        if output is not None:
            output.close()
        if self._error is not None:
            return
        self._error = error
        self._catch_up()
        streams, self._streams = self._streams, {}
        self._fail(iter(tuple(streams.values())), error)
        self._listener.lane_lost(self, error)
        if transport is not None:
            transport.abort()


def _portion(outputs: Sequence[Output] | Sequence[LargeOutput], at: int) -> int:
    """How far one turn of the loop gets with these, from the one at `at` on."""
    count, left = len(outputs), MOST_OUTPUTS
    if DEAR * (count - at) > left:
        for place in range(at, count):
            left -= DEAR if _is_dear(outputs[place]) else 1
            if left <= 0:
                return place + 1
    return count


def _is_dear(output: Output | LargeOutput) -> bool:
    return output.end is not None or output.head is not None


def _joined(steps: Sequence[Step], streams: Mapping[int, Stream]) -> list[Output]:
    """All outputs of these steps, those of an HTTP stream as one; the messages of a gRPC stream stay apart."""
    outputs: list[Output] = []
    latest: dict[int, Output] = {}
    pieces: dict[int, list[bytes]] = {}
    for step in steps:
        for output in step.outputs:
            number = output.stream
            stream, before = streams.get(number), latest.get(number)
            if stream is None:  # aborted meanwhile
                continue
            if before is None or not stream.joins or output.head is not None or before.end is not None:
                if number in pieces:
                    latest[number].payload = b"".join(pieces.pop(number))
                latest[number] = output
                outputs.append(output)
            else:
                pieces.setdefault(number, [before.payload]).append(output.payload)
                before.tokens += output.tokens
                before.end = output.end
    for number, parts in pieces.items():
        latest[number].payload = b"".join(parts)
    return outputs


def _hand_over(stream: Stream, output: Output | LargeOutput) -> None:
    """A large payload, without a copy where the sink can take it so."""
    large: Callable[[memoryview, int], None] | None = getattr(stream.sink, "large", None)
    if large is None:
        stream.data(bytes(output.payload), output.tokens)
    else:
        large(memoryview(output.payload), output.tokens)


class _Deaf:
    """Takes what still comes for a stream whose sink failed."""

    started = True

    def routed(self, receipt: object) -> None: ...
    def head(self, status: int, headers: object) -> None: ...
    def data(self, payload: bytes, tokens: int) -> None: ...


_DEAF = _Deaf()


class Lease:
    """A request's charge on its replica; a context manager, so that every way out gives it back."""

    __slots__ = ("_lane",)

    def __init__(self, lane: Lane) -> None:
        self._lane = lane

    def __enter__(self) -> Lane:
        self._lane.account.leased(1)
        return self._lane

    def __exit__(self, *_: object) -> None:
        self._lane.account.leased(-1)
