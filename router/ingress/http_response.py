"""HTTP/1 responses: heads as bytes, and `Exchange`, the sink that relays a replica's answer to one request.

An exchange owns the framing of its response and nothing else; bytes go to its connection, which owns the transport and
what a slow client has not read, or straight to the socket while there is nothing such. The one rule: nothing of an
answer is written before its first payload (or the end) is here, so that until then a failed try can be forgotten. Only
a stream that waits long for a replica is begun before.
"""

from __future__ import annotations

import http
import math
from collections.abc import Callable
from typing import Final, Protocol

import msgspec

from router.errors import KvlaneError, MethodNotAllowed, ReplicaFailed
from router.ingress import http_waiting, openai
from router.lane.relay import Chunks
from router.types import Headers, Receipt, Request

_STATUS_LINES: Final = {status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n" for status in http.HTTPStatus}

# Set here, or meant for the connection between replica and router alone.
_NOT_RELAYED: Final = frozenset(
    {
        *("connection", "keep-alive", "proxy-authenticate", "proxy-connection", "te", "trailer", "transfer-encoding"),
        *("upgrade", "date", "server", "x-request-id", "x-kvlane-route"),
        *("access-control-allow-origin", "access-control-expose-headers"),
    }
)

# How a body ends.
_CHUNKED: Final = 0
_SIZED: Final = 1
_UNTIL_CLOSE: Final = 2
_NO_BODY: Final = 3


_MALFORMED: Final = "The replica's answer has a malformed head"


class _HeadLines(msgspec.Struct, frozen=True):
    """What a replica's head says, as it goes to clients."""

    text: str
    """Status line and relayed headers, each with its line end."""
    length: str | None
    sse: bool
    """Whether the body is a stream of events."""


_MOST_KNOWN: Final = 64
_known_heads: dict[tuple[int, tuple[tuple[str, str], ...]], _HeadLines] = {}
"""Of streamed answers: all of a model's have the same few."""


def _head_lines(status: int, headers: tuple[tuple[str, str], ...]) -> _HeadLines:
    """Raises `ReplicaFailed` for what cannot be sent."""
    known = _known_heads.get((status, headers))
    if known is not None:
        return known
    lines = [_STATUS_LINES.get(status) or f"HTTP/1.1 {status} \r\n"]
    length, sse = None, False
    for name, value in headers:
        if name == "content-length":
            length = value
        elif name not in _NOT_RELAYED:
            lines.append(f"{name}: {value}\r\n")
            if name == "content-type":
                sse = value.startswith("text/event-stream")
    text = "".join(lines)
    if status < 200 or text.count("\n") != len(lines) or text.count("\r") != len(lines):
        raise ReplicaFailed(_MALFORMED)
    made = _HeadLines(text, length, sse)
    if sse:
        if len(_known_heads) >= _MOST_KNOWN:
            _known_heads.clear()
        _known_heads[status, headers] = made
    return made


class Output(Protocol):
    """What an exchange needs of its connection."""

    write_now: Callable[[bytes], object]
    """Straight to the transport; only while `flowing`."""
    flowing: bool
    """Whether the client keeps up: nothing waits to be written."""

    def socket(self) -> int:
        """The client's socket while all that was written is in it, for bytes that follow; else, and over TLS, -1."""

    def write(self, data: bytes | memoryview) -> None:
        """Writes, or keeps what the client cannot take yet."""

    def check_room(self) -> None:
        """Raises `ClientTooSlow` when the client has left too much unread."""

    def answered(self, exchange: Exchange, *, close: bool) -> None:
        """The response is complete."""

    def cut(self) -> None:
        """Breaks the connection so that the client cannot mistake what it has for the whole."""


class Envelope(msgspec.Struct):
    """What the head of every response to one request carries besides the answer's own headers."""

    request_id: str
    method: str
    path: str
    http_1_0: bool
    keep_alive: bool
    cors: str
    """Header lines, each with its line end."""
    date: Callable[[], str]
    """The `date` and `server` lines."""

    @property
    def head_only(self) -> bool:
        return self.method == "HEAD"

    def lines(self, close: bool) -> str:
        kept = "connection: keep-alive\r\n" if self.http_1_0 else ""
        connection = "connection: close\r\n" if close else kept
        return f"x-request-id: {self.request_id}\r\n{self.cors}{self.date()}{connection}\r\n"


class Reply(msgspec.Struct):
    """A whole response that the router itself gives."""

    status: int
    content_type: str
    body: bytes
    lines: str = ""
    """Further header lines, each with its line end."""

    def render(self, envelope: Envelope, *, close: bool) -> bytes:
        """The response's bytes; only the head for a HEAD request."""
        head = (
            f"{_STATUS_LINES[self.status]}content-type: {self.content_type}\r\n"
            f"content-length: {len(self.body)}\r\n{self.lines}{envelope.lines(close)}"
        )
        return head.encode("latin-1") + (b"" if envelope.head_only else self.body)


def error_reply(error: KvlaneError, path: str, receipt: Receipt | None = None) -> Reply:
    """The response that tells of `error`, as an OpenAI error object."""
    lines = [f"x-kvlane-error: {error.name}\r\n"]
    if error.http_status in (429, 503):
        lines.append(f"retry-after: {max(1, math.ceil(error.retry_after_s or 1))}\r\n")
    if error.http_status == 401:
        lines.append("www-authenticate: Bearer\r\n")
    if error.http_status == 415:
        lines.append("accept-encoding: identity\r\n")
    if isinstance(error, MethodNotAllowed):
        lines.append(f"allow: {', '.join(error.allow)}\r\n")
    if receipt is not None:
        lines.append(f"x-kvlane-route: {receipt.header()}\r\n")
    return Reply(error.http_status, "application/json", openai.error_body(error, path), "".join(lines))


class Exchange(Chunks):
    """One relayed request's response; a `Sink`."""

    __slots__ = (
        "_begun",
        "_complete",
        "_ending",
        "_folded",
        "_head",
        "_left",
        "_output",
        "_receipt",
        "_sse",
        "done",
        "envelope",
        "started",
        "status",
    )

    def __init__(self, output: Output, envelope: Envelope) -> None:
        self.envelope = envelope
        self.started = False
        self.done = False
        """Complete, or nobody is there to read it."""
        self.status = 0
        self._output = output
        self._write = output.write_now
        self._open = False
        """The short way is open: chunked, the head is out and the client keeps up."""
        self._socket = -1
        self._complete = False
        """All of it is written; the replica's `End` is on its way through dispatch."""
        self._receipt: Receipt | None = None
        self._head: bytes | None = None
        self._ending = _CHUNKED
        self._left = 0
        self._sse = False
        self._begun = False
        """The head of an event stream went out before there was a replica."""
        self._folded: bytearray | None = None
        """The replica's answer to such a request, where it is no event stream."""

    def waiting(self, request: Request) -> None:
        """The request still waits for a replica: where a stream was asked for, its client is told so by a comment, that
        nobody in between takes the connection for dead."""
        if self.done or self.started or self.envelope.http_1_0 or not self._output.flowing:
            return
        if self._begun:
            self._output.write(self._frame(http_waiting.COMMENT))
        elif http_waiting.wants_events(request):
            self._begun = self._sse = True
            self._ending = _CHUNKED
            self.status = 200
            head = http_waiting.HEAD + self.envelope.lines(not self.envelope.keep_alive)
            self._output.write(head.encode("latin-1") + self._frame(http_waiting.COMMENT))

    def routed(self, receipt: Receipt) -> None:
        """A new try; what an earlier one gave was not sent and is forgotten."""
        self._receipt = receipt
        self._head = self._folded = None

    def head(self, status: int, headers: Headers) -> None:
        """Renders the head and keeps it. Raises `ReplicaFailed` for one that cannot be sent."""
        answer = _head_lines(status, tuple(headers))
        if self._begun:
            self._reconcile(status, answer)
            return
        self._sse = answer.sse
        route = ""
        if self._receipt is not None:
            route = f"x-kvlane-route: {self._receipt.header()}\r\n"
            if route.count("\n") != 1 or route.count("\r") != 1:
                raise ReplicaFailed(_MALFORMED)
        framing = self._framing(status, answer.length)
        close = self._ending == _UNTIL_CLOSE or not self.envelope.keep_alive
        try:
            self._head = f"{answer.text}{framing}{route}{self.envelope.lines(close)}".encode("latin-1")
        except UnicodeEncodeError as error:
            raise ReplicaFailed(_MALFORMED) from error
        self.status = status

    def _reconcile(self, status: int, answer: _HeadLines) -> None:
        """The head is out already, and promised an event stream."""
        self.status = status
        if status == 200 and answer.sse:
            route = http_waiting.route_comment(self._receipt.header()) if self._receipt is not None else b""
            self._head = self._frame(route) if route else b""
        else:
            self._folded = bytearray()

    def _framing(self, status: int, length: str | None) -> str:
        if status in (204, 304) or self.envelope.head_only:
            self._ending = _NO_BODY
            return "" if length is None or status == 204 else f"content-length: {length}\r\n"
        if length is not None:
            if not (length.isascii() and length.isdigit()):
                raise ReplicaFailed("The replica's answer has a malformed content-length")
            self._ending = _SIZED
            self._left = int(length)
            return f"content-length: {length}\r\n"
        if self.envelope.http_1_0:
            self._ending = _UNTIL_CLOSE
            return ""
        self._ending = _CHUNKED
        return "transfer-encoding: chunked\r\n"

    def _slowly(self, payload: bytes) -> None:
        """A payload while the short way is not open. Raises `ClientTooSlow` and `ReplicaFailed`."""
        if payload and not self.done:
            self._data(payload)

    def last(self, payload: bytes, tokens: int) -> None:
        """Relays the last payload of an answer that is complete with it, where possible in one write with the end.
        Raises as `data`."""
        if self._ending != _CHUNKED or self._head is None or not payload or self.done or not self._output.flowing:
            self.data(payload, tokens)
            return
        head = b"" if self.started else self._head
        self.started = self._complete = True
        self._open = False
        self._write(b"%b%x\r\n%b\r\n0\r\n\r\n" % (head, len(payload), payload))

    def large(self, payload: memoryview, tokens: int) -> None:
        """As `data`, and copies nothing."""
        head = self._head
        if self._folded is not None:
            self._data(bytes(payload))
            return
        if head is None:
            raise ReplicaFailed("The replica sent output before its head")
        if self.done or self._ending == _NO_BODY:
            return
        output = self._output
        output.check_room()
        self._spend(len(payload))
        if not self.started:
            self.started = True
            output.write(head)
        if self._ending == _CHUNKED:
            output.write(b"%x\r\n" % len(payload))
            output.write(payload)
            output.write(b"\r\n")
        else:
            output.write(payload)
        self.flow()

    def _data(self, payload: bytes) -> None:
        head = self._head
        if self._folded is not None:
            self._folded += payload
            if len(self._folded) > http_waiting.MAX_FOLDED_BYTES:
                raise ReplicaFailed("The replica's answer is no event stream and too long for one event")
            return
        if head is None:
            raise ReplicaFailed("The replica sent output before its head")
        if self._ending == _NO_BODY:
            return
        self._output.check_room()
        framed = self._frame(payload)
        if not self.started:
            self.started = True
            framed = head + framed
        self._output.write(framed)
        self.flow()

    def _frame(self, payload: bytes) -> bytes:
        if self._ending == _CHUNKED:
            return b"%x\r\n%b\r\n" % (len(payload), payload)
        self._spend(len(payload))
        return payload

    def _spend(self, size: int) -> None:
        if self._ending == _SIZED:
            if size > self._left:
                raise ReplicaFailed("The replica's answer is longer than its content-length")
            self._left -= size

    def flow(self) -> None:
        """The client began or ceased to keep up."""
        able = self.started and not self.done and not self._complete
        self._open = able and self._ending == _CHUNKED and self._output.flowing
        self._socket = self._output.socket() if self._open else -1

    def finish(self) -> None:
        """The replica's answer is complete."""
        if self.done:
            return
        if self._complete:
            self._answered(close=False)
            return
        if self._folded is not None:
            self._head = self._frame(http_waiting.as_event(bytes(self._folded), self.envelope.path))
        if self._head is None:
            self.fail(ReplicaFailed("The replica ended the stream without an answer"))
            return
        if self._ending == _SIZED and self._left:
            self.fail(ReplicaFailed("The replica's answer is shorter than its content-length"))
            return
        tail = b"0\r\n\r\n" if self._ending == _CHUNKED else b""
        if not self.started:
            self.started = True
            tail = self._head + tail
        if tail:
            self._output.write(tail)
        self._answered(close=self._ending == _UNTIL_CLOSE)

    def fail(self, error: KvlaneError) -> None:
        """The answer cannot be completed: an error response, an error event, or a broken connection."""
        if self.done:
            return
        if self._complete:  # The client has all of it.
            self._answered(close=False)
            return
        close = openai.ends_connection(error)
        if not self.started and not self._begun:
            self.started = True
            self.status = error.http_status
            reply = error_reply(error, self.envelope.path, self._receipt)
            close = close or not self.envelope.keep_alive
            self._output.write(reply.render(self.envelope, close=close))
            self._answered(close=close)
        elif self._sse and self._ending in (_CHUNKED, _UNTIL_CLOSE):
            event = self._frame(openai.error_event(error, self.envelope.path))
            self._output.write(event + (b"0\r\n\r\n" if self._ending == _CHUNKED else b""))
            self._answered(close=close or self._ending == _UNTIL_CLOSE)
        else:
            self.done = True
            self._open = False
            self._output.cut()

    def _answered(self, *, close: bool) -> None:
        self.done = True
        self._open = False
        self._output.answered(self, close=close or not self.envelope.keep_alive)

    def abandon(self) -> None:
        """The client is gone."""
        self.done = True
        self._open = False
