"""Where requests go: a whole router process over simulated replicas in the test's own process."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections import Counter
from collections.abc import AsyncIterator
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
from router.types import CacheMode, Reason, Receipt, Request, Rpc
from tests.fakes import DEADLINE_S, SECRET, RecordingSink, eventually

pytestmark = [pytest.mark.timeout(120)]

MODEL = "sim"
REPLICAS = 4
ENGINE: dict[str, Any] = {"step_base_ms": 2.0, "prefill_ms_per_token": 0.01, "answer_tokens": 4}
AWARE = ["prefix-affinity", "cost"]
OTHERS = ["power-of-two", "prefix-affinity"]


class Fleet:
    """A router and the replicas behind it."""

    def __init__(self, app: App) -> None:
        self.app = app
        self.served: Counter[str] = Counter()
        """Requests by the replica that they went to."""
        self._asked = 0

    async def chat(self, *messages: tuple[str, str]) -> tuple[str, Receipt]:
        """The answer to a conversation of (role, content), and why it went where it went."""
        self._asked += 1
        sink = RecordingSink()
        await asyncio.wait_for(self.app.dispatcher.run(chat(f"r{self._asked}", *messages), sink), DEADLINE_S)
        receipt = sink.receipts[-1]
        self.served[receipt.replica] += 1
        return json.loads(b"".join(sink.payloads))["choices"][0]["message"]["content"], receipt

    async def ask_together(self, system: str, questions: list[str]) -> None:
        """Each of the questions at the same time, behind the same system prompt."""
        await asyncio.gather(*(self.chat(("system", system), ("user", question)) for question in questions))

    def modes(self) -> set[CacheMode]:
        """What is known of the replicas' caches."""
        return {status.mode for status in self.app.replicas.caches().values()}


def chat(request_id: str, *messages: tuple[str, str]) -> Request:
    turns = [{"role": role, "content": content} for role, content in messages]
    body = json.dumps({"model": MODEL, "messages": turns}).encode()
    headers = (("content-type", "application/json"),)
    return Request(request_id, MODEL, Rpc.HTTP, "/v1/chat/completions", body, headers=headers)


@asynccontextmanager
async def engines(tmp_path: Path, count: int = REPLICAS, **options: Any) -> AsyncIterator[tuple[StaticReplica, ...]]:
    """Cold replicas."""
    secret = tmp_path / "secret"
    secret.write_bytes(SECRET)
    running, records = [], []
    for i in range(count):
        replica = Replica(f"replica-{i}", SimulatedEngine(ENGINE | options | {"seed": i}, MODEL), SECRET)
        await replica.start()
        running.append(replica)
        port = await replica.listen("127.0.0.1")
        records.append(StaticReplica(name=replica.name, port=port, secret_file=str(secret)))
    try:
        yield tuple(records)
    finally:
        for replica in running:
            await replica.close()


@asynccontextmanager
async def router(replicas: tuple[StaticReplica, ...], policy: str, **config: Any) -> AsyncIterator[Fleet]:
    """A router with a lane to each of them, that knows what each holds."""
    app = App(
        Config(
            **{"http": HttpOptions(enabled=False), "grpc": GrpcOptions(enabled=False)} | config,
            membership=MembershipOptions(kind="static", replicas=replicas),
            policy=PolicyOptions(name=policy),
        )
    )
    await app.start()
    try:
        running = Fleet(app)
        await eventually(lambda: app.replicas.readiness().models.get(MODEL) == len(replicas))
        await eventually(lambda: CacheMode.APPROXIMATE not in running.modes())
        yield running
    finally:
        await app.stop(0)


@asynccontextmanager
async def fleet(tmp_path: Path, policy: str, **config: Any) -> AsyncIterator[Fleet]:
    """A router over cold replicas."""
    async with engines(tmp_path) as replicas, router(replicas, policy, **config) as running:
        yield running


