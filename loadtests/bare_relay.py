"""What relaying frames costs before any code of a router: `python -m loadtests.bare_relay [--chunks 2,8] …`.

A process wakes for each frame that comes on one connection and sends some chunks on to others, without reading what is
in the frame: once on uvloop with a protocol for each connection, as any asyncio server does it, and once with nothing
but a blocking `recv` and `send`, which no server can go below. Frames come some milliseconds apart, so the caches are
cold, and another process reads the chunks. A router's cost per chunk stands beside these figures divided by the chunks
of a frame (see docs/benchmarks.md).
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import selectors
import socket
import statistics
import subprocess
import sys
import threading
import time
from typing import Final

import uvloop

FRAME: Final = bytes(700)
CHUNK: Final = bytes(250)
CONNECTIONS: Final = 8
WARM_UP: Final = 50
FRAMES: Final = 500
"""Counted; those that come together with another one are one."""
LIMIT_S: Final = 60.0


class _Frames(asyncio.Protocol):
    """Sends chunks on whenever something comes."""

    def __init__(self, clients: list[asyncio.Transport], chunks: int, done: asyncio.Event) -> None:
        self._turn = itertools.cycle(clients)
        self._chunks = chunks
        self._done = done
        self._frames = 0
        self._began = 0.0
        self.cost_us = 0.0

    def data_received(self, data: bytes) -> None:
        for _ in range(self._chunks):
            next(self._turn).write(CHUNK)
        self._frames += 1
        if self._frames == WARM_UP:
            self._began = time.process_time()
        elif self._frames == WARM_UP + FRAMES:
            self.cost_us = 1e6 * (time.process_time() - self._began) / FRAMES
            self._done.set()


async def _on_uvloop(frames: socket.socket, clients: list[socket.socket], chunks: int) -> float:
    loop, done = asyncio.get_running_loop(), asyncio.Event()
    opened = [(await loop.create_connection(asyncio.Protocol, sock=client))[0] for client in clients]
    _, protocol = await loop.create_connection(lambda: _Frames(opened, chunks, done), sock=frames)
    async with asyncio.timeout(LIMIT_S):
        await done.wait()
    return protocol.cost_us


def _bare(frames: socket.socket, clients: list[socket.socket], chunks: int) -> float:
    turn, began = itertools.cycle(clients), 0.0
    for number in range(1, WARM_UP + FRAMES + 1):
        frames.recv(1 << 16)
        for _ in range(chunks):
            next(turn).send(CHUNK)
        if number == WARM_UP:
            began = time.process_time()
    return 1e6 * (time.process_time() - began) / FRAMES


def relay(way: str, port: int, chunks: int) -> float:
    """CPU per frame in microseconds, of this process."""
    frames = socket.create_connection(("127.0.0.1", port))
    clients = [socket.create_connection(("127.0.0.1", port)) for _ in range(CONNECTIONS)]
    for client in clients:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if way == "bare":
        return _bare(frames, clients, chunks)
    return uvloop.run(_on_uvloop(frames, clients, chunks))


def measure(way: str, chunks: int, gap_s: float) -> float:
    """The same, in a process of its own, which gets a frame every `gap_s`."""
    with socket.create_server(("127.0.0.1", 0), backlog=CONNECTIONS + 1) as server:
        port = str(server.getsockname()[1])
        command = [sys.executable, "-m", "loadtests.bare_relay", "--way", way, "--port", port, "--chunks", str(chunks)]
        relaying = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            server.settimeout(LIMIT_S)
            frames, *clients = [server.accept()[0] for _ in range(CONNECTIONS + 1)]
            reading = threading.Thread(target=_read, args=(clients,), daemon=True)
            reading.start()
            give_up = time.monotonic() + LIMIT_S
            while relaying.poll() is None and time.monotonic() < give_up:
                try:
                    frames.send(FRAME)
                except (ConnectionResetError, BrokenPipeError):
                    break  # It has counted enough.
                time.sleep(gap_s)
            told = relaying.communicate(timeout=LIMIT_S)[0]
        finally:
            relaying.kill()
    for connection in (frames, *clients):
        connection.close()
    return float(told)


def _read(clients: list[socket.socket]) -> None:
    with selectors.DefaultSelector() as selector:
        for client in clients:
            selector.register(client, selectors.EVENT_READ)
        while selector.get_map():
            for key, _ in selector.select(LIMIT_S):
                assert isinstance(key.fileobj, socket.socket)
                try:
                    more = key.fileobj.recv(1 << 16)
                except OSError:
                    more = b""
                if not more:
                    selector.unregister(key.fileobj)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m loadtests.bare_relay")
    parser.add_argument("--chunks", default="2,8,64", help="chunks of a frame, by commas")
    parser.add_argument("--gap-ms", type=float, default=2.5, help="between two frames")
    parser.add_argument("--reps", type=int, default=5)
    parser.add_argument("--way", choices=("uvloop", "bare"), help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.way is not None:
        print(relay(arguments.way, arguments.port, int(arguments.chunks)))
        return
    print("| chunks of a frame | on uvloop, µs per frame | bare sockets, µs per frame |\n|---|---|---|")
    for chunks in map(int, arguments.chunks.split(",")):
        costs: dict[str, list[float]] = {"uvloop": [], "bare": []}
        for repetition in range(arguments.reps):
            for way in sorted(costs, reverse=bool(repetition % 2)):
                costs[way].append(measure(way, chunks, arguments.gap_ms * 1e-3))
        cells = [f"**{statistics.median(c):.0f}** ({min(c):.0f} to {max(c):.0f})" for c in costs.values()]
        print(f"| {chunks} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
