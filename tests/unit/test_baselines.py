"""The simulator's re-implementations of other routers, rule by rule, and its bounds against the simulated engine."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.simulated_core import SimulatedCore
from engine.simulated_text import Prompt
from loadtests.simulate.baselines import (
    BASELINES,
    Aibrix,
    CacheAware,
    Chwbl,
    Dynamo,
    LlmD,
    LMetric,
    RayPrefix,
    Remembered,
)
from loadtests.simulate.bounds import Greedy, Ideal, true_ttft_s
from loadtests.simulate.context import Context
from loadtests.simulate.perf import H200_8B
from router.policies.base import NoOptions, Policy
from router.testing import check_policy, make_request
from router.types import Chain, Held, Load, PrefixView, Reason, ReplicaView, Snapshot

BLOCK_TOKENS = 512
BLOCK_BYTES = 2048
ROUTERS = (CacheAware, RayPrefix, Chwbl, Aibrix, LlmD, Dynamo, LMetric)


def view(name: str, leases: int = 0, *, kv_tokens: int = 820_000, unacked_tokens: int = 0, **load: Any) -> ReplicaView:
    given = {"running": leases, **load}
    return ReplicaView(
        name, Load(**given), unacked=0, leases=leases, kv_tokens=kv_tokens, unacked_tokens=unacked_tokens
    )


def snapshot(
    views: Sequence[ReplicaView], blocks: Sequence[int] = (), held: dict[str, int] | None = None, tokens: int = 0
) -> Snapshot:
    """`held`: blocks by replica."""
    chain = Chain(BLOCK_BYTES, 0, tuple(blocks), len(blocks) * BLOCK_BYTES)
    matches = {name: Held(count, count * BLOCK_TOKENS) for name, count in (held or {}).items()}
    return Snapshot("model", tuple(views), PrefixView(chain, tokens or len(blocks) * BLOCK_TOKENS, matches))


def prompt(conversation: int, blocks: int) -> list[int]:
    return [conversation * 1000 + block for block in range(blocks)]


def new(policy: Any, seed: int = 0, **options: Any) -> Policy:
    made = NoOptions() if policy is LMetric else policy.Options(**options)
    chosen: Policy = policy(made, random.Random(seed))
    return chosen


def send(policy: Policy, views: Sequence[ReplicaView], blocks: Sequence[int]) -> tuple[str, Reason]:
    decision = policy.choose(make_request(), snapshot(views, blocks))
    return decision.replica, decision.reason


@pytest.mark.parametrize("policy", ROUTERS)
def test_every_router_keeps_the_promises_of_a_policy(policy: Any) -> None:
    check_policy(policy)


@pytest.mark.parametrize("policy", ROUTERS)
def test_sequential_unique_prompts_spread_over_idle_replicas(policy: Any) -> None:
    subject = new(policy)
    views = [view(name) for name in "abcd"]
    chosen = {send(subject, views, prompt(number, 4))[0] for number in range(40)}
    assert chosen == set("abcd")


def test_every_issued_name_makes_a_policy_and_refuses_options_that_it_does_not_have() -> None:
    names = {"cache-aware", "ray-prefix", "chwbl", "aibrix", "llm-d", "dynamo", "lmetric", "greedy", "ideal"}
    assert set(BASELINES) == names
    assert isinstance(BASELINES["cache-aware"](context({}, options={"balance_abs": 8})), CacheAware)
    with pytest.raises(msgspec.ValidationError):
        BASELINES["cache-aware"](context({}, options={"threshold": 8}))


# What is remembered


def test_memory_finds_the_longest_beginning_that_each_replica_was_sent() -> None:
    memory = Remembered()
    memory.keep("abc")
    memory.sent("a", [1, 2, 3])
    memory.sent("b", [1, 9])
    assert memory.depths([1, 2, 3, 4], "abc") == {"a": 3, "b": 1}
    assert memory.depths([2, 3], "a") == {"a": 2}
    assert memory.depths([7], "abc") == {}


def test_memory_of_a_replica_that_left_is_gone_when_it_returns() -> None:
    memory = Remembered()
    memory.keep("ab")
    memory.sent("a", [1])
    memory.keep("b")
    memory.keep("ab")
    assert memory.depths([1], "ab") == {}


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 8)), max_size=30),
    st.integers(1, 12),
)
@settings(derandomize=True, deadline=None)
def test_memory_stays_within_its_capacity_and_forgets_only_ends(sent: list[tuple[int, int]], capacity: int) -> None:
    memory = Remembered()
    memory.keep("a")
    for conversation, blocks in sent:
        memory.sent("a", prompt(conversation, blocks), capacity)
        assert memory.size("a") <= capacity
        depths = memory.depths(prompt(conversation, blocks), "a")
        assert depths["a"] == min(blocks, capacity)  # The newest prompt's beginning is never what is forgotten.
    kept = sum(memory.depths(prompt(conversation, 8), "a").get("a", 0) for conversation in range(4))
    assert kept == memory.size("a")  # What is remembered hangs together from the beginnings on.


# Router by router


def test_cache_aware_follows_a_match_above_its_threshold_only() -> None:
    policy = new(CacheAware)
    assert send(policy, [view("a", 0), view("b", 5)], prompt(1, 10)) == ("a", Reason.SHORTEST_QUEUE)
    busy = [view("a", 9), view("b", 5)]
    assert send(policy, busy, prompt(1, 10)) == ("a", Reason.LONGEST_PREFIX)
    assert send(policy, busy, [*prompt(1, 4), *prompt(2, 9)[4:]]) == ("a", Reason.LONGEST_PREFIX)
    assert send(policy, busy, [*prompt(1, 3), *prompt(3, 10)[3:]]) == ("b", Reason.SHORTEST_QUEUE)


def test_cache_aware_balances_only_where_both_thresholds_are_passed() -> None:
    policy = new(CacheAware)
    send(policy, [view("a", 0), view("b", 5)], prompt(1, 4))
    assert send(policy, [view("a", 64), view("b", 0)], prompt(1, 4))[0] == "a"
    assert send(policy, [view("a", 265), view("b", 200)], prompt(1, 4))[0] == "a"
    assert send(policy, [view("a", 65), view("b", 0)], prompt(1, 4)) == ("b", Reason.OVERLOADED)


def test_ray_prefix_sends_every_match_to_its_replica_however_busy_by_default() -> None:
    policy = new(RayPrefix)
    first, _ = send(policy, [view("a"), view("b", 1)], prompt(1, 4))
    assert first == "a"
    assert send(policy, [view("a", 500), view("b", 0)], prompt(1, 4)) == ("a", Reason.LONGEST_PREFIX)


def test_ray_prefix_draws_two_where_queues_differ_by_more_than_its_threshold() -> None:
    policy = new(RayPrefix, imbalanced_threshold=10)
    send(policy, [view("a"), view("b", 1)], prompt(1, 4))
    assert send(policy, [view("a", 10), view("b", 0)], prompt(1, 4)) == ("a", Reason.LONGEST_PREFIX)
    assert send(policy, [view("a", 11), view("b", 0)], prompt(1, 4)) == ("b", Reason.SHORTER_OF_TWO)


def test_ray_prefix_fills_the_smallest_tree_where_too_little_matches() -> None:
    policy = new(RayPrefix)
    idle = [view("a"), view("b", 1)]
    assert send(policy, idle, prompt(1, 20))[0] == "a"
    assert send(policy, idle, [*prompt(1, 1), *prompt(2, 20)[1:]]) == ("b", Reason.POLICY)
    assert send(policy, idle, [*prompt(1, 2), *prompt(3, 20)[2:]]) == ("a", Reason.LONGEST_PREFIX)


def test_chwbl_keeps_a_conversation_together_until_its_replica_is_above_the_bound() -> None:
    policy = new(Chwbl)
    names = "abcdefgh"
    home, reason = send(policy, [view(name, 4) for name in names], prompt(1, 2))
    assert reason is Reason.PREFIX_HASH
    for turn in range(3, 30):
        assert send(policy, [view(name, 4) for name in names], prompt(1, turn))[0] == home
    # The bound for 33 requests on 8 replicas is ceil(1.25 * 33 / 8) = 6, this one included.
    assert send(policy, [view(name, 5 if name == home else 4) for name in names], prompt(1, 2))[0] == home
    other, reason = send(policy, [view(name, 6 if name == home else 4) for name in names], prompt(1, 2))
    assert other != home
    assert reason is Reason.OVERLOADED


def test_chwbl_moves_few_conversations_when_a_replica_leaves() -> None:
    policy = new(Chwbl)
    names = "abcdefgh"
    before = [send(policy, [view(name) for name in names], prompt(key, 2))[0] for key in range(400)]
    after = [send(policy, [view(name) for name in names[:-1]], prompt(key, 2))[0] for key in range(400)]
    assert all(old == new_one for old, new_one in zip(before, after, strict=True) if old != "h")
    assert 20 < before.count("h") < 100


def test_aibrix_passes_over_a_match_whose_load_is_above_one_deviation() -> None:
    policy = new(Aibrix)
    names = "abcd"
    assert send(policy, [view("a", 0), *(view(name, 1) for name in "bcd")], prompt(1, 4))[0] == "a"
    assert send(policy, [view(name, 3) for name in names], prompt(1, 4)) == ("a", Reason.LONGEST_PREFIX)
    uneven = [view("a", 8), view("b", 3), view("c", 3), view("d", 2)]
    assert send(policy, uneven, prompt(1, 4)) == ("d", Reason.OVERLOADED)


def test_aibrix_lets_only_the_least_loaded_take_part_where_load_is_far_apart() -> None:
    policy = new(Aibrix, deviations=100.0)
    send(policy, [view("a", 0), *(view(name, 1) for name in "bcd")], prompt(1, 4))
    assert send(policy, [view("a", 7), view("b", 0), view("c", 0), view("d", 0)], prompt(1, 4))[0] == "a"
    assert send(policy, [view("a", 40), view("b", 2), view("c", 1), view("d", 2)], prompt(1, 4))[0] == "c"


def test_llm_d_adds_its_scores_by_weight() -> None:
    policy = new(LlmD)
    views = [view("a", waiting=4, kv_usage=0.9), view("b", waiting=0, kv_usage=0.1)]
    # a: 3 * 10/10 + 2 * 0 + 2 * 0.1 = 3.2; b: 3 * 0 + 2 * 1 + 2 * 0.9 = 3.8.
    decision = policy.choose(make_request(), snapshot(views, prompt(1, 10), {"a": 10}))
    assert decision.replica == "b"
    assert decision.score == pytest.approx(-3.8)
    calm = [view("a", waiting=4, kv_usage=0.5), view("b", waiting=4, kv_usage=0.1)]
    assert policy.choose(make_request(), snapshot(calm, prompt(1, 10), {"a": 10})).replica == "a"


def test_dynamo_adds_blocks_to_compute_and_blocks_in_use() -> None:
    policy = new(Dynamo)
    views = [view("a", kv_usage=0.02, queued_prefill_tokens=1600), view("b", kv_usage=0.01, unacked_tokens=160)]
    decision = policy.choose(make_request(), snapshot(views, prompt(1, 10), {"a": 10}))
    # b: prefill 160 + 5120, in use 8200 + 160 + 5120; a: prefill 1600, in use 16400 + 1600 + 5120.
    assert decision.replica == "b"
    assert decision.score == pytest.approx((160 + 5120 + 8200 + 160 + 5120) / 16)


def test_dynamo_counts_no_block_of_a_prompt_twice_where_a_request_in_flight_has_it() -> None:
    there = {"a": 9, "b": 0}
    policy = Dynamo(Dynamo.Options(), random.Random(0), in_flight=lambda replica, blocks: there[replica])
    views = [view("a", queued_prefill_tokens=1600), view("b")]
    # a: prefill 1600 + 5120, in use 1600 + 512; b: prefill 5120, in use 5120.
    decision = policy.choose(make_request(), snapshot(views, prompt(1, 10)))
    assert (decision.replica, decision.score) == ("a", (1600 + 5120 + 1600 + 512) / 16)


def test_lmetric_multiplies_queued_new_tokens_and_batch() -> None:
    policy = new(LMetric)
    views = [view("a", 9, queued_prefill_tokens=100), view("b", 1, queued_prefill_tokens=0)]
    # a: (100 + 1) * 10 = 1010; b: (0 + 5120) * 2 = 10240.
    decision = policy.choose(make_request(), snapshot(views, prompt(1, 10), {"a": 10}))
    assert (decision.replica, decision.score) == ("a", 1010)
    assert policy.choose(make_request(), snapshot(views, prompt(1, 10))).replica == "b"


@pytest.mark.parametrize("name", ["dynamo", "lmetric"])
def test_routers_that_tokenize_know_the_exact_length(name: str) -> None:
    policy = BASELINES[name](context({}, hashed(0, 5000)))
    scores = {
        policy.choose(make_request(), snapshot([view("a")], prompt(1, 10), {"a": 9}, tokens=tokens)).score
        for tokens in (4000, 5120, 6000)
    }
    assert len(scores) == 1


@pytest.mark.parametrize("policy", [Dynamo, LMetric])
def test_a_prompt_that_is_held_whole_still_costs_a_token(policy: Any) -> None:
    views = [view("a", queued_prefill_tokens=0)]
    assert new(policy).choose(make_request(), snapshot(views, prompt(1, 10), {"a": 10}, tokens=5000)).score > 0


# Bounds


class Replica:
    """A replica that is stepped by hand."""

    def __init__(self, name: str, core: SimulatedCore | None = None, slowness: float = 1.0) -> None:
        self.name = name
        self.core = core or SimulatedCore(H200_8B.options)
        self.slowness = slowness
        self.alone = True
        self.now = 0.0
        self.ends = 0.0

    def settle(self) -> None: ...

    def step_ends_s(self) -> float:
        return max(self.ends, self.now)

    def begin(self) -> None:
        planned = self.core.plan()
        assert planned is not None
        self.ends = self.now + planned / 1000 * self.slowness

    def first_token_s(self, key: str) -> float:
        """Steps on until that request has its first token; how long that took."""
        start = self.now
        while True:
            if self.ends <= self.now:
                self.begin()
            self.now = self.ends
            if any(job.id == key for job in self.core.commit().prefilled):
                return self.now - start


class Replayed(msgspec.Struct):
    prompt: Prompt


def hashed(conversation: int, tokens: int) -> Prompt:
    return Prompt(tokens, tuple(1 + conversation * 100_000 + block for block in range(tokens // BLOCK_TOKENS)))


def context(replicas: dict[str, Replica], asked: Prompt | None = None, **fields: Any) -> Context:
    return Context(
        random=random.Random(0),
        now=lambda: 0.0,
        replicas=replicas,
        profile=H200_8B,
        request=lambda request: Replayed(asked or hashed(0, 1)),
        **fields,
    )


@pytest.mark.parametrize("slowness", [1.0, 2.5])
@pytest.mark.parametrize("ahead", [0, 1, 6])
@pytest.mark.parametrize("tokens", [10, 3000, 30_000])
@pytest.mark.parametrize("cached", [False, True])
def test_true_ttft_is_what_the_engine_then_takes(slowness: float, ahead: int, tokens: int, cached: bool) -> None:
    replica = Replica("a", slowness=slowness)
    asked = hashed(99, tokens)
    if cached:
        replica.core.add("before", hashed(99, tokens), 1)
        replica.first_token_s("before")
    for number in range(ahead):
        replica.core.add(number, hashed(number, 5000 + 1000 * number), 500)
    if ahead:
        replica.begin()
    expected = true_ttft_s(replica, H200_8B, asked, replica.now)
    replica.core.add("asked", asked, 5)
    assert replica.first_token_s("asked") == pytest.approx(expected, rel=0.03)


def test_true_ttft_counts_what_prompts_ahead_will_have_computed() -> None:
    replica = Replica("a")
    replica.core.add("ahead", hashed(1, 20_000), 100)
    asked = hashed(1, 20_480)
    expected = true_ttft_s(replica, H200_8B, asked, 0.0)
    replica.core.add("asked", asked, 5)
    assert replica.first_token_s("asked") == pytest.approx(expected, rel=0.03)


def test_true_ttft_waits_for_answers_to_free_the_cache() -> None:
    options = msgspec.structs.replace(H200_8B.options, kv_blocks=40, max_model_len=40 * BLOCK_TOKENS)
    replica = Replica("a", SimulatedCore(options))
    for number, answer in enumerate((50, 200, 400)):
        replica.core.add(number, hashed(number, 6000), answer)
    for _ in range(5):
        replica.begin()
        replica.now = replica.ends
        replica.core.commit()
    asked = hashed(9, 6000)
    expected = true_ttft_s(replica, H200_8B, asked, replica.now)
    replica.core.add("asked", asked, 5)
    took = replica.first_token_s("asked")
    assert took > 0.25
    assert took == pytest.approx(expected, rel=0.1)


def test_greedy_prefers_the_cache_until_its_queue_outweighs_it() -> None:
    replicas = {name: Replica(name) for name in "ab"}
    asked = hashed(7, 20_000)
    replicas["a"].core.add("before", asked, 1)
    replicas["a"].first_token_s("before")
    replicas["a"].now = replicas["a"].ends = 0.0
    views = snapshot([view("a"), view("b")])
    subject = Greedy(context(replicas, asked))
    assert subject.choose(make_request(), views).replica == "a"
    replicas["a"].core.add("long", hashed(8, 60_000), 1)
    assert subject.choose(make_request(), views).replica == "b"


def test_the_ideal_minds_only_the_queue_where_another_replica_holds_the_prompt() -> None:
    replicas = {name: Replica(name) for name in "ab"}
    asked = hashed(7, 20_000)
    replicas["a"].core.add("before", asked, 1)
    replicas["a"].first_token_s("before")
    replicas["a"].now = replicas["a"].ends = 0.0
    replicas["a"].core.add("short", hashed(8, 500), 1)
    views = snapshot([view("a"), view("b")])
    assert Greedy(context(replicas, asked)).choose(make_request(), views).replica == "a"
    assert Ideal(context(replicas, asked)).choose(make_request(), views).replica == "b"
