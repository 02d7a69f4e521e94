"""What a streamed message and a call cost on the router's two gRPC edges, side by side.

`python -m loadtests grpc-edges [--streams 32,128,256] [--reps 5] [--json FILE]`. Two simulated replicas in one process;
for each edge a router process over them; this process is the client, grpcio's own. The edges take turns. CPU is the
router process's, user and system time, from the kernel's accounting.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final, Literal

import msgspec
import uvloop

from loadtests.arguments import Parser, many, number
from loadtests.clients import grpc_load
from loadtests.processes import Cost, engines, router
from loadtests.router_cost import STEP_OPTIONS

Edge = Literal["h2", "aio"]
EDGES: Final[tuple[Edge, ...]] = ("h2", "aio")
CALLS: Final = 1500
"""Of one token each, to see what a call costs."""


class Row(msgspec.Struct):
    """One edge at one load; medians over the repetitions, with the least and the greatest."""

    edge: Edge
    streams: int
    cpu_us_per_message: tuple[float, float, float]
    cpu_us_per_call: tuple[float, float, float]
    """Of a call with one token: its route, its token and its status."""
    messages_per_s: float
    """While the streams ran; the replicas' step sets it, unless a side is at its limit."""
    errors: int


def main(argv: Sequence[str]) -> int:
    parser = Parser(prog="python -m loadtests grpc-edges", description=__doc__)
    parser.add_argument("--streams", type=many(number(int, least=1, most=1024)), default=[32, 128, 256])
    parser.add_argument("--tokens", type=number(int, least=2, most=2000), default=200, help="per answer")
    parser.add_argument("--prompt-kb", type=number(float, above=0, most=1024), default=1.0)
    parser.add_argument("--step-ms", type=number(float, above=0, most=1000), default=20.0, help="of an engine step")
    parser.add_argument("--channels", type=number(int, least=1, most=64), default=4, help="connections of the client")
    parser.add_argument("--policy", default="power-of-two")
    parser.add_argument("--reps", type=number(int, least=1, most=50), default=5)
    parser.add_argument("--json", metavar="FILE", help="write the rows here as well")
    try:
        arguments = parser.parse_args(argv)
    except ValueError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    rows = uvloop.run(_measure(arguments))
    print(markdown(rows))
    if arguments.json:
        Path(arguments.json).write_bytes(msgspec.json.format(msgspec.json.encode({"results": rows})))
    return 1 if any(row.errors for row in rows) else 0


async def _measure(arguments: argparse.Namespace) -> list[Row]:
    rows: list[Row] = []
    with ExitStack() as stack:
        _, addresses = stack.enter_context(engines(2, STEP_OPTIONS | {"step_base_ms": arguments.step_ms}))
        routers = {edge: stack.enter_context(router(addresses, arguments.policy, edge=edge)) for edge in EDGES}
        for streams in arguments.streams:
            samples = {edge: _Samples() for edge in EDGES}
            for rep in range(-1, arguments.reps):  # The first round warms up.
                for edge in EDGES if rep % 2 else EDGES[::-1]:
                    pid, _, port = routers[edge]
                    await _round(arguments, streams, pid, port, samples[edge] if rep >= 0 else _Samples())
            rows += (samples[edge].row(edge, streams) for edge in EDGES)
            for row in rows[-len(EDGES) :]:
                print(json.dumps(msgspec.to_builtins(row)), file=sys.stderr)
    return rows


class _Samples:
    def __init__(self) -> None:
        self.per_message: list[float] = []
        self.per_call: list[float] = []
        self.rates: list[float] = []
        self.errors = 0

    def row(self, edge: Edge, streams: int) -> Row:
        rate = round(statistics.median(self.rates))
        return Row(edge, streams, _spread(self.per_message), _spread(self.per_call), rate, self.errors)


async def _round(arguments: argparse.Namespace, streams: int, pid: int, port: int, samples: _Samples) -> None:
    common: dict[str, Any] = {"prompt_kb": arguments.prompt_kb, "channels": arguments.channels}
    cost = Cost(pid)
    tally = await grpc_load(port, streams, arguments.tokens, rounds=1, **common)
    samples.per_message.append(1e6 * cost.cpu_s() / max(tally.chunks, 1))
    samples.rates.append(tally.chunks / tally.seconds)
    samples.errors += tally.errors
    cost = Cost(pid)
    tally = await grpc_load(port, streams, 1, rounds=max(2, CALLS // streams), **common)
    samples.per_call.append(1e6 * cost.cpu_s() / tally.requests)
    samples.errors += tally.errors


def _spread(values: list[float]) -> tuple[float, float, float]:
    return round(statistics.median(values), 1), round(min(values), 1), round(max(values), 1)


def markdown(rows: Sequence[Row]) -> str:
    """The rows as a table: median (least to greatest)."""
    lines = [
        "| edge | streams | router CPU per message, µs | per call, µs | messages per second |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        message, call = (f"**{a}** ({b} to {c})" for a, b, c in (row.cpu_us_per_message, row.cpu_us_per_call))
        lines.append(f"| {row.edge} | {row.streams} | {message} | {call} | {row.messages_per_s:,.0f} |")
    return "\n".join(lines)
