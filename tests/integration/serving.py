"""A router in the test's own process over simulated replicas that a real Ray Serve runs."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, Literal

import msgspec
from kvlane.client import Client

from engine import deployment
from router.app import App
from router.membership.base import application_name
from router.options import Config, EngineOptions, GrpcOptions, HttpOptions, LaneOptions, MembershipOptions
from router.types import Request, Rpc
from tests.integration.ray_local import DEADLINE_S, NAMESPACE, until, wait_until

MODEL = "sim"
FAST: dict[str, Any] = {"step_base_ms": 5.0, "prefill_ms_per_token": 0.0, "decode_ms_per_seq": 0.0}


def config(address: str, replicas: int = 2, carrier: Literal["socket", "actor"] = "socket", **args: Any) -> Config:
    """Two simulated replicas, and a router on free ports."""
    engine = EngineOptions(
        name=MODEL,
        kind="sim",
        replicas=replicas,
        args=FAST | args,
        num_cpus=0.1,
        health_check_period_s=0.5,
        drain_timeout_s=60.0,
    )
    return Config(
        http=HttpOptions(port=0),
        grpc=GrpcOptions(port=0),
        lane=LaneOptions(carrier=carrier),
        membership=MembershipOptions(ray_address=address, ray_namespace=NAMESPACE),
        engines=(engine,),
    )


@contextmanager
def deployed(config: Config) -> Iterator[None]:
    """The engines of the configuration, ready; removed at the end."""
    deployment.deploy(config)
    wanted = {application_name(engine.name): engine.replicas for engine in config.engines}

    def ready() -> bool:
        found = deployment.statuses()
        return all(name in found and found[name].ready >= count for name, count in wanted.items())

    try:
        wait_until(ready, "the replicas are ready")
        yield
    finally:
        deployment.undeploy(engine.name for engine in config.engines)


@asynccontextmanager
async def routing(config: Config) -> AsyncIterator[App]:
    """A router in this process with lanes to all replicas."""
    app = App(config)
    await app.start()
    try:
        wanted = {engine.name: engine.replicas for engine in config.engines}
        await until(lambda: app.replicas.readiness().models == wanted, "the router has a lane to each replica")
        yield app
    finally:
        await app.stop(5.0)


@asynccontextmanager
async def grpc_client(app: App) -> AsyncIterator[Client]:
    """A gRPC client of the router."""
    async with Client(f"127.0.0.1:{app.grpc_port}") as client:
        yield client


def completion(tokens: int, prompt: str = "hello", *, stream: bool = True) -> Request:
    """A completion as the HTTP ingress would submit it."""
    body = {"model": MODEL, "prompt": prompt, "max_tokens": tokens, "stream": stream}
    name = f"r{random.getrandbits(64):x}"
    headers = (("content-type", "application/json"),)
    return Request(name, MODEL, Rpc.HTTP, "/v1/completions", json.dumps(body).encode(), headers=headers)


def with_seed(config: Config, seed: int) -> Config:
    """The same with engines of another seed: for Serve another version."""
    engines = tuple(msgspec.structs.replace(engine, args=engine.args | {"seed": seed}) for engine in config.engines)
    return msgspec.structs.replace(config, engines=engines)


async def within_deadline(work: Any) -> Any:
    """The result of `work`; fails after the deadline."""
    return await asyncio.wait_for(work, DEADLINE_S)
