"""`python -m loadtests simulate`: runs policies over a trace and writes what came out."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from loadtests.simulate import traces
from loadtests.simulate.measure import WARM_UP, Result
from loadtests.simulate.perf import PROFILES
from loadtests.simulate.runs import Knobs, check, goodput, run, saturation_rps
from router.errors import ConfigError


def main(argv: Sequence[str]) -> int:
    """Exit status 0; 2 where the arguments make no sense."""
    args = _parser().parse_args(argv)
    try:
        options: dict[str, Any] = json.loads(args.options)
        for policy in args.policies:
            check(policy, options.get(policy, {}))
        trace = traces.load(args.trace)
    except (ValueError, OSError, ConfigError) as error:
        print(f"simulate: {error}", file=sys.stderr)
        return 2
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
        saturation_rps(trace, size, args.profile)  # Once, before processes would each want to know it.
        for policy in args.policies:
            for seed in args.seed:
                mine = msgspec.structs.replace(knobs, options=options.get(policy, {}))
                if args.goodput:
                    jobs.append(partial(goodput, args.trace, size, policy, seed, knobs=mine))
                else:
                    jobs += [partial(run, args.trace, size, policy, load, seed, knobs=mine) for load in args.load]
    results = []
    for result in _each(jobs, args.jobs):
        results.append(result)
        print(_line(result), flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps({"results": msgspec.to_builtins(results)}, indent=1) + "\n")
    return 0


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
    return (
        f"{result.policy:<14} {result.trace} N={result.replicas} load {result.load:.2f} ({result.rate_rps:.2f}/s) "
        f"seed {result.seed}: hits {result.hit_ratio:.3f}, TTFT mean {mean} p50 {p50} p90 {p90} p99 {p99} s, "
        f"TPOT p50 {result.tpot_p50_s * 1000:.1f} p99 {result.tpot_p99_s * 1000:.1f} ms, good {result.good_share:.3f}, "
        f"goodput {result.goodput_rps:.2f}/s, imbalance {result.imbalance:.2f}, errors {result.errors}, "
        f"{pace:.0f} requests/s"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m loadtests simulate", description=__doc__)
    known = ", ".join((*traces.FILES, *traces.GENERATED))
    parser.add_argument("--trace", required=True, help=f"{known}, or a file in the Mooncake format")
    parser.add_argument("--replicas", type=_many(int), default=[8], help="fleet sizes (default 8)")
    parser.add_argument(
        "--load", type=_many(float), default=[0.8], help="shares of least-queue's saturation rate (default 0.8)"
    )
    parser.add_argument("--policies", type=_many(str), required=True, help="names, or classes as module:Class")
    parser.add_argument("--goodput", action="store_true", help="search for the highest rate instead of using --load")
    parser.add_argument("--staleness-ms", type=float, default=0.0, help="how late replicas' reports come")
    parser.add_argument("--routers", type=int, default=1)
    parser.add_argument("--model-error", type=float, default=0.0, help="0.3: each term of a router's cost model is wrong by up to 30%%")
    parser.add_argument(
        "--replica-error", type=float, default=0.0, help="and each replica is taken for up to so much faster or slower"
    )
    parser.add_argument("--token-error", type=float, default=0.05, help="of the estimated prompt length (default 0.05)")
    parser.add_argument(
        "--slow-replica", type=float, default=1.0, metavar="FACTOR", help="one replica's steps take longer"
    )
    parser.add_argument("--join", type=_many(float), default=[], metavar="SHARE", help="replicas join there in the run")
    parser.add_argument("--leave", type=_many(float), default=[], metavar="SHARE", help="replicas are lost there")
    parser.add_argument("--seed", type=_many(int), default=[0])
    parser.add_argument("--profile", choices=PROFILES, default="h200-8b")
    parser.add_argument("--options", default="{}", help='policies\' options as JSON: {"cost": {"price": 2}}')
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--json", help="file to write the results to")
    return parser


def _many(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    return lambda text: [kind(part) for part in text.split(",") if part]
