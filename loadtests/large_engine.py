"""A process of one replica whose answers are as large as the request says, for the load tests.

`python -m loadtests.large_engine MODEL`. A request's body is a `Wanted`, with the model's name beside it. Prints one
JSON line when it listens, and ends when its standard input closes.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable
from typing import Final

import msgspec
import uvloop

from engine.base import Abort, StreamOut
from engine.replica import Replica
from loadtests.engines import SECRET
from router.errors import KvlaneError, PathNotFound
from router.lane.frames import Submit
from router.types import EngineInfo, Headers, Load, ModelCard, RouteInfo

PATH: Final = "/v1/completions"
_LINE: Final = b'data: {"choices":[{"index":0,"text":"%b"}]}\n\n'
_DONE: Final = b"data: [DONE]\n\n"


class Wanted(msgspec.Struct):
    """What an answer shall be: one of `piece_bytes` with its length, or a stream of `pieces` events."""

    model: str
    piece_bytes: int
    pieces: int = 1
    every_ms: float = 0.0
    stream: bool = False


class LargeEngine:
    """An `Engine` without a cache. Streams send at times of their own."""

    def __init__(self, model: str) -> None:
        self._card = ModelCard(model, max_model_len=1 << 24)
        self._streams: set[_Stream] = set()
        self._stepped: list[Callable[[], None]] = []

    async def start(self) -> None: ...

    def info(self) -> EngineInfo:
        return EngineInfo("sim", (self._card,), (RouteInfo(PATH, ("POST",)),), 1024, 1 << 20)

    def load(self) -> Load:
        return Load(len(self._streams))

    def cache(self) -> None:
        return None

    def on_step(self, listener: Callable[[], None]) -> None:
        self._stepped.append(listener)

    def submit(self, call: Submit, out: StreamOut) -> Abort:
        if call.path != PATH:
            out.fail(PathNotFound("Not Found"))
            return lambda: None
        stream = _Stream(msgspec.json.decode(call.body, type=Wanted), out, self._streams.discard)
        self._streams.add(stream)
        stream.begin()
        return stream.stop

    def dead(self) -> bool:
        return False

    async def check_health(self) -> None: ...

    async def close(self) -> None:
        for stream in tuple(self._streams):
            stream.stop()
            stream.out.fail(KvlaneError("the engine was closed"))


class _Stream:
    def __init__(self, wanted: Wanted, out: StreamOut, ended: Callable[[_Stream], None]) -> None:
        self.out = out
        self._wanted = wanted
        self._left = wanted.pieces
        self._ended = ended
        self._timer: asyncio.Handle | None = None
        self._piece = _LINE % (b"x" * wanted.piece_bytes) if wanted.stream else b"x" * wanted.piece_bytes

    def begin(self) -> None:
        kind = "text/event-stream" if self._wanted.stream else "text/plain"
        headers: Headers = (("content-type", kind),)
        if not self._wanted.stream:
            headers += (("content-length", str(len(self._piece) * self._left)),)
        self.out.head(200, headers)
        self._send()

    def _send(self) -> None:
        self._left -= 1
        self.out.data(self._piece, 1)
        if self._left:
            self._timer = asyncio.get_running_loop().call_later(self._wanted.every_ms / 1e3, self._send)
            return
        self._ended(self)
        if self._wanted.stream:
            self.out.data(_DONE)
        self.out.end("stop")

    def stop(self) -> None:
        self._ended(self)
        if self._timer is not None:
            self._timer.cancel()


async def serve(model: str) -> None:
    """Runs the replica until standard input closes."""
    replica = Replica(f"{model}-large", LargeEngine(model), SECRET)
    await replica.start()
    lane = await replica.listen("127.0.0.1")
    sys.stdout.write(json.dumps([{"replica": replica.name, "lane": lane, "http": 0}]) + "\n")
    sys.stdout.flush()
    closed = asyncio.Event()
    asyncio.get_running_loop().add_reader(sys.stdin.fileno(), closed.set)
    await closed.wait()
    await replica.close()


if __name__ == "__main__":
    uvloop.run(serve(sys.argv[1]))
