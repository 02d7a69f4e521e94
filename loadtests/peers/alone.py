"""What the bench's engine takes by itself: the same streams, written to nobody.

`python -m loadtests.peers.alone MODEL REPLICAS STREAMS TOKENS` prints CPU per token in microseconds. What a replica
takes more than that is its front end: to take requests, and to send tokens on their way.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from typing import Final

import msgspec
import uvloop

from engine.base import StreamOut
from loadtests.peers.errors import PeerError
from loadtests.peers.replicas import Replicas
from loadtests.processes import MODEL
from router.errors import KvlaneError
from router.lane.frames import Submit
from router.types import Headers, Rpc

GRACE_S: Final = 60.0


class _Nobody(StreamOut):
    def __init__(self, over: asyncio.Future[None]) -> None:
        self._over = over

    def head(self, status: int, headers: Headers) -> None: ...

    def data(self, payload: bytes, tokens: int = 0, *, urgent: bool = False) -> None: ...

    def end(self, finish: str = "") -> None:
        self._over.set_result(None)

    def fail(self, error: KvlaneError) -> None:
        self._over.set_exception(error)


async def cost_us(model: str, replicas: Replicas, streams: int, tokens: int) -> float:
    """CPU per token, of so many streams shared out over the replicas."""
    loop = asyncio.get_running_loop()
    engines = [replicas.engine.make(model) for _ in range(replicas.number)]
    for engine in engines:
        await engine.start()
    body = msgspec.json.encode({"model": model, "prompt": "x", "max_tokens": tokens, "stream": True})
    began = time.process_time()
    ends = []
    for number in range(streams):
        ends.append(loop.create_future())
        call = Submit(number, f"{number:032x}", Rpc.HTTP, "POST", "/v1/completions", (), body)
        engines[number % len(engines)].submit(call, _Nobody(ends[-1]))
    await asyncio.gather(*ends)
    return 1e6 * (time.process_time() - began) / streams / tokens


def measure(replicas: Replicas, streams: int, tokens: int, seconds: float) -> float:
    """The same in a process of its own, which takes about so many seconds. Raises `PeerError`."""
    packed = msgspec.json.encode(replicas).decode()
    command = [sys.executable, "-m", "loadtests.peers.alone", MODEL, packed, str(streams), str(tokens)]
    try:
        done = subprocess.run(command, capture_output=True, check=True, timeout=seconds + GRACE_S)
        return float(done.stdout)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        raise PeerError("the engine alone", str(error)) from error


if __name__ == "__main__":
    _model, _replicas, _streams, _tokens = sys.argv[1:]
    order = msgspec.json.decode(_replicas, type=Replicas)
    print(uvloop.run(cost_us(_model, order, int(_streams), int(_tokens))))
