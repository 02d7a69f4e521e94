"""A call on the `h2` edge: the receiving half of one HTTP/2 stream, and the sink of its answer.

Rule: a call keeps no more of its client than it will read. Its connection feeds it, its handler's task reads it.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from typing import Final, Protocol

import grpc

from router.errors import KvlaneError, Overloaded
from router.ingress import h2_headers
from router.ingress.grpc_errors import Trailers
from router.ingress.grpc_sink import StreamSink, route_message, taken
from router.ingress.h2_headers import Head
from router.ingress.h2_messages import Message, MessageCutter, decompressed
from router.ingress.h2_output import Output
from router.ingress.h2_wire import Wire
from router.options import GrpcOptions
from router.types import Request

MAX_UNREAD_MESSAGES: Final = 64
"""Of a stream of requests, which only reflection has."""
LINGER_S: Final = 60.0
"""How long an ended stream is kept whose client does not read the rest of it."""
DEADLINE_SLACK_S: Final = 0.5
"""A deadline that has passed by this much ends a call whatever its handler does; dispatch keeps to it by itself."""
_INLINE_BYTES: Final = 1024
"""A compressed message larger than this is decompressed in a thread: it may grow a thousandfold."""


class Receiving(Protocol):
    """What a call needs of its connection."""

    options: GrpcOptions
    loop: asyncio.AbstractEventLoop
    peer_name: str
    wire: Wire

    def hold(self, size: int) -> bool:
        """Counts bytes of requests that nobody has read yet (less, where negative); False where they are too many."""

    def keep(self, size: int) -> bool:
        """Counts the bytes that compressed requests grew to, while their calls have them; as `hold`, by themselves."""


class H2Call:
    """One call (see `grpc_call.Call`)."""

    __slots__ = (
        *("_connection", "_cutter", "_fault", "_grown", "_held", "_inbox", "_waiter", "deadline"),
        *("begun", "ended", "head", "listening", "linger_by", "output", "task"),
    )

    def __init__(self, connection: Receiving, stream: int, head: Head, window: int) -> None:
        options = connection.options
        self._connection = connection
        self.head = head
        """What opened it."""
        self._cutter = MessageCutter(options.max_message_bytes)
        self._inbox: deque[Message] = deque()
        self._fault: KvlaneError | None = None
        self._waiter: asyncio.Future[None] | None = None
        self.listening = True
        """What comes is read."""
        self._held = 0
        self._grown = 0
        self.ended = False
        """The client has sent its last."""
        self.deadline = None if head.timeout_s is None else connection.loop.time() + head.timeout_s
        """In loop time."""
        self.output = Output(connection.wire, stream, window, options.stream_buffer_bytes)
        self.linger_by = math.inf
        """Until when the rest of an ended call waits for its client to read it."""
        self.task: asyncio.Task[None] | None = None
        """The handler's."""
        self.begun = False
        """It runs."""

    # -- for the connection

    def fed(self, data: bytes) -> None:
        """Request bytes came."""
        if not self.listening or self._fault is not None:
            return
        try:
            self._inbox += self._cutter.feed(data)
            self._count()
            if len(self._inbox) > MAX_UNREAD_MESSAGES:
                raise Overloaded("more request messages came than are read")
        except KvlaneError as error:
            self._fault = error
            self._forget()
        if self._waiter is not None and (self._inbox or self._fault is not None):
            self._wake()

    def end_of_request(self) -> None:
        """The client has sent its last."""
        self.ended = True
        self._wake()

    def over(self) -> None:
        """The stream is gone: nothing comes or goes any more."""
        self._forget()
        self._let_go()
        self.listening = False
        self.output.kill()

    @property
    def abandoned(self) -> bool:
        """Ended, and its client has not read up to the status."""
        return self.output.ending and (self.task is None or self.task.done())

    def is_overdue(self, now: float) -> bool:
        """Ends the call where its deadline has passed; true where its stream has to be reset for it."""
        if self.deadline is not None and now > self.deadline + DEADLINE_SLACK_S:
            output = self.output
            output.drop()
            output.end(h2_headers.status(grpc.StatusCode.DEADLINE_EXCEEDED, "too late", alone=not output.opened))
            if not output.dead:
                return True  # A message is out in part, and its client takes no more of it.
            if self.task is not None:
                self.task.cancel()
            return False
        if self.linger_by == math.inf and self.abandoned:
            self.linger_by = now + LINGER_S
        return now > self.linger_by

    # -- for the handler

    def metadata(self) -> dict[str, str]:
        return self.head.metadata

    def time_remaining(self) -> float | None:
        return None if self.deadline is None else self.deadline - self._connection.loop.time()

    def peer(self) -> str:
        return self._connection.peer_name

    async def read(self) -> bytes | None:
        self._let_go()  # Who asks for the next message is done with the last.
        while not self._inbox:
            if self._fault is not None:
                raise self._fault
            if self.output.dead:
                raise asyncio.CancelledError  # Nobody asks any more; the task's own cancel may come later.
            if self.ended:
                return None
            self._waiter = self._connection.loop.create_future()
            await self._waiter
        compressed, message = self._inbox.popleft()
        self._count()
        if not compressed:
            return message
        limit, encoding = self._connection.options.max_message_bytes, self.head.encoding
        if len(message) <= _INLINE_BYTES:
            grown = decompressed(message, encoding, limit)
        else:
            grown = await asyncio.to_thread(decompressed, message, encoding, limit)
        if self.listening:  # Else the call is over.
            self._grown = len(grown)
            if not self._connection.keep(self._grown):
                raise Overloaded("this connection's compressed requests hold too many bytes until their calls end")
        return grown

    def stream(self, request_id: str) -> H2Sink:
        self.stop_reading()
        return H2Sink(self.output, request_id)

    async def answer(self, message: bytes, request_id: str = "") -> None:
        self.stop_reading()
        self.send(message, request_id)
        await taken(self.output, self._connection.options.read_timeout_s)

    async def fail(self, code: grpc.StatusCode, message: str, trailers: Trailers = ()) -> None:
        self.stop_reading()
        self.output.end(h2_headers.status(code, message, trailers, alone=not self.output.opened))

    # -- for both

    def stop_reading(self) -> None:
        """What still comes is of no interest."""
        self.listening = False
        self._forget()

    def send(self, message: bytes, request_id: str = "") -> None:
        """Sends a message, behind the answer's head where that is not out yet."""
        if not self.output.opened:
            self.output.open(h2_headers.opening(request_id))
        self.output.send(message)

    def finish(self) -> None:
        """Ends the call with OK."""
        if not self.output.opened:
            self.output.open(h2_headers.OPENING)
        self.output.end(h2_headers.OK)

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _count(self) -> None:
        held = self._cutter.held_bytes + sum(len(message) for _, message in self._inbox)
        change, self._held = held - self._held, held
        if change and not self._connection.hold(change):
            raise Overloaded("this connection's requests hold too many bytes that are not whole messages yet")

    def _let_go(self) -> None:
        if self._grown:
            self._connection.keep(-self._grown)
            self._grown = 0

    def _forget(self) -> None:
        self._inbox.clear()
        self._cutter.clear()
        if self._held:
            self._connection.hold(-self._held)
            self._held = 0


