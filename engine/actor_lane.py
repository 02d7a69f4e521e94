"""The replica's side of the `actor` carrier: lane sessions behind pipes of Ray calls (`router.lane.pipes`).

Three threads meet here: Serve runs the replica's code, and so its lane sessions, on an event loop of its own; Ray runs
the streams down on the actor's loop, and the calls that feed pipes on a thread beside it. Rule: a session is touched on
the replica's loop only; what crosses over is either handed to a loop or guarded by the pipe's lock. `ActorPipes` owns
the pipes, and each pipe its session's transport.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable
from typing import Final

from router.lane import pipes

log = logging.getLogger(__name__)

READ_BACKLOG_BYTES: Final = 64 << 20
"""What a session that paused reading may leave lying before its pipe is cut."""
HIGH_WATER_BYTES: Final = 1 << 20


class ActorPipes:
    """All pipes to one replica; create it on the replica's loop."""

    def __init__(self, replica: str, session: Callable[[], asyncio.Protocol]) -> None:
        """`session` makes the replica's side of one new lane."""
        self._replica = replica
        self.session = session
        self.home = asyncio.get_running_loop()
        self._pipes: dict[str, _Pipe] = {}

    def open(self) -> None:
        """From now on routers may open pipes."""
        pipes.HOSTED[self._replica] = self

    def close(self) -> None:
        """No new pipes; those that are open belong to their sessions."""
        pipes.HOSTED.pop(self._replica, None)

    def chunks(self, pipe: str) -> AsyncIterator[bytes]:
        """Runs on any thread. See `router.lane.pipes.Pipes`."""
        # Entered here and not in the stream, so that a call that closes it at once finds it.
        end = self._pipes[pipe] = _Pipe(self.home)
        return self._chunks(pipe, end)

    async def _chunks(self, pipe: str, end: _Pipe) -> AsyncIterator[bytes]:
        error: Exception | None = None
        try:
            end.begin(self.session)
            yield b""
            async for chunk in end.sent():
                yield chunk
        except Exception as failure:
            error = failure
            raise
        finally:
            del self._pipes[pipe]
            end.lost(error)

    def find(self, pipe: str) -> pipes.Feed:
        """Runs on any thread. See `router.lane.pipes.Pipes`."""
        try:
            return self._pipes[pipe]
        except KeyError:
            raise ConnectionResetError("the replica has closed this pipe") from None


class _Pipe:
    """One pipe's crossing between the actor's calls and the replica's loop."""

    def __init__(self, home: asyncio.AbstractEventLoop) -> None:
        self._home = home
        self._loop: asyncio.AbstractEventLoop | None = None
        self._wake = asyncio.Event()
        self._lock = threading.Lock()
        self._buffer = bytearray()
        self._ending = False
        self._taken = 0
        self._yielded = 0
        self._next_seq = 0
        self._heard = time.monotonic()
        self.transport = PipeTransport(self, home)

    # -- on the actor's loop

    def begin(self, session: Callable[[], asyncio.Protocol]) -> None:
        self._loop = asyncio.get_running_loop()
        self._home.call_soon_threadsafe(self.transport.begin, session)

    async def sent(self) -> AsyncIterator[bytes]:
        """What the session writes, joined; ends once it closed. Raises `TimeoutError` where the router fell silent."""
        while True:
            chunk, over = self._take()
            if chunk:
                self._yielded += len(chunk)
                self._home.call_soon_threadsafe(self.transport.sent, len(chunk))
                yield chunk
            elif over:
                return
            else:
                await self._news()

    def _take(self) -> tuple[bytes, bool]:
        """The next chunk, empty where nothing waits or the router has enough to take; and whether the pipe is over."""
        room = pipes.WINDOW_BYTES - (self._yielded - self._taken)
        with self._lock:
            chunk = bytes(self._buffer[:room]) if room > 0 else b""
            del self._buffer[: len(chunk)]
            return chunk, self._ending and not self._buffer

    async def _news(self) -> None:
        left_s = self._heard + pipes.QUIET_S - time.monotonic()
        if left_s <= 0:
            raise TimeoutError(f"the router has not called for {pipes.QUIET_S:g} s")
        try:
            async with asyncio.timeout(left_s):
                await self._wake.wait()
        except TimeoutError:
            return  # It may have called in the meantime; the next look tells.
        self._wake.clear()

    def lost(self, error: Exception | None) -> None:
        self._home.call_soon_threadsafe(self.transport.lost, error)

    # -- on the thread of the router's calls

    def feed(self, seq: int, data: bytes, taken: int, close: bool) -> None:
        self._heard = time.monotonic()
        with self._lock:
            expected = self._next_seq
            if seq == expected:
                self._next_seq += 1
                self._taken = taken
        if seq < 0:
            self.end(drop=True)  # An abort comes out of turn.
            return
        if seq != expected:
            self.end(drop=True)
            raise ConnectionResetError(f"batch {expected} is missing")
        self._poke()
        if data:
            self._home.call_soon_threadsafe(self.transport.received, data)
        if close:
            self._home.call_soon_threadsafe(self.transport.hung_up)

    # -- on the replica's loop

    def send(self, data: bytes | bytearray | memoryview) -> None:
        with self._lock:
            waiting = bool(self._buffer)
            self._buffer += data
        if not waiting:
            self._poke()

    # -- on any thread

    def end(self, drop: bool) -> None:
        """Ends the stream to the router; what was written is still sent unless dropped."""
        with self._lock:
            if drop:
                self._buffer.clear()
            self._ending = True
        self._poke()

    def _poke(self) -> None:
        if self._loop is not None:  # Else the stream has not begun, and looks when it does.
            self._loop.call_soon_threadsafe(self._wake.set)


