"""The sending half of one HTTP/2 connection: this turn's frames, the connection's window, and the turns of streams.

All that is written in one turn of the event loop leaves in one write. Rule: streams that have to wait for the window or
the transport go on one frame at a time each, so none delays another by more than that.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from time import monotonic
from typing import Final

from router.ingress.h2_frames import DEFAULT_WINDOW
from router.ingress.h2_output import Output

log = logging.getLogger(__name__)

MAX_DEBT_BYTES: Final = 1 << 20
"""What a client may leave unread of answers to control frames, and of trailers, once the transport is full."""
TURN_S: Final = 0.002
"""What one connection may take of one turn of the event loop; the rest of its work is done in the next ones."""
_WRITE_BYTES: Final = 1 << 16  # Of waiting streams, in one write: the transport is asked again before the next.


class Wire:
    """See `h2_output.Sending`."""

    __slots__ = (
        *("_loop", "_max_unread_bytes", "_retired", "_sent", "_transport", "_woken"),
        *("flowing", "out", "prelude", "unread_bytes", "waiting", "window"),
    )

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        retired: Callable[[int], None],
        sent: Callable[[], None],
        max_unread_bytes: int,
    ) -> None:
        """`retired` is told of streams whose trailers are out, `sent` of each turn that writes something."""
        self.window = DEFAULT_WINDOW
        self.flowing = True
        self.out: list[bytes | memoryview] = []
        self.waiting: dict[Output, None] = {}
        self.prelude = b""
        """What HPACK wants before the next header block."""
        self.unread_bytes = 0
        self._loop = loop
        self._max_unread_bytes = max_unread_bytes
        self._retired = retired
        self._sent = sent
        self._transport: asyncio.Transport | None = None
        self._woken = False

    @property
    def crowded(self) -> bool:
        return self.unread_bytes > self._max_unread_bytes

    def connect(self, transport: asyncio.Transport) -> None:
        self._transport = transport

    def disconnect(self) -> None:
        """The transport is gone, and nobody is told anything any more."""
        self._transport = None
        self._sent = _nothing
        self._retired = _nobody
        self.flowing = False
        self.out.clear()

    def wake(self) -> None:
        """Has `out`, and what waits and has room, written at the end of this turn."""
        if not self._woken:
            self._woken = True
            self._loop.call_soon(self.flush)

    def retire(self, stream: int) -> None:
        """The stream's trailers are out."""
        self._retired(stream)

    def write(self, frame: bytes) -> None:
        """Sends a frame in this turn, behind what is there."""
        self.wake()
        self.out.append(frame)

    def say(self, data: bytes) -> None:
        """Sends what keeps the connection going, ahead of this turn's output."""
        if self._transport is not None and self._bearable():
            self._transport.write(data)

    def flow(self, flowing: bool) -> None:
        """The transport is full, or takes output again."""
        self.flowing = flowing
        if flowing and self.waiting:
            self.wake()

    def opened(self, increment: int) -> None:
        """The client widened the connection's window."""
        self.window += increment
        if self.waiting:
            self.wake()

    def flush(self) -> None:
        """Writes what there is, as far as one turn goes."""
        try:
            self._write_out()
            self._woken = self._write_waiting()
        except Exception:
            log.exception("a defect in the HTTP/2 edge; a client loses its connection")
            if self._transport is not None:
                self._transport.abort()
            return
        if self._woken:
            self._loop.call_soon(self.flush)

    def _write_waiting(self) -> bool:
        """Whether there is more to do in the next turn."""
        written, until = 0, monotonic() + TURN_S
        waiting, late = self.waiting, False
        while waiting and self.flowing and self.window > 0 and not late:
            output = next(iter(waiting))
            del waiting[output]
            written += output.write_one()
            output.resume()  # Behind the others.
            late = monotonic() > until
            if written >= _WRITE_BYTES:
                written = 0
                self._write_out()
        self._write_out()
        return late and bool(waiting)

    def close(self) -> bool:
        """Writes what there is, and nothing any more; returns whether the client will see that this was the end.

        It is left to the client to close the rest: a socket that is closed upon a client that still sends, were it
        window updates, resets the connection, and what is on its way to the client is lost.
        """
        self._write_out()
        transport, self._transport = self._transport, None
        if transport is None or transport.is_closing():
            return True
        if not transport.can_write_eof():
            return False  # Over TLS the GOAWAY alone has to do.
        try:
            transport.write_eof()
        except OSError:
            transport.abort()  # The client was faster.
        return True

    def _write_out(self) -> None:
        out = self.out
        if not out:
            return
        self._sent()
        data = b"".join(out)
        out.clear()
        if self._transport is not None and self._bearable():
            self._transport.write(data)

    def _bearable(self) -> bool:
        transport = self._transport
        assert transport is not None
        if transport.is_closing():
            return False
        if self.flowing or transport.get_write_buffer_size() <= MAX_DEBT_BYTES:
            return True
        log.info("cut a connection: its client reads nothing and goes on sending")
        transport.abort()
        return False


def _nothing() -> None: ...
def _nobody(stream: int) -> None: ...
