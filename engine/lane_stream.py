"""The engine's side of one stream on a lane.

Rule: what a stream writes within one frame is one output, its end too; the messages of a gRPC stream alone stay apart.
"""

from __future__ import annotations

from typing import Protocol

from engine.base import Abort
from router.errors import ClientTooSlow, KvlaneError
from router.lane.frames import End, Head, Output
from router.types import Headers

STREAM_BACKLOG_BYTES = 16 << 20
"""What one stream may hold back while its router does not read the lane."""
MAX_PAYLOAD_BYTES = 64 << 20
"""Longer pieces of an HTTP body go in several outputs; gRPC messages are far below this."""
JOINED_PAYLOAD_BYTES = 64 << 10
"""Output joins what still waits of its stream up to this size; copying more would cost more than another output."""


class Lane(Protocol):
    """The lane that a stream is on."""

    frame: int
    """Rises with each frame of output: what was put under another number is on its way."""

    @property
    def paused(self) -> bool:
        """Whether the router reads too slowly, so that output is held back."""

    def put(self, output: Output) -> None:
        """Adds to the next step frame, which goes out in this turn of the loop."""

    def urge(self) -> None:
        """Sends what waits at once, or very soon if that was done a moment ago."""

    def held_back(self) -> None:
        """Some output waits because the router does not read."""

    def forget(self, stream: LaneStream) -> None:
        """The stream is over, however it ended."""


class LaneStream:
    """One stream on one lane; the engine writes to it (`engine.base.StreamOut`)."""

    __slots__ = ("_frame", "_head", "_joins", "_session", "_waiting", "backlog", "id", "over", "stop")

    def __init__(self, session: Lane, stream: int, *, joins: bool) -> None:
        self._session = session
        self._joins = joins
        self._head: Head | None = None
        self._waiting: Output | None = None
        """The last output, while its frame has not gone out."""
        self._frame = -1
        self.id = stream
        self.stop: Abort = _nothing
        self.over = False
        self.backlog = 0
        """Bytes that wait because the router does not read."""

    def head(self, status: int, headers: Headers) -> None:
        self._head = Head(status, tuple(headers))

    def data(self, payload: bytes, tokens: int = 0, *, urgent: bool = False) -> None:
        if self.over:
            return
        session = self._session
        if session.paused:
            if self.backlog > STREAM_BACKLOG_BYTES:
                self._overflow()
                return
            self.backlog += len(payload)
            session.held_back()
        if len(payload) > MAX_PAYLOAD_BYTES:
            self._put_in_pieces(payload, tokens)
            return
        waiting = self._waiting
        if (
            waiting is not None
            and self._frame == session.frame
            and self._joins
            and len(waiting.payload) < JOINED_PAYLOAD_BYTES
        ):
            waiting.payload += payload
            waiting.tokens += tokens
        else:
            self._put(payload, tokens)
        if urgent:
            session.urge()

    def end(self, finish: str = "") -> None:
        self._finish(End(finish))

    def fail(self, error: KvlaneError) -> None:
        self._finish(End("", error.name, error.message, error.param))

    def _put(self, payload: bytes, tokens: int, end: End | None = None) -> None:
        session = self._session
        self._waiting = Output(self.id, payload, tokens, end, self._head)
        self._frame = session.frame
        self._head = None
        session.put(self._waiting)

    def _finish(self, end: End) -> None:
        if self.over:
            return
        if self._waiting is not None and self._frame == self._session.frame:
            self._waiting.end = end
        else:
            self._put(b"", 0, end)
        self._session.forget(self)

    def _overflow(self) -> None:
        self.fail(ClientTooSlow(f"the router left {self.backlog} bytes of this stream unread"))
        self.stop()

    def _put_in_pieces(self, payload: bytes, tokens: int) -> None:
        for start in range(0, len(payload), MAX_PAYLOAD_BYTES):
            self._put(payload[start : start + MAX_PAYLOAD_BYTES], tokens if not start else 0)


def _nothing() -> None:
    """What there is to stop before the engine took a stream."""
