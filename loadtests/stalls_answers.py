"""`python -m loadtests stalls-answers`: whether large answers, scrapes or clients that do not read hold up others.

As `python -m loadtests stalls`, with disturbances on the way back: answers of another model, whose replica is a process
of its own, and pages of the router's own.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import socket
import subprocess
import sys
import tempfile
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

import msgspec
import uvloop

from loadtests import loop_lag, stalls, watched
from loadtests.large_engine import PATH, Wanted
from loadtests.peers import load
from loadtests.peers.clients import HttpClient
from loadtests.peers.load import Due, Prompts
from loadtests.peers.replicas import EngineOrder, Replicas
from loadtests.processes import replica_process, router
from loadtests.results import Row
from loadtests.stalls import OTHER, QUIET, SETTLE_S, Window, row

EVENT_BYTES, EVENT_MS = 4 << 10, 1.0
HELD_S: Final = 0.7
"""How long a client does not read: its events of that time are less than a router holds for it."""
OPENED, OPENED_MS = 200, 20.0
LEAVERS, LEAVES_PER_S = 500, 2.0
ANSWER_MB, ANSWERS_PER_S = 10, 2.0
SCRAPE_EVERY_S: Final = 0.1
APART_S: Final = 0.005
"""Between the beginnings of streams: those of many at once are a load of their own."""
_RECEIVE_BYTES: Final = 4096
_ESTABLISHED: Final = 1
"""The first byte of Linux's `tcp_info` while neither side has ended."""


def main(argv: Sequence[str]) -> int:
    """Exit status 0; 1 where a stream was not whole, 2 where the arguments make no sense."""
    return stalls.command("stalls-answers", __doc__, KINDS, measure, argv)


def measure(args: argparse.Namespace) -> list[Row]:
    """A row for each kind, the quiet times first."""
    windows: dict[str, list[tuple[Window, Window]]] = {kind: [] for kind in args.kinds}
    order = Replicas(args.replicas, EngineOrder(options={"step_ms": args.step_ms, "spread": True}))
    with ExitStack() as stack:
        own = replica_process("loadtests.peers.replicas", msgspec.json.encode(order).decode())
        _, addresses = stack.enter_context(own)
        _, others = stack.enter_context(replica_process("loadtests.large_engine", model=OTHER))
        file = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "told"
        up = router([*addresses, *others], args.policy, command=watched.command(file))
        pid, port, _ = stack.enter_context(up)
        for rep in range(args.reps):
            for kind in args.kinds[:: -1 if rep % 2 else 1]:
                uvloop.run(_streams(port, args, SETTLE_S))
                quiet = _window(pid, port, file, args)
                with _disturbed(kind, port):
                    windows[kind].append((_window(pid, port, file, args), quiet))
                print(f"stalls-answers: {kind}, repetition {rep + 1}", file=sys.stderr, flush=True)
    quiet_times = [quiet for pairs in windows.values() for _, quiet in pairs]
    rows = [row(QUIET, [(quiet, quiet) for quiet in quiet_times])]
    return rows + [row(KINDS[kind][0], pairs) for kind, pairs in windows.items()]


def _window(pid: int, port: int, file: Path, args: argparse.Namespace) -> Window:
    before = loop_lag.scrape(port)
    watched.ask(pid, file)
    late, errors = uvloop.run(_streams(port, args, args.seconds))
    told = watched.ask(pid, file)
    return Window(late, loop_lag.between(before, loop_lag.scrape(port)), told, errors)


async def _streams(port: int, args: argparse.Namespace, seconds: float) -> tuple[list[float], int]:
    """By how much tokens were late, in milliseconds, and how many streams were not whole."""
    tokens, prompts = max(2, int(seconds * 1e3 / args.step_ms)), Prompts(1.0)
    due = [Due(number * APART_S, tokens, lambda: prompts.next(0)) for number in range(args.streams)]
    tally = await load.open_loop(HttpClient([port]), due, args.streams, limit_s=2 * seconds + 30)
    return [max(0.0, 1e3 * gap - args.step_ms) for gap in tally.gaps_s], tally.errors


# -- those who disturb