class H2Sink(StreamSink):
    """Gives a stream's messages to the call's output."""

    __slots__ = ("_output", "_request_id", "_send")

    def __init__(self, output: Output, request_id: str) -> None:
        super().__init__()
        self._output = output
        self._request_id = request_id
        self._send = output.send

    def data(self, payload: bytes, tokens: int) -> None:
        if not self.started:
            self._begin()
        self._send(payload)

    def waiting(self, request: Request) -> None:
        """The request still waits for a replica: an empty message tells so. Pings, which are the connection's, do not
        keep balancers from cutting a silent stream."""
        output = self._output
        if not self.started and not output.unread_bytes:
            self._open()
            self._send(b"")

    def _open(self) -> None:
        if not self._output.opened:
            self._output.open(h2_headers.opening(self._request_id))

    def _begin(self) -> None:
        self.started = True
        self._open()
        if self._receipt is not None:
            self._send(route_message(self._receipt))

    def complete(self) -> None:
        if not self.started:
            self._begin()

    def stop(self) -> None:
        """Everything that came is on its way already."""

    @property
    def unread_bytes(self) -> int:
        return self._output.unread_bytes

    async def flushed(self, limit_s: float) -> bool:
        return await self._output.flushed(limit_s)

    async def close(self) -> None:
        self._output.drop()