class PipeTransport(asyncio.Transport):
    """A session's transport; all of it runs on the replica's loop."""

    def __init__(self, pipe: _Pipe, home: asyncio.AbstractEventLoop) -> None:
        super().__init__({"peername": "a router, by actor calls"})
        self._pipe = pipe
        self._home = home
        self._protocol = asyncio.Protocol()
        self._unsent = 0
        self._high, self._low = HIGH_WATER_BYTES, HIGH_WATER_BYTES // 4
        self._writing_paused = self._reading_paused = False
        self._unread = bytearray()
        self._closing = self._lost = False

    # -- the session's side

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if self._closing or not data:
            return
        self._unsent += len(data)
        self._pipe.send(data)
        if self._unsent > self._high and not self._writing_paused:
            self._writing_paused = True
            self._protocol.pause_writing()

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self._high = HIGH_WATER_BYTES if high is None else high
        self._low = self._high // 4 if low is None else low

    def get_write_buffer_size(self) -> int:
        return self._unsent

    def can_write_eof(self) -> bool:
        return False

    def pause_reading(self) -> None:
        self._reading_paused = True

    def resume_reading(self) -> None:
        if self._reading_paused:
            self._reading_paused = False
            self._home.call_soon(self._read)

    def is_reading(self) -> bool:
        return not (self._reading_paused or self._closing)

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self._protocol = protocol  # type: ignore[assignment]

    def get_protocol(self) -> asyncio.BaseProtocol:
        return self._protocol

    def is_closing(self) -> bool:
        return self._closing

    def close(self) -> None:
        """The router gets what was written, then the end of the pipe."""
        if not self._closing:
            self._closing = True
            self._pipe.end(drop=False)

    def abort(self) -> None:
        """Ends the pipe now."""
        self._closing = True
        self._pipe.end(drop=True)

    # -- the pipe's side

    def begin(self, session: Callable[[], asyncio.Protocol]) -> None:
        if not self._closing:
            self._protocol = session()
            self._protocol.connection_made(self)

    def received(self, data: bytes) -> None:
        self._unread += data
        if not self._reading_paused:
            self._read()
        elif len(self._unread) > READ_BACKLOG_BYTES:
            log.warning("a router sent %d bytes to a lane that does not read", len(self._unread))
            self.abort()

    def _read(self) -> None:
        if self._unread and not (self._reading_paused or self._lost):
            data = bytes(self._unread)
            self._unread.clear()
            try:
                self._protocol.data_received(data)
            except Exception as error:  # The session's own failure: it loses its lane, as with asyncio's transports.
                log.exception("a lane's session failed")
                self.abort()
                self.lost(error)

    def sent(self, size: int) -> None:
        self._unsent -= size
        if self._writing_paused and self._unsent <= self._low:
            self._writing_paused = False
            self._protocol.resume_writing()

    def hung_up(self) -> None:
        """The router has closed the pipe, after all it had sent."""
        self._read()
        self.abort()

    def lost(self, error: Exception | None) -> None:
        """The pipe is gone; tells the session once."""
        if not self._lost:
            self._closing = self._lost = True
            self._protocol.connection_lost(error)
