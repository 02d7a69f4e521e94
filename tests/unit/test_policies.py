"""The built-in policies, the registry, and the kit that checks policies."""

from __future__ import annotations

import random
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import pytest

from router.errors import ConfigError
from router.policies import registry
from router.policies.base import NoOptions, Policy
from router.testing import check_policy, make_replica, make_request, make_snapshot
from router.types import Decision, Reason, Request, Snapshot

BUILT_IN = ["least-queue", "power-of-two", "random", "round-robin"]


def create(name: str, seed: int = 0, **options: Any) -> Policy:
    return registry.create(name, options, random.Random(seed))


def picks(policy: Policy, snapshot: Snapshot, count: int) -> list[str]:
    return [policy.choose(make_request(), snapshot).replica for _ in range(count)]


# The built-ins


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_single_replica_is_chosen_for_being_the_only_one(name: str) -> None:
    decision = create(name).choose(make_request(), make_snapshot([7]))
    assert (decision.replica, decision.reason, decision.fallbacks) == ("replica-0", Reason.ONLY_REPLICA, ())


@pytest.mark.parametrize("name", BUILT_IN)
def test_an_idle_pool_is_used_evenly_enough(name: str) -> None:
    counts = Counter(picks(create(name), make_snapshot([0] * 4), 400))
    assert len(counts) == 4
    assert min(counts.values()) > 60


def test_round_robin_takes_all_in_turn_and_names_the_rest_as_fallbacks() -> None:
    policy = create("round-robin")
    snapshot = make_snapshot([5, 0, 9])
    chosen = picks(policy, snapshot, 6)
    assert chosen[:3] == chosen[3:]
    assert set(chosen) == {"replica-0", "replica-1", "replica-2"}
    decision = policy.choose(make_request(), snapshot)
    assert (decision.reason, [decision.replica, *decision.fallbacks]) == (Reason.NEXT_IN_TURN, chosen[:3])


def test_round_robin_starts_anywhere() -> None:
    snapshot = make_snapshot([0] * 4)
    assert {picks(create("round-robin", seed), snapshot, 1)[0] for seed in range(30)} == {
        f"replica-{index}" for index in range(4)
    }


def test_round_robin_neither_skips_nor_repeats_when_replicas_leave_and_join() -> None:
    policy = create("round-robin")
    while picks(policy, make_snapshot([0] * 4, names="abcd"), 1) != ["b"]:
        pass
    assert picks(policy, make_snapshot([0] * 3, names="acd"), 1) == ["c"]
    assert picks(policy, make_snapshot([0] * 5, names="dcxab"), 3) == ["d", "x", "a"]
    assert picks(policy, make_snapshot([0], names="c"), 1) == ["c"]
    assert picks(policy, make_snapshot([0] * 4, names="abcd"), 2) == ["d", "a"]


def test_round_robin_keeps_a_turn_for_each_model() -> None:
    policy = create("round-robin")
    models = [make_snapshot([0] * 2, model=model) for model in ("a", "b")]
    chosen = [policy.choose(make_request(), models[turn % 2]).replica for turn in range(8)]
    assert Counter(chosen[::2]) == Counter(chosen[1::2]) == {"replica-0": 2, "replica-1": 2}


def test_least_queue_takes_the_shortest_queue_and_ties_at_random() -> None:
    policy = create("least-queue")
    decision = policy.choose(make_request(), make_snapshot([3, 1, 2]))
    assert (decision.replica, decision.reason, decision.score) == ("replica-1", Reason.SHORTEST_QUEUE, 1)
    counts = Counter(picks(policy, make_snapshot([1, 4, 1, 1]), 300))
    assert set(counts) == {"replica-0", "replica-2", "replica-3"}
    assert min(counts.values()) > 60


def test_least_queue_counts_what_runs_what_waits_and_what_is_on_its_way() -> None:
    busy = [
        make_replica("running", running=2),
        make_replica("waiting", waiting=2),
        msgspec.structs.replace(make_replica("unacked"), unacked=2),
        make_replica("short", 1),
    ]
    policy = create("least-queue")
    for free in range(4):
        replicas = [view if place != free else make_replica("free") for place, view in enumerate(busy)]
        assert picks(policy, Snapshot("model", tuple(replicas)), 1) == ["free"]
    score = policy.choose(make_request(), Snapshot("model", (busy[2], busy[1]))).score
    assert score == busy[2].queue_depth


