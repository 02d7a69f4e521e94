"""The bench of routers side by side: Ray Serve's applications and processes, as far as they need no cluster."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from kvlane.v1 import inference_pb2 as pb

from loadtests.peers import ray_app, ray_serve
from loadtests.peers.answers import Answer, read_http
from loadtests.peers.errors import PeerError
from loadtests.peers.load import http_request
from loadtests.peers.replicas import EngineOrder
from loadtests.peers.systems import SYSTEMS
from router.errors import KvlaneError

QUICK = EngineOrder(options={"step_ms": 0.0})
SIMULATED = EngineOrder("simulated", {"time_scale": 0.0})


async def asked(app: ray_app.HttpApp, body: bytes) -> list[dict[str, Any]]:
    """What the ASGI application sends for a completion whose body comes in two parts."""
    parts = [
        {"type": "http.request", "body": body[:20], "more_body": True},
        {"type": "http.request", "body": body[20:], "more_body": False},
    ]
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return parts.pop(0)

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    async with asyncio.timeout(10):
        await app({"type": "http", "path": "/v1/completions"}, receive, send)
    return sent


@pytest.mark.parametrize("order", [QUICK, SIMULATED], ids=["metronome", "simulated"])
async def test_the_http_application_streams_the_engines_answer(order: EngineOrder) -> None:
    body = http_request("a prompt", 5).partition(b"\r\n\r\n")[2]
    head, *pieces = await asked(ray_app.HttpApp(order), body)
    assert (head["type"], head["status"]) == ("http.response.start", 200)
    assert (b"content-type", b"text/event-stream; charset=utf-8") in head["headers"]
    assert [piece["more_body"] for piece in pieces] == [True] * (len(pieces) - 1) + [False]
    framed = b"".join(b"%x\r\n%b\r\n" % (len(piece["body"]), piece["body"]) for piece in pieces if piece["body"])
    raw = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + framed + b"0\r\n\r\n"
    assert [tokens for _, tokens in read_http(Answer(5, times=[1.0], pieces=[raw]))] == [1] * 5


async def test_the_http_application_leaves_other_scopes_alone() -> None:
    async def nothing(*arguments: object) -> Any:
        raise AssertionError("nothing is to be received or sent")

    await ray_app.HttpApp(QUICK)({"type": "lifespan"}, nothing, nothing)


async def test_the_http_application_raises_what_the_engine_refuses() -> None:
    with pytest.raises(KvlaneError):
        await asked(ray_app.HttpApp(QUICK), b'{"prompt": "without a length"}')


async def test_the_grpc_application_streams_messages() -> None:
    request = pb.GenerateRequest(model="sim", text="a prompt", sampling=pb.SamplingParams(max_tokens=4))
    app = ray_app.GrpcApp(QUICK)
    messages = [message async for message in app.Generate(request)]
    assert [message.text for message in messages] == ["k42 "] * 4
    assert messages[-1].finish_reason == "length"


def test_an_order_survives_the_command_line() -> None:
    order = ray_serve.Order("grpc", 1234, 2, QUICK, "/tmp/somewhere")
    assert msgspec.json.decode(msgspec.json.encode(order), type=ray_serve.Order) == order


def test_each_clusters_files_and_ports_are_its_own(tmp_path: Path) -> None:
    one, other = (ray_serve._own_places(str(tmp_path / name), ray_serve.HAPROXY) for name in ("one", "other"))
    assert one["RAY_SERVE_ENABLE_HA_PROXY"] == "1"
    ports = [value for name, value in (*one.items(), *other.items()) if name.endswith("_PORT")]
    assert len(set(ports)) == len(ports) == 8
    places = {name: value for name, value in one.items() if "/" in value}
    assert len(places) == 4
    assert all(value.startswith(str(tmp_path / "one")) and other[name] != value for name, value in places.items())


def test_proxies_and_replicas_are_told_apart_by_the_names_of_their_processes() -> None:
    command = [sys.executable, "-c", "print(flush=True); input()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()  # It bears its own name by now.
        name = Path(f"/proc/{process.pid}/comm").read_text().strip()
        assert process.pid in ray_serve._named("ray", os.getpid(), frozenset({name}))
        with pytest.raises(PeerError, match="has none of the processes ray::ProxyActor"):
            ray_serve._named("ray", process.pid, frozenset({"ray::ProxyActor"}))
        process.communicate(b"\n")


def test_all_ways_into_ray_serve_can_be_compared() -> None:
    assert {name: system.protocols for name, system in SYSTEMS.items() if name.startswith("ray")} == {
        "ray-serve": ("http",),
        "ray-serve-haproxy": ("http",),
        "ray-serve-grpc": ("grpc",),
    }
    assert not any(system.quiet for name, system in SYSTEMS.items() if name.startswith("ray"))
