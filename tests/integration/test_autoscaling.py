"""Replicas that come and go by load in real Ray Serve, with the simulated engine: no stream is cut, all are exact."""

from __future__ import annotations

import asyncio
import json
import random
import re
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest
import ray
from ray import serve

from engine import deployment
from engine.simulated_text import answer, text_prompt
from router import up
from router.app import App
from router.membership.waker import RayWaker
from router.options import (
    AutoscalingOptions,
    Config,
    EngineOptions,
    GrpcOptions,
    HttpOptions,
    MembershipOptions,
    PolicyOptions,
)
from router.types import Request, Rpc
from tests.fakes import RecordingSink
from tests.integration.ray_local import NAMESPACE, cluster, until

pytestmark = [pytest.mark.ray, pytest.mark.slow]

MODEL = "sim"
APPLICATION = "kvlane-sim"
BLOCK_TOKENS = 16
AUTOSCALING = AutoscalingOptions(
    min_replicas=0,
    max_replicas=3,
    target_streams=4.0,
    upscale_delay_s=0.5,
    downscale_delay_s=1.0,
    # Longer than what Serve remembers of a call that waited, which would start a replica anew.
    downscale_to_zero_delay_s=6.0,
)
ENGINE = EngineOptions(
    name=MODEL,
    kind="sim",
    num_cpus=0.1,
    lane_host="127.0.0.1",
    drain_timeout_s=60.0,
    health_check_period_s=0.5,
    args={"step_base_ms": 20.0, "prefill_ms_per_token": 0.0, "block_tokens": BLOCK_TOKENS},
    autoscaling=AUTOSCALING,
)
CONFIG = Config(
    http=HttpOptions(port=0),
    grpc=GrpcOptions(port=0),
    membership=MembershipOptions(ray_namespace=NAMESPACE),
    policy=PolicyOptions(name="round-robin"),
    engines=(ENGINE,),
)
TEXT = re.compile(rb'"text":"([^"]*)"')


@pytest.fixture(scope="module", autouse=True)
def at_zero() -> Iterator[None]:
    """A cluster with an engine that has no replica."""
    with cluster():
        deployment.deploy(CONFIG)
        up._wait_for_engines(CONFIG)
        assert state() == ("RUNNING", 0, "")
        yield


def state() -> deployment.ApplicationState | None:
    return deployment.statuses().get(APPLICATION)


class Router:
    """A router in this process, a waker beside it, and streams that are compared with what they should be."""

    def __init__(self, app: App) -> None:
        self.app = app
        self.waker = RayWaker(CONFIG.engines)
        self.broken: list[str] = []
        self.whole = 0

    @property
    def ready(self) -> int:
        return self.app.replicas.readiness().models.get(MODEL, 0)

    async def stream(self, tokens: int, sink: RecordingSink | None = None) -> None:
        """One stream; notes whether it came whole and exact."""
        prompt, sink = f"prompt {random.getrandbits(64):x}", sink or RecordingSink()
        body = {"model": MODEL, "prompt": prompt, "max_tokens": tokens, "stream": True}
        headers = (("content-type", "application/json"),)
        name = f"r{random.getrandbits(64):x}"
        request = Request(name, MODEL, Rpc.HTTP, "/v1/completions", json.dumps(body).encode(), headers=headers)
        try:
            await self.app.dispatcher.run(request, sink)
        except Exception as error:
            self.broken.append(repr(error))
            return
        payload = b"".join(sink.payloads)
        text = b"".join(TEXT.findall(payload))
        expected = answer(text_prompt(prompt.encode(), BLOCK_TOKENS).key, 0, tokens)
        if text == expected and payload.endswith(b"data: [DONE]\n\n"):
            self.whole += 1
        else:
            self.broken.append(f"{prompt}: {len(text)} bytes of text instead of {len(expected)}, or others")

    @asynccontextmanager
    async def load(self, streams: int) -> AsyncIterator[None]:
        """So many streams at any time meanwhile, each of about a second."""
        over = False

        async def repeat() -> None:
            while not over and not self.broken:
                await self.stream(40)

        tasks = [asyncio.create_task(repeat()) for _ in range(streams)]
        try:
            yield
        finally:
            over = True
            await asyncio.gather(*tasks)


@pytest.fixture
async def router() -> AsyncIterator[Router]:
    app = App(CONFIG)
    await app.start()
    router = Router(app)
    try:
        yield router
    finally:
        await router.waker.close()
        await app.stop(5.0)
    assert router.broken == []


