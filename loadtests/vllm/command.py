"""`python -m loadtests vllm`: kvlane over a real vLLM beside a bare `vllm serve`, in turns."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import msgspec
import uvloop

from engine.tiny_model import make_tiny_model
from loadtests.arguments import Parser, many, number
from loadtests.peers.children import leaving_nothing
from loadtests.peers.environments import BENCH
from loadtests.peers.errors import PeerError
from loadtests.vllm import load, report, stacks
from loadtests.vllm.load import Sample, Shape
from loadtests.vllm.stacks import Engine, Stack

EPILOG: Final = """
Both stacks are up at the same time, each with an engine of its own, and are asked in turns: on a GPU, give each less
than half of its memory (--engine-args '{"gpu_memory_utilization": 0.45}'). Shapes are prompt and answer tokens, such as
8000/50 and 50/500. The exit status is 1 where anything was answered with an error or not in time, and 2 where the
arguments make no sense.
"""


def main(argv: Sequence[str]) -> int:
    """Exit status 0; 1 where something failed, 2 where the arguments make no sense."""
    try:
        args = _parser().parse_args(argv)
    except ValueError as error:
        print(f"vllm: {error}", file=sys.stderr)
        return 2
    shapes = [Shape(streams, prompt, answer, args.rounds) for prompt, answer in args.shapes for streams in args.streams]
    try:
        with leaving_nothing():
            rows = uvloop.run(_compare(args, shapes))
    except (PeerError, RuntimeError, TimeoutError) as error:
        print(f"vllm: {error or 'a load took longer than --limit-s'}", file=sys.stderr)
        return 1
    text = report.markdown(rows)
    print(text)
    if args.markdown:
        Path(args.markdown).write_text(f"{text}\n")
    if args.json:
        packed = {"results": rows, "arguments": {name: value for name, value in vars(args).items() if name != "json"}}
        Path(args.json).write_bytes(msgspec.json.format(msgspec.json.encode(packed), indent=1) + b"\n")
    return 1 if any(row["errors"] for row in rows) else 0


async def _compare(args: argparse.Namespace, shapes: Sequence[Shape]) -> list[dict[str, Any]]:
    logs = BENCH / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    with ExitStack() as up:
        engine = _engine(args, up)
        running = [up.enter_context(stacks.bare(engine, logs / "vllm-serve.log"))]
        running.append(up.enter_context(stacks.kvlane(engine, logs / "vllm-kvlane.log", policy=args.policy, fast=True)))
        if args.as_it_comes:
            log = logs / "vllm-serve-as-it-comes.log"
            running.append(up.enter_context(stacks.bare(engine, log, as_it_comes=True)))
        if args.app_alone:
            log = logs / "vllm-kvlane-app.log"
            running.append(up.enter_context(stacks.kvlane(engine, log, policy=args.policy, fast=False)))
        rows = []
        for shape in shapes:
            rows += await _measure(args, shape, running)
    return rows


def _engine(args: argparse.Namespace, up: ExitStack) -> Engine:
    from vllm.platforms import current_platform

    model = args.model or str(make_tiny_model(Path(up.enter_context(tempfile.TemporaryDirectory()))))
    most = max(args.streams)
    return Engine(model, {"max_num_seqs": most, **args.engine_args}, bool(current_platform.is_cpu()), args.threads)


async def _measure(args: argparse.Namespace, shape: Shape, running: Sequence[Stack]) -> list[dict[str, Any]]:
    words = await load.words_for(running[0], shape.prompt_tokens)
    for stack in running:
        await load.run(
            stack, msgspec.structs.replace(shape, tokens=min(shape.tokens, 20), rounds=1), words, args.limit_s
        )
    samples: dict[str, list[Sample]] = {stack.name: [] for stack in running}
    for rep in range(args.reps):
        for stack in running if rep % 2 else reversed(running):
            sample = await load.run(stack, shape, words, args.limit_s)
            samples[stack.name].append(sample)
            said = f"{sample.tokens_per_s:,.0f} tokens/s, TTFT {sample.ttft_p50_ms:.0f} ms"
            print(f"vllm: {stack.name}, {shape}: {said}", file=sys.stderr, flush=True)
    rows = [report.row(stack.name, shape, samples[stack.name]) for stack in running]
    for row in rows[1:]:
        report.compare(row, rows[0])
    return rows


def _parser() -> argparse.ArgumentParser:
    parser = Parser("python -m loadtests vllm", description=__doc__, epilog=EPILOG)
    few, whole = number(int, least=1, most=1024), number(int, least=1)
    parser.add_argument("--model", default="", help="path or name (default: a tiny one with random weights)")
    parser.add_argument("--engine-args", type=_object, default={}, help="vLLM's, for both, as a JSON object")
    parser.add_argument("--streams", type=many(few), default=[32, 128], help="by commas (default: 32,128)")
    parser.add_argument("--shapes", type=many(_shape), default=[(50, 200)], help="by commas (default: 50/200)")
    parser.add_argument("--rounds", type=whole, default=2, help="requests of each stream, one after the other")
    parser.add_argument("--reps", type=whole, default=5, help="repetitions, the order turned each time (default: 5)")
    parser.add_argument("--threads", type=whole, default=1, help="OpenMP threads of an engine on CPU (default: 1)")
    parser.add_argument("--policy", default="cost", help="of the router (default: cost)")
    parser.add_argument(
        "--app-alone", action="store_true", help="kvlane also with all tokens rendered by vLLM's own server"
    )
    parser.add_argument(
        "--as-it-comes",
        action="store_true",
        help="`vllm serve` also with the threads and processes that it chooses itself on CPU",
    )
    parser.add_argument("--limit-s", type=number(float, above=0), default=120.0, help="of a single load (default: 120)")
    parser.add_argument("--json", metavar="FILE", help="write the rows here as well")
    parser.add_argument("--markdown", metavar="FILE", help="and the table here")
    return parser


def _shape(text: str) -> tuple[int, int]:
    prompt, _, answer = text.partition("/")
    if not (prompt.isdecimal() and answer.isdecimal() and int(prompt) and int(answer)):
        raise argparse.ArgumentTypeError(f"{text!r} is not PROMPT/ANSWER in tokens, such as 50/200")
    return int(prompt), int(answer)


def _object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"not JSON: {error}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError("not a JSON object")
    return value
