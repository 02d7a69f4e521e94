"""What one routing decision takes: `python -m loadtests.decision [--replicas N] [--policy NAME] …`.

Runs the router's own dispatch, with lanes whose transports lead nowhere, and measures from `Dispatcher.run` to the
sink's `routed`: admission, hashing the prompt, the snapshot, the look-up, the policy under its guard, charge, lease and
hold. What follows (encoding the submit, writing it) belongs to relaying. Between two decisions some replicas send
steps, so that their views have to be made anew, as under load. Figures are CPU time, which other processes disturb
least.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import random
import time
from array import array
from collections.abc import Callable, Coroutine
from typing import Any

from router.app import App
from router.lane import frames
from router.lane.client import Lane
from router.lane.frames import CacheReport, End, Step, Welcome
from router.membership.base import ReplicaRecord
from router.options import Config, GrpcOptions, HttpOptions, MembershipOptions, PolicyOptions, StaticReplica
from router.types import EngineInfo, Headers, Load, ModelCard, Receipt, Request, Rpc

MODEL = "m"


class _Nowhere(asyncio.Transport):
    """Takes everything and answers nothing."""

    def write(self, data: object) -> None: ...
    def abort(self) -> None: ...


class _Carrier:
    """Opens lanes to replicas that are not there."""

    def __init__(self) -> None:
        self.lanes: list[Lane] = []

    async def connect(self, record: ReplicaRecord, protocol: Callable[[], asyncio.Protocol]) -> asyncio.BaseTransport:
        lane = protocol()
        assert isinstance(lane, Lane)
        transport = _Nowhere()
        lane.connection_made(transport)
        info = EngineInfo("bench", (ModelCard(MODEL),), (), 256, 50_000, 16)
        lane.data_received(frames.encode(Welcome(frames.VERSION, record.replica, info, Load())))
        self.lanes.append(lane)
        return transport


class _Watch:
    """A sink that notes when it was told of the decision."""

    started = False

    def __init__(self) -> None:
        self.told = 0.0

    def routed(self, receipt: Receipt) -> None:
        self.told = time.thread_time()

    def head(self, status: int, headers: Headers) -> None: ...
    def data(self, payload: bytes, tokens: int) -> None: ...


def _request(number: int, prompt_bytes: int, shared: list[str], rng: random.Random) -> Request:
    """A chat whose first half is one of the shared texts."""
    own = "".join(rng.choices("abcdefghij klmnopqrst", k=prompt_bytes // 2))
    turns = [{"role": "system", "content": rng.choice(shared)}, {"role": "user", "content": own}]
    body = json.dumps({"model": MODEL, "messages": turns, "stream": True}).encode()
    return Request(f"r{number}", MODEL, Rpc.HTTP, "/v1/chat/completions", body)


def _report(app: App, lane: Lane, shared: list[str], blocks: int, rng: random.Random) -> CacheReport:
    """A replica holds some of the shared texts, and other prompts up to that many blocks."""
    stored: list[int] = []
    for text in rng.sample(shared, len(shared) // 4):
        body = json.dumps({"model": MODEL, "messages": [{"role": "system", "content": text}]}).encode()
        chain = app.prefixes.chain(Request("r", MODEL, Rpc.HTTP, "/v1/chat/completions", body))
        stored += chain.blocks if chain is not None else ()
    stored += [rng.getrandbits(64) for _ in range(blocks - len(stored))]
    depths = array("I", [64 * (i % 64 + 1) for i in range(len(stored))])
    return CacheReport(1, True, array("Q", stored).tobytes(), depths.tobytes())


def _step(seq: int, lane: Lane, rng: random.Random) -> bytes:
    running = rng.randint(1, 40)
    load = Load(
        running,
        rng.randint(0, 3),
        rng.randint(0, 4000),
        0.5,
        rng.uniform(8, 30),
        1e6,
        rng.choice([0, 2000]),
        1e6,
        running,
        9000,
    )
    return frames.encode(Step(seq, 1 << 30, load, []))


async def measure(options: argparse.Namespace) -> dict[str, list[float]]:
    """Microseconds per decision, by policy."""
    rng = random.Random(options.seed)
    shared = ["".join(rng.choices("abcdefghij klmnopqrst", k=options.prompt_bytes // 2)) for _ in range(64)]
    replicas = tuple(StaticReplica(name=f"replica-{i}", port=1) for i in range(options.replicas))
    found = {}
    for policy in options.policies.split(","):
        app = App(
            Config(
                http=HttpOptions(enabled=False),
                grpc=GrpcOptions(enabled=False),
                membership=MembershipOptions(kind="static", replicas=replicas),
                policy=PolicyOptions(name=policy),
            )
        )
        carrier = app.replicas.carrier = _Carrier()
        await app.start()
        while app.replicas.readiness().models.get(MODEL) != options.replicas:
            await app.replicas.wait_for_news()
        for lane in carrier.lanes:
            report = _report(app, lane, shared, options.blocks // options.replicas, rng)
            lane.data_received(frames.encode(Step(1, 0, Load(), [], report)))
        found[policy] = _decide(app, carrier.lanes, shared, options, rng)
        await app.stop(0)
    return found


def _decide(
    app: App, lanes: list[Lane], shared: list[str], options: argparse.Namespace, rng: random.Random
) -> list[float]:
    took = []
    flying: list[Coroutine[Any, Any, End]] = []
    gc.collect()
    gc.freeze()
    for number in range(options.requests):
        for lane in rng.sample(lanes, min(options.stepping, len(lanes))):
            lane.data_received(_step(number + 2, lane, rng))
        request, watch = _request(number, options.prompt_bytes, shared, rng), _Watch()
        running = app.dispatcher.run(request, watch)
        began = time.thread_time()
        running.send(None)  # Runs until it waits for the stream's end.
        took.append(1e6 * (watch.told - began))
        flying.append(running)
        if len(flying) > options.in_flight:
            flying.pop(rng.randrange(len(flying))).close()
    for running in flying:
        running.close()
    gc.unfreeze()
    return took[len(took) // 10 :]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m loadtests.decision")
    parser.add_argument("--replicas", type=int, default=64)
    parser.add_argument("--blocks", type=int, default=1_000_000, help="prefix blocks indexed, of all replicas together")
    parser.add_argument("--prompt-bytes", type=int, default=4096)
    parser.add_argument("--policies", default="power-of-two,prefix-affinity,cost")
    parser.add_argument("--requests", type=int, default=3000)
    parser.add_argument("--stepping", type=int, default=8, help="replicas that send a step between two decisions")
    parser.add_argument("--in-flight", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    found = asyncio.run(measure(options))
    print("| policy | p50, µs | p90, µs | p99, µs |\n|---|---|---|---|")
    for policy, took in found.items():
        took.sort()
        p50, p90, p99 = (took[int(len(took) * share)] for share in (0.5, 0.9, 0.99))
        print(f"| {policy} | {p50:.0f} | {p90:.0f} | {p99:.0f} |")


if __name__ == "__main__":
    main()