async def test_replicas_follow_a_wave_from_none_to_three_and_back_and_no_stream_is_cut(router: Router) -> None:
    assert router.ready == 0
    async with router.load(10):
        await until(lambda: router.ready == 3, "three replicas carry ten streams")
        # Longer than the rest of the load, than what Serve looks back at, and than the delay after which replicas go.
        sinks = [RecordingSink() for _ in range(6)]
        long = [asyncio.create_task(router.stream(900, sink)) for sink in sinks[:3]]
        await until(lambda: all(sink.started for sink in sinks[:3]), "three long streams have begun")
    assert len({sink.receipts[-1].replica for sink in sinks[:3]}) == 3
    await until(lambda: router.ready == 1, "two replicas are taken away")
    assert not any(task.done() for task in long)
    # What comes now goes to the one that stays.
    await asyncio.gather(*(router.stream(20, sink) for sink in sinks[3:]))
    assert len({sink.receipts[-1].replica for sink in sinks[3:]}) == 1
    await asyncio.gather(*long)
    await until(lambda: router.ready == 0, "the last replica is taken away")
    assert router.whole > 10


class Starts:
    """When Serve began to start a replica, and when it called one ready; seconds of the monotonic clock."""

    def __init__(self) -> None:
        self.seen: dict[str, float] = {}

    @asynccontextmanager
    async def watched(self) -> AsyncIterator[None]:
        """Looks ten times a second meanwhile."""
        task = asyncio.create_task(self._look())
        try:
            yield
        finally:
            task.cancel()

    async def _look(self) -> None:
        while True:
            found = await asyncio.to_thread(serve.status)
            for name, count in found.applications[APPLICATION].deployments["engine"].replica_states.items():
                if count:
                    self.seen.setdefault(str(name), time.monotonic())
            await asyncio.sleep(0.1)


async def test_two_hundred_requests_at_zero_are_held_and_all_complete(router: Router) -> None:
    await until(lambda: router.ready == 0 and state() == ("RUNNING", 0, ""), "no replica is left")
    starts, sinks = Starts(), [RecordingSink() for _ in range(200)]
    async with starts.watched():
        began = time.monotonic()
        streams = [asyncio.create_task(router.stream(20, sink)) for sink in sinks]
        await until(lambda: any(sink.started for sink in sinks), "a first token has come")
        first = time.monotonic()
        await asyncio.gather(*streams)
        over = time.monotonic()
        await until(lambda: "RUNNING" in starts.seen, "Serve calls a replica ready")
    moments = {"start-up begins": starts.seen["STARTING"], "first token": first}
    moments |= {"Serve calls it ready": starts.seen["RUNNING"], "last end": over}
    print("after the first request:", ", ".join(f"{what} {at - began:.2f} s" for what, at in moments.items()))
    assert router.whole == 200
    assert first - starts.seen["RUNNING"] < 10


async def test_a_redeploy_under_load_cuts_no_stream_and_leaves_alone_what_has_not_changed(router: Router) -> None:
    await until(lambda: router.ready == 1, "one replica is there")
    async with router.load(3):
        before = await places(router)
        await asyncio.to_thread(deployment.deploy, CONFIG)
        more = msgspec.structs.replace(AUTOSCALING, min_replicas=2, max_replicas=4)
        await asyncio.to_thread(deployment.deploy, with_engine(autoscaling=more))
        await until(lambda: router.ready == 2, "there is one replica more, as the new minimum says")
        same = await places(router)
        assert before < same
        await asyncio.to_thread(deployment.deploy, with_engine(autoscaling=more, env={"KVLANE_TEST": "1"}))
        await until(lambda: rolled_out(2), "the redeploy is over")
        assert not same & await places(router)


async def places(router: Router) -> set[str]:
    """The replicas that answer now."""
    sinks = [RecordingSink() for _ in range(8)]
    await asyncio.gather(*(router.stream(2, sink) for sink in sinks))
    return {sink.receipts[-1].replica for sink in sinks}


def with_engine(**options: Any) -> Config:
    return msgspec.structs.replace(CONFIG, engines=(msgspec.structs.replace(ENGINE, **options),))


def rolled_out(replicas: int) -> bool:
    found = state()
    return found is not None and (found.status, found.ready) == ("RUNNING", replicas)


async def test_a_model_is_woken_in_a_serve_started_anew_whose_controller_dies_meanwhile(router: Router) -> None:
    await asyncio.to_thread(serve.shutdown)
    router.waker.wanted(MODEL, 11)
    await asyncio.to_thread(deployment.deploy, CONFIG)
    ray.kill(ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve"), no_restart=False)
    await until(lambda: router.ready == 3, "there are replicas for the eleven requests that are held")
    router.waker.wanted(MODEL, 0)
    await router.stream(5)
