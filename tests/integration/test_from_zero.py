"""From zero on real Ray Serve: clients of a model without any replica wait, Serve is woken, and all are served."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

import httpx
import pytest
from kvlane.client import Client

from engine import deployment
from router import up
from router.app import App
from router.options import AutoscalingOptions, Config, EngineOptions, GrpcOptions, HttpOptions, MembershipOptions
from tests.integration.ray_local import NAMESPACE, cluster, until

pytestmark = [pytest.mark.ray, pytest.mark.slow]

MODEL = "sim"
COUNT = 100
"""Over each protocol."""
ENGINE = EngineOptions(
    name=MODEL,
    kind="sim",
    num_cpus=0.1,
    lane_host="127.0.0.1",
    health_check_period_s=0.5,
    args={"step_base_ms": 5.0, "prefill_ms_per_token": 0.0},
    autoscaling=AutoscalingOptions(
        min_replicas=0, max_replicas=1, downscale_delay_s=1.0, downscale_to_zero_delay_s=6.0
    ),
)
CONFIG = Config(
    http=HttpOptions(port=0),
    grpc=GrpcOptions(port=0),
    membership=MembershipOptions(ray_namespace=NAMESPACE),
    engines=(ENGINE,),
)


@pytest.fixture(scope="module", autouse=True)
def at_zero() -> Iterator[None]:
    with cluster():
        deployment.deploy(CONFIG)
        up._wait_for_engines(CONFIG)
        yield


async def test_200_requests_sent_at_zero_wake_the_model_and_all_complete() -> None:
    app = App(CONFIG)
    await app.start()
    try:
        async with asyncio.timeout(60):
            await app.wait_ready()  # Without any replica.
        assert app.replicas.readiness().models == {MODEL: 0}
        up_at, first_at = [0.0], [0.0]

        async def watch() -> None:
            while not app.replicas.ready(MODEL):
                await app.replicas.wait_for_news()
            up_at[0] = time.monotonic()

        url = f"http://127.0.0.1:{app.http_port}/v1/completions"
        watching = asyncio.create_task(watch())
        async with (
            httpx.AsyncClient(timeout=120, limits=httpx.Limits(max_connections=COUNT)) as http,
            Client(f"127.0.0.1:{app.grpc_port}") as grpc,
        ):

            async def stream(number: int) -> bool:
                body = {"model": MODEL, "prompt": f"p{number}", "max_tokens": 5, "stream": True}
                async with http.stream("POST", url, json=body) as answer:
                    lines = []
                    async for line in answer.aiter_lines():
                        if line.startswith("data: "):
                            first_at[0] = first_at[0] or time.monotonic()
                            lines.append(line)
                return answer.status_code == 200 and len(lines) >= 6 and lines[-1] == "data: [DONE]"

            async def call(number: int) -> bool:
                deltas = [delta async for delta in grpc.generate(MODEL, f"p{number}", max_tokens=5)]
                return sum(len(delta.token_ids) for delta in deltas) == 5

            tasks = [asyncio.create_task(ask(number)) for ask in (stream, call) for number in range(COUNT)]
            async with asyncio.timeout(120):
                assert await asyncio.gather(*tasks) == [True] * (2 * COUNT)
        await watching
        print(f"first token {1e3 * (first_at[0] - up_at[0]):.0f} ms after the lane was open")
        await until(lambda: not app.replicas.ready(MODEL), "the model is at zero again")
        assert app.replicas.readiness().ready
    finally:
        await app.stop(5.0)
