"""Calls for a real vLLM engine, and a `StreamOut` that keeps what the engine writes."""

from __future__ import annotations

import asyncio
import gc
import itertools
import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest
from google.protobuf.message import Message

from engine.base import Abort
from engine.vllm import VllmEngine
from router.errors import KvlaneError
from router.lane.frames import Submit
from router.types import Headers, Rpc

M = TypeVar("M", bound=Message)

os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

MODEL = "tiny"
DEADLINE_S = 120.0
"""For a single answer. The first of a kind may load what vLLM imports late, on a busy machine."""
START_DEADLINE_S = 240.0
ENGINE_ARGS: dict[str, Any] = {
    "max_num_seqs": 8,
    "block_size": 32,
    "num_gpu_blocks_override": 1024,
    "enable_auto_tool_choice": True,
    "tool_call_parser": "hermes",
}
# Of vLLM and what it imports, not ours.
FOREIGN_WARNINGS = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning", "ignore::ResourceWarning"
)

_streams = itertools.count(1)


class RecordingOut:
    """Keeps a stream's output."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.pieces: list[bytes] = []
        self.urgent: list[bool] = []
        self.tokens = 0
        self.finishes: list[str] = []
        self.failures: list[KvlaneError] = []
        self.done = asyncio.Event()
        self.started = asyncio.Event()
        """Set with the first data."""

    def head(self, status: int, headers: Headers) -> None:
        assert not self.status, "a second head"
        self.status, self.headers = status, dict(headers)

    def data(self, payload: bytes, tokens: int = 0, *, urgent: bool = False) -> None:
        assert not self.done.is_set(), "data after the end"
        self.pieces.append(payload)
        self.urgent.append(urgent)
        self.tokens += tokens
        self.started.set()

    def end(self, finish: str = "") -> None:
        self.finishes.append(finish)
        self.done.set()

    def fail(self, error: KvlaneError) -> None:
        self.failures.append(error)
        self.done.set()

    @property
    def body(self) -> bytes:
        return b"".join(self.pieces)

    def json(self) -> Any:
        """The whole body."""
        return json.loads(self.body)

    def events(self) -> list[Any]:
        """The events of a streamed body, the closing ``[DONE]`` left out."""
        lines = self.body.decode().split("\n\n")
        assert lines[-2:] == ["data: [DONE]", ""]
        return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]

    def messages(self, kind: type[M]) -> list[M]:
        """The messages of a gRPC stream."""
        return [kind.FromString(piece) for piece in self.pieces]

    async def ended(self) -> RecordingOut:
        """Waits for the end; a stream has exactly one."""
        async with asyncio.timeout(DEADLINE_S):
            await self.done.wait()
        assert len(self.finishes) + len(self.failures) == 1
        return self


def http_call(path: str, body: Any, method: str = "POST") -> Submit:
    """An HTTP call; a body that is bytes goes as it is, anything else as JSON."""
    stream = next(_streams)
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = (("host", "test"), ("content-type", "application/json"), ("content-length", str(len(raw))))
    return Submit(stream, f"test-{stream}", Rpc.HTTP, method, path, headers, raw)


def grpc_call(method: str, request: Message | bytes) -> Submit:
    """A call of `Inference`; a request that is bytes goes as it is."""
    stream = next(_streams)
    raw = request if isinstance(request, bytes) else request.SerializeToString()
    return Submit(stream, f"test-{stream}", Rpc.GRPC, "POST", f"/kvlane.v1.Inference/{method}", (), raw)


def submit(engine: VllmEngine, call: Submit) -> tuple[RecordingOut, Abort]:
    out = RecordingOut()
    return out, engine.submit(call, out)


async def ask(engine: VllmEngine, call: Submit) -> RecordingOut:
    """Runs a call to its end."""
    return await submit(engine, call)[0].ended()


async def post(engine: VllmEngine, path: str, **body: Any) -> RecordingOut:
    """Posts a JSON body to the tiny model."""
    return await ask(engine, http_call(path, {"model": MODEL, **body}))


@asynccontextmanager
async def running_engine(model: Path, **args: Any) -> AsyncIterator[VllmEngine]:
    """A started engine; closed at the end."""
    engine = VllmEngine(str(model), MODEL, ENGINE_ARGS | args)
    async with asyncio.timeout(START_DEADLINE_S):
        await engine.start()
    try:
        yield engine
    finally:
        await engine.close()
        del engine
        # vLLM leaves its ZMQ context to the garbage collector, which warns of it: now rather than in another test.
        gc.collect()
