"""A replica: one engine behind a lane server.

Job: take streams that routers submit over their lanes, hand them to the engine, and send each router one step frame per
turn of the event loop with all its streams' new output and what changed in the KV cache. Rule: a stream that was
accepted ends on its lane exactly once, unless the router aborted it or the lane is gone. `LaneSession` owns the state
of one lane, `Replica` the set of them.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import time
from collections.abc import Callable

from engine.base import Abort, Engine, SleepyEngine, StreamOut
from engine.cache_report import Cursor
from engine.lane_port import LanePort
from engine.lane_stream import HELD_OUTPUT_BYTES, LaneStream, kinds
from engine.refusals import Refusals
from engine.sleep import Sleeper
from router.compiled import note
from router.errors import ConfigError, ReplicaDraining, ReplicaFailed
from router.lane import frames
from router.lane.carriers import tune
from router.lane.frames import CacheReport, Draining, FrameError
from router.lane.tls import LaneTls
from router.types import CacheMode, Load, Rpc

log = logging.getLogger(__name__)

HANDSHAKE_TIMEOUT_S = 5.0
TLS_HANDSHAKE = b"\x16\x03"
"""How a TLS client begins."""
URGENT_GAP_S = 0.001
"""Least time between frames that go out for the sake of one stream's first token; others are waiting to be rendered."""
LAST_STREAM = (1 << 63) - 1
"""The greatest number of a stream."""
CLOSE_TIMEOUT_S = 10.0
"""How long the last frames may take to leave when a replica closes."""
LANE_BUFFER_BYTES = 4 << 20
"""Unsent bytes in the transport before output is held back and joined."""


class Replica:
    """One engine and the lanes that lead to it."""

    def __init__(
        self, name: str, engine: Engine, secret: bytes, *, refused: Callable[[str], None] = lambda code: None
    ) -> None:
        """`refused` takes the code of each lane that is refused, for metrics. Raises `ConfigError` where compiled parts
        are demanded that are not there."""
        self.name = name
        self.engine = engine
        self.secret = secret
        self.draining = False
        self.grace_s = 0.0
        self.active = 0
        """Streams accepted and not ended, all lanes together."""
        self._dead = False
        """The engine was found dead."""
        self._idle = asyncio.Event()
        self._idle.set()
        self.refusals = Refusals(name, refused)
        self.kinds = kinds()
        self._sessions: set[LaneSession] = set()
        self._port: LanePort | None = None
        self.submit: Callable[[frames.Submit, StreamOut], Abort] = engine.submit
        """Takes a stream; a sleeping engine is woken for it."""
        self.load: Callable[[], Load] = engine.load
        """The engine's load now."""
        self.sleeper: Sleeper | None = None

    def sleep_when_idle(self, after_s: float, level: int) -> None:
        """Has the engine sleep after so many seconds without a stream; call it before `start`. Raises `ConfigError` for
        an engine that cannot."""
        if not isinstance(self.engine, SleepyEngine):
            raise ConfigError("this engine cannot sleep", param="sleep_after_s")
        self.sleeper = Sleeper(self.engine, after_s, level, self._busy, self.load_changed, self._say_draining_at_once)
        self.submit, self.load = self.sleeper.submit, self.sleeper.load

    async def start(self) -> None:
        """Starts the engine."""
        note(log, ("engine._lane_stream",))
        await self.engine.start()
        self.engine.on_step(self.load_changed)
        if self.sleeper is not None:
            self.sleeper.idle()

    def session(self) -> asyncio.Protocol:
        """The replica's side of one new lane; connect it to a transport."""
        return LaneSession(self)

    async def listen(self, host: str, port: int = 0, tls: LaneTls | None = None) -> int:
        """Opens the TCP port of the `socket` carrier; returns the port. See `LanePort.open`."""
        self._port = LanePort(self.session, self.refusals.add, tls)
        return await self._port.open(host, port)

    async def check_health(self) -> None:
        """Raises `ReplicaFailed` when the engine is dead, or did not wake. Wakes nobody."""
        if self.sleeper is not None:
            self.sleeper.check()
        await self.engine.check_health()

    async def drain(self, grace_s: float) -> int:
        """Takes no new streams, tells all routers, and waits for streams in flight; returns how many were cut."""
        self._say_draining(grace_s)
        try:
            async with asyncio.timeout(grace_s):
                await self._idle.wait()
        except TimeoutError:
            log.warning("replica %s: %d streams did not end within %g s", self.name, self.active, grace_s)
        return self.active

    async def close(self) -> None:
        """Closes all lanes, with what they still hold sent first, and the engine."""
        if self.sleeper is not None:
            await self.sleeper.close()
        if self._port is not None:
            await self._port.close()
        sessions = tuple(self._sessions)
        for session in sessions:
            session.close()
        if sessions:
            await asyncio.wait([session.gone for session in sessions], timeout=CLOSE_TIMEOUT_S)
        await self.engine.close()

    def _say_draining(self, grace_s: float) -> None:
        self.draining, self.grace_s = True, grace_s
        for session in self._sessions:
            session.send_draining()

    def _say_draining_at_once(self) -> None:
        if not self.draining:
            self._say_draining(0.0)

    def _busy(self) -> bool:
        return bool(self.active) or self.draining

    def opened(self, session: LaneSession) -> None:
        self._sessions.add(session)

    def closed(self, session: LaneSession) -> None:
        self._sessions.discard(session)

    def stream_began(self) -> None:
        self.active += 1
        self._idle.clear()

    def stream_ended(self) -> None:
        self.active -= 1
        if not self.active:
            self._idle.set()
            if self.sleeper is not None:
                self.sleeper.idle()
        self.load_changed()  # for the other routers: the engine may have no further step that would tell them

    def load_changed(self) -> None:
        """The engine did a step, died, or has less to do: every router shall know."""
        if not self._dead and self.engine.dead():
            self._dead = True  # Before streams end, each of which comes here again.
            log.error("replica %s: the engine died", self.name)
            if self.sleeper is not None:
                self.sleeper.died()
            self._say_draining_at_once()  # an idle-looking corpse would draw all traffic until Serve replaces it
        for session in self._sessions:
            session.schedule_flush()


