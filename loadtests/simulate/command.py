"""`python -m loadtests simulate`: runs policies over a trace and writes what came out."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Final

import msgspec

from loadtests.arguments import Parser, many, number
from loadtests.simulate import traces
from loadtests.simulate.measure import WARM_UP, Result
from loadtests.simulate.perf import PROFILES
from loadtests.simulate.runs import Knobs, check, goodput, run, saturation_rps
from router.errors import ConfigError

Options = dict[str, dict[str, Any]]
"""Of policies, by name."""

ERRORS: Final = """
What routers may be wrong about: --model-error, the terms of the fleet's cost model, drawn once per router and the same
for all replicas; --replica-error, each replica's speed, drawn once per router and replica; --token-error, a prompt's
length, drawn per request. The first two touch no policy that does not ask the cost model, so none of the baselines. The
bounds (greedy, ideal) run with one router and without delay or error.
"""


def main(argv: Sequence[str]) -> int:
    """Exit status 0; 2 where the arguments make no sense."""
    try:
        args = _parser().parse_args(argv)
        _check(args)
        jobs = _jobs(args)
        out = _Out(args.json) if args.json else None
    except (ValueError, OSError, ConfigError) as error:
        print(f"simulate: {error}", file=sys.stderr)
        return 2
    for result in _each(jobs, args.jobs):
        print(_line(result), flush=True)
        if out is not None:
            out.add(result)
    if out is not None:
        out.close()
    return 0


def _check(args: argparse.Namespace) -> None:
    """Raises `ValueError` or `ConfigError` for arguments that do not go together."""
    for name in args.options.keys() - set(args.policies):
        raise ValueError(f"--options: {name!r} is not one of --policies")
    for policy in args.policies:
        check(policy, args.options.get(policy, {}))
    # At the same time, replicas join first.
    changes = sorted([(share, -1) for share in args.join] + [(share, 1) for share in args.leave])
    for size in args.replicas:
        for _, lost in changes:
            size -= lost
            if size < 1:
                raise ValueError("--leave: no replica would be left")


def _jobs(args: argparse.Namespace) -> list[Callable[[], Result]]:
    """Raises `ValueError` and `OSError` for a trace that cannot be used."""
    knobs = Knobs(
        profile=args.profile,
        staleness_s=args.staleness_ms / 1000,
        routers=args.routers,
        model_error=args.model_error,
        replica_error=args.replica_error,
        token_error=args.token_error,
        slow_factor=args.slow_replica,
        joins=tuple(args.join),
        leaves=tuple(args.leave),
    )
    jobs: list[Callable[[], Result]] = []
    for size in args.replicas:
        for seed in args.seed:  # Once, before processes would each want to know it.
            saturation_rps(traces.load(args.trace, seed), size, args.profile)
        for policy in args.policies:
            mine = msgspec.structs.replace(knobs, options=args.options.get(policy, {}))
            for seed in args.seed:
                if args.goodput:
                    jobs.append(partial(goodput, args.trace, size, policy, seed, knobs=mine))
                else:
                    jobs += [partial(run, args.trace, size, policy, load, seed, knobs=mine) for load in args.load]
    return jobs


class _Out:
    """The file of results: whole after each of them under the name of its part, and under its own when all are there.

    Raises `OSError` where it cannot be written.
    """

    def __init__(self, path: str) -> None:
        self._path = Path(path)
        if self._path.is_dir():
            raise IsADirectoryError(f"--json: {path} is a directory")
        if self._path.exists() and not os.access(self._path, os.W_OK):
            raise PermissionError(f"--json: {path} cannot be written")
        self._part = self._path.with_name(self._path.name + ".part")
        self._results: list[Result] = []
        self._write()

    def add(self, result: Result) -> None:
        self._results.append(result)
        self._write()

    def close(self) -> None:
        self._part.replace(self._path)

    def _write(self) -> None:
        packed = msgspec.json.encode({"results": self._results})
        self._part.write_bytes(msgspec.json.format(packed, indent=1) + b"\n")


def _each(jobs: Sequence[Callable[[], Result]], processes: int) -> Iterable[Result]:
    """The results in order."""
    if processes == 1:
        for job in jobs:
            yield job()
        return
    with ProcessPoolExecutor(processes) as pool:
        for future in [pool.submit(job) for job in jobs]:
            yield future.result()


def _line(result: Result) -> str:
    pace = result.requests / (1 - WARM_UP) / max(result.seconds, 1e-9)
    times = (result.ttft_mean_s, result.ttft_p50_s, result.ttft_p90_s, result.ttft_p99_s)
    mean, p50, p90, p99 = [f"{time:.3f}" for time in times]
    limit = " (no rate is too much)" if result.unlimited else ""
    return (
        f"{result.policy:<14} {result.trace} N={result.replicas} load {result.load:.2f} ({result.rate_rps:.2f}/s) "
        f"seed {result.seed}: hits {result.hit_ratio:.3f}, TTFT mean {mean} p50 {p50} p90 {p90} p99 {p99} s, "
        f"TPOT p50 {result.tpot_p50_s * 1000:.1f} p99 {result.tpot_p99_s * 1000:.1f} ms, good {result.good_share:.3f}, "
        f"goodput {result.goodput_rps:.2f}/s{limit}, imbalance {result.imbalance:.2f}, errors {result.errors}, "
        f"{pace:.0f} requests/s"
    )


def _parser() -> argparse.ArgumentParser:
    parser = Parser("python -m loadtests simulate", description=__doc__, epilog=ERRORS)
    known = ", ".join((*traces.FILES, *traces.GENERATED))
    delay, error = number(float, least=0), number(float, least=0, below=1)
    positive, count, share = number(float, above=0), number(int, least=1), number(float, least=0, most=1)
    parser.add_argument("--trace", required=True, help=f"{known}, or a file in the Mooncake format")
    parser.add_argument("--replicas", type=many(count), default=[8], help="fleet sizes (default 8)")
    parser.add_argument(
        "--load", type=many(positive), default=[0.8], help="shares of least-queue's saturation rate (default 0.8)"
    )
    parser.add_argument("--policies", type=many(str), required=True, help="names, or classes as module:Class")
    parser.add_argument("--goodput", action="store_true", help="search for the highest rate instead of using --load")
    parser.add_argument("--staleness-ms", type=delay, default=0.0, help="how late replicas' reports come")
    parser.add_argument("--routers", type=count, default=1)
    parser.add_argument(
        "--model-error", type=error, default=0.0, help="0.3: each term of a router's cost model is wrong by up to 30%%"
    )
    parser.add_argument(
        "--replica-error", type=error, default=0.0, help="and each replica is taken for up to so much faster or slower"
    )
    parser.add_argument("--token-error", type=error, default=0.05, help="of the estimated prompt length (default 0.05)")
    parser.add_argument(
        "--slow-replica", type=positive, default=1.0, metavar="FACTOR", help="one replica's steps take longer"
    )
    parser.add_argument("--join", type=many(share), default=[], metavar="SHARE", help="replicas join there in the run")
    parser.add_argument("--leave", type=many(share), default=[], metavar="SHARE", help="replicas are lost there")
    parser.add_argument("--seed", type=many(number(int)), default=[0])
    parser.add_argument("--profile", choices=PROFILES, default="h200-8b")
    parser.add_argument(
        "--options", type=_options, default={}, help='policies\' options as JSON: {"cost": {"price": 2}}'
    )
    parser.add_argument("--jobs", type=count, default=1, help="processes")
    parser.add_argument("--json", metavar="FILE", help="for the results; FILE.part while there are more to come")
    return parser


def _options(text: str) -> Options:
    try:
        return msgspec.json.decode(text, type=Options)
    except msgspec.MsgspecError as error:
        raise argparse.ArgumentTypeError(f"not an object of policies' options: {error}") from error