def test_power_of_two_never_takes_the_longest_queue_and_falls_back_on_the_other() -> None:
    policy = create("power-of-two")
    snapshot = make_snapshot([5, 0, 9])
    decisions = [policy.choose(make_request(), snapshot) for _ in range(200)]
    assert {d.replica for d in decisions} == {"replica-0", "replica-1"}
    for decision in decisions:
        assert decision.reason is Reason.SHORTER_OF_TWO
        (other,) = decision.fallbacks
        depth = {view.replica: view.queue_depth for view in snapshot.replicas}
        assert decision.score == depth[decision.replica] <= depth[other]


def test_power_of_two_draws_every_pair_equally() -> None:
    policy = create("power-of-two")
    snapshot = make_snapshot([0, 1, 2, 3])
    pairs = Counter((d.replica, *d.fallbacks) for d in (policy.choose(make_request(), snapshot) for _ in range(1200)))
    assert len(pairs) == 6
    assert min(pairs.values()) > 140


def test_more_choices_find_the_shortest_queue() -> None:
    snapshot = make_snapshot([3, 2, 1, 0])
    assert set(picks(create("power-of-two", choices=4), snapshot, 50)) == {"replica-3"}
    assert set(picks(create("power-of-two", choices=9), snapshot, 50)) == {"replica-3"}
    decision = create("power-of-two", choices=3).choose(make_request(), snapshot)
    assert len(decision.fallbacks) == 2


# The registry


def test_the_built_ins_are_installed_by_their_names() -> None:
    specs = {spec.name: spec for spec in registry.installed()}
    assert set(BUILT_IN) <= set(specs)
    assert specs["power-of-two"].dist == "kvlane 0.1.0"
    assert [field.name for field in msgspec.structs.fields(specs["power-of-two"].options)] == ["choices"]


@pytest.mark.parametrize(("kind", "heading"), [("policies", "## The built-in policies"), ("scorers", "## Scorers")])
def test_the_page_on_policies_tells_of_each_built_in_and_its_options(kind: str, heading: str) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "policies.md").read_text()
    section = page.split(f"{heading}\n")[1].split("\n## ")[0]
    for spec in getattr(registry, kind).installed():
        if spec.dist.startswith("kvlane "):
            (row,) = [line for line in section.splitlines() if line.startswith(f"| `{spec.name}`")]
            assert all(f"`{field.encode_name}`" in row for field in msgspec.structs.fields(spec.options))


