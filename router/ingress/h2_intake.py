"""The receiving half of one HTTP/2 connection: what comes is cut into frames, and these are worked off turn by turn.

Rule: one connection takes a bounded part of a turn of the event loop, however many frames come in one read, and all
connections together begin a bounded number of calls in it: meanwhile nothing more is read of one, and all others get
their turn.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterator
from time import monotonic

from router.ingress.h2_frames import HEADERS, Frame, FrameCutter
from router.ingress.h2_wire import TURN_S
from router.ingress.pace import Pace


class Intake:
    """One connection's."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        pace: Pace,
        received: Callable[[int, int, int, bytes], None],
        failed: Callable[[Exception], None],
    ) -> None:
        """`received` is given each frame: its type, flags, stream, and the whole of it. `failed` is told of what that
        raises, and of input that is no frames; nothing more is given then."""
        self.stuck_since = math.inf
        """Since when, in loop time, a frame or a header block is not whole."""
        self._loop = loop
        self._pace = pace
        self._received = received
        self._failed = failed
        self._transport: asyncio.Transport | None = None
        self._frames = FrameCutter()
        self._unread: Iterator[Frame] | None = None
        """What waits for the next turn."""
        self._next: Frame | None = None
        """Of these the first, which begins a call."""
        self._moved = False
        self._stopped = False

    def connect(self, transport: asyncio.Transport) -> None:
        self._transport = transport

    @property
    def ready(self) -> bool:
        """The peer has sent its preface and its first settings."""
        return self._frames.ready

    def feed(self, data: bytes) -> None:
        """Takes what came in. Not called while reading is paused."""
        if self._stopped:
            return
        self._moved = False
        self._work_off(self._frames.feed(data))

    def stop(self) -> None:
        """Takes no more. What still comes is read and thrown away, so that the end of it is noticed."""
        self._stopped = True
        self._flow()

    def disconnect(self) -> None:
        """The connection is lost: lets go of whoever was told of frames, who holds this."""
        self.stop()
        self._received = self._failed = _ignore
        self._transport = self._unread = self._next = None

    def _work_off(self, frames: Iterator[Frame]) -> None:
        until = monotonic() + TURN_S
        try:
            if self._next is not None:
                first, self._next = self._next, None
                self._received(*first)
                if self._stopped:
                    return
            for kind, flags, stream, frame in frames:
                self._moved = True
                if kind == HEADERS and not self._pace.admits(self._loop, self._next_turn):
                    self._next = kind, flags, stream, frame
                    self._put_off(frames)
                    return
                self._received(kind, flags, stream, frame)
                if self._stopped:
                    return
                if monotonic() > until:
                    self._put_off(frames)
                    self._loop.call_soon(self._next_turn)
                    return
        except Exception as error:
            self._stopped = True
            self._flow()
            self._failed(error)
            return
        self._flow()
        if not self._frames.pending:
            self.stuck_since = math.inf
        elif self._moved or self.stuck_since == math.inf:
            self.stuck_since = self._loop.time()

    def _put_off(self, frames: Iterator[Frame]) -> None:
        if self._unread is None and self._transport is not None:
            self._transport.pause_reading()
        self._unread = frames
        self.stuck_since = math.inf  # It is ours to go on.

    def _next_turn(self) -> None:
        if self._unread is not None:
            self._work_off(self._unread)

    def _flow(self) -> None:
        """Lets more come, where it was stopped."""
        if self._unread is None:
            return
        self._unread = None
        if self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()


def _ignore(*_: object) -> None: ...
