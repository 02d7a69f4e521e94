"""One HTTP/1 connection: requests in, responses out, strictly in order, and every wait with a deadline.

A connection owns its transport, its parser, the requests that wait for their turn, the output that a slow client has
not taken, and the task of the one request under way. A client that closes its sending side (half-close) counts as
gone, as with other ASGI servers: its request is cancelled. What it asked before and was answered is flushed.

Deadlines are looked at by the server's one coarse timer, so a request costs no timer of its own.
"""

from __future__ import annotations

import asyncio
import math
import socket
import struct
from collections import deque
from collections.abc import Awaitable, Callable, Generator, Mapping
from typing import Final, Protocol, cast

from router.errors import ClientTooSlow, InternalError, KvlaneError, RequestTimeout, ShuttingDown, TooManyConnections
from router.ingress.base import Dispatch
from router.ingress.cors import Cors
from router.ingress.http_log import log_answer, log_defect, log_failure, log_relayed_refusal, logger
from router.ingress.http_parser import BODY, HEAD, IDLE, HttpRequest, RequestParser
from router.ingress.http_response import Envelope, Exchange, Reply, error_reply
from router.ingress.http_routes import Target, read_target
from router.ingress.pace import Pace
from router.lane.carriers import tune
from router.options import HttpOptions
from router.turns import in_turns
from router.types import Request

MAX_QUEUED: Final = 8
"""Pipelined requests that wait for their turn; beyond it no more input is parsed."""
MAX_QUEUED_BYTES: Final = 1 << 20
"""Bytes of their bodies, likewise."""
MAX_HELD_BYTES: Final = 1 << 20
"""Input that waits to be parsed; a client that sends more is cut off. Reading never pauses for longer than a turn of
the event loop, because a connection that is not read cannot tell that its client is gone."""
PACED_BYTES: Final = 128 << 10
"""After a read of so many, other connections get their turn: libuv would take up to 32 reads of 256 kB in one go."""
LAST_CALL_S: Final = 5.0
"""How long an open connection of a server that accepts no more may be idle: its client's next request is answered, and
told that there will be no other."""
PIECE_BYTES: Final = 256 << 10
"""Output that is written in one turn of the loop: to join and to write so much takes 0.1 to 0.3 ms."""
MAX_JOINED: Final = 1000
"""Pieces of output that are joined to one."""
LINGER_S: Final = 5.0
"""How long a closing connection may stand still: its output unread, or its client still sending after an error."""

_SLICE_BYTES: Final = 16 << 10  # Bounds how many pipelined requests one read can bring at once.
_CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"
_RESET_ON_CLOSE: Final = struct.pack("ii", 1, 0)

# What a connection waits for; its deadline follows from it.
_FRESH: Final = "the first request"
_WAITING: Final = "the next request"
_IN_HEAD: Final = "the headers"
_IN_BODY: Final = "the body"
_UNREAD: Final = "the client's reading"
_CLOSING: Final = "the end"
_NOTHING: Final = ("", 0)


class Pages(Protocol):
    """What is to be had at a server."""

    @property
    def glance(self) -> Callable[[Mapping[str, str]], None] | None:
        """Refuses who may not send a large body, by the noted headers; see `RequestParser`."""

    def request_id(self, request: HttpRequest | None) -> str:
        """By which the request goes in logs; None for input that could not be read."""

    def own(self, request: HttpRequest, target: Target) -> Reply | Awaitable[Reply] | None:
        """The router's own answer, at once or later; None where a replica must give it. Raises `KvlaneError`."""

    def relay(self, request: HttpRequest, target: Target, request_id: str) -> Request | Generator[None, None, Request]:
        """The request for a replica, at once or in slices, after each of which other streams get their turn.

        Raises `KvlaneError`, from a slice too.
        """

    def leave(self) -> None:
        """The router goes away: from now on it is not ready."""


class Site(Protocol):
    """What the connections of one server share."""

    options: HttpOptions
    dispatch: Dispatch
    routes: Pages
    cors: Cors
    clock: Callable[[], float]
    refused: Callable[[str, str], None]

    pace: Pace

    def date(self) -> str:
        """The `date` and `server` lines."""

    def admit(self, connection: Connection) -> bool:
        """Counts the connection in; False where there are too many."""

    def leave(self, connection: Connection) -> None:
        """The connection is lost."""

    def adopt(self, task: asyncio.Task[None]) -> None:
        """Takes a task that is cancelled, or is about to be, to be awaited at the latest when the server stops."""