def test_an_unknown_name_is_refused_with_the_nearest_and_all_installed() -> None:
    with pytest.raises(ConfigError, match="unknown policy 'rendom'; did you mean 'random'\\? installed: cost, "):
        create("rendom")
    with pytest.raises(ConfigError, match="unknown policy 'zzz'; installed: cost, "):
        create("zzz")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"choices": 1}, "policy.options.choices: expected an integer at least 2, got 1 (policy 'power-of-two')"),
        ({"choices": "2"}, "policy.options.choices: expected an integer at least 2, got '2' (policy 'power-of-two')"),
        ({"choice": 2}, "policy.options.choice: unknown field; did you mean 'choices'? (policy 'power-of-two')"),
    ],
)
def test_bad_options_are_refused_by_their_names(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        create("power-of-two", **options)
    assert caught.value.message == message


@pytest.fixture
def plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory on the import path, as pip would fill it."""
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in [name for name, module in sys.modules.items() if str(tmp_path) in str(getattr(module, "__file__", ""))]:
        del sys.modules[name]


def install(
    directory: Path, dist: str, entry_points: dict[str, str], source: str, group: str = "kvlane.policies"
) -> None:
    module = dist.replace("-", "_")
    (directory / f"{module}.py").write_text("import msgspec\nfrom router.types import Decision, Reason\n" + source)
    info = directory / f"{module}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {dist}\nVersion: 1.0\n")
    lines = [f"{name} = {module}:{attribute}" for name, attribute in entry_points.items()]
    (info / "entry_points.txt").write_text("\n".join([f"[{group}]", *lines]))


GOOD = """
class Good:
    class Options(msgspec.Struct, frozen=True, kw_only=True):
        limit: int = 1
        tag: int | str = 1
        def __post_init__(self):
            if self.limit == 13:
                raise ValueError("13 brings bad luck")
    def __init__(self, options, random):
        if options.limit == 14:
            raise ValueError("14 is no better")
        self.limit = options.limit
    def choose(self, request, snapshot):
        return Decision(snapshot.replicas[0].replica, Reason.POLICY)
"""


def test_a_plugin_is_listed_and_created_as_the_built_ins_are(plugins: Path) -> None:
    install(plugins, "kvlane-good", {"good": "Good"}, GOOD)
    spec = {spec.name: spec for spec in registry.installed()}["good"]
    assert spec.dist == "kvlane-good 1.0"
    decision = create("good", limit=2).choose(make_request(), make_snapshot([0]))
    assert decision == Decision("replica-0", Reason.POLICY)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"limt": 1}, "policy.options.limt: unknown field; did you mean 'limit'? (policy 'good')"),
        ({"tag": 1.5}, "policy.options.tag: expected int | str, got float (policy 'good')"),
        ({"limit": 13}, "policy.options: 13 brings bad luck (policy 'good')"),
        ({"limit": 14}, "policy.options: policy 'good' refuses its options: 14 is no better"),
    ],
)
def test_a_plugins_own_checks_are_told_as_its_own(plugins: Path, options: dict[str, Any], message: str) -> None:
    install(plugins, "kvlane-good", {"good": "Good"}, GOOD)
    with pytest.raises(ConfigError) as caught:
        create("good", **options)
    assert caught.value.message == message


def test_a_plugin_that_fails_to_import_is_told_by_name_and_harms_no_other(plugins: Path) -> None:
    install(plugins, "kvlane-bad", {"bad": "Bad"}, "import a_module_that_is_not_there")
    assert set(BUILT_IN) <= {spec.name for spec in registry.installed()}
    create("random")
    cause = "kvlane_bad:Bad fails to import: ModuleNotFoundError: No module named 'a_module_that_is_not_there'"
    assert [(b.name, b.dist, b.cause) for b in registry.broken()] == [("bad", "kvlane-bad 1.0", cause)]
    with pytest.raises(ConfigError, match=r"policy 'bad' of kvlane-bad 1\.0 cannot be used: kvlane_bad:Bad fails"):
        create("bad")


@pytest.mark.parametrize(
    ("source", "cause"),
    [
        ("Bad = 5", "is not a class"),
        ("class Bad: pass", "has no class attribute Options"),
        ("class Bad:\n    class Options(msgspec.Struct): pass", "has no method choose"),
        ("class Bad:\n    class Options(msgspec.Struct): pass\n    async def choose(self, r, s): pass", "async choose"),
        ("", "AttributeError"),
    ],
)
def test_what_is_no_policy_class_is_told_as_such(plugins: Path, source: str, cause: str) -> None:
    install(plugins, "kvlane-bad", {"bad": "Bad"}, source)
    (broken,) = registry.broken()
    assert cause in broken.cause


def test_a_name_of_two_packages_is_refused_when_it_is_used(plugins: Path) -> None:
    install(plugins, "kvlane-good", {"good": "Good"}, GOOD)
    install(plugins, "kvlane-other", {"good": "Good"}, GOOD)
    with pytest.raises(ConfigError, match="several installed packages use this name"):
        create("good")
    create("random")


# The kit: each of these breaks one promise


class First:
    """Picks by position; the base of the bad ones."""

    Options: ClassVar[type[msgspec.Struct]] = NoOptions

    def __init__(self, options: NoOptions, random: random.Random) -> None:
        self._random = random

    def choose(self, request: Request, snapshot: Snapshot) -> Decision:
        return Decision(self.pick(request, snapshot), Reason.POLICY)

    def pick(self, request: Request, snapshot: Snapshot) -> str:
        return snapshot.replicas[0].replica


class Anywhere(First):
    def pick(self, request: Request, snapshot: Snapshot) -> str:
        return self._random.choice(snapshot.replicas).replica


class Favourite(First):
    """Spreads prompts, but always starts at the first replica."""

    turn = -1

    def pick(self, request: Request, snapshot: Snapshot) -> str:
        self.turn += 1
        return snapshot.replicas[self.turn % len(snapshot.replicas)].replica


class Stranger(First):
    def pick(self, request: Request, snapshot: Snapshot) -> str:
        return "elsewhere"


class Nostalgic(First):
    """Sticks to the first replica it saw, there or not."""

    first = ""

    def pick(self, request: Request, snapshot: Snapshot) -> str:
        self.first = self.first or super().pick(request, snapshot)
        return self.first


class Unseeded(First):
    def pick(self, request: Request, snapshot: Snapshot) -> str:
        return random.SystemRandom().choice(snapshot.replicas).replica


class Meddler(Anywhere):
    def pick(self, request: Request, snapshot: Snapshot) -> str:
        msgspec.structs.force_setattr(snapshot.replicas[0], "unacked", 1000)
        return super().pick(request, snapshot)


class Pair(Anywhere):
    def pick(self, request: Request, snapshot: Snapshot) -> str:
        return snapshot.replicas[self._random.randrange(2)].replica


class Slow(Anywhere):
    def pick(self, request: Request, snapshot: Snapshot) -> str:
        for _ in range(10_000):
            len(snapshot.replicas)
        return super().pick(request, snapshot)


class Patient(First):
    async def choose(self, request: Request, snapshot: Snapshot) -> Decision:  # type: ignore[override]
        return Decision(self.pick(request, snapshot), Reason.POLICY)


class Tuple(Anywhere):
    def choose(self, request: Request, snapshot: Snapshot) -> Any:
        return (self.pick(request, snapshot), Reason.POLICY)


class SelfFallback(Anywhere):
    def choose(self, request: Request, snapshot: Snapshot) -> Decision:
        chosen = self.pick(request, snapshot)
        return Decision(chosen, Reason.POLICY, (chosen,))


class WordyReason(Anywhere):
    def choose(self, request: Request, snapshot: Snapshot) -> Decision:
        return Decision(self.pick(request, snapshot), "because")  # type: ignore[arg-type]


class Bare:
    def choose(self, request: Request, snapshot: Snapshot) -> Decision:
        raise NotImplementedError


class Faithful(First):
    """Never leaves who holds the most, whatever waits there."""

    def pick(self, request: Request, snapshot: Snapshot) -> str:
        held = {name: held.blocks for name, held in snapshot.prefix.held.items()}
        most = max(held.get(view.replica, 0) for view in snapshot.replicas)
        best = [view.replica for view in snapshot.replicas if held.get(view.replica, 0) == most]
        return self._random.choice(best)


@pytest.mark.parametrize(
    ("policy_class", "message"),
    [
        (Faithful, "sends all to the holder of a prefix, a thousand requests behind"),
        (First, "sends 16 unique prompts to one replica of four idle ones"),
        (Favourite, "ties go by position"),
        (Stranger, "chose 'elsewhere', which is not in the snapshot"),
        (Nostalgic, "which is not in the snapshot"),
        (Unseeded, "decides differently under one seed"),
        (Meddler, "changed the request or the snapshot"),
        (Pair, "choose raised IndexError"),
        (Slow, "choose makes 100"),
        (Patient, "is async"),
        (Tuple, "is no Decision"),
        (SelfFallback, "as its own fallback"),
        (WordyReason, "is no Reason"),
        (Bare, "has no class attribute Options"),
    ],
)
def test_the_kit_tells_a_broken_promise_plainly(policy_class: Any, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_policy(policy_class)


def test_the_kit_tells_options_that_do_not_fit() -> None:
    with pytest.raises(AssertionError, match="does not take the options"):
        check_policy(Anywhere, {"x": 1})


def test_the_kit_lets_affinity_keep_requests_together() -> None:
    class Sticky(First):
        affinity = True

        def pick(self, request: Request, snapshot: Snapshot) -> str:
            return min(view.replica for view in snapshot.replicas)

    check_policy(Sticky)


def test_the_kit_passes_a_policy_that_keeps_its_promises() -> None:
    check_policy(Anywhere)
