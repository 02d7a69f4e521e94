"""What kvlane's own code takes per relayed chunk, without a socket: `python -m loadtests.relay`.

One lane gets step frames with some streams' chunks, and hands them to sinks that frame them as the HTTP edge does and
write nowhere; the load model learns from each frame.
"""

from __future__ import annotations

import asyncio
import time

from router.errors import ReplicaLost
from router.lane import frames
from router.lane.client import Lane
from router.load.model import FleetModel
from router.types import EngineInfo, Headers, Load, Receipt, Request, Rpc

CHUNK = b"data: " + b"x" * 242 + b"\n\n"
CHUNKS = 400_000


class _Nobody:
    def lane_opened(self, lane: Lane) -> None: ...
    def lane_draining(self, lane: Lane) -> None: ...
    def lane_lost(self, lane: Lane, error: ReplicaLost) -> None: ...
    def first_output(self, waited_s: float, expected_s: float) -> None: ...
    def cache_reported(self, lane: Lane, report: frames.CacheReport) -> None: ...


class _Framing:
    """Frames as the HTTP edge does on its short way."""

    started = True

    def __init__(self) -> None:
        self.size = 0

    def routed(self, receipt: Receipt) -> None: ...
    def head(self, status: int, headers: Headers) -> None: ...

    def data(self, payload: bytes, tokens: int) -> None:
        self.size += len(b"%x\r\n%b\r\n" % (len(payload), payload))


class _Sinkhole(asyncio.Transport):
    def write(self, data: object) -> None: ...
    def abort(self) -> None: ...


async def _measure(streams: int) -> float:
    lane = Lane("replica", b"secret", "bench", _Nobody(), lambda info: FleetModel().foresight())
    lane.connection_made(_Sinkhole())
    lane.data_received(frames.encode(frames.Welcome(frames.VERSION, "replica", EngineInfo("bench", ()), Load())))
    request = Request("r", "m", Rpc.HTTP, "/", b"")
    tasks = [asyncio.create_task(lane.run(request, _Framing())) for _ in range(streams)]
    await asyncio.sleep(0)
    outputs = [frames.Output(number + 1, CHUNK, 1) for number in range(streams)]
    load = Load(streams, 2, 3, 0.5, 6.0, step_decodes=streams, step_context_tokens=1000 * streams)
    step = frames.encode(frames.Step(1, streams, load, outputs))
    rounds = CHUNKS // streams
    began = time.process_time()
    for _ in range(rounds):
        lane.data_received(step)
    cost = 1e6 * (time.process_time() - began) / rounds / streams
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return cost


def main() -> None:
    print("| streams per frame | CPU per chunk, µs |\n|---|---|")
    for streams in (4, 16, 128):
        print(f"| {streams} | {asyncio.run(_measure(streams)):.2f} |")


if __name__ == "__main__":
    main()
