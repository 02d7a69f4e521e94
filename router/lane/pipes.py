"""What the `actor` carrier calls: one call that feeds bytes up a pipe, one stream that brings bytes down.

Both functions run inside the replica's actor, by reference (`router.ray_private`). Such a call knows
the process and no object in it, so the replica enters its pipes in a table of the process under its name. Rule: only
the replica's side (`engine.actor_lane`) writes that table.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, MutableMapping
from typing import Final, Protocol

WINDOW_BYTES: Final = 16 << 20
"""How much a replica may send that its router has not taken yet. Ray itself bounds nothing here: the streams of all
routers share one thread, and Ray's own back-pressure would make one slow router stop them all."""
QUIET_S: Final = 30.0
"""A pipe whose router has not called for so long is lost: Ray does not tell an actor that its caller died."""
KEEP_ALIVE_S: Final = 5.0
"""So often an idle router calls."""


class Feed(Protocol):
    """The replica's end of one pipe."""

    def feed(self, seq: int, data: bytes, taken: int, close: bool) -> None:
        """Takes the `seq`-th batch from the router, counted from 0, and the number of bytes the router took so far.

        Raises `ConnectionError` where the pipe is lost or a batch is missing.
        """


class Pipes(Protocol):
    """The replica's ends of all its pipes."""

    def chunks(self, pipe: str) -> AsyncIterator[bytes]:
        """Opens a pipe. The first chunk is empty and says that it is open; the end of the stream is its end."""

    def find(self, pipe: str) -> Feed:
        """Raises `ConnectionResetError` where no such pipe is open."""


HOSTED: Final[MutableMapping[str, Pipes]] = {}
"""The pipes of this process's replica, by the replica's name."""


def _pipes(replica: str) -> Pipes:
    try:
        return HOSTED[replica]
    except KeyError:
        raise ConnectionRefusedError(f"no replica {replica} in this process") from None


def down(_actor: object, replica: str, pipe: str) -> AsyncIterator[bytes]:
    """Opens a pipe; yields what the replica sends. Raises `ConnectionError`."""
    return _pipes(replica).chunks(pipe)


def up(_actor: object, replica: str, pipe: str, seq: int, data: bytes, taken: int, close: bool) -> None:
    """Brings one batch from the router. Raises `ConnectionError`."""
    try:
        end = _pipes(replica).find(pipe)
    except ConnectionError:
        if close:
            return  # It is closed already.
        raise
    end.feed(seq, data, taken, close)
