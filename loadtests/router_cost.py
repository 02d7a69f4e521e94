"""What the router costs: CPU per relayed chunk and per request, and the time to first token that it adds.

`python -m loadtests.router_cost [--reps 5] [--json FILE]`. Two simulated replicas in one process, one router process,
this process as the client, all on loopback. CPU is the router process's own, from the kernel's accounting. Long streams
give the cost per chunk, one-token answers the cost per request. The added time to first token is the difference of
medians between the router and the engine's own HTTP port, asked in turn in one run.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import msgspec
import uvloop

from loadtests import clients
from loadtests.certificates import Authority
from loadtests.clients import Tally
from loadtests.floor import send_cost_us
from loadtests.processes import Cost, engines, peak_rss_mb, router
from router.options import LaneOptions


class Load(Protocol):
    """Runs a load of `streams` streams, each asking `rounds` times for `tokens` tokens."""

    async def __call__(
        self, port: int, streams: int, tokens: int, prompt_kb: float, rounds: int, spread_s: float = 0.0
    ) -> Tally: ...


PROTOCOLS: dict[str, Load] = {"http": clients.http_load, "grpc": clients.grpc_load}
STEP_OPTIONS: dict[str, Any] = {
    # A fixed step, so that both sides of every comparison see the same schedule.
    "step_base_ms": 20.0,
    "prefill_ms_per_token": 0.0,
    "decode_ms_per_seq": 0.0,
    "context_ms_per_1k_tokens": 0.0,
    "max_num_seqs": 1024,
    "max_num_batched_tokens": 1 << 20,
    "kv_blocks": 400_000,
}


class Row(msgspec.Struct):
    """One measured row; medians over the repetitions, with the least and the greatest."""

    protocol: str
    streams: int
    cpu_us_per_chunk: tuple[float, float, float]
    floor_us_per_chunk: tuple[float, float, float]
    """The kernel's part that nobody can save: see `loadtests.floor`."""
    cpu_us_per_request: tuple[float, float, float]
    ttft_added_p50_ms: tuple[float, float, float]
    ttft_added_p99_ms: tuple[float, float, float]
    rss_mb: float
    errors: int


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtests.router_cost", description=__doc__)
    parser.add_argument("--streams", default="32,256", help="concurrent streams, by commas")
    parser.add_argument("--protocols", default="http,grpc")
    parser.add_argument("--tokens", type=int, default=200, help="tokens per answer when chunks are measured")
    parser.add_argument("--prompt-kb", type=float, default=4.0)
    parser.add_argument("--step-ms", type=float, default=20.0, help="duration of an engine step")
    parser.add_argument("--policy", default="power-of-two")
    parser.add_argument("--reps", type=int, default=5)
    parser.add_argument("--lane-tls", action="store_true", help="TLS on lanes, with certificates on both sides")
    parser.add_argument("--json", metavar="FILE", help="write the rows here as well")
    arguments = parser.parse_args()
    rows = uvloop.run(_measure_all(arguments))
    print(markdown(rows))
    if arguments.json:
        Path(arguments.json).write_bytes(msgspec.json.format(msgspec.json.encode({"results": rows})))
    return 1 if any(row.errors for row in rows) else 0


async def _measure_all(arguments: argparse.Namespace) -> list[Row]:
    rows = []
    for protocol in arguments.protocols.split(","):
        for streams in map(int, arguments.streams.split(",")):
            with (
                _lanes(tls=arguments.lane_tls) as (lane, lane_tls),
                engines(2, STEP_OPTIONS | {"step_base_ms": arguments.step_ms}, lane_tls) as (_, addresses),
                router(addresses, arguments.policy, lane=lane) as (pid, http, grpc),
            ):
                port = {"http": http, "grpc": grpc}[protocol]
                rows.append(await _measure(arguments, protocol, streams, pid, port, addresses))
                print(json.dumps(msgspec.to_builtins(rows[-1])), file=sys.stderr)
    return rows


