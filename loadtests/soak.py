"""`python -m loadtests soak --requests 1000000`: whether a router process grows.

A closed loop of one-token requests, each with a prompt of its own, so that the prefix index fills up and forgets. While
it runs, the router's memory, descriptors, threads and tasks are told; its memory counts as flat where every sample
after the warm-up is within a share of the first of them.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import msgspec
import uvloop

from loadtests import watched
from loadtests.arguments import Parser, number
from loadtests.peers.answers import read_http
from loadtests.peers.children import leaving_nothing
from loadtests.peers.load import HttpCaller, Prompts
from loadtests.peers.replicas import EngineOrder, Replicas
from loadtests.processes import replica_process, router, rss_mb
from loadtests.results import table, write_json

FLAT_SHARE: Final = 0.05
SETTLE_S: Final = 0.2
"""From the last answer to a sample: the router's task ends a moment after the client has it all."""
COLUMNS: Final = {
    "requests": "requests",
    "rss_mb": "RSS, MiB",
    "descriptors": "descriptors",
    "tasks": "tasks",
    "objects": "objects",
    "requests_per_s": "requests/s",
}


class Sample(msgspec.Struct):
    """What the router held after so many requests."""

    requests: int
    rss_mb: float
    descriptors: int
    threads: int
    tasks: int
    objects: int
    requests_per_s: float


def main(argv: Sequence[str]) -> int:
    """Exit status 0; 1 where a request failed or the process grew, 2 where the arguments make no sense."""
    try:
        args = _parser().parse_args(argv)
    except ValueError as error:
        print(f"soak: {error}", file=sys.stderr)
        return 2
    with leaving_nothing():
        samples, failures = measure(args)
    rows = [msgspec.to_builtins(sample) for sample in samples]
    print(table(rows, COLUMNS))
    grown = growth(samples, args.warm_up)
    verdict = [f"{failures} requests failed"] if failures else []
    verdict += grown
    print("; ".join(verdict) or f"flat after the first {args.warm_up:,} requests")
    if args.json:
        write_json(args.json, rows)
    return 1 if verdict else 0


def growth(samples: Sequence[Sample], warm_up: int) -> list[str]:
    """What grew after the warm-up, in words; nothing where too few samples came after it."""
    warm = [sample for sample in samples if sample.requests >= warm_up]
    if len(warm) < 2:
        return ["too few samples to tell"]
    first, *later = warm
    found = []
    low, high = min(each.rss_mb for each in later), max(each.rss_mb for each in later)
    if high > first.rss_mb * (1 + FLAT_SHARE) or low < first.rss_mb * (1 - FLAT_SHARE):
        found.append(f"memory went from {first.rss_mb:.1f} MiB to between {low:.1f} and {high:.1f}")
    for name in ("descriptors", "threads", "tasks"):
        before, after = getattr(first, name), getattr(later[-1], name)
        if after > before:
            found.append(f"{name} went from {before} to {after}")
    return found


def measure(args: argparse.Namespace) -> tuple[list[Sample], int]:
    """Samples in order, and how many requests failed."""
    with ExitStack() as stack:
        order = Replicas(args.replicas, EngineOrder(options={"step_ms": 0.0}))
        packed = msgspec.json.encode(order).decode()
        _, addresses = stack.enter_context(replica_process("loadtests.peers.replicas", packed))
        file = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "told"
        pid, port, _ = stack.enter_context(router(addresses, args.policy, command=watched.command(file)))
        samples: list[Sample] = []
        began = time.monotonic()

        def sample(requests: int) -> None:
            nonlocal began
            told, now = watched.ask(pid, file, collect=True), time.monotonic()
            since = requests - (samples[-1].requests if samples else 0)
            samples.append(_sample(pid, requests, told, since / (now - began)))
            began = time.monotonic()
            print(f"soak: {msgspec.json.encode(samples[-1]).decode()}", file=sys.stderr, flush=True)

        failures = uvloop.run(_requests(port, args, sample))
    return samples, failures


def _sample(pid: int, requests: int, told: watched.Told, rate: float) -> Sample:
    process = Path(f"/proc/{pid}")
    descriptors, threads = len(list((process / "fd").iterdir())), len(list((process / "task").iterdir()))
    return Sample(requests, round(rss_mb(pid), 2), descriptors, threads, told.tasks, told.objects, round(rate, 1))


async def _requests(port: int, args: argparse.Namespace, sample: Callable[[int], None]) -> int:
    """Asks them all, with a sample at each time that all connections are idle; returns how many failed."""
    callers = [HttpCaller(port) for _ in range(args.streams)]
    prompts, failures, asked = Prompts(args.prompt_kb), 0, 0

    async def ask(caller: HttpCaller, upto: int) -> None:
        nonlocal failures, asked
        while asked < upto:
            asked += 1
            answer = await caller.ask(prompts.next(0), 1)
            try:
                read_http(answer)
            except ValueError as error:
                failures += 1
                if failures <= 10:
                    print(f"soak: {error}", file=sys.stderr)

    while asked < args.requests:
        upto = min(asked + args.sample_every, args.requests)
        await asyncio.gather(*(ask(caller, upto) for caller in callers))
        await asyncio.sleep(SETTLE_S)
        await asyncio.to_thread(sample, asked)
    for caller in callers:
        caller.close()
    return failures


def _parser() -> argparse.ArgumentParser:
    parser = Parser("python -m loadtests soak", description=__doc__)
    whole, positive = number(int, least=1), number(float, above=0)
    parser.add_argument("--requests", type=whole, default=1_000_000)
    parser.add_argument("--warm-up", type=whole, default=50_000, help="requests after which nothing may grow")
    parser.add_argument("--sample-every", type=whole, default=25_000, help="requests")
    parser.add_argument("--streams", type=whole, default=32)
    parser.add_argument("--replicas", type=whole, default=2)
    parser.add_argument("--prompt-kb", type=positive, default=4.0)
    parser.add_argument("--policy", default="cost")
    parser.add_argument("--json", metavar="FILE", default="", help="write the samples here as well")
    return parser