class Connection(asyncio.Protocol):
    """The asyncio protocol of one client connection."""

    def __init__(self, site: Site, loop: asyncio.AbstractEventLoop, beneath: asyncio.Transport | None = None) -> None:
        """Over TLS, `beneath` carries the connection's transport."""
        options = site.options
        self._beneath = beneath
        self.deadline = math.inf
        self.flowing = True
        self._site = site
        self._loop = loop
        self._parser = RequestParser(options.max_header_bytes, options.max_body_bytes, site.routes.glance)
        self._queue = self._parser.complete
        self._waits_for = _NOTHING
        self._exchange: Exchange | None = None
        self._task: asyncio.Task[None] | None = None
        self._begun = False
        self._held_input = bytearray()
        self._awaits_turn = False
        self._held_output: deque[bytes | memoryview] = deque()
        self._held_bytes = 0
        self._full = False
        self._due = False
        self._half = False
        self._unflushed = 0
        self._retiring = False
        self._leaving = False
        self._idle_limit_s = options.idle_timeout_s
        self._closing = False
        self._lost = False

    # The transport's side.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's are none by type.
        self.write_now: Callable[[bytes], object] = self._transport.write
        tune(transport)
        sock = transport.get_extra_info("socket") if self._beneath is None else None
        self._socket = sock.fileno() if sock is not None else -1
        self._wait(_FRESH, self._site.options.header_timeout_s)
        if not self._site.admit(self):
            self._refuse(TooManyConnections("Too many connections are open"))

    def data_received(self, data: bytes) -> None:
        size = len(data)
        if size > PACED_BYTES:
            self._transport.pause_reading()
            self._loop.call_soon(self._read_on)
        if self._closing:
            return
        if self._awaits_turn or not (self._parser.lacks(size) or self._site.pace.admits(self._loop, self._take_turn)):
            self._awaits_turn = True
            self._held_input += data
            if len(self._held_input) > MAX_HELD_BYTES:
                self._take_turn()  # That it is refused, or read into its body.
            return
        sliced = size > _SLICE_BYTES and not self._parser.lacks(size)
        if self._held_input or sliced or not self._has_room():
            self._held_input += data
        else:
            self._parser.feed(data)
        self._advance()

    def _take_turn(self) -> None:
        """Reads what came while it was others' turn."""
        if not self._awaits_turn:
            return
        self._awaits_turn = False
        try:
            self._advance()
        except Exception:
            self.abort()
            raise
        if self._retiring and self._exchange is None and self._is_last() and self._parser.state == IDLE:
            self._close()

    def _read_on(self) -> None:
        if not self._transport.is_closing():
            self._transport.resume_reading()

    def eof_received(self) -> bool:
        self._take_turn()  # While what it asked can still be answered.
        if self._exchange is not None and self._begun and self._beneath is None:
            self._site.pace.run(self._loop, self._gone)
            return True
        self._gone()
        return bool(self._held_output) and self._beneath is None  # Which goes out first; TLS ends both sides at once.

    def _gone(self) -> None:
        """The client sends nothing more: it is gone, if something is under way."""
        if self._lost:
            return
        # To let the transport close itself takes a flush, which a client that is gone would hold up.
        if self._exchange is not None:
            self._abandon()
            self._transport.abort()
        else:
            self._close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._lost = True
        self._closing = True
        self._awaits_turn = False
        self._abandon()
        self._parser.stop()
        self._queue.clear()
        self._held_input.clear()
        self._held_output.clear()
        self._beneath = None
        self._site.leave(self)

    def pause_writing(self) -> None:
        self._full = True
        self._flow(False)

    def resume_writing(self) -> None:
        self._full = False
        self._flush_soon()  # asyncio's transports must not be closed in here.

    def _flow(self, flowing: bool) -> None:
        self.flowing = flowing
        if self._exchange is not None:
            self._exchange.flow()

    # Requests in, in order.

    def _advance(self) -> None:
        """Reads and answers as far as the input and the client's reading allow."""
        self._answer_queued()
        held = self._held_input
        while held and not self._closing and self._has_room():
            piece = held[:_SLICE_BYTES]
            del held[:_SLICE_BYTES]
            self._parser.feed(piece)
            self._answer_queued()
        if self._closing:
            return
        if len(held) > MAX_HELD_BYTES:
            logger.info("cut a connection: its client sent %d bytes ahead of the answers", len(held))
            self._abandon()
            self.cut()
            return
        if self._parser.wants_continue and self._exchange is None and not self._queue:
            self._parser.wants_continue = False
            self.write(_CONTINUE)
        self._set_deadline()

    def _has_room(self) -> bool:
        queue = self._queue
        if not queue:
            return True
        waiting = sum(len(item.body) for item in queue if isinstance(item, HttpRequest))
        return len(queue) < MAX_QUEUED and waiting < MAX_QUEUED_BYTES

    def _answer_queued(self) -> None:
        queue = self._queue
        while queue and self._exchange is None and self.flowing and not self._closing:
            item = queue.popleft()
            if isinstance(item, KvlaneError):
                self._refuse(item)
            else:
                self._handle(item)

    def _handle(self, request: HttpRequest) -> None:
        site = self._site
        noted = request.noted
        envelope = Envelope(
            request_id=site.routes.request_id(request),
            method=request.method,
            path="",
            http_1_0=request.http_1_0,
            keep_alive=request.keep_alive and not (self._retiring or (self._leaving and self._is_last())),
            cors=site.cors.lines(noted.get("origin")),
            date=site.date,
        )
        try:
            if request.method == "OPTIONS" and "origin" in noted and "access-control-request-method" in noted:
                preflight = site.cors.preflight(noted)
                if preflight is not None:
                    self._reply(_preflight_reply(preflight, envelope), envelope)
                    return
            target = read_target(request.target)
            envelope.path = target.path
            self._route(request, target, envelope)
        except KvlaneError as error:
            log_failure(error, envelope)
            self._reply_refusal(error, envelope)
        except Exception:
            log_defect("handle", request.method, envelope.path)
            self._reply_refusal(InternalError("Internal error"), envelope)

    def _route(self, request: HttpRequest, target: Target, envelope: Envelope) -> None:
        routes = self._site.routes
        reply = routes.own(request, target)
        if isinstance(reply, Reply):
            self._reply(reply, envelope)
            return
        if reply is not None:
            exchange = self._exchange = Exchange(self, envelope)
            self._begun = False
            self._task = self._loop.create_task(self._give(reply, exchange))
            return
        routed = routes.relay(request, target, envelope.request_id)
        exchange = Exchange(self, envelope)
        self._exchange = exchange
        self._begun = False
        self._task = self._loop.create_task(self._relay(routed, exchange))

    async def _give(self, reply: Awaitable[Reply], exchange: Exchange) -> None:
        """The router's own answer that takes a while."""
        self._begun = True
        try:
            page = await reply
            exchange.head(page.status, (("content-type", page.content_type), ("content-length", str(len(page.body)))))
            exchange.data(page.body, 0)
            exchange.finish()
        except KvlaneError as error:
            log_failure(error, exchange.envelope)
            exchange.fail(error)
        except asyncio.CancelledError:
            exchange.fail(ShuttingDown("The request was cancelled"))
            raise
        except Exception:
            log_defect("answer", exchange.envelope.method, exchange.envelope.path)
            exchange.fail(InternalError("Internal error"))

    async def _relay(self, routed: Request | Generator[None, None, Request], exchange: Exchange) -> None:
        self._begun = True
        try:
            request = routed if isinstance(routed, Request) else await self._read(routed)
            await self._site.dispatch.run(request, exchange)
            exchange.finish()
            if exchange.status >= 400:
                log_relayed_refusal(exchange.envelope, exchange.status)
        except KvlaneError as error:
            if not exchange.done:
                log_failure(error, exchange.envelope)
            exchange.fail(error)
        except asyncio.CancelledError:
            # Where the client is gone or the server cut the answer short, the exchange is done and this does nothing.
            exchange.fail(ShuttingDown("The request was cancelled"))
            raise
        except Exception:
            log_defect("relay", exchange.envelope.method, exchange.envelope.path)
            exchange.fail(InternalError("Internal error"))

    async def _read(self, slices: Generator[None, None, Request]) -> Request:
        """A large request, slice by slice."""
        try:
            return await in_turns(slices)
        except KvlaneError as error:
            self._site.refused("http", error.name)
            raise

    # Responses out.

    def _reply(self, reply: Reply, envelope: Envelope) -> None:
        """Answers at once, without a replica."""
        close = not envelope.keep_alive
        self.write(reply.render(envelope, close=close))
        log_answer(envelope, reply.status)
        if close:
            self._close()

    def _reply_refusal(self, error: KvlaneError, envelope: Envelope) -> None:
        self._site.refused("http", error.name)
        self._reply(error_reply(error, envelope.path), envelope)

    def answered(self, exchange: Exchange, *, close: bool) -> None:
        """The exchange's response is complete; the next request gets its turn."""
        log_answer(exchange.envelope, exchange.status)
        self._exchange = self._task = None
        if close or self._retiring:
            self._close()
        elif self._queue or self._held_input or self._parser.wants_continue:
            self._advance()
        else:
            self._set_deadline()

    def write(self, data: bytes | memoryview) -> None:
        """Writes, or keeps what the client cannot take yet, and what is too much for one turn of the loop."""
        if self._lost:
            return
        size = len(data)
        if self.flowing and size <= PIECE_BYTES:
            self._transport.write(data)
            return
        self._held_bytes += size
        if size <= PIECE_BYTES:
            self._held_output.append(data)
            return
        view = memoryview(data)
        self._held_output.extend(view[at : at + PIECE_BYTES] for at in range(0, size, PIECE_BYTES))
        if self.flowing:
            self._flow(False)
            self._flush()

    def socket(self) -> int:
        """The client's socket while all that was written is in it, for bytes that follow; else, and over TLS, -1."""
        return -1 if self._held_output or self._transport.get_write_buffer_size() else self._socket

    def check_room(self) -> None:
        """Raises `ClientTooSlow` when more than `stream_buffer_bytes` are unread."""
        if not self._full:
            return  # What is held waits for its turn and not for the client.
        unread = self._unread_bytes()
        if unread > self._site.options.stream_buffer_bytes:
            raise ClientTooSlow(f"The client left {unread} bytes unread")

    def _unread_bytes(self) -> int:
        """Output that the client has not taken yet."""
        unread = self._held_bytes + self._transport.get_write_buffer_size()
        return unread if self._beneath is None else unread + self._beneath.get_write_buffer_size()

    def _flush_soon(self) -> None:
        if not self._full and not self._due:
            self._due = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        """Writes what is held, a piece in each turn of the loop, until the transport is full."""
        self._due = False
        if self._lost or self._full or self._transport.is_closing():
            return
        held = self._held_output
        if held:
            pieces: list[bytes | memoryview] = []
            size = 0
            while held and size < PIECE_BYTES and len(pieces) < MAX_JOINED:
                size += len(held[0])
                pieces.append(held.popleft())
            self._held_bytes -= size
            self._transport.write(pieces[0] if len(pieces) == 1 else b"".join(pieces))
        if held:
            self._flush_soon()
        elif self._closing:
            self._leave()
        elif not self._full:
            self._flow(True)
            if self._waits_for[0] == _UNREAD:
                self._waits_for = _NOTHING  # The next answer has its own time.
            self._advance()

    # Endings.

    def _refuse(self, error: KvlaneError) -> None:
        """Answers an input that cannot be read on, and closes once the client had time to read the answer."""
        envelope = Envelope(self._site.routes.request_id(None), "", "", False, False, "", self._site.date)
        log_failure(error, envelope)
        self._site.refused("http", error.name)
        self.write(error_reply(error, "").render(envelope, close=True))
        # Closed with input unread, the kernel would reset the connection and the answer could be lost.
        self._close(half=True)

    def _close(self, *, half: bool = False) -> None:
        """Closes after what is written has gone out; `half` waits for the client to close its side first."""
        if self._closing:
            return
        self._closing = True
        self._parser.stop()
        self._queue.clear()
        self._held_input.clear()
        self._half = half
        self._unflushed = self._unread_bytes()
        self._wait(_CLOSING, LINGER_S)
        if not self._held_output:
            self._leave()

    def _leave(self) -> None:
        """All is written."""
        if self._half and self._transport.can_write_eof():
            self._transport.write_eof()
        else:
            self._transport.close()

    def cut(self) -> None:
        """Resets the connection: the client must not take what it has for the whole answer."""
        if self._lost:
            return
        sock = self._transport.get_extra_info("socket")
        if sock is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
        self._exchange = self._task = None
        self._closing = True
        self._transport.abort()

    def _abandon(self) -> None:
        """The client is gone: nobody needs the answer any more."""
        exchange, task = self._exchange, self._task
        self._exchange = self._task = None
        if exchange is not None:
            exchange.abandon()
        if task is not None:
            self._site.pace.cancel(self._loop, task, begun=self._begun)
            self._site.adopt(task)

    def retire(self) -> None:
        """No further requests: closes now if idle, else after the response under way."""
        self._retiring = True
        if self._exchange is not None:
            self._exchange.envelope.keep_alive = False
        elif self._is_last() and self._parser.state == IDLE:
            self._close()

    def _is_last(self) -> bool:
        """Whether no further request has come."""
        return not (self._queue or self._held_input)

    def notice(self, limit_s: float) -> None:
        """Whatever is asked is served; the answer to the last request says that the connection ends."""
        self._leaving = True
        exchange = self._exchange
        if exchange is not None and not exchange.status and self._is_last():  # Its head is still to come.
            exchange.envelope.keep_alive = False

    def last_call(self) -> None:
        """One more request at most: it is answered, and told that the connection ends."""
        self._leaving = True
        self._idle_limit_s = LAST_CALL_S
        if self._exchange is None and self._waits_for[0] == _WAITING:
            self._waits_for = _NOTHING
            self._set_deadline()

    def stop_short(self) -> None:
        """Ends the response under way with an error and closes."""
        exchange, task = self._exchange, self._task
        if exchange is not None:
            exchange.fail(ShuttingDown("The router is shutting down"))
        if task is not None:
            task.cancel()
            self._site.adopt(task)
        if not self._closing:
            self._close()

    def abort(self) -> None:
        """Drops the connection, unflushed output and all; an answer that is cut so does not look whole."""
        self._abandon()
        if self._unread_bytes():
            self.cut()
        else:
            self._transport.abort()

    # Deadlines.

    def _set_deadline(self) -> None:
        options = self._site.options
        state = self._parser.state
        if self._exchange is not None:
            self.deadline, self._waits_for = math.inf, _NOTHING
        elif not self.flowing:
            if self._waits_for[0] != _UNREAD:
                self._unflushed = self._unread_bytes()
                self._wait(_UNREAD, options.body_timeout_s)
        elif state == HEAD:
            self._wait(_IN_HEAD, options.header_timeout_s)
        elif state == BODY:
            self._waits_for = _NOTHING  # The pause is what is limited, so any byte starts it anew.
            self._wait(_IN_BODY, options.body_timeout_s)
        elif self._parser.begun:
            self._wait(_WAITING, self._idle_limit_s)

    def _wait(self, what: str, limit_s: float) -> None:
        """Sets the deadline, unless this very wait has one already."""
        wait = (what, self._parser.begun)
        if wait != self._waits_for:
            self._waits_for = wait
            self.deadline = self._site.clock() + limit_s

    def expired(self) -> None:
        """The deadline has passed."""
        if self._awaits_turn:  # What it was waited for may be there.
            self._take_turn()
            return
        what = self._waits_for[0]
        if what in (_IN_HEAD, _IN_BODY):
            self._refuse(RequestTimeout(f"Timed out waiting for {what}"))
        elif what == _UNREAD:
            self._hurry(self._site.options.body_timeout_s)
        elif what == _CLOSING:
            self._hurry(LINGER_S)
        else:
            self._close()

    def _hurry(self, limit_s: float) -> None:
        """Gives the client more time as long as it reads."""
        unread = self._unread_bytes()
        if self._due or 0 < unread < self._unflushed:
            self._unflushed = unread
            self.deadline = self._site.clock() + limit_s
        else:
            self.abort()


def _preflight_reply(preflight: tuple[int, str, bytes], envelope: Envelope) -> Reply:
    status, lines, body = preflight
    envelope.cors = ""  # The preflight's own lines say it all.
    return Reply(status, "text/plain; charset=utf-8", body, lines)
