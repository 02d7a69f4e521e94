"""What a plain step touches: a lane's receiving end, its streams, and the short way of an HTTP answer.

A step is plain where all that it brings is payloads and a load. Of these there are thousands a second, each alone
after the processor's caches have seen other work, so that what counts is how little memory one touches. The rule: the
compiled classes (`_relay.pyx`) take a plain step that came alone from its bytes to the clients in one go, and leave
all else, what is malformed too, to the Python way; these here leave it everything.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING

from router.compiled import part
from router.lane.frames import End
from router.types import Sink

if TYPE_CHECKING:
    from router.lane.meter import FrameMeter
    from router.load.account import Account


class Chunks:
    """The short way of an HTTP answer, whose body is chunked."""

    __slots__ = ("_open", "_socket", "_write")

    _open: bool
    """The head is out and the client keeps up."""
    _socket: int
    """The client's socket, where bytes may go to it past the transport; else -1. The compiled class does that: nothing
    may wait in the transport, and a socket is only closed after the short way is."""
    _write: Callable[[bytes], object]

    def data(self, payload: bytes, tokens: int) -> None:
        """Relays one payload; by `_slowly` where the short way is not open."""
        if self._open and payload:
            self._write(b"%x\r\n%b\r\n" % (len(payload), payload))
        else:
            self._slowly(payload)

    def _slowly(self, payload: bytes) -> None:
        raise NotImplementedError


class Stream:
    """One request in flight on a lane."""

    __slots__ = ("began", "data", "done", "expected_s", "joins", "last", "sink")

    def __init__(self, sink: Sink, done: asyncio.Future[End], began: float, expected_s: float, joins: bool) -> None:
        self.sink = sink
        self.joins = joins
        """Whether its payloads may be joined."""
        self.data = sink.data
        self.last: Callable[[bytes, int], None] = getattr(sink, "last", sink.data)
        self.done = done
        self.began = began
        """When it was submitted, in loop time; 0 once output came."""
        self.expected_s = expected_s

    def deafen(self, deaf: Sink) -> None:
        """Whatever still comes goes to `deaf`."""
        self.sink, self.data, self.last = deaf, deaf.data, deaf.data


class Relay:
    """A lane's receiving end."""

    steps: int
    tokens: int
    """Tokens received, for metrics."""
    _heard: bool
    _streams: dict[int, Stream]
    _meter: FrameMeter

    def _relays(self, account: Account, now: Callable[[], float]) -> None:
        """From now on plain steps may go the short way: their loads to `account`, at the times that `now` says."""

    def data_received(self, data: bytes) -> None:
        self._heard = True
        self._read(data)

    def _read(self, data: bytes) -> None:
        raise NotImplementedError


_compiled = part("router.lane._relay")
if _compiled is not None:
    Chunks = _compiled.Chunks  # type: ignore[misc]
    Stream = _compiled.Stream  # type: ignore[misc]
    Relay = _compiled.Relay  # type: ignore[misc]
