"""The headers of gRPC over HTTP/2: a call's head as it comes in, header blocks as they go out.

Sans-IO. Outgoing blocks use HPACK's static table and literals that no table keeps, so they depend on no connection's
state, and the constant ones are made once. Rule: whatever a head says, it leads to a call or to one whole refusal.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable
from typing import Final

import grpc
import msgspec
from hpack import Encoder, NeverIndexedHeaderTuple
from hpack.hpack import encode_integer

from router.ingress.grpc_errors import Trailers
from router.ingress.h2_messages import ENCODINGS

MAX_LIST_BYTES: Final = 16 << 10
"""Of a call's headers as HTTP/2 counts them: told to clients, and what grpc's own servers take at most."""
FIELD_BYTES: Final = 32  # What HTTP/2 counts for each field beside its name and value.

_ENCODER: Final = Encoder()  # Fields that are never indexed leave it as it is.
_TIMEOUT: Final = re.compile(rb"([0-9]{1,8})([HMSmun])").fullmatch
_UNITS: Final = {b"H": 3600.0, b"M": 60.0, b"S": 1.0, b"m": 1e-3, b"u": 1e-6, b"n": 1e-9}
_UNSAFE: Final = re.compile(rb"[^ -$&-~]|^ | \Z")  # No field begins or ends with a space.


class Head(msgspec.Struct):
    """What a call's headers say."""

    path: str
    metadata: dict[str, str]
    encoding: str = "identity"
    timeout_s: float | None = None


class Refusal(msgspec.Struct):
    """What answers headers that lead to no call."""

    block: bytes


def encoded(fields: Iterable[tuple[str, str | bytes]]) -> bytes:
    """A header block that leaves the peer's table as it is."""
    block: bytes = _ENCODER.encode([NeverIndexedHeaderTuple(name, value) for name, value in fields], huffman=False)
    return block


_ANSWER: Final = ((":status", "200"), ("content-type", "application/grpc"))
_ACCEPTED: Final = ("grpc-accept-encoding", ",".join(ENCODINGS))
OPENING: Final = encoded((*_ANSWER, _ACCEPTED))
"""The head of an answer."""
_OPENING_WITH_ID: Final = OPENING + b"\x10\x0cx-request-id"
TABLE_EMPTIED: Final = b"\x20"
"""Says that the table of this direction holds nothing, which has to be said once when a client changes its size."""
OK: Final = encoded((("grpc-status", "0"),))
"""Trailers of a call that ended whole."""


def opening(request_id: str) -> bytes:
    """The head of an answer that tells its request id."""
    if not request_id:
        return OPENING
    value = request_id.encode()
    return b"%b%b%b" % (_OPENING_WITH_ID, bytes(encode_integer(len(value), 7)), value)


def status(code: grpc.StatusCode, message: str, trailers: Trailers = (), *, alone: bool) -> bytes:
    """The trailers that tell of a status; `alone`, where they are the whole answer, the answer's head is in them."""
    number: int = code.value[0]
    fields: list[tuple[str, str | bytes]] = [*_ANSWER] if alone else []
    fields += ("grpc-status", str(number)), ("grpc-message", percent_encoded(message))
    fields += [(name, _text(name, value)) for name, value in trailers]
    if code is grpc.StatusCode.UNIMPLEMENTED and alone:
        fields.append(_ACCEPTED)
    return encoded(fields)


def percent_encoded(text: str) -> str:
    """A grpc-message."""
    return _UNSAFE.sub(lambda byte: b"%%%02X" % byte[0][0], text.encode(errors="replace")).decode("ascii")


def _text(name: str, value: str | bytes) -> str | bytes:
    if not name.endswith("-bin"):
        return value
    return base64.b64encode(value if isinstance(value, bytes) else value.encode()).rstrip(b"=")


def _refused(http_status: str, code: grpc.StatusCode, message: str) -> Refusal:
    fields = ((":status", http_status), ("content-type", "application/grpc"))
    number: int = code.value[0]
    return Refusal(encoded((*fields, ("grpc-status", str(number)), ("grpc-message", percent_encoded(message)))))


_BAD_METHOD: Final = _refused("405", grpc.StatusCode.UNIMPLEMENTED, "gRPC calls are POST requests")
_BAD_TYPE: Final = _refused("415", grpc.StatusCode.UNKNOWN, "the content-type is not application/grpc")
_BAD_TE: Final = _refused("200", grpc.StatusCode.INTERNAL, "te is not trailers: a proxy that drops trailers?")
_BAD_TIMEOUT: Final = _refused("200", grpc.StatusCode.INTERNAL, "grpc-timeout is malformed")
_TOO_LARGE: Final = _refused("200", grpc.StatusCode.RESOURCE_EXHAUSTED, "the request's metadata is too large")
_BAD_ENCODING: Final = Refusal(
    status(grpc.StatusCode.UNIMPLEMENTED, "this grpc-encoding is not understood", alone=True)
)


def malformed(what: str) -> Refusal:
    """Answers a request that breaks HTTP's rules."""
    return _refused("400", grpc.StatusCode.INTERNAL, f"the request is malformed: {what}")


def read_head(fields: Iterable[tuple[bytes, bytes]], wanted: frozenset[bytes]) -> Head | Refusal:
    """The call that these headers begin; of its metadata only what is wanted, of each name the last value.

    h2 has seen to it that the pseudo-headers are there, once, and in front.
    """
    path = method = kind = te = b""
    timeout: bytes | None = None
    encoding = b"identity"
    metadata: dict[str, str] = {}
    size = 0
    for name, value in fields:
        size += len(name) + len(value) + FIELD_BYTES
        if name == b":path":
            path = value
        elif name == b":method":
            method = value
        elif name == b"content-type":
            kind = value
        elif name == b"te":
            te = value
        elif name == b"grpc-timeout":
            timeout = value
        elif name == b"grpc-encoding":
            encoding = value
        elif name in wanted:
            metadata[name.decode("ascii")] = value.decode("latin-1")
    if method != b"POST":
        return _BAD_METHOD
    if not (kind.startswith(b"application/grpc") and (len(kind) == 16 or kind[16:17] in b"+;")):
        return _BAD_TYPE
    if te.lower() != b"trailers":
        return _BAD_TE
    if size > MAX_LIST_BYTES:
        return _TOO_LARGE
    name_of_encoding = encoding.decode("latin-1")
    if name_of_encoding not in ENCODINGS:
        return _BAD_ENCODING
    timeout_s = None
    if timeout is not None:
        match = _TIMEOUT(timeout)
        if match is None:
            return _BAD_TIMEOUT
        timeout_s = int(match[1]) * _UNITS[match[2]]
    return Head(path.decode("latin-1"), metadata, name_of_encoding, timeout_s)