@contextmanager
def _lanes(*, tls: bool) -> Iterator[tuple[LaneOptions, tuple[str, ...]]]:
    """Options of the router's lanes, and files of the replicas'."""
    if not tls:
        yield LaneOptions(), ()
        return
    with tempfile.TemporaryDirectory() as folder:
        authority = Authority(Path(folder))
        cert, key = authority.issue("router")
        replica = authority.issue("replica")
        yield LaneOptions(tls_ca_file=authority.ca, tls_cert_file=cert, tls_key_file=key), (*replica, authority.ca)


async def _measure(
    arguments: argparse.Namespace, protocol: str, streams: int, pid: int, port: int, addresses: list[dict[str, Any]]
) -> Row:
    load = PROTOCOLS[protocol]
    kilobytes = arguments.prompt_kb
    await load(port, streams, 5, kilobytes, 2)  # warm-up
    per_chunk, floor, per_request, added_p50, added_p99, errors = [], [], [], [], [], 0
    for rep in range(arguments.reps):
        cost = Cost(pid)
        tally = await load(port, streams, arguments.tokens, kilobytes, 1)
        per_chunk.append(1e6 * cost.cpu_s() / tally.chunks)
        errors += tally.errors
        floor.append(await asyncio.to_thread(send_cost_us, streams, arguments.step_ms / 1000))
        rounds = max(4, 2000 // streams)
        cost = Cost(pid)
        tally = await load(port, streams, 1, kilobytes, rounds)
        per_request.append(1e6 * cost.cpu_s() / tally.requests)
        errors += tally.errors
        routed, direct = await _ttfts(
            load, port, addresses, streams, kilobytes, arguments.step_ms, routed_first=rep % 2 == 0
        )
        added_p50.append(1e3 * (_percentile(routed, 50) - _percentile(direct, 50)))
        added_p99.append(1e3 * (_percentile(routed, 99) - _percentile(direct, 99)))
    return Row(
        protocol,
        streams,
        _spread(per_chunk),
        _spread(floor),
        _spread(per_request),
        _spread(added_p50),
        _spread(added_p99),
        round(peak_rss_mb(pid), 1),
        errors,
    )


async def _ttfts(
    load: Load,
    port: int,
    addresses: list[dict[str, Any]],
    streams: int,
    kilobytes: float,
    step_ms: float,
    *,
    routed_first: bool,
) -> tuple[list[float], list[float]]:
    """Times to first token through the router, and straight from the engines' HTTP ports.

    The streams begin spread over an answer's length, and answers are long enough that neither side is saturated: both
    would otherwise queue, and the difference would say nothing of the router.
    """
    tokens, rounds = (10, 30) if streams <= 64 else (50, 8)
    spread_s = tokens * step_ms / 1000

    async def routed() -> list[float]:
        return _whole(await load(port, streams, tokens, kilobytes, rounds, spread_s))

    async def direct() -> list[float]:
        share = max(1, streams // len(addresses))
        tallies = await asyncio.gather(
            *(clients.http_load(address["http"], share, tokens, kilobytes, rounds, spread_s) for address in addresses)
        )
        return [ttft for tally in tallies for ttft in _whole(tally)]

    if routed_first:
        first = await routed()
        return first, await direct()
    second = await direct()
    return await routed(), second


def _whole(tally: Tally) -> list[float]:
    if tally.errors:
        raise RuntimeError(f"{tally.errors} of {tally.requests} requests failed")
    return tally.ttft_s


def _percentile(values: list[float], percent: int) -> float:
    return statistics.quantiles(values, n=100)[percent - 1]


def _spread(values: list[float]) -> tuple[float, float, float]:
    return round(statistics.median(values), 2), round(min(values), 2), round(max(values), 2)


def markdown(rows: list[Row]) -> str:
    """The rows as a table: median (least to greatest)."""
    lines = [
        "| protocol | streams | router CPU per chunk, µs | bare send, µs | CPU per request, µs | added TTFT p50, ms "
        "| p99, ms | RSS, MiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [
            f"**{median}** ({low} to {high})"
            for median, low, high in (
                row.cpu_us_per_chunk,
                row.floor_us_per_chunk,
                row.cpu_us_per_request,
                row.ttft_added_p50_ms,
                row.ttft_added_p99_ms,
            )
        ]
        lines.append(f"| {row.protocol} | {row.streams} | {' | '.join(cells)} | {row.rss_mb} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
