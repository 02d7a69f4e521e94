"""`python -m loadtests slow`: very many slow streams on one router process.

Streams are opened one after the other and held, a token a second each; several processes are the clients. Told are the
memory that the router takes per stream, how late its event loop ran meanwhile, and whether all answers were whole.
"""

from __future__ import annotations

import argparse
import asyncio
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

import msgspec
import uvloop

from loadtests import loop_lag, watched
from loadtests.arguments import Parser, number
from loadtests.peers.children import leaving_nothing
from loadtests.peers.load import Prompts, http_request
from loadtests.peers.replicas import EngineOrder, Replicas
from loadtests.processes import replica_process, router, rss_mb
from loadtests.results import Row, table, write_json

WARM_UP_STREAMS: Final = 200
SETTLE_S: Final = 5.0
"""From the last stream's opening to the time that is measured."""
GRACE_S: Final = 60.0
SPARE_DESCRIPTORS: Final = 500
COLUMNS: Final = {
    "streams": "streams",
    "whole": "whole",
    "lost": "lost",
    "kb_per_stream": "router memory per stream, KiB",
    "rss_mb": "router RSS, MiB",
    "cpu": "router CPU, cores",
    "waited": "it waited for a CPU, share of the time",
    "lag_p99_ms": "loop lag p99 at most, ms",
    "busy_p99_ms": "loop busy without a pause p99, ms",
    "busy_max_ms": "max, ms",
}


class Counted(msgspec.Struct):
    """What one process of clients got."""

    whole: int = 0
    lost: int = 0
    causes: dict[str, int] = {}


def main(argv: Sequence[str]) -> int:
    """Exit status 0; 1 where a stream was lost, 2 where the arguments make no sense."""
    try:
        args = _parser().parse_args(argv)
        _allow_descriptors(args.streams + SPARE_DESCRIPTORS)
    except ValueError as error:
        print(f"slow: {error}", file=sys.stderr)
        return 2
    with leaving_nothing():
        row = measure(args)
    print(table([row], COLUMNS))
    write_json(args.json, [row])
    return 1 if row["lost"] else 0


def measure(args: argparse.Namespace) -> Row:
    """One run."""
    tokens = int((args.streams / args.opened_per_s + SETTLE_S + args.hold_s) * 1e3 / args.step_ms) + 2
    with ExitStack() as stack:
        engine = EngineOrder(options={"step_ms": args.step_ms, "spread": True})
        order = msgspec.json.encode(Replicas(args.replicas, engine)).decode()
        _, addresses = stack.enter_context(replica_process("loadtests.peers.replicas", order))
        file = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "told"
        most = args.streams + SPARE_DESCRIPTORS  # The metrics are asked for over a connection more.
        up = router(addresses, args.policy, command=watched.command(file), max_connections=most)
        pid, port, _ = stack.enter_context(up)
        uvloop.run(_clients(port, WARM_UP_STREAMS, 3, 1000.0, 60.0))
        before_mb = rss_mb(pid)
        results = stack.enter_context(_processes(port, args, tokens))
        time.sleep(args.streams / args.opened_per_s + SETTLE_S)
        watched.ask(pid, file)
        lag = loop_lag.scrape(port)
        cpu, waited, began = _cpu_s(pid), _waited_s(pid), time.monotonic()
        time.sleep(args.hold_s)
        held_mb, cpu_s, took_s = rss_mb(pid), _cpu_s(pid) - cpu, time.monotonic() - began
        waited_s = _waited_s(pid) - waited
        during = loop_lag.between(lag, loop_lag.scrape(port))
        told = watched.ask(pid, file)
        counted = results()
    causes: dict[str, int] = {}
    for each in counted:
        for cause, times in each.causes.items():
            print(f"slow: {times} x {cause}", file=sys.stderr)
            causes[cause] = causes.get(cause, 0) + times
    whole = sum(each.whole for each in counted)
    return {
        "streams": args.streams,
        "whole": whole,
        "lost": args.streams - whole,
        "kb_per_stream": round((held_mb - before_mb) * 1024 / args.streams, 2),
        "rss_mb": round(held_mb, 1),
        "cpu": round(cpu_s / took_s, 3),
        "waited": round(waited_s / took_s, 3),
        "lag_p99_ms": during.p99_ms,
        "busy_p99_ms": told.stretch_ms(0.99),
        "busy_max_ms": told.stretch_ms(1.0),
        "tasks": told.tasks,
        "causes": causes,
    }


