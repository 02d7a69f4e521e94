"""The policy `weighted`, its scorers, and scorers as plugins."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import pytest

from router.errors import ConfigError
from router.policies import registry
from router.policies.base import NoOptions
from router.policies.expectations import first_token_s, first_tokens_s
from router.policies.scorers import Scorer
from router.policies.weighted import Weighted
from router.testing import check_scorer, make_prefix, make_replica, make_request, make_snapshot
from router.types import Outlook, Reason, Request, Snapshot
from tests.unit.test_policies import install, plugins  # noqa: F401  (a fixture)

FOUR = ["a", "b", "c", "d"]


def weighted(scorers: dict[str, float] | None = None, **options: Any) -> Weighted:
    given = options if scorers is None else {"scorers": scorers, **options}
    policy = registry.create("weighted", given, random.Random(0))
    assert isinstance(policy, Weighted)
    return policy


def scores(name: str, snapshot: Snapshot, request: Request | None = None, **options: Any) -> list[float]:
    scorer: Scorer = registry.scorers.create(name, options, random.Random(0))
    return list(scorer.score(request or make_request(), snapshot))


# The sum


def test_the_best_weighted_sum_wins() -> None:
    snapshot = make_snapshot([4, 0, 2, 0], names=FOUR, held={"a": 16})
    assert weighted({"prefix": 1, "queue": 1}).choose(make_request(), snapshot).replica == "a"
    decision = weighted({"prefix": 1, "queue": 3}).choose(make_request(), snapshot)
    assert decision.replica in ("b", "d")
    assert (decision.reason, decision.score) == (Reason.BEST_SCORE, -3)


def test_ties_are_random() -> None:
    policy, snapshot = weighted(), make_snapshot([1, 0, 0, 0], names=FOUR)
    counts = Counter(policy.choose(make_request(), snapshot).replica for _ in range(300))
    assert set(counts) == {"b", "c", "d"}
    assert min(counts.values()) > 60


def test_a_weight_of_zero_leaves_a_scorer_out() -> None:
    snapshot = make_snapshot([8, 0, 0, 0], names=FOUR, held={"a": 16})
    assert weighted({"prefix": 1, "queue": 0}).choose(make_request(), snapshot).replica == "a"


def test_queues_outweigh_any_affinity_once_they_are_long_enough() -> None:
    policy = weighted({"prefix": 10, "session": 10, "queue": 1})
    snapshot = make_snapshot([200, 0, 0, 0], names=FOUR, held={"a": 16})
    assert policy.choose(make_request(), snapshot).replica != "a"


def test_an_explanation_has_the_measure_of_each_replica_and_the_chosen_one_is_the_lowest() -> None:
    policy, snapshot = weighted(), make_snapshot([4, 1, 2, 3], names=FOUR, held={"c": 4})
    explained = policy.explain(make_request(), snapshot)
    decision = policy.choose(make_request(), snapshot)
    assert set(explained) == set(FOUR)
    assert explained[decision.replica] == decision.score == min(explained.values())


def test_scorers_with_a_memory_learn_of_the_choice_alone() -> None:
    policy = weighted({"lora": 1})
    request, snapshot = make_request(lora="poet"), make_snapshot([0] * 4, names=FOUR)
    policy.explain(request, snapshot)
    first = policy.choose(request, snapshot).replica
    assert {policy.choose(request, snapshot).replica for _ in range(20)} == {first}


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"scorers": {}}, "scorers: at least one weight must be above 0"),
        ({"scorers": {"queue": 0}}, "scorers: at least one weight must be above 0"),
        ({"scorers": {"quue": 0, "prefix": 1}}, "scorers: unknown scorer 'quue'; did you mean 'queue'?"),
        ({"scorer_options": {"ttft": {}}}, "scorer_options.ttft: 'ttft' is none of the scorers"),
        ({"scorer_options": {"queue": {"lead": 0}}}, "scorer_options.queue.lead: expected a number above 0, got 0"),
    ],
)
def test_bad_scorers_are_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        registry.check("weighted", options)
    assert caught.value.message.startswith(f"policy.options: {told}")


# The scorers


def test_the_prefix_scorer_tells_the_share_that_is_held() -> None:
    snapshot = make_snapshot([0] * 4, names=FOUR, held={"b": 4, "d": 16, "gone": 16}, prompt_tokens=1024)
    assert scores("prefix", snapshot) == [0, 0.25, 0, 1]
    assert scores("prefix", make_snapshot([0] * 4)) == [0] * 4


def test_the_queue_scorer_counts_from_the_shortest_and_allows_more_where_all_are_long() -> None:
    assert scores("queue", make_snapshot([2, 6, 10, 42]), lead=8, share=0) == [1, 0.5, 0, -4]
    assert scores("queue", make_snapshot([100, 100, 100, 180]), lead=8, share=0.25) == pytest.approx(
        [1, 1, 1, 1 - 80 / 30]
    )


def test_the_prefill_scorer_counts_waiting_tokens_and_those_on_their_way() -> None:
    replicas = (
        make_replica("a", queued_prefill_tokens=100),
        make_replica("b", queued_prefill_tokens=1100),
        make_replica("c", queued_prefill_tokens=100, unacked_tokens=500),
    )
    assert scores("prefill", Snapshot("model", replicas), tokens=1000) == [1, 0, 0.5]


def test_the_kv_usage_scorer_tells_what_is_free() -> None:
    replicas = (make_replica("a", kv_usage=0.75), make_replica("b"))
    assert scores("kv-usage", Snapshot("model", replicas)) == [0.25, 1]


def test_the_session_scorer_marks_the_home_that_the_session_policy_would_choose() -> None:
    for session in map(str, range(10)):
        request, snapshot = make_request(session_id=session), make_snapshot([0] * 4, names=FOUR)
        home = registry.create("session", {}, random.Random(0)).choose(request, snapshot).replica
        assert scores("session", snapshot, request) == [float(name == home) for name in FOUR]
    assert scores("session", make_snapshot([0] * 4)) == [0] * 4


def test_the_ttft_scorer_prefers_the_soonest_first_token() -> None:
    replicas = (
        make_replica("a", outlook=Outlook(wait_s=1.0, token_s=1e-3)),
        make_replica("b", outlook=Outlook(wait_s=0.0, token_s=1e-3)),
    )
    snapshot = Snapshot("model", replicas, make_prefix({"a": 16}, prompt_tokens=1024))
    assert scores("ttft", snapshot, seconds=0.5) == pytest.approx([1, 1 - (1.024 - 1.0) / 0.5])
    assert scores("ttft", make_snapshot([5, 0])) == [1, 1]


def test_first_tokens_are_expected_alike_one_by_one_and_all_at_once() -> None:
    chance = random.Random(5)
    for _ in range(50):
        replicas = tuple(
            make_replica(
                name,
                outlook=Outlook(chance.random(), 0.01, 1e-4, 1e-8, chance.random(), as_of=chance.random() * 5),
            )
            for name in FOUR
        )
        held = {name: chance.randrange(1, 17) for name in FOUR[:2]}
        # A prompt may be estimated shorter than what is held of it.
        prefix = msgspec.structs.replace(make_prefix(held), tokens=chance.randrange(1500))
        snapshot = Snapshot("model", replicas, prefix, now=5.0)
        one_by_one = [first_token_s(view, prefix, 5.0) for view in replicas]
        assert first_tokens_s(snapshot) == pytest.approx(one_by_one)
        assert min(one_by_one) >= 0


def test_a_queue_that_was_reported_some_time_ago_is_shorter_by_now() -> None:
    view = make_replica("a", outlook=Outlook(wait_s=2.0, batch_s=0.5, as_of=10.0))
    assert first_token_s(view, make_prefix({}, prompt_tokens=1), 11.5) == pytest.approx(1.0)
    assert first_token_s(view, make_prefix({}, prompt_tokens=1), 99.0) == pytest.approx(0.5)


# Scorers as plugins


SCORER = """
class Last:
    class Options(msgspec.Struct, frozen=True):
        bonus: float = 1.0
    def __init__(self, options, random):
        if options.bonus == 13:
            raise ValueError("13 brings bad luck")
        self.bonus = options.bonus
    def score(self, request, snapshot):
        last = max(view.replica for view in snapshot.replicas)
        return [self.bonus * (view.replica == last) for view in snapshot.replicas]
