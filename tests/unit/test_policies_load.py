"""Many requests through the policies, with the router's own accounts: affinity yields to load, and a fleet learns."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest

from router.load.account import Account
from router.policies import registry
from router.testing import FakePrefixes, make_request
from router.types import Charge, EngineInfo, Load, ModelCard, Snapshot

INFO = EngineInfo("sim", (ModelCard("model", "", 32768),), (), 256, 10_000, 16)
PROMPT = "You are a helpful assistant. ".ljust(4096, "x")


class Pool:
    """Replicas that take requests and, when told so, finish them."""

    def __init__(self, policy: str, size: int, seed: int, **options: Any) -> None:
        self._policy = registry.create(policy, options, random.Random(seed))
        self._accounts = [Account(f"replica-{index}", INFO, Load()) for index in range(size)]
        self._prefixes = FakePrefixes()
        self._streams = 0

    def send(self, prompt: str = PROMPT, **fields: Any) -> str:
        """The replica that a request for that prompt goes to, and waits at."""
        chain = self._prefixes.chain(prompt)
        prefix = self._prefixes.view(chain)
        views = tuple(account.view() for account in self._accounts)
        decision = self._policy.choose(make_request(prompt, **fields), Snapshot("model", views, prefix))
        account = next(each for each in self._accounts if each.replica == decision.replica)
        self._streams += 1
        held = prefix.held.get(decision.replica)
        account.submitted(self._streams, Charge(prefix.tokens - (held.tokens if held else 0), 0.0, chain))
        self._prefixes.hold(decision.replica, chain)
        return decision.replica

    def finish_all(self) -> None:
        """All replicas are idle again; their caches are not."""
        for account in self._accounts:
            account.stepped(Load(), self._streams, 0.0)


SHARED: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("least-queue", {}, {}),
    ("prefix-affinity", {}, {}),
    ("prefix-hash", {}, {}),
    ("weighted", {}, {}),
    ("session", {}, {"session_id": "one"}),
    ("lora-affinity", {}, {"lora": "poet"}),
]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("policy", "options", "fields"), SHARED, ids=[f"{one[0]}-{one[1]}" for one in SHARED])
def test_forty_concurrent_requests_with_one_prefix_take_no_more_than_half_to_one_of_four(
    policy: str, options: dict[str, Any], fields: dict[str, Any], seed: int
) -> None:
    pool = Pool(policy, 4, seed, **options)
    counts = Counter(pool.send(f"{PROMPT} question {index}", **fields) for index in range(40))
    assert max(counts.values()) <= 20, counts


@pytest.mark.parametrize("policy", ["prefix-affinity", "prefix-hash", "weighted"])
def test_one_after_another_requests_with_one_prefix_stay_together(policy: str) -> None:
    pool = Pool(policy, 4, 0)
    replicas = set()
    for index in range(20):
        replicas.add(pool.send(f"{PROMPT} question {index}"))
        pool.finish_all()
    assert len(replicas) == 1


@pytest.mark.parametrize("policy", ["prefix-affinity", "weighted"])
def test_one_after_another_unique_prompts_spread(policy: str) -> None:
    pool = Pool(policy, 4, 0)
    counts: Counter[str] = Counter()
    for index in range(200):
        counts[pool.send(f"prompt {index} ".ljust(2048, "y"))] += 1
        pool.finish_all()
    assert len(counts) == 4
    assert max(counts.values()) <= 1.5 * 50


@pytest.mark.parametrize("policy", ["prefix-affinity", "weighted"])
def test_a_busy_fleet_learns_a_shared_prefix_on_all_replicas_and_then_balances(policy: str) -> None:
    pool = Pool(policy, 4, 0)
    for index in range(200):
        pool.send(f"{PROMPT} question {index}")
    pool.finish_all()
    counts = Counter(pool.send(f"{PROMPT} another {index}") for index in range(40))
    assert set(counts.values()) == {10}


@pytest.mark.parametrize("policy", ["prefix-affinity", "weighted"])
def test_conversations_stay_where_their_turns_are_held(policy: str) -> None:
    pool = Pool(policy, 4, 0)
    for conversation in range(20):
        prompt, replicas = f"conversation {conversation} ".ljust(1024, "z"), set()
        for turn in range(5):
            replicas.add(pool.send(prompt))
            pool.finish_all()
            prompt += f"turn {turn} ".ljust(700, "z")
        assert len(replicas) == 1
