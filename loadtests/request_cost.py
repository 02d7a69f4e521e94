"""What kvlane's own code takes per request of one token, without a socket: `python -m loadtests.request_cost`.

A burst of requests goes through the HTTP edge, dispatch and the lanes of a few replicas, which answer each lane's part
in one frame, as an engine step does, with the cache report of its prompts. `--cold` pushes everything out of the
processor's caches before each burst and each frame, as happens to a router that waits for the next step of its engines
while other processes run. `--gc` compares the ways to set up the garbage collector.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import itertools
import random
import struct
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import uvloop

from loadtests.arguments import number
from loadtests.peers.load import Prompts, http_request
from loadtests.processes import MODEL
from router import garbage
from router.admission import Admission
from router.dispatch import Dispatcher
from router.hold import Hold
from router.ingress.http import HttpIngress
from router.ingress.http_connection import Connection
from router.lane import frames
from router.lane.frames import CacheReport, Head, Output, Step, Submit, Welcome
from router.load.model import new_fleet
from router.membership.base import ReplicaRecord
from router.observe.metrics import Metrics
from router.options import Config
from router.policies import registry
from router.prefix.prefixes import Prefixes
from router.receipts import Explainer
from router.replicas import Replicas
from router.types import CacheMode, EngineInfo, Load, ModelCard, RouteInfo

BURST: Final = 8
"""Requests that come together, and answers in a frame."""
KV_BLOCK: Final = 64
"""Tokens of a prefix block, as these replicas count them."""
_CACHE_BYTES: Final = 8 << 20
_HEAD: Final = Head(200, (("content-type", "text/event-stream; charset=utf-8"), ("cache-control", "no-cache")))
_ANSWER: Final = b'data: {"choices":[{"index":0,"text":" word","finish_reason":"length"}]}\n\ndata: [DONE]\n\n'
_GARBAGE: Final = ("default", "frozen", "settled", "off")


class Pipe(asyncio.Transport):
    """Keeps what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.written: list[bytes] = []

    def write(self, data: Any) -> None:
        self.written.append(data)

    def get_write_buffer_size(self) -> int:
        return 0

    def is_closing(self) -> bool:
        return False

    def pause_reading(self) -> None: ...
    def resume_reading(self) -> None: ...
    def close(self) -> None: ...
    def abort(self) -> None: ...


class Engines:
    """Replicas at the other end of their lanes (`router.lane.carriers.Carrier`)."""

    def __init__(self) -> None:
        self._lanes: list[tuple[asyncio.Protocol, Pipe, Iterator[int]]] = []

    async def connect(self, record: ReplicaRecord, protocol: Callable[[], asyncio.Protocol]) -> asyncio.BaseTransport:
        lane, pipe = protocol(), Pipe()
        lane.connection_made(pipe)
        routes = (RouteInfo("/v1/completions", ("POST",)),)
        info = EngineInfo("sim", (ModelCard(MODEL, "", 100_000),), routes, 256, 4000, 32)
        lane.data_received(frames.encode(Welcome(frames.VERSION, record.replica, info, Load())))
        lane.data_received(frames.encode(Step(1, 0, Load(), [], CacheReport(1, snapshot=True))))
        self._lanes.append((lane, pipe, itertools.count(2)))
        return pipe

    def answers(self) -> Iterator[tuple[asyncio.Protocol, bytes, int]]:
        """A frame for each lane that something was asked on, and how many answers are in it."""
        for lane, pipe, seqs in self._lanes:
            sent = map(frames.decode_up, frames.FrameSplitter(1 << 30).feed(b"".join(pipe.written)))
            asked = [frame for frame in sent if isinstance(frame, Submit)]
            pipe.written.clear()
            if not asked:
                continue
            chains = [chain for call in asked if (chain := frames.unpack_chain(call.chain)) is not None]
            blocks = [block for chain in chains for block in chain.blocks]
            depths = [KV_BLOCK * (at + 1) for chain in chains for at in range(len(chain.blocks))]
            seq = next(seqs)
            report = CacheReport(
                seq,
                stored=struct.pack(f"<{len(blocks)}Q", *blocks),
                depths=struct.pack(f"<{len(depths)}I", *depths),
            )
            load = Load(0, 0, 0, 0.3, 20.0, step_prefill_tokens=1000 * len(asked))
            acked = asked[-1].stream
            outputs = [Output(call.stream, _ANSWER, 1, frames.End(), _HEAD) for call in asked]
            yield lane, frames.encode(Step(seq, acked, load, outputs, report)), len(asked)