@pytest.mark.parametrize("policy", ["cost", *(pytest.param(each, marks=pytest.mark.slow) for each in OTHERS)])
async def test_unique_prompts_one_after_the_other_spread_over_the_replicas(tmp_path: Path, policy: str) -> None:
    count = 200
    async with fleet(tmp_path, policy) as running:
        for i in range(count):
            await running.chat(("user", f"{i} has a prompt of its own. " * 20))
    assert sum(running.served.values()) == count
    assert max(running.served.values()) <= 1.5 * count / REPLICAS, running.served


@pytest.mark.parametrize("policy", AWARE)
async def test_a_burst_with_one_shared_prefix_does_not_all_go_to_one_replica(tmp_path: Path, policy: str) -> None:
    system = "You are one of four. " * 200
    async with fleet(tmp_path, policy) as running:
        await running.ask_together(system, [f"Question {i}?" for i in range(40)])
    assert sum(running.served.values()) == 40
    assert max(running.served.values()) <= 20, running.served


@pytest.mark.parametrize("policy", AWARE)
async def test_a_cold_fleet_learns_a_shared_system_prompt_wherever_it_is_served(tmp_path: Path, policy: str) -> None:
    system = "You answer in verse, always. " * 150
    async with fleet(tmp_path, policy) as running:
        for turn in range(4):
            await running.ask_together(system, [f"Question {i} of turn {turn}?" for i in range(24)])
        chain = running.app.prefixes.chain(chat("r", ("system", system)))
        assert chain is not None
        held = running.app.prefixes.view(MODEL, chain).held
    assert {replica for replica, one in held.items() if one.blocks == len(chain.blocks)} == set(running.served)
    assert all(one.soon == 0 for one in held.values())
    assert len(running.served) > 1, running.served


async def test_a_conversation_stays_where_its_turns_ran_and_its_answers_count_as_held(tmp_path: Path) -> None:
    async with fleet(tmp_path, "prefix-affinity") as running:
        turns = [("system", "You are patient. " * 100), ("user", "How long is a long answer? " * 10)]
        receipts = []
        for turn in range(4):
            answer, receipt = await running.chat(*turns)
            receipts.append(receipt)
            turns += [("assistant", answer), ("user", f"And then {turn}? " * 20)]
        status = running.app.prefixes.status()
    assert len(running.served) == 1
    assert receipts[0].matched == 0
    for before, after in itertools.pairwise(receipts):
        assert after.matched >= before.blocks - 1  # The last block may end in a KV block that is not full.
        assert after.reason is Reason.LONGEST_PREFIX
    assert (status.gaps, status.off) == (0, 0)
    assert status.compared == 4


async def test_a_new_router_knows_at_once_what_the_replicas_hold(tmp_path: Path) -> None:
    messages = [("system", "You forget nothing. " * 200), ("user", "What do you know?")]
    async with engines(tmp_path) as replicas:
        async with router(replicas, "prefix-affinity") as first:
            _, cold = await first.chat(*messages)
        async with router(replicas, "prefix-affinity") as second:
            _, warm = await second.chat(*messages)
    assert (cold.matched, warm.replica) == (0, cold.replica)
    assert warm.matched >= warm.blocks - 1


async def test_what_was_evicted_is_no_longer_counted_on(tmp_path: Path) -> None:
    async with (
        engines(tmp_path, 1, kv_blocks=256, max_model_len=4096) as replicas,
        router(replicas, "prefix-affinity") as running,
    ):
        for i in range(12):  # Each takes about a third of the KV cache.
            await running.chat(("user", f"{i} fills the cache. " * 300))
        _, again = await running.chat(("user", "0 fills the cache. " * 300))
        status = running.app.prefixes.status()
    assert (again.matched, status.gaps, status.off, status.compared) == (0, 0, 0, 13)


async def test_without_prefix_caching_requests_go_by_load_alone(tmp_path: Path) -> None:
    async with (
        engines(tmp_path, prefix_caching=False) as replicas,
        router(replicas, "prefix-affinity") as running,
    ):
        assert running.modes() == {CacheMode.OFF}
        for _ in range(2):
            _, receipt = await running.chat(("user", "again and again " * 100))
    assert (receipt.blocks, receipt.reason) == (0, Reason.SHORTEST_QUEUE)


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
