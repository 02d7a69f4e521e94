"""`python -m loadtests peers`: routers side by side on the same load, in turns."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NoReturn

import msgspec

from loadtests.arguments import Parser, many, number
from loadtests.peers import trivial
from loadtests.peers.children import leaving_nothing
from loadtests.peers.environments import BENCH
from loadtests.peers.errors import PeerError
from loadtests.peers.load import MAX_STREAMS, Prompts
from loadtests.peers.measure import Shape
from loadtests.peers.report import markdown
from loadtests.peers.runs import Contender, Plan, contenders, run
from loadtests.peers.systems import SYSTEMS

EPILOG: Final = f"""
Systems: {", ".join(SYSTEMS)}. `direct` is the floor and always runs; over gRPC the floor is HTTP too.
Policies are named round_robin and cache_aware for all; kvlane's counterparts are power-of-two and cost, and can be
named so. Packages of other routers are installed into environments of their own under .bench/ where they are first
needed. The exit status is 1 where a system could not be measured or anything was answered with an error, and 2 where
the arguments make no sense.
"""


def main(argv: Sequence[str]) -> int:
    """Exit status 0; 1 where something failed, 2 where the arguments make no sense."""
    try:
        args = _parser().parse_args(argv)
        args.streams = list(dict.fromkeys(args.streams))
        speaking = [name for name, system in SYSTEMS.items() if args.protocol in system.protocols]
        chosen = contenders(args.systems or speaking, args.policy, args.protocol)
        if args.json:
            _check_writable(Path(args.json))
    except (ValueError, OSError) as error:
        print(f"peers: {error}", file=sys.stderr)
        return 2
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        with leaving_nothing():
            print(_ceilings(args), flush=True)
            return 0 if args.ceiling else _compare(args, chosen)
    except PeerError as error:
        print(f"peers: {error}", file=sys.stderr)
        return 1
    finally:
        signal.signal(signal.SIGTERM, before)


def _stop(number: int, frame: object) -> NoReturn:
    """Ends as an exception does, so that all that was started is ended."""
    sys.exit(128 + number)


def _compare(args: argparse.Namespace, chosen: Sequence[Contender]) -> int:
    shape = Shape(args.tokens, args.prompt_kb, args.repeated_prompts, args.step_ms, args.seconds)
    plan = Plan(
        shape, list(dict.fromkeys(args.streams)), args.reps, args.replicas, args.protocol, args.limit_s, BENCH / "logs"
    )
    outcome = run(plan, chosen, lambda line: print(f"peers: {line}", file=sys.stderr, flush=True))
    if outcome.rows:
        print(markdown(outcome.rows))
    if args.json:
        packed = msgspec.json.format(msgspec.json.encode({"results": outcome.rows}), indent=1)
        Path(args.json).write_bytes(packed + b"\n")
    return 1 if outcome.failed or any(row["errors"] for row in outcome.rows) else 0


def _ceilings(args: argparse.Namespace) -> str:
    """What the load generator can take, a line for each number of streams."""
    prompts = Prompts(args.prompt_kb, repeated=args.repeated_prompts)
    lines = []
    for streams in args.streams:
        most = trivial.measure(streams, args.tokens, prompts, args.seconds, BENCH / "logs" / "trivial.log")
        lines.append(
            f"load generator, {streams} streams over HTTP from a server that only writes: "
            f"{most.chunks_per_s:,.0f} chunks/s, {most.requests_per_s:,.0f} requests/s, "
            f"{most.cpu_us_per_chunk:.1f} µs of its own CPU per chunk"
        )
    return "\n".join(lines)


def _check_writable(path: Path) -> None:
    if path.is_dir():
        raise IsADirectoryError(f"--json: {path} is a directory")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise PermissionError(f"--json: {path} cannot be written")


def _parser() -> argparse.ArgumentParser:
    parser = Parser("python -m loadtests peers", description=__doc__, epilog=EPILOG)
    few = number(int, least=1, most=64)
    streams, whole, positive = number(int, least=1, most=MAX_STREAMS), number(int, least=1), number(float, above=0)
    parser.add_argument("--systems", type=many(str), default=[], help="by commas (default: all that speak it)")
    parser.add_argument("--policy", type=many(str), default=[], help="by commas (default: all of each system)")
    parser.add_argument("--protocol", choices=("http", "grpc"), default="http")
    parser.add_argument("--streams", type=many(streams), default=[32, 256], help=f"by commas, up to {MAX_STREAMS}")
    parser.add_argument("--tokens", type=whole, default=200, help="of an answer where chunks are measured")
    parser.add_argument("--prompt-kb", type=positive, default=4.0)
    parser.add_argument(
        "--repeated-prompts", action="store_true", help="a stream's requests share one prompt; else none is asked twice"
    )
    parser.add_argument("--reps", type=whole, default=5, help="repetitions, the order of systems turned each time")
    parser.add_argument("--step-ms", type=positive, default=20.0, help="duration of a simulated engine's step")
    parser.add_argument("--replicas", type=few, default=2, help="simulated replicas of each system")
    parser.add_argument("--seconds", type=positive, default=3.0, help="length of each timed load")
    parser.add_argument("--limit-s", type=positive, default=7200.0, help="of all loads; then the rest is left out")
    parser.add_argument("--ceiling", action="store_true", help="only tell what the load generator can take")
    parser.add_argument("--json", metavar="FILE", help="write the rows here as well")
    return parser
