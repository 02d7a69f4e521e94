"""Where requests go: a whole router process over simulated replicas in the test's own process."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from engine.replica import Replica
from engine.simulated import SimulatedEngine
from router.app import App
from router.options import (
    AdminOptions,
    Config,
    GrpcOptions,
    HttpOptions,
    MembershipOptions,
    PolicyOptions,
    StaticReplica,
)
from router.types import Request, Rpc
from tests.fakes import DEADLINE_S, SECRET, RecordingSink, eventually

pytestmark = [pytest.mark.timeout(120)]

MODEL = "sim"
REPLICAS = 4
ENGINE: dict[str, Any] = {"step_base_ms": 2.0, "prefill_ms_per_token": 0.01, "answer_tokens": 4}
AWARE = ["prefix-affinity", "cost"]


class Fleet:
    """A router and the replicas behind it."""

    def __init__(self, app: App) -> None:
        self.app = app
        self.served: Counter[str] = Counter()
        """Requests by the replica that they went to."""
        self._asked = 0

    async def ask(self, prompt: str, **message: str) -> None:
        """One chat request, to its end."""
        self._asked += 1
        system = [{"role": "system", "content": message["system"]}] if "system" in message else []
        body = {"model": MODEL, "messages": [*system, {"role": "user", "content": prompt}], "stream": True}
        headers = (("content-type", "application/json"),)
        request = Request(
            f"r{self._asked}", MODEL, Rpc.HTTP, "/v1/chat/completions", json.dumps(body).encode(), headers=headers
        )
        sink = RecordingSink()
        await asyncio.wait_for(self.app.dispatcher.run(request, sink), DEADLINE_S)
        self.served[sink.receipts[-1].replica] += 1


@asynccontextmanager
async def fleet(tmp_path: Path, policy: str, replicas: int = REPLICAS, **config: Any) -> AsyncIterator[Fleet]:
    """A cold fleet under that policy."""
    secret = tmp_path / "secret"
    secret.write_bytes(SECRET)
    running, records = [], []
    for i in range(replicas):
        replica = Replica(f"replica-{i}", SimulatedEngine(ENGINE | {"seed": i}, MODEL), SECRET)
        await replica.start()
        running.append(replica)
        port = await replica.listen("127.0.0.1")
        records.append(StaticReplica(name=replica.name, port=port, secret_file=str(secret)))
    app = App(
        Config(
            **{"http": HttpOptions(enabled=False), "grpc": GrpcOptions(enabled=False)} | config,
            membership=MembershipOptions(kind="static", replicas=tuple(records)),
            policy=PolicyOptions(name=policy),
        )
    )
    await app.start()
    try:
        await eventually(lambda: app.replicas.readiness().models.get(MODEL) == replicas)
        yield Fleet(app)
    finally:
        await app.stop(0)
        for replica in running:
            await replica.close()


async def together(count: int, ask: Callable[[int], Coroutine[Any, Any, None]]) -> None:
    await asyncio.gather(*(ask(i) for i in range(count)))


@pytest.mark.parametrize("policy", ["power-of-two", *AWARE])
async def test_unique_prompts_one_after_the_other_spread_over_the_replicas(tmp_path: Path, policy: str) -> None:
    count = 200
    async with fleet(tmp_path, policy) as running:
        for i in range(count):
            await running.ask(f"{i} has a prompt of its own. " * 20)
    assert sum(running.served.values()) == count
    assert max(running.served.values()) <= 1.5 * count / REPLICAS, running.served


@pytest.mark.parametrize("policy", AWARE)
async def test_a_burst_with_one_shared_prefix_does_not_all_go_to_one_replica(tmp_path: Path, policy: str) -> None:
    system = "You are one of four. " * 200
    async with fleet(tmp_path, policy) as running:
        await together(40, lambda i: running.ask(f"Question {i}?", system=system))
    assert sum(running.served.values()) == 40
    assert max(running.served.values()) <= 20, running.served


@pytest.mark.parametrize("policy", AWARE)
async def test_a_cold_fleet_learns_a_shared_system_prompt_wherever_it_is_served(tmp_path: Path, policy: str) -> None:
    system = "You answer in verse, always. " * 150
    async with fleet(tmp_path, policy) as running:
        for turn in range(4):
            await together(24, lambda i, turn=turn: running.ask(f"Question {turn} {i}?", system=system))  # type: ignore[misc]
        chain = running.app.prefixes.chain(
            Request(
                "r",
                MODEL,
                Rpc.HTTP,
                "/v1/chat/completions",
                json.dumps({"model": MODEL, "messages": [{"role": "system", "content": system}]}).encode(),
            )
        )
        assert chain is not None
        learned: dict[str, int] = {}

        def all_know() -> bool:
            held = running.app.prefixes.view(MODEL, chain).held
            learned.update({replica: one.blocks - one.soon for replica, one in held.items()})
            return all(learned.get(replica, 0) >= len(chain.blocks) - 1 for replica in running.served)

        await eventually(all_know)
    assert len(running.served) > 1, running.served


async def test_the_admin_port_tells_why_each_request_went_where_it_went(tmp_path: Path) -> None:
    admin = AdminOptions(enabled=True, port=0, routes=8)
    async with fleet(tmp_path, "prefix-affinity", admin=admin, http=HttpOptions(port=0)) as running:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{running.app.http_port}") as client:
            body = {"model": MODEL, "messages": [{"role": "user", "content": "a secret " * 200}]}
            await client.post("/v1/chat/completions", json=body)
            answer = await client.post(
                "/v1/chat/completions", json=body, headers={"x-kvlane-explain": "1", "x-request-id": "second"}
            )
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{running.app.admin_port}") as client:
            page = await client.get("/debug/routes", params={"request_id": "second"})
            ready = (await client.get("/readyz")).json()
            metrics = (await client.get("/metrics")).text
    assert answer.status_code == 200
    chosen = answer.headers["x-kvlane-route"]
    assert ";reason=longest_prefix;" in chosen
    (record,) = page.json()["routes"]
    route = record["route"]
    assert chosen.startswith(f"replica={route['replica']};policy=prefix-affinity;")
    assert f";matched={route['matched']}/{route['blocks']};" in chosen
    assert route["matched"] > 0
    assert route["candidates"][0]["replica"] == route["replica"]
    assert len(route["candidates"]) == REPLICAS
    assert all(f"{one['replica']}(" in chosen for one in route["candidates"])
    assert b"secret" not in page.content
    assert set(ready["caches"]) == {f"replica-{i}" for i in range(REPLICAS)}
    assert 'kvlane_prefix_matched_tokens_total{model="sim"}' in metrics