@contextmanager
def _disturbed(kind: str, port: int) -> Iterator[None]:
    """A process that disturbs until the end. Raises `RuntimeError` where it ended before."""
    command = [sys.executable, "-m", "loadtests.stalls_answers", kind, str(port)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdout.readline()  # It has begun.
            yield
            if process.poll() is not None:
                raise RuntimeError(f"nobody disturbed: {kind!r} ended with status {process.returncode}")
        finally:
            process.stdin.close()


async def _disturb(kind: str, port: int) -> None:
    closed = asyncio.Event()
    asyncio.get_running_loop().add_reader(sys.stdin.fileno(), closed.set)
    tasks = [asyncio.ensure_future(KINDS[kind][1](port)), asyncio.ensure_future(closed.wait())]
    sys.stdout.write("begun\n")
    sys.stdout.flush()
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        task.cancel()
    for end in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(end, Exception):
            raise end


def _request(wanted: Wanted) -> bytes:
    body = msgspec.json.encode(wanted)
    return b"POST %b HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: %d\r\n\r\n%b" % (PATH.encode(), len(body), body)


_EVENTS: Final = _request(Wanted(OTHER, EVENT_BYTES, 1_000_000, EVENT_MS, True))


async def _opened(port: int, request: bytes) -> socket.socket:
    """A connection with a small window that has asked."""
    loop, client = asyncio.get_running_loop(), socket.socket()
    client.setblocking(False)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BYTES)
    await loop.sock_connect(client, ("127.0.0.1", port))
    await loop.sock_sendall(client, request)
    return client


async def _unread(port: int) -> None:
    """Reads nothing of a long answer until it is cut off, and asks again."""
    while True:
        with await _opened(port, _EVENTS) as client:
            while client.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == _ESTABLISHED:
                await asyncio.sleep(0.05)


async def _resumed(port: int) -> None:
    """Reads nothing of a long answer for a while, then all that has come, and so on."""
    loop = asyncio.get_running_loop()
    with await _opened(port, _EVENTS) as client:
        while True:
            await asyncio.sleep(HELD_S)
            until = loop.time() + HELD_S
            while loop.time() < until:
                if not await loop.sock_recv(client, 1 << 20):
                    raise RuntimeError("the answer ended")


async def _crowd(port: int) -> None:
    """Many connections, of which none reads."""
    request = _request(Wanted(OTHER, EVENT_BYTES, 1_000_000, OPENED_MS, True))
    held = await asyncio.gather(*(_opened(port, request) for _ in range(OPENED)))
    try:
        await asyncio.Event().wait()
    finally:
        for client in held:
            client.close()


async def _leave_together(port: int) -> None:
    """Many streams whose clients are gone at one moment, as those of a gateway that dies are."""
    request = _request(Wanted(OTHER, EVENT_BYTES, 1_000, 1e3, True))
    while True:
        pairs = [await asyncio.open_connection("127.0.0.1", port) for _ in range(LEAVERS)]
        for _, writer in pairs:
            writer.write(request)
        for reader, _ in pairs:
            await reader.readuntil(b"\n\n")
        for _, writer in pairs:
            writer.transport.abort()
        await asyncio.sleep(1 / LEAVES_PER_S)


async def _large(port: int) -> None:
    """Large answers that come in one piece, and are read as fast as they come."""
    size = ANSWER_MB << 20
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
    while True:
        writer.write(_request(Wanted(OTHER, size)))
        if await _whole(reader) != size:
            raise RuntimeError("an answer of another size")
        await asyncio.sleep(1 / ANSWERS_PER_S)


async def _scrapes(port: int) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    while True:
        writer.write(b"GET /metrics HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        await _whole(reader)
        await asyncio.sleep(SCRAPE_EVERY_S)


async def _whole(reader: asyncio.StreamReader) -> int:
    """Reads an answer that has a length; returns that. Raises `RuntimeError` where it is none."""
    head = await reader.readuntil(b"\r\n\r\n")
    length = re.search(rb"\r\ncontent-length: (\d+)\r\n", head)
    if length is None or not head.startswith(b"HTTP/1.1 200"):
        raise RuntimeError(head.partition(b"\r\n")[0].decode("latin-1"))
    left = size = int(length[1])
    while left:
        left -= len(await reader.read(min(left, 1 << 20)))
    return size


KINDS: Final[dict[str, tuple[str, Callable[[int], Awaitable[None]]]]] = {
    "unread": (f"a client that reads nothing of {EVENT_BYTES >> 10} KB a millisecond", _unread),
    "resumed": (f"one that reads on after {HELD_S:g} s", _resumed),
    "opened": (f"{OPENED} connections at once that read nothing", _crowd),
    "leaving": (f"{LEAVERS} streams whose clients leave at one moment, and as many that come", _leave_together),
    "large": (f"{ANSWERS_PER_S:g} answers of {ANSWER_MB} MB a second", _large),
    "scrapes": (f"a scrape every {1e3 * SCRAPE_EVERY_S:g} ms", _scrapes),
}


if __name__ == "__main__":
    uvloop.run(_disturb(sys.argv[1], int(sys.argv[2])))
