"""What a system is to the comparison, and how one is asked whether it serves."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Final

import grpc
import msgspec
from kvlane.v1 import inference_pb2 as pb

from loadtests.peers.grpc_client import GENERATE
from loadtests.peers.load import Client
from loadtests.peers.replicas import EngineOrder
from loadtests.processes import MODEL

PROBE_TIMEOUT_S: Final = 5.0


class Setup(msgspec.Struct, frozen=True):
    """What a system is started with."""

    policy: str
    """In its own words."""
    protocol: str
    replicas: int
    engine: EngineOrder
    log: Path


class Running(msgspec.Struct, frozen=True):
    """A system that serves."""

    client: Client
    router_pids: tuple[int, ...] = ()
    """What stands between client and engines; descendants count with them."""
    engine_pids: tuple[int, ...] = ()


class System(msgspec.Struct, frozen=True):
    """One that can be compared."""

    start: Callable[[Setup], AbstractContextManager[Running]]
    """Raises `PeerError` where it cannot be installed or started."""
    policies: Mapping[str, str] = msgspec.field(default_factory=lambda: {"none": "none"})
    """Its own names, by the name that the command knows them by."""
    protocols: tuple[str, ...] = ("http",)
    quiet: bool = True
    """Whether it costs next to nothing while it has nothing to do, so that it may be up while others are measured."""


def answers(port: int) -> bool:
    """Whether a completion of one token is answered there."""
    body = json.dumps({"model": MODEL, "prompt": "ready?", "max_tokens": 1, "stream": True}).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions", body, {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=PROBE_TIMEOUT_S) as response:
            return b"[DONE]" in response.read()
    except (urllib.error.URLError, OSError):
        return False


def answers_grpc(port: int, method: str = GENERATE, metadata: tuple[tuple[str, str], ...] = ()) -> bool:
    """Whether a call of one token is answered there."""
    request = pb.GenerateRequest(model=MODEL, text="ready?", sampling=pb.SamplingParams(max_tokens=1))
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        call = channel.unary_stream(method, pb.GenerateRequest.SerializeToString, pb.GenerateResponse.FromString)
        try:
            return any(answer.text for answer in call(request, metadata=metadata, timeout=PROBE_TIMEOUT_S))
        except grpc.RpcError:
            return False
