"""`python -m loadtests peers`: routers side by side on the same load, in turns."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NoReturn

import msgspec

from loadtests.arguments import Parser, many, number
from loadtests.peers import plots, trivial
from loadtests.peers.children import leaving_nothing
from loadtests.peers.environments import BENCH
from loadtests.peers.errors import PeerError
from loadtests.peers.load import MAX_STREAMS, Prompts
from loadtests.peers.measure import PACED_CHUNKS_PER_S, Shape
from loadtests.peers.replays import TRACES
from loadtests.peers.report import tables
from loadtests.peers.runs import Contender, Plan, Replay, contenders, run
from loadtests.peers.systems import SYSTEMS
from loadtests.peers.trivial import Ceiling

EPILOG: Final = f"""
Systems: {", ".join(SYSTEMS)}. `direct` is the floor and always runs; over gRPC the floor is HTTP too.
Policies are named round_robin and cache_aware for all; kvlane's counterparts are round-robin and cost, and can be
named so. Packages of other routers are installed into environments of their own under .bench/ where they are first
needed. Engines give a token to each stream at each step and take next to nothing themselves; those of replays are
simulated with a scheduler and a KV cache. A step is longer than --step-ms where so many streams would ask for more
chunks a second than --paced-rate. All listens on loopback, with three exceptions that Ray Serve has no setting for:
its gRPC proxy, its HAProxy with the metrics port, and its replicas' own gRPC ports listen on all interfaces. Run those
behind a firewall. The exit status is 1 where a system could not be measured or anything was answered with an error,
and 2 where the arguments make no sense.
"""
QUICK: Final = {
    "systems": ["kvlane", "vllm-router", "smg"],
    "streams": [32, 256],
    "tokens": 100,
    "reps": 3,
    "seconds": 1.0,
}
"""What --quick has in place of the defaults; five to eight minutes on two cores."""
FULL: Final[dict[str, Any]] = {"systems": [], "streams": [32, 256], "tokens": 200, "reps": 5, "seconds": 3.0}


def main(argv: Sequence[str]) -> int:
    """Exit status 0; 1 where something failed, 2 where the arguments make no sense."""
    try:
        args = _parser().parse_args(argv)
        _fill(args)
        speaking = [name for name, system in SYSTEMS.items() if args.protocol in system.protocols]
        chosen = contenders(args.systems or speaking, args.policy, args.protocol)
        for path in filter(None, (args.json, args.markdown)):
            _check_writable(Path(path))
    except (ValueError, OSError) as error:
        print(f"peers: {error}", file=sys.stderr)
        return 2
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        with leaving_nothing():
            ceilings = _ceilings(args)
            return 0 if args.ceiling else _compare(args, chosen, ceilings)
    except PeerError as error:
        print(f"peers: {error}", file=sys.stderr)
        return 1
    finally:
        signal.signal(signal.SIGTERM, before)


def _stop(number: int, frame: object) -> NoReturn:
    """Ends as an exception does, so that all that was started is ended."""
    sys.exit(128 + number)


def _fill(args: argparse.Namespace) -> None:
    """What was not given."""
    for name, value in (QUICK if args.quick else FULL).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.streams = list(dict.fromkeys(args.streams))


def _compare(args: argparse.Namespace, chosen: Sequence[Contender], ceilings: Sequence[Ceiling]) -> int:
    shape = Shape(args.tokens, args.prompt_kb, args.repeated_prompts, args.step_ms, args.seconds, args.paced_rate)
    plan = Plan(
        shape,
        args.streams,
        args.reps,
        args.replicas,
        args.protocol,
        args.limit_s,
        BENCH / "logs",
        list(dict.fromkeys(args.load)),
        [Replay(trace, args.time_factor, args.replay_requests) for trace in dict.fromkeys(args.replay)],
    )
    outcome = run(plan, chosen, lambda line: print(f"peers: {line}", file=sys.stderr, flush=True))
    text = tables(outcome)
    print(text)
    if args.markdown:
        Path(args.markdown).write_text(f"{text}\n")
    if args.plots and outcome.rows:
        for path in plots.write(outcome.rows, Path(args.plots)):
            print(f"peers: wrote {path}", file=sys.stderr)
    if args.json:
        packed = {
            "results": outcome.rows,
            "open": outcome.open,
            "replays": outcome.replays,
            "generator": ceilings,
            "arguments": {
                name: value for name, value in vars(args).items() if name not in ("json", "markdown", "plots")
            },
        }
        Path(args.json).write_bytes(msgspec.json.format(msgspec.json.encode(packed), indent=1) + b"\n")
    rows = (*outcome.rows, *outcome.open, *outcome.replays)
    return 1 if outcome.failed or any(row["errors"] for row in rows) else 0


def _ceilings(args: argparse.Namespace) -> list[Ceiling]:
    """What the load generator can take, told as a line for each protocol and number of streams."""
    prompts = Prompts(args.prompt_kb, repeated=args.repeated_prompts)
    found = []
    for protocol in dict.fromkeys(("http", args.protocol)):  # The floor is asked over HTTP in any case.
        for streams in args.streams:
            log = BENCH / "logs" / "trivial.log"
            most = trivial.measure(protocol, streams, args.tokens, prompts, args.seconds, log)
            found.append(most)
            print(
                f"load generator, {streams} streams over {protocol} from a server that only writes: "
                f"{most.chunks_per_s:,.0f} chunks/s ({most.joined_chunks_per_s:,.0f} with {trivial.JOINED} in a write) "
                f"and {most.requests_per_s:,.0f} requests/s, "
                f"{most.cpu_us_per_chunk:.1f} and {most.cpu_us_per_request:.0f} µs of its own CPU for each",
                flush=True,
            )
    return found


def _check_writable(path: Path) -> None:
    if path.is_dir():
        raise IsADirectoryError(f"--json: {path} is a directory")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise PermissionError(f"--json: {path} cannot be written")


def _parser() -> argparse.ArgumentParser:
    parser = Parser("python -m loadtests peers", description=__doc__, epilog=EPILOG)
    few = number(int, least=1, most=64)
    streams, whole, positive = number(int, least=1, most=MAX_STREAMS), number(int, least=1), number(float, above=0)
    load, factor = number(float, above=0, most=2), number(float, above=0, most=1000)
    parser.add_argument(
        "--quick", action="store_true", help="fewer systems, repetitions and seconds, five to eight minutes"
    )
    parser.add_argument("--systems", type=many(str), help="by commas (default: all that speak it)")
    parser.add_argument("--policy", type=many(str), default=[], help="by commas (default: all of each system)")
    parser.add_argument("--protocol", choices=("http", "grpc"), default="http")
    parser.add_argument("--streams", type=many(streams), help=f"by commas, up to {MAX_STREAMS} (default: 32,256)")
    parser.add_argument("--tokens", type=whole, help="of an answer where chunks are measured (default: 200)")
    parser.add_argument("--prompt-kb", type=positive, default=4.0)
    parser.add_argument(
        "--repeated-prompts", action="store_true", help="a stream's requests share one prompt; else none is asked twice"
    )
    parser.add_argument("--reps", type=whole, help="repetitions, the order of systems turned each time (default: 5)")
    parser.add_argument("--step-ms", type=positive, default=20.0, help="duration of an engine's step")
    parser.add_argument(
        "--paced-rate",
        type=positive,
        default=PACED_CHUNKS_PER_S,
        metavar="CHUNKS",
        help="most chunks a second while engines set the pace, so that two cores serve everyone's (default: 16000)",
    )
    parser.add_argument("--replicas", type=few, default=2, help="replicas of each system")
    parser.add_argument("--seconds", type=positive, help="length of each timed load (default: 3)")
    parser.add_argument(
        "--load",
        type=many(load),
        default=[],
        help="open loops at these shares of the chunks/s that each system relayed at saturation, such as 0.5,0.8",
    )
    parser.add_argument("--replay", type=many(_trace), default=[], help=f"traces, by commas: {', '.join(TRACES)}")
    parser.add_argument(
        "--time-factor", type=factor, default=5.0, help="how much faster traces are replayed (default: 5)"
    )
    parser.add_argument("--replay-requests", type=whole, default=300, help="how many of a trace, from its beginning")
    parser.add_argument("--limit-s", type=positive, default=7200.0, help="of all loads; then the rest is left out")
    parser.add_argument("--ceiling", action="store_true", help="only tell what the load generator can take")
    parser.add_argument("--json", metavar="FILE", help="write the rows here as well")
    parser.add_argument("--markdown", metavar="FILE", help="and the tables here")
    parser.add_argument("--plots", metavar="DIR", help="and pictures there, as SVG")
    return parser


def _trace(name: str) -> str:
    if name not in TRACES:
        raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(TRACES)}")
    return name