def _allow_descriptors(number: int) -> None:
    """Raises `ValueError` where the system does not."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < number:
        raise ValueError(f"--streams: {number} descriptors are needed and `ulimit -Hn` allows {hard}")
    if soft != resource.RLIM_INFINITY and soft < number:
        resource.setrlimit(resource.RLIMIT_NOFILE, (number, hard))


def _cpu_s(pid: int) -> float:
    return time.clock_gettime(~pid << 3 | 2)


def _waited_s(pid: int) -> float:
    """How long its main thread was ready to run and had no CPU: then its loop is late through no fault of its own."""
    return int(Path(f"/proc/{pid}/task/{pid}/schedstat").read_text().split()[1]) / 1e9


# -- clients


@contextmanager
def _processes(port: int, args: argparse.Namespace, tokens: int) -> Iterator[Callable[[], list[Counted]]]:
    """Processes of clients that have begun; what is yielded waits for what they got."""
    share = [args.streams // args.processes + (n < args.streams % args.processes) for n in range(args.processes)]
    limit_s = args.streams / args.opened_per_s + (tokens + 1) * args.step_ms / 1e3 + GRACE_S
    with ExitStack() as stack:
        made = []
        for streams in share:
            rate = args.opened_per_s / args.processes
            numbers = (str(each) for each in (port, streams, tokens, rate, limit_s))
            command = [sys.executable, "-m", "loadtests.slow", *numbers]
            process = stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE))
            stack.callback(process.kill)
            made.append(process)
        yield lambda: [msgspec.json.decode(process.communicate()[0], type=Counted) for process in made]


async def _clients(port: int, streams: int, tokens: int, per_s: float, limit_s: float) -> Counted:
    counted, prompts = Counted(), Prompts(1.0)
    began = time.perf_counter()

    async def one(number: int) -> None:
        await asyncio.sleep(began + number / per_s - time.perf_counter())
        reader = _Reader(http_request(prompts.next(0), tokens))
        try:
            async with asyncio.timeout(limit_s):
                await asyncio.get_running_loop().create_connection(lambda: reader, "127.0.0.1", port)
                failure = await reader.done
        except (OSError, TimeoutError) as error:
            failure = repr(error)
        got = reader.tokens
        if not failure and got != tokens:
            failure = f"{got} of {tokens} tokens"
        if failure:
            counted.lost += 1
            counted.causes[failure] = counted.causes.get(failure, 0) + 1
        else:
            counted.whole += 1

    await asyncio.gather(*(one(number) for number in range(streams)))
    return counted


class _Reader(asyncio.Protocol):
    """Asks once and counts tokens; keeps nothing."""

    def __init__(self, request: bytes) -> None:
        self._request = request
        self._tail = b""
        self.tokens = 0
        self.done: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: asyncio.Transport = transport  # type: ignore[assignment]
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        tail = self._tail + data
        self.tokens += tail.count(b'"text":"') - self._tail.count(b'"text":"')
        self._tail = tail[-16:]
        if tail.endswith(b"\r\n0\r\n\r\n"):
            self._finish("" if b"[DONE]" in tail else "no end of the stream")
        elif not tail.startswith(b"HTTP/1.1 200") and not self.tokens:
            self._finish(tail.partition(b"\r\n")[0].decode("latin-1"))

    def connection_lost(self, exc: Exception | None) -> None:
        self._finish("the connection was lost")

    def _finish(self, failure: str) -> None:
        if not self.done.done():
            self.done.set_result(failure)
            self._transport.abort()


def _parser() -> argparse.ArgumentParser:
    parser = Parser("python -m loadtests slow", description=__doc__)
    whole, positive = number(int, least=1), number(float, above=0)
    parser.add_argument("--streams", type=whole, default=10_000)
    parser.add_argument("--replicas", type=whole, default=40, help="whose steps come at times of their own")
    parser.add_argument("--step-ms", type=positive, default=1000.0, help="between two tokens of a stream")
    parser.add_argument("--opened-per-s", type=positive, default=400.0)
    parser.add_argument("--hold-s", type=positive, default=30.0, help="how long all of them are held")
    parser.add_argument("--processes", type=whole, default=4, help="of clients")
    parser.add_argument("--policy", default="cost")
    parser.add_argument("--json", metavar="FILE", default="", help="write the figures here as well")
    return parser


if __name__ == "__main__":
    _port, _count, _tokens, _rate, _limit = sys.argv[1:]
    told = uvloop.run(_clients(int(_port), int(_count), int(_tokens), float(_rate), float(_limit)))
    sys.stdout.buffer.write(msgspec.json.encode(told))
