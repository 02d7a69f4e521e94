"""What a supervisor and its workers say to each other.

Job: the messages, and the channel that carries them: a pair of connected sockets, each message a length and msgpack.
Rule: either side's end is the other's end of the channel; nothing on it waits for an answer without a limit.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import struct
import sys
from typing import Any, Final, Generic, TypeVar

import msgspec

from router.observe.merge import Families
from router.options import Config

log = logging.getLogger(__name__)

STOP_MARGIN_S: Final = 10.0
"""How much later than its streams' grace ends a process that was told to stop is killed."""
HURRY_S: Final = 5.0
"""How soon one is that was told to hurry."""
LAST_WORDS: Final = 0
"""The number of what a worker tells at its end."""
_LENGTH: Final = struct.Struct("<I")


class Seat(msgspec.Struct, frozen=True):
    """Where a worker sits among its siblings: its number, and what it inherits, as file descriptors."""

    number: int
    control: int
    """Its end of the channel to the supervisor."""
    http: tuple[tuple[int, ...], ...] = ()
    """Sockets of the HTTP ingress, bound to one address and by slot; a worker listens on those that it is told to."""
    grpc: tuple[tuple[int, ...], ...] = ()
    admin: tuple[int, ...] = ()
    """Those of its own admin port."""


class Order(msgspec.Struct, frozen=True):
    """What a child process is told on its standard input, as one line of JSON."""

    config: Config
    seat: Seat | None = None
    """Of a worker under a supervisor. Alone, a second router on the same port shall fail, not share."""


def spawn_arguments() -> list[str]:
    """The command line of a child that takes an `Order`."""
    return [sys.executable, "-m", "router", "worker"]


def address_line(config: Config, http_port: int, grpc_port: int, admin_port: int) -> str:
    """What a router prints once it serves: where."""
    words = ["ready"]
    if config.http.enabled:
        words.append(f"http=http://{config.http.host}:{http_port}")
    if config.grpc.enabled:
        words.append(f"grpc={config.grpc.host}:{grpc_port}")
    if config.admin.enabled:
        words.append(f"admin=http://{config.admin.host}:{admin_port}")
    return " ".join(words)


# From the supervisor.


class Listen(msgspec.Struct, frozen=True, tag=True):
    """Accept connections on these slots, and on no others."""

    slots: tuple[int, ...]


class Collect(msgspec.Struct, frozen=True, tag=True):
    """Tell your figures."""

    number: int


class Page(msgspec.Struct, frozen=True, tag=True):
    """The answer to a `Scrape`."""

    number: int
    text: bytes
    content_type: str


class Drain(msgspec.Struct, frozen=True, tag=True):
    """Others have taken over: accept nothing more, serve what is connected until it has gone, and end."""

    limit_s: float


class Notice(msgspec.Struct, frozen=True, tag=True):
    """The router goes away after that time: serve on, be unready, and ask clients to go elsewhere."""

    limit_s: float


class Hurry(msgspec.Struct, frozen=True, tag=True):
    """Cut what is in flight, and end."""


# From a worker.


class Started(msgspec.Struct, frozen=True, tag=True):
    """It can be told to listen, and has no replica of some required model."""


class Ready(msgspec.Struct, frozen=True, tag=True):
    """Every required model has a ready replica."""


class Collected(msgspec.Struct, frozen=True, tag=True):
    """Its figures: the answer to a `Collect`, or its last words, which nobody asked for."""

    number: int
    families: Families


class Scrape(msgspec.Struct, frozen=True, tag=True):
    """Somebody wants the figures of all workers."""

    number: int


class Leaving(msgspec.Struct, frozen=True, tag=True):
    """It got a signal of its own and ends."""


ToWorker = Listen | Collect | Page | Drain | Notice | Hurry
ToSupervisor = Started | Ready | Collected | Scrape | Leaving
Got = TypeVar("Got")


class Channel(Generic[Got]):
    """One side of it; `Got` are the messages of the other side."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, decoder: msgspec.msgpack.Decoder[Got]
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._decoder = decoder

    def send(self, message: ToWorker | ToSupervisor) -> None:
        """Does nothing where the other side has ended."""
        if not self._writer.is_closing():
            body = msgspec.msgpack.encode(message)
            self._writer.write(_LENGTH.pack(len(body)) + body)

    async def receive(self) -> Got | None:
        """The next message; None once the other side has ended, or says what this version does not understand."""
        try:
            (length,) = _LENGTH.unpack(await self._reader.readexactly(_LENGTH.size))
            return self._decoder.decode(await self._reader.readexactly(length))
        except (asyncio.IncompleteReadError, ConnectionError):
            return None
        except msgspec.MsgspecError as error:
            log.error("a message between supervisor and worker makes no sense: %s", error)
            return None

    async def close(self) -> None:
        """Closes it once all is sent."""
        self._writer.close()
        try:
            await self._writer.wait_closed()
        except ConnectionError:
            pass  # The other side was faster.


async def _open(sock: socket.socket, kind: Any) -> Channel[Any]:
    reader, writer = await asyncio.open_unix_connection(sock=sock)
    return Channel(reader, writer, msgspec.msgpack.Decoder(kind))


async def supervisors_end(sock: socket.socket) -> Channel[ToSupervisor]:
    """The supervisor's side."""
    return await _open(sock, ToSupervisor)


async def workers_end(seat: Seat) -> Channel[ToWorker]:
    """The worker's side."""
    sock = socket.socket(fileno=seat.control)
    sock.set_inheritable(False)
    return await _open(sock, ToWorker)
