"""`python -m loadtests fleet`: whether a router's cost grows with its fleet.

kvlane over a few and over many replicas, both up at the same time and measured in turns: CPU per relayed chunk and per
request of one token. Twice: with as many streams on each replica, as fleets are used, and with as many streams in all,
where each replica's step has fewer tokens to share what a frame costs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Final

from loadtests.arguments import Parser, many, number
from loadtests.peers.base import Running, Setup
from loadtests.peers.children import leaving_nothing
from loadtests.peers.environments import BENCH
from loadtests.peers.errors import PeerError
from loadtests.peers.measure import Bench, Paced, Shape
from loadtests.peers.replicas import EngineOrder
from loadtests.peers.systems import SYSTEMS
from loadtests.results import Row, spread, table, write_json

REQUESTS: Final = 20_000
"""Of one token: what the first ones cost, as their streams begin all at once, shall not be what is told."""

COLUMNS: Final = {
    "what": "load",
    "replicas": "replicas",
    "streams": "streams",
    "cpu_us_per_chunk": "router CPU per chunk, µs",
    "chunk_ratio": "by the smallest fleet",
    "cpu_us_per_request": "per request, µs",
    "request_ratio": "by the smallest fleet",
    "errors": "errors",
}


def main(argv: Sequence[str]) -> int:
    """Exit status 0; 1 where something was not answered, 2 where the arguments make no sense."""
    try:
        args = _parser().parse_args(argv)
    except ValueError as error:
        print(f"fleet: {error}", file=sys.stderr)
        return 2
    try:
        with leaving_nothing():
            rows = measure(args)
    except PeerError as error:
        print(f"fleet: {error}", file=sys.stderr)
        return 1
    print(table(rows, COLUMNS))
    write_json(args.json, rows)
    return 1 if any(row["errors"] for row in rows) else 0


def measure(args: argparse.Namespace) -> list[Row]:
    """A row for each size of fleet and each kind of load, in the order of sizes."""
    shape = Shape(args.tokens, args.prompt_kb, False, args.step_ms, args.seconds, requests=REQUESTS)
    loads = {
        f"{args.streams_per_replica} streams each": {size: size * args.streams_per_replica for size in args.replicas},
        f"{args.streams} streams in all": dict.fromkeys(args.replicas, args.streams),
    }
    samples: dict[tuple[str, int], list[Paced]] = {}
    with ExitStack() as stack:
        up: dict[int, Running] = {}
        for size in args.replicas:
            engine = EngineOrder(options={"step_ms": args.step_ms})
            setup = Setup(args.policy, "http", size, engine, BENCH / "logs" / "fleet.log")
            up[size] = stack.enter_context(SYSTEMS["kvlane"].start(setup))
        bench = Bench(shape)
        for what, streams in loads.items():
            for size, running in up.items():
                bench.warm_up("kvlane", running, streams[size])
            for rep in range(args.reps):
                for size in list(up)[:: -1 if rep % 2 else 1]:
                    sample = bench.paced("kvlane", up[size], streams[size])
                    samples.setdefault((what, size), []).append(sample)
                    print(f"fleet: {size} replicas, {what}, repetition {rep + 1}", file=sys.stderr, flush=True)
    return [
        row(what, size, streams[size], samples[what, size], samples[what, min(args.replicas)])
        for what, streams in loads.items()
        for size in args.replicas
    ]


def row(what: str, replicas: int, streams: int, samples: Sequence[Paced], least: Sequence[Paced]) -> Row:
    """`least` has the repetitions of the smallest fleet; ratios are those of repetitions next to each other."""
    both = list(zip(samples, least, strict=True))
    return {
        "what": what,
        "replicas": replicas,
        "streams": streams,
        **spread("cpu_us_per_chunk", [each.cpu_us_per_chunk for each in samples]),
        **spread("cpu_us_per_request", [each.cpu_us_per_request for each in samples]),
        **spread("chunk_ratio", [each.cpu_us_per_chunk / small.cpu_us_per_chunk for each, small in both]),
        **spread("request_ratio", [each.cpu_us_per_request / small.cpu_us_per_request for each, small in both]),
        "errors": sum(each.errors for each in samples),
        "reps": len(samples),
    }


def _parser() -> argparse.ArgumentParser:
    parser = Parser("python -m loadtests fleet", description=__doc__)
    whole, positive = number(int, least=1), number(float, above=0)
    parser.add_argument("--replicas", type=many(number(int, least=1, most=256)), default=[4, 64], help="by commas")
    parser.add_argument("--streams-per-replica", type=whole, default=8)
    parser.add_argument("--streams", type=whole, default=256, help="in the second kind of load")
    parser.add_argument("--tokens", type=whole, default=200)
    parser.add_argument("--prompt-kb", type=positive, default=4.0)
    parser.add_argument("--policy", default="cost")
    parser.add_argument("--step-ms", type=positive, default=20.0)
    parser.add_argument("--seconds", type=positive, default=8.0, help="of each timed load")
    parser.add_argument("--reps", type=whole, default=5)
    parser.add_argument("--json", metavar="FILE", default="", help="write the rows here as well")
    return parser
