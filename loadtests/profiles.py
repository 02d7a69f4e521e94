"""`python -m loadtests profile`: where router and replica spend their CPU time under load.

py-spy samples both processes from outside while a closed loop of streams runs, over HTTP and over gRPC. Where this
machine does not allow that (ptrace), they sample themselves, which is less exact, and the result says so. Written for
each: a flame graph (SVG), its collapsed stacks, and a table of the functions that most of the time went to. With
`--pid` a process that runs already is sampled, under whatever load it has.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final, NamedTuple

import uvloop

from loadtests import flame, sampled
from loadtests.arguments import Parser, many, number
from loadtests.clients import grpc_load, http_load
from loadtests.processes import replica_process, router
from loadtests.router_cost import STEP_OPTIONS

LOADS: Final = {"http": http_load, "grpc": grpc_load}
ROUNDS: Final = 1000
"""More than there is time for: the load ends when the samples are taken."""
WARM_UP_S: Final = 1.0
PY_SPY: Final = str(Path(sys.executable).with_name("py-spy"))
SELF_SAMPLED: Final = "sampled by the process itself, since no other may look into it here"


class SpyError(Exception):
    """A process could not be sampled; says why."""


class Profile(NamedTuple):
    """What was sampled of one process."""

    name: str
    raw: Path
    """Collapsed stacks."""
    note: str


def main(argv: Sequence[str]) -> int:
    """Exit status 0; 1 where a process could not be sampled, 2 where the arguments make no sense."""
    try:
        args = _parser().parse_args(argv)
    except ValueError as error:
        print(f"profile: {error}", file=sys.stderr)
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        for profile in _running(args) if args.pid else _loaded(args):
            print(write(args.out, profile, args.rows))
    except SpyError as error:
        print(f"profile: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m loadtests profile", description=__doc__)
    parser.add_argument("--protocols", type=many(str), default=["http", "grpc"], metavar="NAME,…")
    parser.add_argument("--streams", type=number(int, least=1), default=64)
    parser.add_argument("--tokens", type=number(int, least=1), default=200)
    parser.add_argument("--prompt-kb", type=number(float, above=0), default=4.0)
    parser.add_argument("--step-ms", type=number(float, above=0), default=20.0)
    parser.add_argument("--policy", default="cost")
    parser.add_argument("--seconds", type=number(int, least=1), default=10)
    parser.add_argument("--rate", type=number(int, least=1), default=200, help="samples per second (default: 200)")
    parser.add_argument("--rows", type=number(int, least=1), default=15, help="of the table (default: 15)")
    parser.add_argument("--out", type=Path, default=Path("build/profiles"), metavar="FOLDER")
    parser.add_argument("--pid", type=number(int, least=1), default=0, help="a process that runs already")
    parser.add_argument(
        "--native",
        action=argparse.BooleanOptionalAction,
        help="compiled functions too; each sample holds the process up for longer (default: yes, with --pid no)",
    )
    return parser


def write(folder: Path, profile: Profile, rows: int) -> str:
    """Writes a profile's files; returns its table."""
    stacks = flame.short(flame.parse(profile.raw.read_text()))
    profile.raw.unlink()
    title = f"{profile.name} ({profile.note})" if profile.note else profile.name
    table = f"### {title}\n\n{flame.markdown(flame.top(stacks, rows))}\n"
    (folder / f"{profile.name}.svg").write_text(flame.svg(stacks, title))
    (folder / f"{profile.name}.txt").write_text(flame.collapsed(stacks))
    (folder / f"{profile.name}.md").write_text(table)
    return table


def _running(args: argparse.Namespace) -> Iterator[Profile]:
    file = args.out / "process.raw"
    asyncio.run(_spy(args, args.pid, file))
    yield Profile(f"process-{args.pid}", file, "")


def _loaded(args: argparse.Namespace) -> Iterator[Profile]:
    """Router and replica under each protocol's load."""
    allowed = spying_is_allowed()
    if not allowed:
        print(f"profile: {SELF_SAMPLED}", file=sys.stderr)
    for protocol in args.protocols:
        files = {name: (args.out / f"{name}.raw").resolve() for name in ("router", "replica")}
        uvloop.run(_sample(args, protocol, files, spying=allowed))
        for name, file in files.items():
            yield Profile(f"{name}-{protocol}", file, "" if allowed else SELF_SAMPLED)


def spying_is_allowed() -> bool:
    """Whether py-spy may look into another process of ours."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        looked = subprocess.run([PY_SPY, "dump", "--pid", str(child.pid)], capture_output=True, check=False)
        child.communicate(b"\n")
    return looked.returncode == 0


async def _sample(args: argparse.Namespace, protocol: str, files: dict[str, Path], *, spying: bool) -> None:
    with ExitStack() as stack:
        module, command = "loadtests.engines", None
        if not spying:
            module, command = "loadtests.sampled", [sys.executable, "-m", "loadtests.sampled", "worker"]
        options = json.dumps(STEP_OPTIONS | {"step_base_ms": args.step_ms})
        with _asked("loadtests.engines", files["replica"]):
            replica, addresses = stack.enter_context(replica_process(module, "2", options))
        with _asked("router", files["router"]):
            pid, http, grpc = stack.enter_context(router(addresses, args.policy, command=command))
        port = {"http": http, "grpc": grpc}[protocol]
        load = asyncio.create_task(LOADS[protocol](port, args.streams, args.tokens, args.prompt_kb, ROUNDS))
        try:
            await asyncio.sleep(WARM_UP_S)
            if spying:
                spies = [_spy(args, replica, files["replica"]), _spy(args, pid, files["router"])]
                await asyncio.gather(*spies)
            else:
                await asyncio.sleep(args.seconds)
        finally:
            load.cancel()
            await asyncio.wait([load])


@contextmanager
def _asked(module: str, file: Path) -> Iterator[None]:
    """What a process that samples itself is told; others do not look at it."""
    os.environ.update({sampled.MODULE: module, sampled.FILE: str(file)})
    try:
        yield
    finally:
        del os.environ[sampled.MODULE], os.environ[sampled.FILE]


async def _spy(args: argparse.Namespace, pid: int, file: Path) -> None:
    """Raises `SpyError` where the process cannot be looked into."""
    spy = await asyncio.create_subprocess_exec(
        *(PY_SPY, "record", "--pid", str(pid), "--duration", str(args.seconds), "--rate", str(args.rate)),
        *("--nolineno", "--full-filenames", "--format", "raw", "--output", str(file)),
        *(("--native",) if (not args.pid if args.native is None else args.native) else ()),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    said, _ = await spy.communicate()
    if spy.returncode:
        raise SpyError(f"py-spy ended with status {spy.returncode}: {said.decode(errors='replace').strip()}")