class Router:
    """One router in this process, with connections that lead nowhere."""

    def __init__(self, policy: str, connections: int, engines: Engines) -> None:
        config, metrics, clock = Config(), Metrics(), time.perf_counter
        self.prefixes = Prefixes(config.prefix, time.monotonic)
        self.replicas = Replicas(
            "bench",
            engines,
            config.lane,
            first_output=metrics.first_output,
            caches=self.prefixes,
            foresee=lambda info: fleet.foresight(),
        )
        fleet = new_fleet()
        dispatcher = Dispatcher(
            Admission(config.limits.max_streams),
            registry.create(policy, {}, random.Random(1)),
            policy,
            self.prefixes,
            self.replicas,
            Hold(config.hold, config.limits.no_replica_wait_s, self.replicas, time.monotonic),
            config.limits,
            metrics,
            clock,
            Explainer(None, metrics.policies, clock, 0.005),
        )
        site = HttpIngress(config.http, dispatcher, self.replicas, metrics=metrics.exposition)
        site.sweep()
        self.clients = [(Connection(site, asyncio.get_running_loop()), Pipe()) for _ in range(connections)]
        for connection, pipe in self.clients:
            connection.connection_made(pipe)


class Cost:
    """CPU of this thread, in seconds."""

    def __init__(self, *, cold: bool) -> None:
        self.spent = 0.0
        self._other = bytes(_CACHE_BYTES if cold else 0)

    async def of(self, arrivals: Sequence[tuple[asyncio.Protocol, bytes]]) -> None:
        """Adds what it takes that these bytes came, and what that leaves to the event loop."""
        self._other.count(1)
        began = time.thread_time()
        for connection, data in arrivals:
            connection.data_received(data)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        self.spent += time.thread_time() - began


async def measure(args: argparse.Namespace, garbage_mode: str) -> tuple[float, float, float, float]:
    """Microseconds per request, garbage collections per 1,000 requests, their microseconds per request, and the longest
    one in milliseconds."""
    engines = Engines()
    router = Router(args.policy, 4 * BURST, engines)
    router.replicas.listed({f"r{i}": ReplicaRecord(f"r{i}", "nowhere", i, b"") for i in range(args.replicas)})
    while router.replicas.readiness().models.get(MODEL, 0) < args.replicas:
        await router.replicas.wait_for_news()
    prompts, cost, done = Prompts(args.prompt_kb), Cost(cold=args.cold), 0
    pauses = _watch_garbage(garbage_mode)
    for round in range(-args.requests // BURST // 4, args.requests // BURST // 4):
        if round == 0:
            cost.spent, done = 0.0, 0
            pauses.clear()
        for at in range(0, len(router.clients), BURST):
            asked = [(one, http_request(prompts.next(0), 1)) for one, _ in router.clients[at : at + BURST]]
            await cost.of(asked)
        for lane, frame, answers in engines.answers():
            await cost.of([(lane, frame)])
            done += answers
        for _, pipe in router.clients:
            if not pipe.written.pop().endswith(b"0\r\n\r\n"):
                raise RuntimeError("a request was not answered")
            pipe.written.clear()
        while router.prefixes.sweep():
            pass
    known = router.prefixes.status()
    if known.gaps or any(replica.mode is not CacheMode.EXACT for replica in known.replicas.values()):
        raise RuntimeError("the router lost count of what the replicas hold")
    await router.replicas.close()
    return 1e6 * cost.spent / done, 1e3 * len(pauses) / done, 1e6 * sum(pauses) / done, 1e3 * max(pauses, default=0.0)


def _watch_garbage(mode: str) -> list[float]:
    """Sets the collector up, and returns where its pauses are noted, in seconds."""
    gc.collect()
    if mode == "settled":
        garbage.settle()
    elif mode == "frozen":
        gc.freeze()
    elif mode == "off":
        gc.disable()
    pauses: list[float] = []
    began = 0.0

    def collected(phase: str, info: dict[str, int]) -> None:
        nonlocal began
        if phase == "start":
            began = time.perf_counter()
        else:
            pauses.append(time.perf_counter() - began)

    gc.callbacks.append(collected)
    return pauses


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtests.request_cost", description=__doc__)
    whole = number(int, least=1)
    parser.add_argument("--requests", type=whole, default=16_000, help="measured, after as many to warm up")
    parser.add_argument("--replicas", type=whole, default=4)
    parser.add_argument("--prompt-kb", type=number(float, above=0), default=4.0)
    parser.add_argument("--policy", default="cost")
    parser.add_argument("--cold", action="store_true", help="with nothing in the processor's caches")
    parser.add_argument("--gc", choices=_GARBAGE, default="settled", help="settled is what kvlane does")
    args = parser.parse_args(argv)
    cpu, collections, pauses, longest = uvloop.run(measure(args, args.gc))
    print(
        "| replicas | caches | collector | CPU per request, µs | collections per 1,000 | µs per request | longest, ms |"
    )
    print("|---|---|---|---|---|---|---|")
    caches = "cold" if args.cold else "warm"
    print(f"| {args.replicas} | {caches} | {args.gc} | {cpu:.0f} | {collections:.1f} | {pauses:.1f} | {longest:.1f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
