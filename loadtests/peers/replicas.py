"""A process of replicas for the bench: a lane port and an HTTP port for each, over one and the same engine.

`python -m loadtests.peers.replicas MODEL ORDER`. Prints one JSON line when it listens, and ends when its standard input
closes.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any, Final

import msgspec
import uvloop

from engine.base import Engine
from engine.replica import Replica
from engine.simulated import SimulatedEngine
from loadtests.engines import SECRET
from loadtests.peers.metronome import Metronome, MetronomeOptions
from loadtests.peers.worker import Worker

BACKLOG: Final = 4096


class EngineOrder(msgspec.Struct, frozen=True):
    """Which engine: `metronome`, or `simulated` with a scheduler and a KV cache."""

    kind: str = "metronome"
    options: dict[str, Any] = {}

    def make(self, model: str) -> Engine:
        """One of them, not started yet."""
        if self.kind == "simulated":
            return SimulatedEngine(self.options, model)
        return Metronome(msgspec.convert(self.options, MetronomeOptions), model)


class Replicas(msgspec.Struct, frozen=True):
    """What a process of them is told."""

    number: int
    engine: EngineOrder


async def serve(model: str, order: Replicas) -> None:
    """Runs the replicas until standard input closes."""
    loop = asyncio.get_running_loop()
    started = []
    for number in range(order.number):
        replica = Replica(f"{model}-{number}", order.engine.make(model), SECRET)
        await replica.start()
        lane = await replica.listen("127.0.0.1")
        http = await loop.create_server(
            lambda engine=replica.engine: Worker(engine),  # type: ignore[misc]
            "127.0.0.1",
            0,
            backlog=BACKLOG,
        )
        started.append((replica, http, lane))
    addresses = [
        {"replica": replica.name, "lane": lane, "http": http.sockets[0].getsockname()[1]}
        for replica, http, lane in started
    ]
    sys.stdout.write(json.dumps(addresses) + "\n")
    sys.stdout.flush()
    closed = asyncio.Event()
    loop.add_reader(sys.stdin.fileno(), closed.set)
    await closed.wait()
    for replica, http, _ in started:
        http.close()
        await replica.close()


if __name__ == "__main__":
    uvloop.run(serve(sys.argv[1], msgspec.json.decode(sys.argv[2], type=Replicas)))
