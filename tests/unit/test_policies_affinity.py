"""The policies that keep requests together: by session, by prefix, by LoRA adapter."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest

from router.policies import registry
from router.policies.adapters import AdapterMirror
from router.policies.base import Policy
from router.policies.queues import Patience
from router.policies.rendezvous import home, key_of
from router.testing import make_prefix, make_replica, make_request, make_snapshot
from router.types import CacheMode, Decision, Reason, Request, Snapshot

FOUR = ["a", "b", "c", "d"]


def create(name: str, seed: int = 0, **options: Any) -> Policy:
    return registry.create(name, options, random.Random(seed))


def decide(policy: Policy, request: Request, depths: list[int], names: list[str] = FOUR, **prompt: Any) -> Decision:
    return policy.choose(request, make_snapshot(depths, names=names, **prompt))


def busy_at(name: str, depth: int) -> list[int]:
    return [depth if each == name else 0 for each in FOUR]


# How long a queue may be


def test_a_queue_is_overloaded_only_above_both_bounds() -> None:
    patience = Patience(max_lead=8, load_factor=1.5)
    assert patience.limit([0, 0, 0, 4]) == 8
    assert patience.limit([100, 100, 100, 140]) == 165
    assert Patience(max_lead=0, load_factor=1).limit([3, 3]) == 3


# Rendezvous hashing


def test_keys_spread_evenly_and_only_those_of_a_replica_that_leaves_move() -> None:
    replicas = [make_replica(name) for name in FOUR]
    homes = {key: home(key_of(f"key {key}"), replicas, [0] * 4, 0)[0] for key in range(2000)}
    assert min(Counter(homes.values()).values()) > 400
    for key, place in homes.items():
        after, _ = home(key_of(f"key {key}"), replicas[:3], [0] * 3, 0)
        assert after == place or place == 3


def test_a_home_does_not_depend_on_the_order_of_replicas() -> None:
    replicas = [make_replica(name) for name in FOUR]
    for key in range(50):
        place, _ = home(key, replicas, [0] * 4, 0)
        turned, _ = home(key, replicas[::-1], [0] * 4, 0)
        assert turned == 3 - place


# Sessions


def test_a_session_stays_on_its_home_in_every_router() -> None:
    request = make_request(session_id="one")
    homes = {decide(create("session", seed), request, [0, 3, 1, 2]).replica for seed in range(10)}
    assert len(homes) == 1
    assert decide(create("session"), request, [0] * 4).reason is Reason.SESSION


def test_a_session_leaves_an_overloaded_home_and_returns() -> None:
    policy, request = create("session", max_lead=2), make_request(session_id="one")
    first = decide(policy, request, [0] * 4).replica
    assert decide(policy, request, busy_at(first, 2)).replica == first
    moved = decide(policy, request, busy_at(first, 3))
    assert moved.replica != first
    assert moved.reason is Reason.OVERLOADED
    assert {decide(create("session", seed, max_lead=2), request, busy_at(first, 3)).replica for seed in range(9)} == {
        moved.replica
    }
    assert decide(policy, request, [0] * 4).replica == first


def test_a_session_moves_when_its_home_is_gone() -> None:
    policy, request = create("session"), make_request(session_id="one")
    first = decide(policy, request, [0] * 4).replica
    rest = [name for name in FOUR if name != first]
    assert decide(policy, request, [0] * 3, rest).replica in rest


def test_requests_without_a_session_go_to_the_shortest_queue() -> None:
    decision = decide(create("session"), make_request(), [1, 0, 1, 1])
    assert (decision.replica, decision.reason) == ("b", Reason.SHORTEST_QUEUE)


def test_a_session_id_that_is_no_unicode_has_a_home_too() -> None:
    assert decide(create("session"), make_request(session_id="\ud800"), [0] * 4).reason is Reason.SESSION


# Prefixes by hash


def test_prompts_that_begin_alike_share_a_home_whatever_follows() -> None:
    policy = create("prefix-hash", blocks=4)
    for system in range(20):
        start = f"system prompt {system} " * 100
        texts = [start, start + "a question " * 300, start + "another question " * 300]
        lengths = (300, 1024, 5000)
        chosen = {
            decide(policy, make_request(), [0] * 4, prompt=text, prompt_tokens=tokens).replica
            for text, tokens in zip(texts, lengths, strict=True)
        }
        assert len(chosen) == 1


def test_prompts_that_begin_differently_spread() -> None:
    policy = create("prefix-hash")
    chosen = Counter(
        decide(policy, make_request(), [0] * 4, prompt=f"prompt {each} ", prompt_tokens=1024).replica
        for each in range(200)
    )
    assert len(chosen) == 4
    assert min(chosen.values()) > 25


def test_which_blocks_are_hashed_is_an_option() -> None:
    start = "the same beginning".ljust(256 * 2, ".")

    def chosen(blocks: int, ends: int) -> set[str]:
        policy = create("prefix-hash", blocks=blocks)
        texts = [start + f"end {end} " * 500 for end in range(ends)]
        return {decide(policy, make_request(), [0] * 4, prompt=text, prompt_tokens=1024).replica for text in texts}

    assert len(chosen(2, 30)) == 1
    assert len(chosen(3, 30)) == 4


def test_an_overloaded_home_is_left_for_the_next_one() -> None:
    policy = create("prefix-hash", max_lead=4)
    first = decide(policy, make_request(), [0] * 4, prompt_tokens=1024)
    assert first.reason is Reason.PREFIX_HASH
    assert decide(policy, make_request(), busy_at(first.replica, 4), prompt_tokens=1024).replica == first.replica
    moved = decide(policy, make_request(), busy_at(first.replica, 5), prompt_tokens=1024)
    assert moved.replica != first.replica
    assert moved.reason is Reason.OVERLOADED


def test_without_a_prompt_the_session_counts_and_then_the_queue() -> None:
    policy = create("prefix-hash")
    session = decide(policy, make_request(session_id="one"), [0] * 4)
    assert session.reason is Reason.SESSION
    assert session.replica == decide(create("session"), make_request(session_id="one"), [0] * 4).replica
    assert decide(policy, make_request(), [1, 1, 0, 1]).replica == "c"
    # Shorter than a block: nothing could be told apart.
    short = decide(policy, make_request(), [1, 1, 0, 1], prompt_tokens=10)
    assert (short.replica, short.reason) == ("c", Reason.SHORTEST_QUEUE)


def test_where_no_engine_reuses_prefixes_load_alone_counts() -> None:
    queues = zip(FOUR, [1, 1, 1, 0], strict=True)
    replicas = tuple(make_replica(name, depth, cache=CacheMode.OFF) for name, depth in queues)
    for prompt in range(8):
        snapshot = Snapshot("model", replicas, make_prefix({}, prompt=str(prompt)))
        decision = create("prefix-hash").choose(make_request(), snapshot)
        assert (decision.replica, decision.reason) == ("d", Reason.SHORTEST_QUEUE)


# Prefixes as they are held


def test_the_longest_held_prefix_wins_over_a_shorter_queue() -> None:
    decision = decide(create("prefix-affinity"), make_request(), [5, 6, 0, 0], held={"a": 8, "b": 9})
    assert (decision.replica, decision.reason, decision.score) == ("b", Reason.LONGEST_PREFIX, 6)


def test_of_equal_prefixes_the_shortest_queue_wins_and_ties_are_random() -> None:
    policy = create("prefix-affinity")
    held = {"a": 8, "b": 8, "c": 8, "d": 2}
    chosen = Counter(decide(policy, make_request(), [3, 2, 2, 0], held=held).replica for _ in range(200))
    assert set(chosen) == {"b", "c"}
    assert min(chosen.values()) > 60


def test_an_overloaded_holder_gives_way_to_the_next_longest() -> None:
    policy, held = create("prefix-affinity", max_lead=4), {"a": 16, "b": 8}
    assert decide(policy, make_request(), [4, 0, 0, 0], held=held).replica == "a"
    decision = decide(policy, make_request(), [5, 0, 0, 0], held=held)
    assert (decision.replica, decision.reason) == ("b", Reason.LONGEST_PREFIX)
    decision = decide(policy, make_request(), [5, 5, 1, 0], held=held)
    assert (decision.replica, decision.reason) == ("d", Reason.OVERLOADED)


def test_too_little_of_a_prompt_is_no_reason() -> None:
    for share, winner in ((0.25, "a"), (0.26, "b")):
        policy = create("prefix-affinity", min_share=share)
        assert decide(policy, make_request(), [1, 0, 1, 1], held={"a": 4}, prompt_tokens=1024).replica == winner


def test_holders_that_are_no_candidates_do_not_matter() -> None:
    decision = decide(create("prefix-affinity"), make_request(), [1, 0], ["a", "b"], held={"gone": 16})
    assert (decision.replica, decision.reason) == ("b", Reason.SHORTEST_QUEUE)


# LoRA adapters


def test_an_adapter_stays_where_it_was_used() -> None:
    policy = create("lora-affinity")
    request = make_request(lora="poet")
    first = decide(policy, request, [0] * 4)
    assert first.reason is Reason.LORA
    assert {decide(policy, request, busy_at(first.replica, 8)).replica for _ in range(20)} == {first.replica}


def test_an_adapters_load_spreads_over_the_replicas_that_have_it() -> None:
    policy = create("lora-affinity", max_lead=2)
    request = make_request(lora="poet")
    first = decide(policy, request, [0] * 4).replica
    second = decide(policy, request, busy_at(first, 3)).replica
    assert second != first
    # Now both have it, and the shorter queue counts.
    depths = [{first: 1, second: 0}.get(name, 0) for name in FOUR]
    assert decide(policy, request, depths).replica == second


@pytest.mark.slow
def test_routers_agree_on_an_adapters_first_replica_and_adapters_spread() -> None:
    homes: dict[str, set[str]] = {f"adapter {each}": set() for each in range(40)}
    for seed in range(3):
        for adapter in homes:
            homes[adapter].add(decide(create("lora-affinity", seed), make_request(lora=adapter), [0] * 4).replica)
    assert all(len(places) == 1 for places in homes.values())
    assert len(set.union(*homes.values())) == 4


def test_requests_without_an_adapter_go_to_the_shortest_queue() -> None:
    decision = decide(create("lora-affinity"), make_request(), [1, 1, 1, 0])
    assert (decision.replica, decision.reason) == ("d", Reason.SHORTEST_QUEUE)


def test_the_mirror_of_adapters_forgets_the_least_recently_used() -> None:
    mirror = AdapterMirror(slots=2)
    for adapter in ("one", "two", "one", "three"):
        mirror.used("a", adapter)
    assert [list(mirror.holders(each)) for each in ("one", "two", "three")] == [["a"], [], ["a"]]


def test_the_mirror_of_adapters_is_bounded_as_replicas_come_and_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("router.policies.adapters._MAX_REPLICAS", 3)
    mirror = AdapterMirror(slots=2)
    for index in range(10):
        mirror.used(f"replica-{index}", "one")
        mirror.used(f"replica-{index}", "two")
    assert sorted(mirror.holders("one")) == sorted(mirror.holders("two")) == ["replica-7", "replica-8", "replica-9"]
    assert len(mirror._loaded) == 3
