"""What the two carriers cost: CPU per token on both sides, and a frame's way there and back.

`python -m loadtests.carriers [--reps 5]`. Starts a Ray cluster of its own with two simulated replicas in Ray Serve,
opens lanes to them from this process, and runs streams into sinks that only count: no ingress, so the figures are the
lane's alone. The carriers take turns. Latency is a ping's round trip on an otherwise idle lane.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import ray
import uvloop
from ray import serve

from engine import deployment
from loadtests.processes import Cost, descendants
from loadtests.router_cost import STEP_OPTIONS
from router.lane import frames
from router.lane.actor import ActorCarrier
from router.lane.carriers import Carrier, SocketCarrier
from router.lane.client import Lane
from router.membership.base import ReplicaRecord
from router.membership.ray import RayMembership
from router.options import Config, EngineOptions, LaneOptions, MembershipOptions
from router.replicas import Replicas
from router.types import Headers, Receipt, Request, Rpc

MODEL = "sim"
REPLICAS = 2
PINGS = 200
DEADLINE_S = 120.0


class Count:
    """A sink that counts."""

    started = True

    def __init__(self) -> None:
        self.tokens = 0

    def routed(self, receipt: Receipt) -> None: ...
    def head(self, status: int, headers: Headers) -> None: ...

    def data(self, payload: bytes, tokens: int) -> None:
        self.tokens += tokens


class Pinger(asyncio.Protocol):
    """A bare lane that only pings."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret
        self._splitter = frames.FrameSplitter(frames.MAX_FRAME_BYTES)
        self._answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: asyncio.Transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        for body in self._splitter.feed(data):
            frame = frames.decode_down(body)
            if isinstance(frame, frames.Challenge):
                proof = frames.prove(self._secret, frame.nonce, "pinger")
                self._transport.write(frames.encode(frames.Hello(frames.VERSION, proof, "pinger")))
            elif isinstance(frame, frames.Welcome | frames.Pong):
                self._answer.set_result(None)

    async def ready(self) -> None:
        await asyncio.wait_for(self._answer, DEADLINE_S)

    async def round_trip_s(self) -> float:
        self._answer = asyncio.get_running_loop().create_future()
        began = time.perf_counter()
        self._transport.write(frames.encode(frames.Ping(1)))
        await asyncio.wait_for(self._answer, DEADLINE_S)
        return time.perf_counter() - began

    def close(self) -> None:
        self._transport.close()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtests.carriers", description=__doc__)
    parser.add_argument("--streams", default="32,256", help="concurrent streams, by commas")
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--reps", type=int, default=5)
    arguments = parser.parse_args()
    ray.init("local", num_cpus=4, include_dashboard=False, namespace="bench", log_to_driver=False)
    config = Config(
        membership=MembershipOptions(ray_namespace="bench"),
        engines=(EngineOptions(name=MODEL, kind="sim", replicas=REPLICAS, args=STEP_OPTIONS, num_cpus=0.1),),
    )
    try:
        deployment.deploy(config)
        while sum(state.ready for state in deployment.statuses().values()) < REPLICAS:
            time.sleep(0.2)
        uvloop.run(_measure(arguments, config))
    finally:
        serve.shutdown()
        ray.shutdown()
    return 0


async def _measure(arguments: argparse.Namespace, config: Config) -> None:
    records: dict[str, ReplicaRecord] = {}

    def listed(members: Mapping[str, ReplicaRecord]) -> None:
        records.update(members)

    membership = asyncio.create_task(RayMembership(config.membership).run(listed))
    async with asyncio.timeout(DEADLINE_S):
        while len(records) < REPLICAS:
            await asyncio.sleep(0.1)
    carriers: dict[str, Carrier] = {"socket": SocketCarrier(), "actor": ActorCarrier()}
    counts = [int(count) for count in arguments.streams.split(",")]
    router: dict[tuple[str, int], list[float]] = {}
    replica: dict[tuple[str, int], list[float]] = {}
    trips: dict[str, list[float]] = {name: [] for name in carriers}
    pids = [pid for pid in descendants(os.getpid()) if _is_replica(pid)]
    for rep in range(arguments.reps):
        for name in list(carriers)[:: 1 if rep % 2 else -1]:
            trips[name] += await _pings(carriers[name], next(iter(records.values())))
            for streams in counts:
                ours, theirs = await _load(carriers[name], records, streams, arguments.tokens, pids)
                router.setdefault((name, streams), []).append(ours)
                replica.setdefault((name, streams), []).append(theirs)
    membership.cancel()
    await asyncio.gather(membership, return_exceptions=True)
    print("| carrier | streams | router CPU per token, µs | replica CPU per token, µs | round trip p50 / p99, ms |")
    print("|---|---|---|---|---|")
    for (name, streams), values in sorted(router.items(), reverse=True):
        trip = statistics.quantiles(trips[name], n=100)
        print(
            f"| {name} | {streams} | {_spread(values)} | {_spread(replica[name, streams])} "
            f"| {1e3 * trip[49]:.2f} / {1e3 * trip[98]:.2f} |"
        )


async def _pings(carrier: Carrier, record: ReplicaRecord) -> list[float]:
    pinger = Pinger(record.secret)
    await carrier.connect(record, lambda: pinger)
    await pinger.ready()
    trips = []
    for _ in range(PINGS):
        trips.append(await pinger.round_trip_s())
        await asyncio.sleep(0.005)  # steps are as sparse
    pinger.close()
    return trips


async def _load(
    carrier: Carrier, records: Mapping[str, ReplicaRecord], streams: int, tokens: int, pids: list[int]
) -> tuple[float, float]:
    """CPU per token in microseconds: this process's, and the replicas'."""
    fleet = Replicas("bench", carrier, LaneOptions(connect_timeout_s=30.0))
    fleet.listed(records)
    while len(fleet.lanes()) < REPLICAS:
        await fleet.wait_for_news()
    lanes, sinks = fleet.lanes(), [Count() for _ in range(streams)]
    costs = [Cost(pid) for pid in pids]
    began = time.process_time()
    async with asyncio.timeout(DEADLINE_S):
        await asyncio.gather(*(_run(lanes[i % REPLICAS], sink, tokens, i) for i, sink in enumerate(sinks)))
    ours, theirs = time.process_time() - began, sum(cost.cpu_s() for cost in costs)
    total = sum(sink.tokens for sink in sinks)
    assert total == streams * tokens, "tokens are missing"
    await fleet.close()
    return 1e6 * ours / total, 1e6 * theirs / total


async def _run(lane: Lane, sink: Count, tokens: int, number: int) -> None:
    body = {"model": MODEL, "prompt": f"stream {number}", "max_tokens": tokens, "stream": True}
    headers = (("content-type", "application/json"),)
    request = Request(f"r{number}", MODEL, Rpc.HTTP, "/v1/completions", json.dumps(body).encode(), headers=headers)
    with lane.lease():
        await lane.run(request, sink)


def _is_replica(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"ray::ServeReplica:kvlane-sim")
    except OSError:
        return False  # It has ended meanwhile.


def _spread(values: list[float]) -> str:
    return f"**{statistics.median(values):.1f}** ({min(values):.1f}–{max(values):.1f})"


if __name__ == "__main__":
    sys.exit(main())
