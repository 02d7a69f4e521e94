"""Request routers of Ray Serve: kvlane's policies in a stock Serve deployment, and Ray's own routers in kvlane."""

from __future__ import annotations

import asyncio
import secrets
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest
from ray import serve

from router.app import App
from router.errors import ConfigError
from router.options import Config, GrpcOptions, HttpOptions, MembershipOptions, PolicyOptions
from router.ray_router import request_router_config
from router.types import Reason
from tests.fakes import eventually
from tests.integration.ray_local import DEADLINE_S, cluster
from tests.integration.test_routing import MODEL, Fleet, engines

REPLICAS = 4
POWER_OF_TWO = "ray.serve._private.request_router.pow_2_router:PowerOfTwoChoicesRequestRouter"
PREFIX_AWARE = "ray.llm._internal.serve.routing_policies.prefix_aware.prefix_aware_router:PrefixCacheAffinityRouter"

on_ray = pytest.mark.ray
slow = pytest.mark.slow


class Deployed:
    """A running deployment, as its callers know it."""

    def __init__(self, handle: Any) -> None:
        self._chat = handle.options(stream=True).chat
        self._hold = handle.options(stream=True).hold
        self._release = handle.release

    async def chat(self, *contents: str, **fields: Any) -> str:
        """Has a conversation answered; the name of the replica that did."""
        roles = ("user", "assistant")
        messages = [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]
        async with asyncio.timeout(DEADLINE_S):
            pieces = [piece async for piece in self._chat.remote({"model": "m", "messages": messages, **fields})]
        assert [piece["token"] for piece in pieces] == [0, 1, 2]
        (replica,) = {piece["replica"] for piece in pieces}
        return str(replica)

    @asynccontextmanager
    async def held(self, count: int) -> AsyncIterator[list[str]]:
        """So many streams that have begun and do not end; the replicas that they are on."""
        async with asyncio.timeout(DEADLINE_S):
            streams = [self._hold.remote({"prompt": secrets.token_hex(600)}) for _ in range(count)]
            places = list(await asyncio.gather(*(anext(aiter(stream)) for stream in streams)))
            yield places
            for stream in streams:
                stream.cancel()


@contextmanager
def deployment(**options: Any) -> Iterator[Deployed]:
    """Four replicas of a stock Serve deployment that streams, with kvlane's request router."""

    # Within a function, so that Ray takes the class along by value.
    class Llm:
        def __init__(self) -> None:
            self.name = serve.get_replica_context().replica_id.unique_id

        async def chat(self, request: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
            for token in range(3):
                yield {"replica": self.name, "token": token}

        async def hold(self, request: dict[str, Any]) -> AsyncIterator[str]:
            yield self.name
            await asyncio.Event().wait()

    made: Any = serve.deployment(
        Llm,
        num_replicas=REPLICAS,
        max_ongoing_requests=50,
        ray_actor_options={"num_cpus": 0.01},
        graceful_shutdown_timeout_s=1.0,
        request_router_config=request_router_config(**options, stall_ms=60_000.0),
    )
    name = f"stock-{options['policy']}"
    serve.start(proxy_location="Disabled")
    try:
        yield Deployed(serve.run(made.bind(), name=name, route_prefix=None))
    finally:
        serve.delete(name)


@pytest.fixture(scope="module")
def ray() -> Iterator[None]:
    with cluster():
        yield


@on_ray
@slow
async def test_round_robin_deals_the_requests_of_a_stock_deployment_in_turn(ray: None) -> None:
    with deployment(policy="round-robin") as deployed:
        places = [await deployed.chat(f"Question {i}") for i in range(20)]
    assert sorted(Counter(places).values()) == [5, 5, 5, 5]
    assert places[:4] * 5 == places


@on_ray
@slow
async def test_least_queue_spreads_concurrent_streams_of_a_stock_deployment_evenly(ray: None) -> None:
    with deployment(policy="least-queue") as deployed:
        async with deployed.held(6) as first, deployed.held(6) as second:
            counts = Counter(first + second)
    assert sorted(counts.values()) == [3, 3, 3, 3]


@on_ray
@slow
async def test_prefix_affinity_keeps_the_conversations_of_a_stock_deployment_together(ray: None) -> None:
    with deployment(policy="prefix-affinity", options={"max_lead": 2}) as deployed:
        turns = {each: [secrets.token_hex(600)] for each in range(8)}
        homes = {each: await deployed.chat(*turn) for each, turn in turns.items()}
        for _ in range(3):
            for each, turn in turns.items():
                turn += ["an answer", secrets.token_hex(300)]
                assert await deployed.chat(*turn) == homes[each]
        shared = secrets.token_hex(2048)
        together = await asyncio.gather(*(deployed.chat(shared + f" question {i}") for i in range(40)))
    assert len(set(homes.values())) > 1
    assert max(Counter(together).values()) <= 20


@asynccontextmanager
async def kvlane(tmp_path: Path, router_class: str, **kwargs: Any) -> AsyncIterator[Fleet]:
    """A router of ours with a request router of Ray's, over four simulated replicas."""
    async with engines(tmp_path, REPLICAS) as replicas:
        app = App(
            Config(
                http=HttpOptions(enabled=False),
                grpc=GrpcOptions(enabled=False),
                membership=MembershipOptions(kind="static", replicas=replicas),
                # A pause of this machine is no fault of the policy.
                policy=PolicyOptions(name="ray", stall_ms=60_000.0, options={"class": router_class, "kwargs": kwargs}),
            )
        )
        await app.start()
        try:
            await eventually(lambda: app.replicas.readiness().models.get(MODEL) == REPLICAS)
            yield Fleet(app)
        finally:
            await app.stop(0)


@pytest.mark.parametrize("router_class", [POWER_OF_TWO, PREFIX_AWARE])
@pytest.mark.parametrize("together", [False, True])
async def test_rays_routers_spread_unique_prompts_over_all_replicas(
    tmp_path: Path, router_class: str, together: bool
) -> None:
    prompts = [secrets.token_hex(200) for _ in range(60)]
    async with kvlane(tmp_path, router_class) as fleet:
        if together:
            answers = await asyncio.gather(*(fleet.chat(("user", prompt)) for prompt in prompts))
        else:
            answers = [await fleet.chat(("user", prompt)) for prompt in prompts]
    assert {receipt.reason for _, receipt in answers} == {Reason.POLICY}
    assert sum(fleet.served.values()) == 60
    assert len(fleet.served) == REPLICAS
    assert max(fleet.served.values()) <= 30


async def test_rays_prefix_aware_router_keeps_conversations_together_in_kvlane(tmp_path: Path) -> None:
    async with kvlane(tmp_path, PREFIX_AWARE, imbalanced_threshold=10) as fleet:
        for _ in range(8):
            turns = [("user", secrets.token_hex(200))]
            home = None
            for _ in range(3):
                answer, receipt = await fleet.chat(*turns)
                home = home or receipt.replica
                assert receipt.replica == home
                turns += [("assistant", answer), ("user", "And then?")]
    assert len(fleet.served) == REPLICAS


def test_a_mistake_in_the_options_is_found_before_anything_is_deployed() -> None:
    with pytest.raises(ConfigError, match="least-queue"):
        request_router_config(policy="least-queu")
    with pytest.raises(ConfigError, match="max_leed"):
        request_router_config(policy="prefix-affinity", options={"max_leed": 1})
    with pytest.raises(ConfigError, match="kv_token"):
        request_router_config(kv_token=5)
