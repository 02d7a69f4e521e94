"""What kvlane's own code takes per relayed chunk, without a socket: `python -m loadtests.relay [--cold]`.

One lane gets step frames with some streams' chunks, and hands them to the HTTP edge's own sinks, which write nowhere;
the load model learns from each frame. `--cold` takes the time of each frame alone, with few chunks, after the
processor's caches have seen much else: as in a router between the steps of an engine. Compiled parts and Python, in
turn and each in processes of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable

from router.compiled import VARIABLE
from router.errors import ReplicaLost
from router.ingress.http_response import Envelope, Exchange
from router.lane import frames
from router.lane.client import Lane
from router.load.model import new_fleet
from router.types import EngineInfo, Load, Request, Rpc

CHUNK = b"data: " + b"x" * 242 + b"\n\n"
CHUNKS = 400_000
FEW = (2, 8, 16)
FRAMES = 3000
"""That come alone."""
ROUNDS = 3
OTHER_BYTES = 4 << 20
"""That are looked at between two of those: more than a core's own caches hold."""


class _Nobody:
    def lane_opened(self, lane: Lane) -> None: ...
    def lane_draining(self, lane: Lane) -> None: ...
    def lane_lost(self, lane: Lane, error: ReplicaLost) -> None: ...
    def first_output(self, waited_s: float, expected_s: float) -> None: ...
    def cache_reported(self, lane: Lane, report: frames.CacheReport) -> None: ...


class _Reader:
    """A client that keeps up."""

    flowing = True

    def __init__(self) -> None:
        self.write_now: Callable[[bytes], object] = deque[bytes](maxlen=0).append  # As a transport's, no Python code.

    def write(self, data: bytes | memoryview) -> None: ...
    def check_room(self) -> None: ...
    def answered(self, exchange: Exchange, *, close: bool) -> None: ...
    def cut(self) -> None: ...


class _Sinkhole(asyncio.Transport):
    def write(self, data: object) -> None: ...
    def abort(self) -> None: ...


async def _open(streams: int) -> tuple[Lane, list[asyncio.Task[frames.End]]]:
    lane = Lane("replica", b"secret", "bench", _Nobody(), lambda info: new_fleet().foresight())
    lane.connection_made(_Sinkhole())
    lane.data_received(frames.encode(frames.Welcome(frames.VERSION, "replica", EngineInfo("bench", ()), Load())))
    request = Request("r", "m", Rpc.HTTP, "/", b"")
    tasks = []
    for _ in range(streams):
        exchange = Exchange(_Reader(), Envelope("r", "POST", "/", False, True, "", lambda: ""))
        exchange.head(200, (("content-type", "text/event-stream"),))
        exchange.data(CHUNK, 1)
        tasks.append(asyncio.create_task(lane.run(request, exchange)))
    await asyncio.sleep(0)
    return lane, tasks


async def _close(tasks: list[asyncio.Task[frames.End]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _step(streams: int, ms: float = 6.0) -> bytes:
    outputs = [frames.Output(number + 1, CHUNK, 1) for number in range(streams)]
    load = Load(streams, 2, 3, 0.5, ms, step_decodes=streams, step_context_tokens=1000 * streams)
    return frames.encode(frames.Step(1, streams, load, outputs))


async def _warm(streams: int) -> float:
    lane, tasks = await _open(streams)
    step = _step(streams)
    rounds = CHUNKS // streams
    began = time.process_time()
    for _ in range(rounds):
        lane.data_received(step)
    cost = 1e6 * (time.process_time() - began) / rounds / streams
    await _close(tasks)
    return cost


async def _cold(streams: int) -> float:
    lane, tasks = await _open(streams)
    steps = [_step(streams, 6.0 + 0.1 * number) for number in range(7)]  # The load model skips what it was told last.
    other = bytearray(OTHER_BYTES)
    clock, took = time.perf_counter_ns, []
    received = lane.data_received
    for number in range(FRAMES):
        other.count(1)
        json.loads(json.dumps({"other": [number] * 50}))
        data = bytes(bytearray(steps[number % 7]))  # As it comes from the kernel: in the cache.
        began = clock()
        received(data)
        took.append(clock() - began)
    await _close(tasks)
    return statistics.median(took) / 1e3


def _both() -> None:
    """In turn, by processes of their own."""
    found: dict[tuple[str, int], list[float]] = {}
    for _ in range(ROUNDS):
        for how in ("0", "1"):
            command = [sys.executable, "-m", "loadtests.relay", "--cold-one"]
            output = subprocess.run(command, env=os.environ | {VARIABLE: how}, check=True, capture_output=True).stdout
            for streams, cost in json.loads(output).items():
                found.setdefault((how, int(streams)), []).append(cost)
    print("| chunks per frame | frame that comes alone, Python, µs | compiled, µs |\n|---|---|---|")
    for streams in FEW:
        cells = [f"{statistics.median(found[how, streams]):.1f}" for how in ("0", "1")]
        print(f"| {streams} | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m loadtests.relay", description=__doc__)
    parser.add_argument("--cold", action="store_true", help="frames that come alone")
    parser.add_argument("--cold-one", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.cold_one:
        print(json.dumps({streams: asyncio.run(_cold(streams)) for streams in FEW}))
        return
    if arguments.cold:
        _both()
        return
    print("| streams per frame | CPU per chunk, µs |\n|---|---|")
    for streams in (4, 16, 128):
        print(f"| {streams} | {asyncio.run(_warm(streams)):.2f} |")


if __name__ == "__main__":
    main()
