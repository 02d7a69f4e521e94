"""`python -m loadtests stalls`: whether long prompts, large bodies, crowds or stalled clients hold up other streams.

Streams of one model are read while another model's requests disturb the same router, each kind between two quiet
times. The two models' engines are in processes of their own, and so are those who disturb, so that only the router is
shared. A token is late by what its gap is longer than a step. The machine's other processes make tokens late too, so
the router's own part is told beside it: the longest times that its event loop computed without a pause, in CPU time,
in which no stream could get its token; and from its metrics, how late its timers ran.
"""

from __future__ import annotations

import argparse
import asyncio
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

import grpc
import grpc.aio
import msgspec
import uvloop
from kvlane.v1 import inference_pb2 as pb

from loadtests import loop_lag, watched
from loadtests.arguments import Parser, many, number
from loadtests.loop_lag import Lag
from loadtests.peers import load
from loadtests.peers.children import leaving_nothing
from loadtests.peers.clients import HttpClient
from loadtests.peers.grpc_client import GrpcClient
from loadtests.peers.load import Client, HttpCaller, Prompts, http_request
from loadtests.peers.measure import percentile
from loadtests.peers.replicas import EngineOrder, Replicas
from loadtests.processes import replica_process, router
from loadtests.results import Row, spread, table, write_json
from loadtests.watched import Told

OTHER: Final = "other"
"""The model of those who disturb."""
PROMPT_KB, PROMPTS_PER_S = 32.0, 20.0
BODY_KB, BODIES_PER_S = 10.0 * 1024, 2.0
BODY_BYTES: Final = 10 << 20
ANSWER_TOKENS: Final = 1
CROWD, CROWDS_PER_S = 500, 4.0
"""At most so often: the next one comes when all have been answered."""
STALLED, STALLED_TOKENS = 16, 1_000_000
SETTLE_S: Final = 0.5
"""For what a disturbance left behind, and at first for connections to open."""
QUIET: Final = "quiet"
KINDS: Final = {
    "prompts": f"{PROMPTS_PER_S:g} prompts of {PROMPT_KB:g} KB a second",
    "bodies": f"{BODIES_PER_S:g} bodies of {BODY_KB / 1024:g} MB a second",
    "ids": f"{BODIES_PER_S:g} bodies of {BODY_KB / 1024:g} MB of token ids a second",
    "messages": f"{BODIES_PER_S:g} of small chat messages",
    "grpc": f"{BODIES_PER_S:g} gRPC requests of {BODY_KB / 1024:g} MB of text a second",
    "grpc-ids": f"{BODIES_PER_S:g} of token ids",
    "grpc-messages": f"{BODIES_PER_S:g} of small chat messages",
    "crowd": f"{CROWD} requests at one moment, {CROWDS_PER_S:g} times a second",
    "grpc-crowd": f"{CROWD} gRPC calls at one moment",
    "stalled": f"{STALLED} clients that do not read",
}
COLUMNS: Final = {
    "what": "beside the streams",
    "late_p50_ms": "token late p50, ms",
    "late_p99_ms": "p99, ms",
    "late_max_ms": "max, ms",
    "added_p99_ms": "added to quiet p99, ms",
    "added_max_ms": "max, ms",
    "busy_p99_ms": "router busy without a pause p99, ms",
    "busy_p999_ms": "p99.9, ms",
    "busy_max_ms": "max, ms",
    "busy_over_5_ms": "over 5 ms",
    "lag_p99_ms": "loop lag p99 at most, ms",
    "errors": "errors",
}


class Window(msgspec.Struct):
    """What one time showed."""

    late_ms: list[float]
    lag: Lag
    told: Told
    errors: int


def main(argv: Sequence[str]) -> int:
    """Exit status 0; 1 where a stream was not whole, 2 where the arguments make no sense."""
    return command("stalls", __doc__, KINDS, measure, argv)


def command(
    name: str,
    about: str | None,
    kinds: Iterable[str],
    measure: Callable[[argparse.Namespace], list[Row]],
    argv: Sequence[str],
) -> int:
    """Runs one of the load tests that disturb streams; `kinds` are its disturbances. Exit statuses as `main`'s."""
    try:
        args = _parser(name, about, list(kinds)).parse_args(argv)
    except ValueError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    with leaving_nothing():
        rows = measure(args)
    print(table(rows, COLUMNS))
    write_json(args.json, rows)
    return 1 if any(row["errors"] for row in rows) else 0


