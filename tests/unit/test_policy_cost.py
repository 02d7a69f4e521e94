"""The cost policy's arithmetic against its formula, written down plainly, and what it makes of ties."""

from __future__ import annotations

import random

import pytest

from router.policies.cost import Cost
from router.testing import make_prefix, make_replica, make_request
from router.types import NO_PREFIX, Held, Outlook, PrefixView, ReplicaView, Snapshot


def costs(options: Cost.Options, snapshot: Snapshot) -> dict[str, float]:
    """One replica after the other, term by term; crowded ones at a million seconds more."""
    views, prefix, now = snapshot.replicas, snapshot.prefix, snapshot.now
    waits = [view.outlook.begins_s(now) for view in views]
    requests = [view.load.running + view.load.waiting + view.unacked for view in views]
    mean_wait = sum(waits) / len(views)
    pressure = sum(view.load.kv_usage for view in views) / len(views)
    price = options.price + options.queue_price * mean_wait
    crowd = (options.crowd_factor + 2 * mean_wait) * sum(requests) / len(views) + options.crowd_slack
    found = {}
    for view, wait, there in zip(views, waits, requests, strict=True):
        held = prefix.held.get(view.replica, Held(0, 0))
        prefill = view.outlook.prefill_s(prefix.tokens, min(held.tokens, prefix.tokens))
        own = wait + view.outlook.batch_s + options.answer_tokens * view.outlook.step_s
        others = options.interference * (view.load.running + view.unacked) * pressure**3
        found[view.replica] = own + prefill * (1 + price + others) + (1e6 if there > crowd else 0.0)
    return found


def a_snapshot(chance: random.Random) -> Snapshot:
    views = tuple(a_replica(f"replica-{i}", chance) for i in range(chance.randrange(2, 40)))
    some = chance.sample(views, chance.randrange(len(views) + 1))
    shared = chance.randrange(1, 17)
    held = {view.replica: chance.choice([shared, shared, chance.randrange(1, 17)]) for view in some}
    prefix = chance.choice([NO_PREFIX, make_prefix(held), make_prefix({})])
    if chance.random() < 0.3:  # The estimate of the prompt's length may fall short of what is held.
        prefix = PrefixView(prefix.chain, prefix.tokens // 2, prefix.held)
    return Snapshot("model", views, prefix, now=chance.random() * 2)


def a_replica(name: str, chance: random.Random) -> ReplicaView:
    outlook = Outlook(
        wait_s=chance.random(),
        step_s=chance.random() * 0.02,
        token_s=chance.random() * 1e-4,
        pair_s=chance.random() * 1e-8,
        batch_s=chance.random() * 0.01,
        as_of=chance.random(),
        sent_s=chance.choice([0.0, chance.random()]),
    )
    depth = chance.choice([chance.randrange(8), chance.randrange(60)])
    return make_replica(
        name,
        depth,
        unacked=chance.randrange(3),
        kv_usage=chance.random(),
        outlook=chance.choice([outlook, Outlook()]),
    )


def test_costs_are_those_of_the_formula() -> None:
    chance = random.Random(11)
    crowded = 0
    for _ in range(500):
        options = Cost.Options(price=chance.random(), interference=chance.random() * 10)
        snapshot = a_snapshot(chance)
        expected = costs(options, snapshot)
        crowded += max(expected.values()) > 1e6
        assert Cost(options, chance).explain(make_request(), snapshot) == pytest.approx(expected, rel=1e-9, abs=1e-9)
    assert crowded > 50


def test_the_least_cost_wins_and_the_next_one_stands_by() -> None:
    chance = random.Random(12)
    for _ in range(300):
        policy, snapshot = Cost(Cost.Options(), chance), a_snapshot(chance)
        expected = policy.explain(make_request(), snapshot)
        decision = policy.choose(make_request(), snapshot)
        least = min(expected.values())
        assert decision.score == least
        assert expected[decision.replica] <= least * 1.02 + 1e-4
        (fallback,) = decision.fallbacks
        assert expected[fallback] == min(cost for name, cost in expected.items() if name != decision.replica)


def test_equal_costs_are_all_chosen() -> None:
    policy = Cost(Cost.Options(), random.Random(13))
    snapshot = Snapshot("model", tuple(make_replica(f"replica-{i}") for i in range(4)))
    assert {policy.choose(make_request(), snapshot).replica for _ in range(100)} == {f"replica-{i}" for i in range(4)}
