"""HTTP/1 requests out of bytes: llhttp does the grammar, this module the limits and what a router must strip.

Sans-IO. One `RequestParser` per connection; what it completes is appended to `complete`, in order. The first thing
that is wrong is appended too, as the error that answers it, and nothing is read after that: a peer whose framing is
in doubt must not get a second guess (request smuggling).
"""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Callable, Mapping
from typing import Final

import httptools
import msgspec

from router.errors import BodyTooLarge, HeadersTooLarge, InternalError, InvalidRequest, KvlaneError
from router.keys import Key

IDLE: Final = 0
"""Between two requests."""
HEAD: Final = 1
"""Inside a request line or headers."""
BODY: Final = 2
"""Inside a body."""
ENDED: Final = 3
"""No request may follow."""

_OVERHEAD: Final = 16
"""Bytes of chunk framing allowed per byte of chunked body; a chunk of one byte needs 5."""

_RESERVE_AT: Final = 1 << 20
"""A body of so many bytes gets memory for all of it; before that, a length that is only claimed takes none."""
_GROWTH: Final = 4
"""By how much memory grows where no length is claimed. Copying a body while it grows would hold up other streams."""

_GLANCE_BYTES: Final = 64 << 10
"""Who may send larger bodies than that is looked at before they are read."""

_MAX_LENGTH_DIGITS: Final = 20
"""Digits of 2**64; llhttp checks the value, but takes any number of leading zeros."""

_PASS: Final = 0  # Goes to the replica.
_NOTE: Final = 1  # Goes to the replica, and the router reads it.
_TAKE: Final = 2  # The router reads it; the replica gets none or the router's own.
_DROP: Final = 3  # Concerns this connection alone (RFC 9110, 7.6.1).

_KINDS: Final = {
    "host": _NOTE,
    "content-type": _NOTE,
    "content-encoding": _NOTE,
    "x-session-id": _NOTE,
    "authorization": _NOTE,
    "x-api-key": _NOTE,
    "connection": _TAKE,
    "content-length": _TAKE,
    "transfer-encoding": _TAKE,
    "expect": _TAKE,
    "origin": _TAKE,
    "access-control-request-method": _TAKE,
    "access-control-request-headers": _TAKE,
    "x-request-id": _TAKE,
    "x-kvlane-model": _TAKE,
    "keep-alive": _DROP,
    "proxy-authenticate": _DROP,
    "proxy-authorization": _DROP,
    "proxy-connection": _DROP,
    "te": _DROP,
    "trailer": _DROP,
    "upgrade": _DROP,
    "http2-settings": _DROP,
}
_COMMON: Final = """
    accept accept-encoding accept-language cookie referer traceparent tracestate user-agent
    x-forwarded-for x-forwarded-proto x-stainless-arch x-stainless-async x-stainless-lang x-stainless-os
    x-stainless-package-version x-stainless-read-timeout x-stainless-retry-count x-stainless-runtime
    x-stainless-runtime-version
"""
# Header names come in two spellings nearly always; one look-up replaces lower-casing and decoding.
_NAMES: Final = {
    spelling.encode(): (name, kind)
    for name, kind in [*_KINDS.items(), *((name, _PASS) for name in _COMMON.split())]
    for spelling in (name, name.title())
}


class HttpRequest(msgspec.Struct):
    """One whole request, as it came."""

    method: str
    target: bytes
    headers: list[tuple[str, str]]
    """For the replica: hop-by-hop and framing headers are gone."""
    noted: dict[str, str]
    """Headers that the router reads, by lower-case name."""
    body: bytes
    keep_alive: bool
    http_1_0: bool
    key: Key | None = None
    """The API key that let it in, where keys are asked for."""


class _Refused(Exception):
    """Stops llhttp inside a callback; carries no more than that."""


_INERT: Final = httptools.HttpRequestParser(object())
"""In the place of a parser that is done with: its callbacks are methods of its owner, and the two would hold each
other until the garbage collector came."""