def measure(args: argparse.Namespace) -> list[Row]:
    """A row for each kind, the quiet times first."""
    windows: dict[str, list[tuple[Window, Window]]] = {kind: [] for kind in args.kinds}
    with ExitStack() as stack:
        own = _order(args.replicas, args.step_ms)
        _, addresses = stack.enter_context(replica_process("loadtests.peers.replicas", own))
        other = replica_process("loadtests.peers.replicas", _order(2, 2.0), model=OTHER)
        _, others = stack.enter_context(other)
        file = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "told"
        command = watched.command(file)
        pid, port, grpc_port = stack.enter_context(router([*addresses, *others], args.policy, command=command))
        where = _Router(pid, port, file)
        for rep in range(args.reps):
            for kind in args.kinds[:: -1 if rep % 2 else 1]:
                uvloop.run(_streams(port, args, SETTLE_S))
                quiet = _window(where, args)
                with _disturbed(kind, grpc_port if kind.startswith("grpc") else port):
                    windows[kind].append((_window(where, args), quiet))
                print(f"stalls: {kind}, repetition {rep + 1}", file=sys.stderr, flush=True)
    quiet_times = [quiet for pairs in windows.values() for _, quiet in pairs]
    rows = [row(QUIET, [(quiet, quiet) for quiet in quiet_times])]
    return rows + [row(KINDS[kind], pairs) for kind, pairs in windows.items()]


def row(what: str, pairs: Sequence[tuple[Window, Window]]) -> Row:
    """`pairs` are times with a disturbance, each with the quiet one before it."""
    loud = [window for window, _ in pairs]
    return {
        "what": what,
        **spread("late_p50_ms", [percentile(each.late_ms, 50) for each in loud]),
        **spread("late_p99_ms", [percentile(each.late_ms, 99) for each in loud]),
        **spread("late_max_ms", [max(each.late_ms) for each in loud]),
        **spread("added_p99_ms", [percentile(a.late_ms, 99) - percentile(b.late_ms, 99) for a, b in pairs]),
        **spread("added_max_ms", [max(a.late_ms) - max(b.late_ms) for a, b in pairs]),
        **spread("lag_p99_ms", [each.lag.p99_ms for each in loud]),
        **spread("busy_p99_ms", [each.told.stretch_ms(0.99) for each in loud]),
        **spread("busy_p999_ms", [each.told.stretch_ms(0.999) for each in loud]),
        **spread("busy_max_ms", [each.told.stretch_ms(1.0) for each in loud]),
        "busy_over_5_ms": sum(each.told.longer(5.0) for each in loud),
        "lag_over_5_ms": sum(each.lag.over_5_ms for each in loud),
        "tokens": sum(len(each.late_ms) for each in loud),
        "errors": sum(each.errors for each in loud),
    }


def _order(replicas: int, step_ms: float) -> str:
    order = Replicas(replicas, EngineOrder(options={"step_ms": step_ms, "spread": True}))
    return msgspec.json.encode(order).decode()


class _Router(msgspec.Struct, frozen=True):
    pid: int
    port: int
    file: Path


def _window(router: _Router, args: argparse.Namespace) -> Window:
    before = loop_lag.scrape(router.port)
    watched.ask(router.pid, router.file)
    late, errors = uvloop.run(_streams(router.port, args, args.seconds))
    told = watched.ask(router.pid, router.file)
    return Window(late, loop_lag.between(before, loop_lag.scrape(router.port)), told, errors)


async def _streams(port: int, args: argparse.Namespace, seconds: float) -> tuple[list[float], int]:
    """By how much tokens were late, in milliseconds, and how many streams were not whole."""
    tokens = max(2, int(seconds * 1e3 / args.step_ms))
    tally = await load.closed_loop(
        HttpClient([port]), args.streams, tokens, Prompts(1.0), rounds=1, limit_s=2 * seconds + 30
    )
    return [max(0.0, 1e3 * gap - args.step_ms) for gap in tally.gaps_s], tally.errors


# -- those who disturb


