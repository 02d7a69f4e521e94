"""What a client of a stream gets while its request waits for a replica, and how that is reconciled with the answer.

Sans-IO. A response whose head is out is an event stream with status 200, whatever the replica says later: an answer
that is another thing is told as one event of it.
"""

from __future__ import annotations

from typing import Final

from router.ingress.openai import STOP_EVENT, has_named_events
from router.types import Request

HEAD: Final = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n"
COMMENT: Final = b": waiting for a replica\n\n"
"""Readers of event streams pass over lines that begin with a colon."""
MAX_FOLDED_BYTES: Final = 1 << 20
"""Of an answer that is told as one event."""
_STREAMED: Final = frozenset({"/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages"})


def wants_events(request: Request) -> bool:
    """Whether its answer will be an event stream, if all goes well."""
    return request.streamed and request.method == "POST" and request.path.partition("?")[0] in _STREAMED


def route_comment(header: str) -> bytes:
    """The route receipt, whose place in the head is taken; as a comment."""
    return b": x-kvlane-route: %b\n\n" % " ".join(header.splitlines()).encode("latin-1", errors="replace")


def as_event(body: bytes, path: str) -> bytes:
    """An answer that is no event stream as the one event of a stream, and that stream's end."""
    lines = b"".join(b"data: %b\n" % line for line in body.splitlines() or (b"",))
    if has_named_events(path):
        return b"event: error\n%b\n" % lines
    return b"%b\n%b" % (lines, STOP_EVENT)