class RequestParser:
    """Feed it bytes; take requests and at most one last error from `complete`.

    The `on_…` methods are llhttp's callbacks.
    """

    def __init__(
        self,
        max_header_bytes: int,
        max_body_bytes: int,
        glance: Callable[[Mapping[str, str]], None] | None = None,
    ) -> None:
        """`glance` is shown the noted headers of requests with a large body, before that is read, and may raise
        `KvlaneError`."""
        self.complete: deque[HttpRequest | KvlaneError] = deque()
        self.state = IDLE
        self.wants_continue = False
        """The client waits for ``100 Continue`` before it sends the body."""
        self.begun = 0
        """Requests begun so far, for timeouts that hold per request."""
        self._max_header_bytes = max_header_bytes
        self._max_body_bytes = max_body_bytes
        self._glance = glance
        self._refusal: KvlaneError | None = None
        self._upgrading = False
        self._reading = 0
        self._parser = httptools.HttpRequestParser(self)
        self._reset()

    def _reset(self) -> None:
        self._url = b""
        self._headers: list[tuple[str, str]] = []
        self._noted: dict[str, str] = {}
        self._body = b""
        self._buffer: io.BytesIO | None = None
        """The body where it came in several pieces; then `_body` is not used."""
        self._body_bytes = 0
        self._reserved = 0
        self._length = 0
        self._fed = 0
        self._dropped = 0
        self._keep_alive = True
        self._http_1_0 = False

    def feed(self, data: bytes | bytearray) -> None:
        """Parses the next bytes; never raises. After the last request they are ignored."""
        while data and self.state != ENDED:
            data = self._feed(data)

    def _feed(self, data: bytes | bytearray) -> bytes | bytearray:
        """Parses up to the end or to the end of a head that wants an upgrade; returns the rest."""
        before, was_idle = self.begun, self.state == IDLE
        self._reading = len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._decline_upgrade()
            return data[upgrade.args[0] :]
        except httptools.HttpParserError as error:
            self._fail(error)
            return b""
        if self.state in (HEAD, BODY):
            began = self.begun - before
            # Behind the end of another request in the same read, the bytes of this one cannot be told apart.
            self._weigh(self._head_bytes() if began > 1 or (began and not was_idle) else len(data))
        return b""

    def lacks(self, size: int) -> bool:
        """Whether the body under way has a claimed length and takes more than the next `size` bytes."""
        return self.state == BODY and self._length - self._body_bytes > size

    def stop(self) -> None:
        """Ignores whatever comes from now on."""
        self.state = ENDED
        self._parser = _INERT

    def _weigh(self, size: int) -> None:
        """Counts bytes of a request that is not complete: llhttp holds them back where it calls no callback."""
        self._fed += size
        if self.state == HEAD:
            if self._fed > self._max_header_bytes:
                self._refuse(self._headers_too_large())
            return
        limit = self._max_header_bytes + _OVERHEAD * max(self._body_bytes, 1)
        if self._fed > limit and self._fed - self._head_bytes() > limit:
            self._refuse(InvalidRequest("The chunked body has more framing than content"))

    def _head_bytes(self) -> int:
        fields = [*self._headers, *self._noted.items()]
        return len(self._url) + self._dropped + sum(len(name) + len(value) + 4 for name, value in fields)

    def _refuse(self, error: KvlaneError) -> None:
        self.complete.append(error)
        self.state = ENDED

    def _fail(self, error: httptools.HttpParserError) -> None:
        if self.state == ENDED:
            return  # Bytes after the last request, such as one sent after `connection: close`.
        if self._refusal is not None:
            self._refuse(self._refusal)
        elif isinstance(error, httptools.HttpParserCallbackError):
            defect = InternalError("The request could not be parsed")
            defect.__cause__ = error.__context__
            self._refuse(defect)
        else:
            self._refuse(InvalidRequest(f"Not a valid HTTP/1.1 request: {error}"))

    def _decline_upgrade(self) -> None:
        """Reads a request with an `upgrade` header as if it had none, body and all.

        Some clients (Java's among them) ask for HTTP/2 with every first request. llhttp takes what follows such a
        head for another protocol; so the head is parsed anew without the wish.
        """
        method, version = self._parser.get_method(), self._parser.get_http_version().encode()
        if method == b"CONNECT":
            self._refuse(InvalidRequest("CONNECT is not supported"))
            return
        connection = [token for token in _tokens(self._noted.pop("connection", "")) if token != "upgrade"]
        taken = [(name, value) for name, value in self._noted.items() if _KINDS[name] == _TAKE]
        fields = [*self._headers, *taken, *(("connection", token) for token in connection)]
        lines = [b"%b: %b\r\n" % (name.encode("latin-1"), value.encode("latin-1")) for name, value in fields]
        self._upgrading = False
        self.state = IDLE
        self.begun -= 1
        self._parser = httptools.HttpRequestParser(self)
        try:
            self._parser.feed_data(b"%b %b HTTP/%b\r\n%b\r\n" % (method, self._url, version, b"".join(lines)))
        except httptools.HttpParserError as error:
            self._fail(error)

    def on_message_begin(self) -> None:
        self._reset()
        self.begun += 1
        self.state = HEAD

    def on_url(self, part: bytes) -> None:
        self._url += part

    def on_header(self, raw: bytes, value: bytes) -> None:
        if self.state == BODY:
            return  # Trailers: nothing behind the router wants them.
        name, kind = _NAMES.get(raw) or _named(raw)
        text = value.decode("latin-1")
        if kind == _PASS:
            self._headers.append((name, text))
            return
        if kind == _NOTE:
            self._headers.append((name, text))
        if kind != _DROP and name not in self._noted:
            self._noted[name] = text
            return
        self._dropped += len(name) + len(text) + 4
        if name in ("connection", "content-encoding"):
            self._noted[name] += "," + text
        elif name == "host":
            self._stop(InvalidRequest("More than one Host header"))

    def on_headers_complete(self) -> None:
        parser = self._parser
        if parser.should_upgrade():
            self._upgrading = True
            return
        version = parser.get_http_version()
        self._http_1_0 = version == "1.0"
        self._keep_alive = parser.should_keep_alive()
        self.state = BODY
        if self._fed + self._reading > self._max_header_bytes and self._head_bytes() > self._max_header_bytes:
            self._stop(self._headers_too_large())
        self._check_head(version)
        connection = self._noted.get("connection")
        if connection is not None:
            self._drop_nominated(connection)
        expect = self._noted.get("expect")
        self.wants_continue = expect is not None and expect.lower() == "100-continue" and not self._http_1_0

    def _check_head(self, version: str) -> None:
        noted = self._noted
        if version not in ("1.1", "1.0"):
            self._stop(InvalidRequest(f"HTTP version {version} is not supported"))
        if "host" not in noted and not self._http_1_0:
            self._stop(InvalidRequest("The Host header is missing"))
        length = noted.get("content-length")
        if length is not None and len(length) > _MAX_LENGTH_DIGITS:
            self._stop(InvalidRequest("The Content-Length has too many digits"))
        if length is not None:
            self._length = int(length)
            if self._length > self._max_body_bytes:
                self._stop(self._body_too_large())
        coding = noted.get("transfer-encoding")
        if coding is not None and (coding.lower() != "chunked" or self._http_1_0):
            self._stop(InvalidRequest("The only transfer coding supported is chunked, in HTTP/1.1"))
        if self._glance is not None and (self._length > _GLANCE_BYTES or coding is not None):
            self._look_before_reading(self._glance)

    def _look_before_reading(self, glance: Callable[[Mapping[str, str]], None]) -> None:
        try:
            glance(self._noted)
        except KvlaneError as error:
            refusal = error.with_traceback(None)  # Which would hold this parser, which holds the error.
        else:
            return
        self._stop(refusal)

    def _drop_nominated(self, connection: str) -> None:
        """Drops the headers that the client calls hop-by-hop."""
        nominated = {*_tokens(connection)} - {"", "keep-alive", "close", "host", "content-type"}
        if nominated:
            self._headers = [header for header in self._headers if header[0] not in nominated]

    def on_body(self, part: bytes) -> None:
        self.wants_continue = False
        before = self._body_bytes
        self._body_bytes = size = before + len(part)
        if size > self._max_body_bytes:
            self._stop(self._body_too_large())
        if not before:
            self._body = part
            return
        buffer = self._buffer
        if buffer is None:
            buffer = self._buffer = io.BytesIO()
            buffer.write(self._body)
        if size > self._reserved and size >= _RESERVE_AT:
            buffer = self._buffer = self._reserve(buffer, size)
        buffer.write(part)

    def _reserve(self, buffer: io.BytesIO, size: int) -> io.BytesIO:
        """The same with memory for the rest of the body, which the system gives only where it is written to."""
        self._reserved = self._length or min(_GROWTH * size, self._max_body_bytes)
        # CPython neither copies the only reference to these bytes, nor takes their pages before they are written.
        wide = io.BytesIO(bytes(self._reserved))
        wide.write(buffer.getbuffer()[: buffer.tell()])
        return wide

    def _whole_body(self) -> bytes:
        """Without a copy, however it came."""
        buffer = self._buffer
        if buffer is None:
            return self._body
        self._buffer = None
        buffer.truncate()
        return buffer.getvalue()

    def on_message_complete(self) -> None:
        if self._upgrading:
            return
        self.complete.append(
            HttpRequest(
                method=self._parser.get_method().decode("ascii"),
                target=self._url,
                headers=self._headers,
                noted=self._noted,
                body=self._whole_body(),
                keep_alive=self._keep_alive,
                http_1_0=self._http_1_0,
            )
        )
        self.wants_continue = False
        self._body = b""
        self.state = IDLE if self._keep_alive else ENDED

    def _stop(self, error: KvlaneError) -> None:
        self._refusal = error
        raise _Refused

    def _headers_too_large(self) -> KvlaneError:
        return HeadersTooLarge(f"The headers are longer than {self._max_header_bytes} bytes")

    def _body_too_large(self) -> KvlaneError:
        return BodyTooLarge(f"The body is longer than {self._max_body_bytes} bytes")


def _named(raw: bytes) -> tuple[str, int]:
    name = raw.decode("latin-1").lower()
    return name, _KINDS.get(name, _PASS)


def _tokens(value: str) -> list[str]:
    return [token.strip() for token in value.lower().split(",")]