"""


def test_a_scorer_from_another_package_is_listed_and_used(plugins: Path) -> None:  # noqa: F811
    install(plugins, "kvlane-last", {"last": "Last"}, SCORER, group="kvlane.scorers")
    assert {spec.name: spec.dist for spec in registry.scorers.installed()}["last"] == "kvlane-last 1.0"
    policy = weighted({"last": 2}, scorer_options={"last": {"bonus": 0.5}})
    decision = policy.choose(make_request(), make_snapshot([0] * 4, names=FOUR))
    assert (decision.replica, decision.score) == ("d", -1)
    with pytest.raises(ConfigError, match=r"^scorer_options\.last: scorer 'last' refuses its options: 13 brings"):
        weighted({"last": 2}, scorer_options={"last": {"bonus": 13}})


def test_a_scorer_that_cannot_be_used_is_told_and_harms_no_other(plugins: Path) -> None:  # noqa: F811
    source = "class Bad:\n    class Options(msgspec.Struct): pass"
    install(plugins, "kvlane-bad", {"bad": "Bad"}, source, group="kvlane.scorers")
    assert [(each.name, each.cause) for each in registry.scorers.broken()] == [
        ("bad", "kvlane_bad:Bad has no method score")
    ]
    assert registry.policies.broken() == []
    weighted()
    with pytest.raises(ConfigError, match=r"scorer 'bad' of kvlane-bad 1\.0 cannot be used"):
        weighted({"bad": 1})


# The kit


class Fine:
    Options: ClassVar[type[msgspec.Struct]] = NoOptions

    def __init__(self, options: NoOptions, random: random.Random) -> None:
        self.asked = 0

    def score(self, request: Request, snapshot: Snapshot) -> Any:
        return [0.5 for _ in snapshot.replicas]


class OneShort(Fine):
    def score(self, request: Request, snapshot: Snapshot) -> Any:
        return [0.5 for _ in snapshot.replicas[1:]]


class TooGood(Fine):
    def score(self, request: Request, snapshot: Snapshot) -> Any:
        return [2.0 for _ in snapshot.replicas]


class Endless(Fine):
    def score(self, request: Request, snapshot: Snapshot) -> Any:
        return [float("-inf") for _ in snapshot.replicas]


class Named(Fine):
    def score(self, request: Request, snapshot: Snapshot) -> Any:
        return {view.replica: 1.0 for view in snapshot.replicas}


class ByPosition(Fine):
    def score(self, request: Request, snapshot: Snapshot) -> Any:
        return [-place for place, _ in enumerate(snapshot.replicas)]


@pytest.mark.parametrize(
    ("scorer_class", "message"),
    [
        (OneShort, "gave 0 figures for 1 replicas"),
        (TooGood, "figures are finite and at most 1"),
        (Endless, "figures are finite and at most 1"),
        (Named, "is no sequence"),
        (ByPosition, "the same replicas in another order"),
        (NoOptions, "has no class attribute Options"),
    ],
)
def test_the_kit_tells_a_scorers_broken_promise_plainly(scorer_class: Any, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_scorer(scorer_class)


def test_the_kit_passes_a_scorer_that_keeps_its_promises() -> None:
    check_scorer(Fine)
