"""`python -m loadtests workers`: whether another worker process adds cost.

Routers of one, two and four workers, all up at the same time and measured in turns: the CPU of the supervisor and all
workers together, per relayed chunk and per request of one token. Twice: with as many streams on each worker, as workers
are used, and with as many in all. Each worker has a lane of its own to each replica, so in the second load a step comes
in more frames of fewer streams, and fewer share what a frame costs.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Final, NamedTuple

import uvloop

from loadtests.arguments import Parser, many, number
from loadtests.clients import grpc_load, http_load
from loadtests.peers.cost import FamilyCost, family_rss_mb
from loadtests.processes import engines, router
from loadtests.results import Row, spread, table, write_json
from loadtests.router_cost import STEP_OPTIONS

COLUMNS: Final = {
    "protocol": "protocol",
    "what": "load",
    "workers": "workers",
    "streams": "streams",
    "cpu_us_per_chunk": "CPU per chunk, µs",
    "chunk_ratio": "by one worker",
    "cpu_us_per_request": "CPU per request, µs",
    "request_ratio": "by one worker",
    "idle_cpu_ms_per_s": "idle, ms of CPU per s",
    "rss_mb": "RSS, MiB",
    "errors": "errors",
}
CONNECTIONS: Final = 32
"""Of the gRPC client: over few, whole workers would have nothing to do."""


class Sample(NamedTuple):
    """One repetition."""

    chunk_us: float
    request_us: float
    errors: int


def main(argv: Sequence[str]) -> int:
    """Exit status 0; 1 where something was not answered, 2 where the arguments make no sense."""
    try:
        args = _parser().parse_args(argv)
    except ValueError as error:
        print(f"workers: {error}", file=sys.stderr)
        return 2
    rows = measure(args)
    print(table(rows, COLUMNS))
    write_json(args.json, rows)
    return 1 if any(row["errors"] for row in rows) else 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m loadtests workers", description=__doc__)
    parser.add_argument("--workers", type=many(number(int, least=1)), default=[1, 2, 4], metavar="N,…")
    parser.add_argument("--protocols", type=many(str), default=["http", "grpc"], metavar="NAME,…")
    parser.add_argument("--streams", type=number(int, least=1), default=256, help="in all (default: 256)")
    parser.add_argument("--streams-per-worker", type=number(int, least=1), default=64, metavar="N")
    parser.add_argument("--tokens", type=number(int, least=1), default=200)
    parser.add_argument("--prompt-kb", type=number(float, above=0), default=4.0)
    parser.add_argument("--step-ms", type=number(float, above=0), default=20.0)
    parser.add_argument("--policy", default="cost")
    parser.add_argument("--reps", type=number(int, least=1), default=5)
    parser.add_argument("--json", default="", metavar="FILE")
    return parser


def measure(args: argparse.Namespace) -> list[Row]:
    """A row for each protocol, load and number of workers."""
    samples: dict[tuple[str, str, int, int], list[Sample]] = {}
    with ExitStack() as stack:
        _, addresses = stack.enter_context(engines(2, STEP_OPTIONS | {"step_base_ms": args.step_ms}))
        up = {count: stack.enter_context(router(addresses, args.policy, workers=count)) for count in args.workers}
        idle = {count: uvloop.run(_idle(pid)) for count, (pid, _, _) in up.items()}
        loads = {
            f"{args.streams_per_worker} streams each": {count: count * args.streams_per_worker for count in up},
            f"{args.streams} streams in all": dict.fromkeys(up, args.streams),
        }
        for protocol, (what, streams) in itertools.product(args.protocols, loads.items()):
            for rep in range(-1, args.reps):  # The first round is for warming up.
                for count in list(up)[:: -1 if rep % 2 else 1]:
                    pid, http, grpc = up[count]
                    port = http if protocol == "http" else grpc
                    sample = uvloop.run(_sample(args, protocol, pid, port, streams[count]))
                    if rep >= 0:
                        samples.setdefault((protocol, what, count, streams[count]), []).append(sample)
                    print(f"workers: {protocol}, {what}, {count}, repetition {rep + 1}", file=sys.stderr, flush=True)
        rss = {count: round(family_rss_mb([pid]), 1) for count, (pid, _, _) in up.items()}
    bases = {(protocol, what): values for (protocol, what, count, _), values in samples.items() if count == min(up)}
    return [_row(key, values, bases[key[:2]], idle[key[2]], rss[key[2]]) for key, values in samples.items()]


def _row(key: tuple[str, str, int, int], values: list[Sample], base: list[Sample], idle: float, rss_mb: float) -> Row:
    pairs = list(zip(values, base, strict=True))
    return {
        **dict(zip(("protocol", "what", "workers", "streams"), key, strict=True)),
        **spread("cpu_us_per_chunk", [each.chunk_us for each in values], 2),
        **spread("chunk_ratio", [each.chunk_us / least.chunk_us for each, least in pairs]),
        **spread("cpu_us_per_request", [each.request_us for each in values], 1),
        **spread("request_ratio", [each.request_us / least.request_us for each, least in pairs]),
        "idle_cpu_ms_per_s": round(idle, 2),
        "rss_mb": rss_mb,
        "errors": sum(each.errors for each in values),
    }


async def _idle(pid: int) -> float:
    """Milliseconds of CPU per second of a router that nobody asks anything."""
    seconds = 3.0
    cost = FamilyCost([pid])
    await asyncio.sleep(seconds)
    return 1e3 * cost.cpu_s() / seconds


async def _sample(args: argparse.Namespace, protocol: str, pid: int, port: int, streams: int) -> Sample:
    load = http_load if protocol == "http" else partial(grpc_load, channels=CONNECTIONS)
    cost = FamilyCost([pid])
    long = await load(port, streams, args.tokens, args.prompt_kb, 1)
    chunk_us = 1e6 * cost.cpu_s() / max(1, long.chunks)
    cost = FamilyCost([pid])
    short = await load(port, streams, 1, args.prompt_kb, max(4, 2000 // streams))
    return Sample(chunk_us, 1e6 * cost.cpu_s() / max(1, short.requests), long.errors + short.errors)
