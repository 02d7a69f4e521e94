"""The sending half of one HTTP/2 stream: messages in DATA frames, within both flow-control windows, then trailers.

What the windows and the transport let pass goes straight into the connection's output of this turn of the event loop;
the rest waits here, and its messages are joined into full frames as room comes. Rule: a message that is out in part is
finished, even where the rest is dropped. The two windows are kept here and in `h2_wire` alone, h2 has no say.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Final, Protocol

from router.ingress import h2_frames
from router.ingress.grpc_sink import check_room
from router.ingress.h2_frames import DATA, MAX_BODY_BYTES, MESSAGE_HEAD, message_prefix

QUICK_BYTES: Final = 4096
"""Messages up to this size take the short way. What that writes in one turn is not counted: an engine step's messages
are small."""
SHARE_BYTES: Final = 1 << 16
"""What a stream may leave unread of a connection that has left too much unread altogether."""
_DEAD: Final = -(1 << 62)
_message_head: Final = MESSAGE_HEAD.pack


class Sending(Protocol):
    """What an output needs of its connection."""

    window: int
    """How much DATA the client takes on the connection, all streams together."""
    flowing: bool
    """The transport takes output."""
    out: list[bytes | memoryview]
    """This turn's frames."""
    waiting: dict[Output, None]
    """Outputs that could go on but for the connection's window or the transport, in their order."""
    unread_bytes: int
    """What waits, all streams together."""
    prelude: bytes
    """What HPACK wants before the next header block."""

    @property
    def crowded(self) -> bool:
        """More waits than is kept for one client."""

    def wake(self) -> None:
        """Has `out`, and what waits and has room, written at the end of this turn."""

    def retire(self, stream: int) -> None:
        """The stream's trailers are out."""


class Output:
    """One stream's."""

    __slots__ = (
        *("_connection", "_limit", "_messages", "_opened", "_rest", "_taken", "_trailers", "stream"),
        *("unread_bytes", "window"),
    )

    def __init__(self, connection: Sending, stream: int, window: int, buffer_bytes: int) -> None:
        """`window` is the stream's; more than `buffer_bytes` unread are not kept."""
        self.stream = stream
        self.window = window
        self.unread_bytes = 0
        """Bytes taken and not yet written."""
        self._connection = connection
        self._limit = buffer_bytes
        self._messages: deque[bytes] = deque()
        self._rest: memoryview | None = None
        """What is left of the message that is out in part."""
        self._opened = False
        self._trailers: bytes | None = None
        self._taken: asyncio.Future[None] | None = None

    @property
    def opened(self) -> bool:
        """The answer's head is out."""
        return self._opened

    @property
    def ending(self) -> bool:
        """The trailers wait behind what is unread."""
        return self._trailers is not None

    @property
    def dead(self) -> bool:
        """Nothing is sent any more."""
        return self.window <= _DEAD >> 1

    def open(self, block: bytes) -> None:
        """Sends the answer's head."""
        self._opened = True
        self._write(block, end_stream=False)

    def send(self, message: bytes) -> None:
        """Sends one message, at once or as soon as there is room. Raises `ClientTooSlow` with too much unread."""
        size = len(message)
        framed = size + 5
        connection = self._connection
        if (
            not self.unread_bytes
            and size <= QUICK_BYTES
            and framed <= self.window
            and framed <= connection.window
            and connection.flowing
        ):
            self.window -= framed
            connection.window -= framed
            out = connection.out
            if not out:
                connection.wake()
            out.append(_message_head(framed << 8, self.stream, size))
            out.append(message)
        elif not self.dead:
            check_room(self.unread_bytes, min(self._limit, SHARE_BYTES) if connection.crowded else self._limit)
            self._messages.append(message)
            self._count(framed)
            self.resume()

    def end(self, block: bytes) -> None:
        """Sends the trailers, behind what is unread. The first ones count."""
        if self.dead or self._trailers is not None:
            return
        if self.unread_bytes:
            self._trailers = block
        else:
            self._close(block)

    def drop(self) -> None:
        """Forgets the messages that have not begun."""
        if self._messages:
            self._messages.clear()
            self._count((len(self._rest) if self._rest is not None else 0) - self.unread_bytes)
            self.resume()
            self._took()

    def kill(self) -> None:
        """The stream is gone."""
        self.window = _DEAD
        self._rest = None
        self._messages.clear()
        self._count(-self.unread_bytes)
        self._connection.waiting.pop(self, None)
        self._took()

    def resume(self) -> None:
        """There may be room, or none any more."""
        if self.unread_bytes and self.window > 0:
            self._connection.waiting[self] = None
            self._connection.wake()
        else:
            self._connection.waiting.pop(self, None)

    def write_one(self) -> int:
        """Writes one DATA frame of what is unread; returns its size. Only where there is room for some of it."""
        room = min(self.window, self._connection.window, MAX_BODY_BYTES)
        parts: list[bytes | memoryview] = [b""]  # The frame's head, once its size is known.
        left = room
        while left:
            rest = self._rest
            if rest is None:
                if not self._messages:
                    break
                message = self._messages.popleft()
                rest = memoryview(message_prefix(len(message)) + message)
            parts.append(rest[:left])
            self._rest = rest[left:] if len(rest) > left else None
            left -= min(left, len(rest))
        size = room - left
        parts[0] = h2_frames.frame_head(DATA, 0, self.stream, size)
        self.window -= size
        self._connection.window -= size
        self._count(-size)
        self._connection.out += parts
        self._took()
        if not self.unread_bytes and self._trailers is not None:
            self._close(self._trailers)
        return size

    async def flushed(self, limit_s: float) -> bool:
        """Whether everything is written; waits for that up to `limit_s`."""
        if not self.unread_bytes:
            return True
        self._taken = asyncio.get_running_loop().create_future()
        await asyncio.wait([self._taken], timeout=limit_s)
        self._taken = None
        return not self.unread_bytes

    def _count(self, change: int) -> None:
        self.unread_bytes += change
        self._connection.unread_bytes += change

    def _took(self) -> None:
        if self._taken is not None and not self.unread_bytes and not self._taken.done():
            self._taken.set_result(None)

    def _close(self, block: bytes) -> None:
        self._opened = True
        self._write(block, end_stream=True)
        self._connection.retire(self.stream)

    def _write(self, block: bytes, *, end_stream: bool) -> None:
        if self.dead:
            return
        connection = self._connection
        if connection.prelude:
            block, connection.prelude = connection.prelude + block, b""
        connection.wake()
        connection.out.append(h2_frames.headers_frame(self.stream, block, end_stream=end_stream))
