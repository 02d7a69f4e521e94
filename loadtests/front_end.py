"""What the engine's side of a stream costs per token: on a lane, and as one HTTP stream per request.

`python -m loadtests.front_end [--streams 32,128,256] [--reps 5] [--json FILE]`. One simulated engine in a process of
its own answers the same streams over its lane (a router and a client behind it), from its own HTTP port (kvlane's edge,
as thin as a server can be), through uvicorn without a framework, and through uvicorn with a `StreamingResponse` over an
asynchronous generator, which is how vLLM's own server streams. CPU is that process's alone, less what the engine takes
without anybody to tell.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any, Final

import msgspec
import uvloop

from engine.simulated import SimulatedEngine
from loadtests import clients
from loadtests.arguments import many, number
from loadtests.peers.children import free_port
from loadtests.processes import MODEL, replica_process, router
from loadtests.router_cost import STEP_OPTIONS
from router.errors import KvlaneError
from router.lane.frames import Submit
from router.types import Headers, Rpc

TOKENS: Final = 200
PROMPT_KB: Final = 0.5


class Row(msgspec.Struct):
    """One number of streams. CPU in microseconds per token, the engine's own taken off; medians, least and greatest."""

    streams: int
    engine_us: float
    """What was taken off."""
    lane_us: tuple[float, float, float]
    edge_us: tuple[float, float, float]
    uvicorn_us: tuple[float, float, float]
    framework_us: tuple[float, float, float]
    lane_over_edge: float
    lane_over_uvicorn: float
    lane_over_framework: float
    errors: int


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 1 where anything was answered with an error."""
    parser = argparse.ArgumentParser(prog="python -m loadtests.front_end", description=__doc__)
    streams = number(int, least=1, most=1000)
    parser.add_argument("--streams", type=many(streams), default=[32, 128, 256], help="by commas")
    parser.add_argument("--reps", type=number(int, least=1), default=5)
    parser.add_argument("--step-ms", type=number(float, above=0), default=20.0, help="duration of an engine step")
    parser.add_argument("--json", metavar="FILE", help="write the rows here as well")
    args = parser.parse_args(argv)
    options = STEP_OPTIONS | {"step_base_ms": args.step_ms}
    rows = [uvloop.run(_measure(streams, args.reps, options)) for streams in args.streams]
    print(markdown(rows))
    if args.json:
        Path(args.json).write_bytes(msgspec.json.format(msgspec.json.encode({"results": rows})))
    return 1 if any(row.errors for row in rows) else 0


async def _measure(streams: int, reps: int, options: dict[str, Any]) -> Row:
    alone = statistics.median([await _alone(streams, options) for _ in range(3)])
    encoded, bare, framed = json.dumps(options), free_port(), free_port()
    with (
        replica_process("loadtests.engines", "1", encoded) as (pid, addresses),
        replica_process("loadtests.front_end", str(bare), encoded) as (bare_pid, _),
        replica_process("loadtests.front_end", str(framed), encoded, "framework") as (framed_pid, _),
        router(addresses, "least-queue") as (_, http, _),
    ):
        ways = {
            "lane": (pid, http),
            "edge": (pid, addresses[0]["http"]),
            "uvicorn": (bare_pid, bare),
            "framework": (framed_pid, framed),
        }
        for _, port in ways.values():
            await clients.http_load(port, streams, 5, PROMPT_KB, 2)
        found: dict[str, list[float]] = {name: [] for name in ways}
        errors = 0
        for rep in range(reps):
            for name, (process, port) in ways.items() if rep % 2 else reversed(ways.items()):
                before = _cpu_s(process)
                tally = await clients.http_load(port, streams, TOKENS, PROMPT_KB, 1)
                found[name].append(1e6 * (_cpu_s(process) - before) / tally.chunks - alone)
                errors += tally.errors
    lane, edge, uvicorn, framework = (_spread(found[name]) for name in ("lane", "edge", "uvicorn", "framework"))
    return Row(
        streams,
        round(alone, 2),
        lane,
        edge,
        uvicorn,
        framework,
        lane_over_edge=round(lane[0] / edge[0], 2),
        lane_over_uvicorn=round(lane[0] / uvicorn[0], 2),
        lane_over_framework=round(lane[0] / framework[0], 2),
        errors=errors,
    )


async def _alone(streams: int, options: dict[str, Any]) -> float:
    """CPU per token of the engine itself, in this process: it renders, and nobody takes it."""
    engine = SimulatedEngine(options, MODEL)
    await engine.start()
    outs = [_Nobody() for _ in range(streams)]
    began = time.process_time()
    for stream, out in enumerate(outs, 1):
        body = {"model": MODEL, "prompt": clients.prompt(PROMPT_KB, stream), "max_tokens": TOKENS, "stream": True}
        engine.submit(_call(stream, msgspec.json.encode(body)), out)
    for out in outs:
        await out.done.wait()
    spent = time.process_time() - began
    await engine.close()
    return 1e6 * spent / streams / TOKENS


def _call(stream: int, body: bytes) -> Submit:
    headers = (("content-type", "application/json"),)
    return Submit(stream, f"r{stream}", Rpc.HTTP, "POST", "/v1/completions", headers, body)


class _Nobody:
    """Takes a stream and drops it."""

    def __init__(self) -> None:
        self.done = asyncio.Event()

    def head(self, status: int, headers: Headers) -> None:
        pass

    def data(self, payload: bytes, tokens: int = 0, *, urgent: bool = False) -> None:
        pass

    def end(self, finish: str = "") -> None:
        self.done.set()

    def fail(self, error: KvlaneError) -> None:
        self.done.set()


class _Queued(_Nobody):
    """A stream for a task that waits for its pieces, as an ASGI application has one."""

    def __init__(self) -> None:
        super().__init__()
        self.pieces: asyncio.Queue[bytes | None] = asyncio.Queue()
        self.status = 500
        self.headers: Headers = ()

    def head(self, status: int, headers: Headers) -> None:
        self.status, self.headers = status, headers

    def data(self, payload: bytes, tokens: int = 0, *, urgent: bool = False) -> None:
        self.pieces.put_nowait(payload)

    def end(self, finish: str = "") -> None:
        self.pieces.put_nowait(None)

    def fail(self, error: KvlaneError) -> None:
        self.pieces.put_nowait(None)


Asgi = Callable[[Any, Callable[[], Awaitable[Any]], Callable[[Any], Awaitable[None]]], Awaitable[None]]


async def _serve(port: int, options: dict[str, Any], make: Callable[[SimulatedEngine], Asgi]) -> None:
    """The simulated engine under uvicorn; ends when standard input closes."""
    import uvicorn

    engine = SimulatedEngine(options, MODEL)
    await engine.start()
    config = uvicorn.Config(make(engine), "127.0.0.1", port, log_level="warning", access_log=False, lifespan="off")
    server = uvicorn.Server(config)
    asyncio.get_running_loop().add_reader(sys.stdin.fileno(), setattr, server, "should_exit", True)
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    print("[]", flush=True)
    with suppress(asyncio.CancelledError):
        await serving
    await engine.close()


def _bare(engine: SimulatedEngine) -> Asgi:
    """An application without any framework."""
    numbers = count(1)

    async def app(scope: Any, receive: Callable[[], Awaitable[Any]], send: Callable[[Any], Awaitable[None]]) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message["body"], message.get("more_body", False)
        out = _Queued()
        engine.submit(_call(next(numbers), body), out)
        piece = await out.pieces.get()
        headers = [(name.encode(), value.encode()) for name, value in out.headers]
        await send({"type": "http.response.start", "status": out.status, "headers": headers})
        while piece is not None:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
            piece = await out.pieces.get()
        await send({"type": "http.response.body", "body": b""})

    return app


def _framework(engine: SimulatedEngine) -> Asgi:
    """An application as vLLM's is made: FastAPI's routing, and a response that an asynchronous generator feeds."""
    from fastapi import FastAPI
    from starlette.requests import Request
    from starlette.responses import StreamingResponse

    app, numbers = FastAPI(), count(1)

    async def pieces(out: _Queued) -> AsyncIterator[bytes]:
        while (piece := await out.pieces.get()) is not None:
            yield piece

    async def completions(request: Request) -> StreamingResponse:
        out = _Queued()
        engine.submit(_call(next(numbers), await request.body()), out)
        return StreamingResponse(pieces(out), media_type="text/event-stream")

    app.add_route("/v1/completions", completions, methods=["POST"])
    return app


def _cpu_s(pid: int) -> float:
    """Of a process, all its threads."""
    return time.clock_gettime(~pid << 3 | 2)


def _spread(values: list[float]) -> tuple[float, float, float]:
    return round(statistics.median(values), 2), round(min(values), 2), round(max(values), 2)


def markdown(rows: Sequence[Row]) -> str:
    """The rows as a table: median (least to greatest)."""
    lines = [
        "| streams | lane, µs per token | own HTTP edge | uvicorn | uvicorn, FastAPI | lane / edge | lane / uvicorn "
        "| lane / FastAPI | engine itself, µs |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        ways = (row.lane_us, row.edge_us, row.uvicorn_us, row.framework_us)
        cells = [f"**{median}** ({low} to {high})" for median, low, high in ways]
        ratios = f"{row.lane_over_edge} | {row.lane_over_uvicorn} | {row.lane_over_framework}"
        lines.append(f"| {row.streams} | {' | '.join(cells)} | {ratios} | {row.engine_us} |")
    return "\n".join(lines)


if __name__ == "__main__":
    if sys.argv[1:2] == [MODEL]:
        make = _framework if "framework" in sys.argv[4:] else _bare
        uvloop.run(_serve(int(sys.argv[2]), json.loads(sys.argv[3]), make))
    else:
        sys.exit(main())