@contextmanager
def _disturbed(kind: str, port: int) -> Iterator[None]:
    """A process that disturbs until the end."""
    command = [sys.executable, "-m", "loadtests.stalls", kind, str(port)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdout.readline()  # It has begun.
            yield
        finally:
            process.stdin.close()


async def _disturb(kind: str, port: int) -> None:
    closed = asyncio.Event()
    asyncio.get_running_loop().add_reader(sys.stdin.fileno(), closed.set)
    task = asyncio.create_task(_disturbance(kind, port))
    sys.stdout.write("begun\n")
    sys.stdout.flush()
    ended = asyncio.create_task(closed.wait())
    await asyncio.wait([task, ended], return_when=asyncio.FIRST_COMPLETED)
    for each in (task, ended):
        each.cancel()
    await asyncio.gather(task, ended, return_exceptions=True)
    if not ended.cancelled() and not closed.is_set():
        task.result()


async def _disturbance(kind: str, port: int) -> None:
    if kind == "stalled":
        await _stall(port)
    elif kind in _CROWDS:
        await _crowd(_CROWDS[kind](port))
    elif kind in _MESSAGES:
        await _call(*_MESSAGES[kind](), port)
    elif kind in _BODIES:
        await _post(*_BODIES[kind](), port)
    else:
        await _ask(kind, port)


def _id_body() -> tuple[str, bytes]:
    body = b'{"model":"%b","max_tokens":%d,"prompt":[' % (OTHER.encode(), ANSWER_TOKENS)
    ids = b",".join(b"%d" % (place * 7919 % 32_000) for place in range(BODY_BYTES * 2 // 11))
    return "/v1/completions", body + ids + b"]}"


def _chat_body() -> tuple[str, bytes]:
    said = [{"role": "user", "content": f"{place}: and then?"} for place in range(BODY_BYTES // 48)]
    return "/v1/chat/completions", msgspec.json.encode({"model": OTHER, "max_tokens": ANSWER_TOKENS, "messages": said})


def _text_message() -> tuple[str, bytes]:
    sampling = pb.SamplingParams(max_tokens=ANSWER_TOKENS)
    request = pb.GenerateRequest(model=OTHER, text="What is it? " * (BODY_BYTES // 12), sampling=sampling)
    return "Generate", request.SerializeToString()


def _id_message() -> tuple[str, bytes]:
    ids = pb.TokenIds(ids=[place * 7919 % 32_000 for place in range(BODY_BYTES // 3)])
    sampling = pb.SamplingParams(max_tokens=ANSWER_TOKENS)
    return "Generate", pb.GenerateRequest(model=OTHER, token_ids=ids, sampling=sampling).SerializeToString()


def _chat_message() -> tuple[str, bytes]:
    said = [pb.ChatMessage(role="user", content=f"{place}: and then?") for place in range(BODY_BYTES // 28)]
    sampling = pb.SamplingParams(max_tokens=ANSWER_TOKENS)
    return "Chat", pb.ChatRequest(model=OTHER, messages=said, sampling=sampling).SerializeToString()


_CROWDS: Final[dict[str, Callable[[int], Client]]] = {
    "crowd": lambda port: HttpClient([port], OTHER),
    "grpc-crowd": lambda port: GrpcClient(port, model=OTHER),
}
_BODIES: Final = {"ids": _id_body, "messages": _chat_body}
_MESSAGES: Final = {"grpc": _text_message, "grpc-ids": _id_message, "grpc-messages": _chat_message}


async def _post(path: str, body: bytes, port: int) -> None:
    """Posts the body again and again."""
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    while True:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(head.encode())
        writer.write(body)
        answer = await reader.read()
        writer.close()
        if not answer.startswith(b"HTTP/1.1 200 "):
            raise RuntimeError(answer[:500].decode(errors="replace"))
        await asyncio.sleep(1 / BODIES_PER_S)


async def _call(method: str, message: bytes, port: int) -> None:
    """Sends the message again and again."""
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        call = channel.unary_stream(f"/kvlane.v1.Inference/{method}")
        while True:
            async for _ in call(message):
                pass
            await asyncio.sleep(1 / BODIES_PER_S)


async def _ask(kind: str, port: int) -> None:
    kilobytes, rate = (PROMPT_KB, PROMPTS_PER_S) if kind == "prompts" else (BODY_KB, BODIES_PER_S)
    prompts, caller = Prompts(kilobytes), HttpCaller(port, OTHER)
    while True:
        answer = await caller.ask(prompts.next(0), 1)
        if answer.failure:
            raise RuntimeError(answer.failure)
        await asyncio.sleep(1 / rate)


async def _crowd(client: Client) -> None:
    """Many ask for a token at one moment, and again some time after all have it."""
    prompts = Prompts(1.0)
    async with client.callers(CROWD) as callers:
        while True:
            answers = await asyncio.gather(*(caller.ask(prompts.next(0), 1) for caller in callers))
            if load.tally(answers, client.read, 1.0).errors:
                raise RuntimeError("not all were answered")
            await asyncio.sleep(1 / CROWDS_PER_S)


async def _stall(port: int) -> None:
    """Asks for long answers and reads none of them."""
    prompts, held = Prompts(1.0), []
    for _ in range(STALLED):
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", port))
        client.sendall(http_request(prompts.next(0), STALLED_TOKENS, OTHER))
        held.append(client)
    try:
        await asyncio.Event().wait()
    finally:
        for client in held:
            client.close()


def _parser(name: str, about: str | None, kinds: list[str]) -> argparse.ArgumentParser:
    def kind(word: str) -> str:
        if word not in kinds:
            raise argparse.ArgumentTypeError(f"{word!r} is not one of {', '.join(kinds)}")
        return word

    parser = Parser(f"python -m loadtests {name}", description=about)
    whole, positive = number(int, least=1), number(float, above=0)
    parser.add_argument("--kinds", type=many(kind), default=kinds, help=f"by commas: {', '.join(kinds)}")
    parser.add_argument("--replicas", type=whole, default=8, help="whose steps come at times of their own")
    parser.add_argument("--streams", type=whole, default=32)
    parser.add_argument("--step-ms", type=positive, default=10.0)
    parser.add_argument("--policy", default="cost")
    parser.add_argument("--seconds", type=positive, default=5.0, help="of each quiet and each disturbed time")
    parser.add_argument("--reps", type=whole, default=5)
    parser.add_argument("--json", metavar="FILE", default="", help="write the rows here as well")
    return parser


if __name__ == "__main__":
    uvloop.run(_disturb(sys.argv[1], int(sys.argv[2])))