class LaneSession(asyncio.Protocol):
    """The replica's side of one lane."""

    def __init__(self, replica: Replica) -> None:
        self._replica = replica
        self._loop = asyncio.get_running_loop()
        self.gone: asyncio.Future[None] = self._loop.create_future()
        """Done when the lane has closed."""
        self._splitter = frames.FrameSplitter()
        self._nonce = os.urandom(32)
        self._router = ""
        self._ready = False
        self._streams: dict[int, LaneStream] = {}
        outbox, self._stream = replica.kinds
        self._outbox = outbox(self)
        self.clock: Callable[[], float] = time.monotonic
        """Not the loop's, which may stand still while the loop turns."""
        self._urged_at = -math.inf
        self._held_back = False
        self._seq = 0
        self._acked = 0
        self._told: tuple[int, Load] | None = None
        self._cursor: Cursor | None = None

    # -- the transport's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: asyncio.Transport = transport  # type: ignore[assignment]
        tune(transport)
        self._transport.set_write_buffer_limits(high=LANE_BUFFER_BYTES)
        self._replica.opened(self)
        self._handshake = self._loop.call_later(HANDSHAKE_TIMEOUT_S, self._give_up)
        self._write(frames.Challenge(frames.VERSION, self._nonce))

    def data_received(self, data: bytes) -> None:
        try:
            for body in self._splitter.feed(data):
                self._received(frames.decode_up(body))
        except FrameError as error:
            if not self._ready and data.startswith(TLS_HANDSHAKE):
                self._refuse("tls", "the router speaks TLS, and this replica has no engines.lane_tls_cert_file")
            else:
                self._refuse("protocol", str(error))

    def connection_lost(self, exc: Exception | None) -> None:
        self._handshake.cancel()
        self._replica.closed(self)
        self._ready = False
        if self._cursor is not None:
            self._cursor.close()
        if self._streams:
            log.info(
                "replica %s: lane to %s lost with %d streams", self._replica.name, self._router, len(self._streams)
            )
        for stream in tuple(self._streams.values()):
            self._abort(stream)
        self._outbox.clear()
        if not self.gone.done():
            self.gone.set_result(None)

    def pause_writing(self) -> None:
        self._outbox.paused = True

    def resume_writing(self) -> None:
        self._outbox.paused = False
        self.schedule_flush()

    # -- frames from the router

    def _received(self, frame: frames.UpFrame) -> None:
        if not self._ready:
            self._greeted(frame)
        elif isinstance(frame, frames.Submit):
            self._submitted(frame)
        elif isinstance(frame, frames.Abort):
            stream = self._streams.get(frame.stream)
            if stream is not None:
                self._abort(stream)
        elif isinstance(frame, frames.Ping):
            self._write(frames.Pong(frame.nonce))
        elif isinstance(frame, frames.Resync):
            if self._cursor is not None:
                self._cursor.resync()
                self.schedule_flush()
        elif isinstance(frame, frames.Wake):
            if self._replica.sleeper is not None:
                self._replica.sleeper.wake()
        else:
            raise FrameError("a second hello")

    def _greeted(self, hello: frames.UpFrame) -> None:
        if not isinstance(hello, frames.Hello):
            raise FrameError("a lane begins with a hello")
        if hello.version != frames.VERSION:
            self._refuse("version", f"this replica speaks lane version {frames.VERSION}, not {hello.version}")
        elif not frames.proof_holds(self._replica.secret, self._nonce, hello):
            self._refuse("secret", "the router does not know this replica's secret")
        else:
            self._handshake.cancel()
            self._router, self._ready = hello.router, True
            self._splitter.limit = frames.MAX_FRAME_BYTES
            replica = self._replica
            self._write(
                frames.Welcome(frames.VERSION, replica.name, replica.engine.info(), replica.load(), replica.draining)
            )
            feed = replica.engine.cache()
            if feed is not None:
                self._cursor = feed.cursor(self.schedule_flush)
                self.schedule_flush()

    def _give_up(self) -> None:
        self._refused("silent", f"no hello within {HANDSHAKE_TIMEOUT_S:g} s")
        self._transport.abort()

    def _refused(self, code: str, message: str) -> None:
        peer = self._router or self._transport.get_extra_info("peername")
        self._replica.refusals.add(code, peer, message)

    def _refuse(self, code: str, message: str) -> None:
        self._refused(code, message)
        self._write(frames.Refused(code, message))
        self._ready = False
        self._transport.close()

    def _submitted(self, call: frames.Submit) -> None:
        if not self._acked < call.stream <= LAST_STREAM:
            raise FrameError(f"stream {call.stream} after stream {self._acked}")
        self._acked = call.stream
        stream = self._stream(self, self._outbox, call.stream, call.rpc == Rpc.HTTP)
        self._streams[call.stream] = stream
        self._replica.stream_began()
        if self._replica.draining:
            stream.fail(ReplicaDraining(f"replica {self._replica.name} is draining"))
            return
        try:
            stream.stop = self._replica.submit(call, stream)
        except Exception:
            log.exception("replica %s: the engine did not take request %s", self._replica.name, call.request_id)
            stream.fail(ReplicaFailed("the engine did not take the request"))

    # -- output

    def flush_soon(self) -> None:
        """What waits goes out in this turn of the loop."""
        self._loop.call_soon(self._flush)

    def urge(self) -> None:
        """Sends what waits at once; if that was done a moment ago, with the first output after the moment."""
        now = self.clock()
        if now - self._urged_at >= URGENT_GAP_S:
            self._urged_at = now
            self._flush()
        else:
            self._outbox.urgent = True

    def schedule_flush(self) -> None:
        if not self._outbox.due and self._ready:
            self._outbox.due = True
            self.flush_soon()

    def _flush(self, *, even_paused: bool = False) -> None:
        outbox = self._outbox
        outbox.due = outbox.urgent = False
        if not self._ready or (outbox.paused and not even_paused):
            return
        load, report = self._replica.load(), self._report()
        if not outbox and report is None and self._told == (self._acked, load):
            return
        self._told = (self._acked, load)
        while True:
            self._seq += 1
            try:
                frame = outbox.take(self._seq, self._acked, load, report)
            except Exception:
                # It would raise again and again, and the others' outputs wait behind it. Their router asks elsewhere.
                log.exception("replica %s: no frame can be made for %s", self._replica.name, self._router)
                self._ready = False
                self._transport.abort()
                return
            self._transport.write(frame)
            if outbox.paused and not even_paused:
                break
            report = self._report() if self._cursor is not None and self._cursor.pending else None
            if not outbox and report is None:
                break
        if self._held_back:
            self._count_backlogs()

    def _report(self) -> CacheReport | None:
        """What the cache has to tell; where that fails, a last word in its place, and the output goes on."""
        cursor = self._cursor
        if cursor is None:
            return None
        try:
            return cursor.take()
        except Exception:
            log.exception("replica %s: no more cache reports to %s", self._replica.name, self._router)
            self._cursor = None
            cursor.close()
            cause = "the replica failed to report"
            return CacheReport(cursor.seq + 1, snapshot=True, mode=CacheMode.APPROXIMATE, cause=cause)

    def _count_backlogs(self) -> None:
        """Each stream's backlog is what still waits of it."""
        for stream in self._streams.values():
            stream.backlog = 0
        for id, size in self._outbox.waiting():
            if id in self._streams:
                self._streams[id].backlog += size + HELD_OUTPUT_BYTES
        self._held_back = bool(self._outbox)

    def held_back(self) -> None:
        """Some output waits because the router does not read."""
        self._held_back = True

    def send_draining(self) -> None:
        if self._ready:
            self._flush()
            self._write(Draining(self._replica.grace_s))

    def close(self) -> None:
        """Sends what is pending, however slowly the router reads, and closes the lane."""
        self._flush(even_paused=True)
        self._transport.close()

    def _write(self, frame: frames.DownFrame) -> None:
        self._transport.write(frames.encode(frame))

    # -- the end of a stream

    def _abort(self, stream: LaneStream) -> None:
        self.forget(stream)
        stream.stop()

    def forget(self, stream: LaneStream) -> None:
        """The stream is over, however it ended."""
        if self._streams.pop(stream.id, None) is not None:
            stream.over = True
            self._replica.stream_ended()
