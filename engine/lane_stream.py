"""The engine's side of a lane's streams, and what waits for the lane's next frame.

Rule: what a stream writes within one frame is one output, its end too; the messages of a gRPC stream alone stay apart.
Both classes are here a second time as C (`_lane_stream.pyx`): between two engine steps other work fills the processor's
caches, so that what a token costs is how much memory its way touches.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, cast

from engine.base import Abort
from router.compiled import part
from router.errors import ClientTooSlow, KvlaneError
from router.lane import frames
from router.lane.frames import CacheReport, End, Head, Output, Step
from router.types import Headers, Load

if TYPE_CHECKING:
    from collections.abc import Sequence

STEP_PAYLOAD_BYTES = 4 << 20
"""After a pause the backlog goes out in frames of about this size, so that none comes near the frame limit."""
STREAM_BACKLOG_BYTES = 16 << 20
"""What one stream may hold back while its router does not read the lane."""
HELD_OUTPUT_BYTES = 64
"""What each of its outputs counts for beside its payload."""
MAX_PAYLOAD_BYTES = 64 << 20
"""Longer pieces of an HTTP body go in several outputs; gRPC messages are far below this."""
JOINED_PAYLOAD_BYTES = 64 << 10
"""Output joins what still waits of its stream up to this size; copying more would cost more than another output."""


class Lane(Protocol):
    """The lane that outputs go out on."""

    def flush_soon(self) -> None:
        """Something waits for the next frame, which is to go out in this turn of the loop."""

    def urge(self) -> None:
        """Sends what waits at once, or very soon if that was done a moment ago."""

    def held_back(self) -> None:
        """Some output waits because the router does not read."""

    def forget(self, stream: LaneStream) -> None:
        """The stream is over, however it ended."""


class Outbox:
    """What waits for a lane's next frame."""

    def __init__(self, lane: Lane) -> None:
        self._lane = lane
        self._outputs: list[Output] = []
        self.frame = 0
        """Rises with each frame: what was put under another number does not wait any more, or not alone."""
        self.paused = False
        """The router reads too slowly, so that output is held back."""
        self.due = False
        """A flush is on its way."""
        self.urgent = False
        """What waits is urgent, and was not sent at once."""

    def __len__(self) -> int:
        return len(self._outputs)

    def put(self, output: Output) -> None:
        """Adds to the next frame."""
        self._outputs.append(output)
        if not self.due:
            self.due = True
            self._lane.flush_soon()
        if self.urgent:
            self._lane.urge()  # This turn of the loop may be a long one.

    def take(self, seq: int, acked: int, load: Load, report: CacheReport | None) -> bytes:
        """A `Step` with what waits, as it goes over the lane; of more than `STEP_PAYLOAD_BYTES` the rest waits on."""
        outputs, self._outputs = _cut(self._outputs)
        self.frame += 1
        return frames.encode(Step(seq, acked, load, outputs, report))

    def waiting(self) -> Sequence[tuple[int, int]]:
        """Of each output its stream and the length of its payload, in bytes."""
        return [(output.stream, len(output.payload)) for output in self._outputs]

    def clear(self) -> None:
        """What waits is nobody's any more."""
        self._outputs.clear()
        self.frame += 1


class LaneStream:
    """One stream on one lane; the engine writes to it (`engine.base.StreamOut`)."""

    __slots__ = ("_frame", "_head", "_joins", "_lane", "_outbox", "_waiting", "backlog", "id", "over", "stop")

    def __init__(self, lane: Lane, outbox: Outbox, stream: int, joins: bool) -> None:
        self._lane = lane
        self._outbox = outbox
        self._joins = joins
        self._head: Head | None = None
        self._waiting: Output | None = None
        """The last output, while its frame has not gone out."""
        self._frame = -1
        self.id = stream
        self.stop: Abort = nothing
        self.over = False
        self.backlog = 0
        """Bytes that wait because the router does not read."""

    def head(self, status: int, headers: Headers) -> None:
        self._head = Head(status, tuple(headers))

    def data(self, payload: bytes, tokens: int = 0, *, urgent: bool = False) -> None:
        if self.over:
            return
        if type(payload) is not bytes:
            payload = bytes(memoryview(payload))
        outbox = self._outbox
        if outbox.paused:
            if self.backlog > STREAM_BACKLOG_BYTES:
                overflow(self)
                return
            self.backlog += len(payload) + HELD_OUTPUT_BYTES
            self._lane.held_back()
        if len(payload) > MAX_PAYLOAD_BYTES:
            self._put_in_pieces(payload, tokens)
            return
        waiting = self._waiting
        if (
            waiting is not None
            and self._frame == outbox.frame
            and self._joins
            and len(waiting.payload) < JOINED_PAYLOAD_BYTES
        ):
            waiting.payload += payload
            waiting.tokens += tokens
        else:
            self._put(payload, tokens)
        if urgent:
            self._lane.urge()

    def end(self, finish: str = "") -> None:
        self._finish(ended(finish))

    def fail(self, error: KvlaneError) -> None:
        self._finish(failed(error))

    def _put(self, payload: bytes, tokens: int, end: End | None = None) -> None:
        outbox = self._outbox
        self._waiting = Output(self.id, payload, tokens, end, self._head)
        self._frame = outbox.frame
        self._head = None
        outbox.put(self._waiting)

    def _finish(self, end: End) -> None:
        if self.over:
            return
        if self._waiting is not None and self._frame == self._outbox.frame:
            self._waiting.end = end
        else:
            self._put(b"", 0, end)
        self._lane.forget(self)

    def _put_in_pieces(self, payload: bytes, tokens: int) -> None:
        for start in range(0, len(payload), MAX_PAYLOAD_BYTES):
            self._put(payload[start : start + MAX_PAYLOAD_BYTES], tokens if not start else 0)


def kinds() -> tuple[type[Outbox], type[LaneStream]]:
    """Of outboxes and of their streams: the compiled ones where these are there.

    Raises `ConfigError` where they have to be and are not.
    """
    compiled = part("engine._lane_stream")
    if compiled is None:
        return Outbox, LaneStream
    return cast("type[Outbox]", compiled.Outbox), cast("type[LaneStream]", compiled.LaneStream)


def overflow(stream: LaneStream) -> None:
    """It holds back more than it may: it ends here and in the engine."""
    stream.fail(ClientTooSlow(f"the router left {stream.backlog} bytes of this stream unread"))
    stream.stop()


def ended(finish: str) -> End:
    """How a stream ends with that reason."""
    return End(_encodable(finish))


def failed(error: KvlaneError) -> End:
    """How a stream ends with it."""
    return End("", error.name, _encodable(error.message), error.param and _encodable(error.param))


def nothing() -> None:
    """What there is to stop before the engine took a stream."""


def _encodable(text: str) -> str:
    """A lone surrogate that came out of a request must not hold up the whole frame."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


def _cut(outputs: list[Output]) -> tuple[list[Output], list[Output]]:
    """The outputs for one frame, and the rest."""
    size = 0
    for i, output in enumerate(outputs):
        size += len(output.payload)
        if size > STEP_PAYLOAD_BYTES:
            return outputs[: i + 1], outputs[i + 1 :]
    return outputs, []
