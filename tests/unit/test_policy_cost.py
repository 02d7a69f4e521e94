"""The cost policy's arithmetic against its formula, written down plainly, and what it makes of ties."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping

import msgspec
import pytest

from router.load.account import new_account
from router.load.model import new_fleet
from router.policies.cost import Cost
from router.testing import make_prefix, make_replica, make_request
from router.types import NO_PREFIX, Charge, EngineInfo, Held, Holders, Load, Outlook, PrefixView, ReplicaView, Snapshot
from tests.twins import twins

both = twins("router.policies._costs", "router.load._outlooks")


def costs(options: Cost.Options, snapshot: Snapshot, known: Mapping[str, float]) -> dict[str, float]:
    """One replica after the other, term by term; crowded ones at a million seconds more.

    `known` is how much the router leans away from each, between 0 and 1.
    """
    views, prefix, now = snapshot.replicas, snapshot.prefix, snapshot.now
    waits = [wait_s(options.late_s, view, now) for view in views]
    requests = [view.load.running + view.load.waiting + view.unacked for view in views]
    mean_wait = sum(waits) / len(views)
    pressure = sum(view.load.kv_usage for view in views) / len(views)
    price = options.price + options.queue_price * mean_wait
    crowd = (options.crowd_factor + 2 * mean_wait) * sum(requests) / len(views) + options.crowd_slack
    lean_s = options.lean_s * others_share(snapshot) * min(sum(requests) / (len(views) * options.lean_requests), 1)
    found = {}
    for view, wait, there in zip(views, waits, requests, strict=True):
        held = prefix.held.get(view.replica, Held(0, 0))
        prefill = view.outlook.prefill_s(prefix.tokens, min(held.tokens, prefix.tokens))
        own = wait + view.outlook.batch_s + options.answer_tokens * view.outlook.step_s
        batch = view.max_num_seqs
        if batch and there >= batch:  # One of `batch` ends every `place_tokens / batch` steps.
            own += (there - batch + 1) * options.place_tokens * view.outlook.step_s / batch
        others = options.interference * (view.load.running + view.unacked) * pressure**4
        lean = known[view.replica] * lean_s
        found[view.replica] = own + prefill * (1 + price + others) + lean + (1e6 if there > crowd else 0.0)
    return found


def wait_s(late_s: float, view: ReplicaView, now: float) -> float:
    """Who is too late for the next step of those that run there waits for another one."""
    outlook = view.outlook
    left = outlook.as_of + outlook.wait_s - now
    if left <= late_s and view.load.running + view.unacked:
        left += outlook.step_s
    return max(left, 0.0) + outlook.sent_s


def others_share(snapshot: Snapshot) -> float:
    """Of the requests that are there; none up to a tenth."""
    requests = sum(view.load.running + view.load.waiting + view.unacked for view in snapshot.replicas)
    share = 1 - sum(view.leases for view in snapshot.replicas) / requests if requests else 0.0
    return share if share > 0.1 else 0.0


def drawn(snapshot: Snapshot, seed: int) -> dict[str, float]:
    """What a router with that source of chance leans by, whose first snapshot this is."""
    chance = random.Random(seed)
    return {view.replica: chance.random() for view in snapshot.replicas}


def a_snapshot(chance: random.Random) -> Snapshot:
    mine = chance.choice([0.0, chance.random(), 1.0, 1.2])
    views = tuple(a_replica(f"replica-{i}", chance, mine) for i in range(chance.randrange(2, 40)))
    some = chance.sample(views, chance.randrange(len(views) + 1))
    shared = chance.randrange(1, 17)
    held = {view.replica: chance.choice([shared, shared, chance.randrange(1, 17)]) for view in some}
    prefix = chance.choice([NO_PREFIX, make_prefix(held), make_prefix({}), in_groups(make_prefix(held), views)])
    if chance.random() < 0.3:  # The estimate of the prompt's length may fall short of what is held.
        prefix = PrefixView(prefix.chain, prefix.tokens // 2, prefix.held)
    return Snapshot("model", views, prefix, now=chance.random() * 2)


def in_groups(prefix: PrefixView, views: tuple[ReplicaView, ...]) -> PrefixView:
    """The same as the index says it: what most hold, and the exceptions."""
    found: dict[Held | None, list[str]] = {}
    for view in views:
        found.setdefault(prefix.held.get(view.replica), []).append(view.replica)
    most = max((one for one in found if one is not None), key=lambda one: len(found[one]), default=None)
    groups = [(one, tuple(names)) for one, names in found.items() if one != most]
    return PrefixView(prefix.chain, prefix.tokens, Holders(groups, most, tuple(view.replica for view in views)))


def a_replica(name: str, chance: random.Random, mine: float) -> ReplicaView:
    """About that share of its requests are the router's own; more than all, where some have just ended."""
    outlook = Outlook(
        wait_s=chance.random(),
        step_s=chance.choice([chance.random() * 0.02, chance.random()]),
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
        leases=round(depth * mine) + chance.randrange(2),
        max_num_seqs=chance.choice([0, 16, 256]),
        kv_usage=chance.random(),
        outlook=chance.choice([outlook, Outlook()]),
    )


def test_costs_are_those_of_the_formula() -> None:
    chance = random.Random(11)
    crowded, leaning = 0, Counter[str]()
    for seed in range(800):
        options = Cost.Options(
            price=chance.random(),
            interference=chance.random() * 10,
            late_s=chance.choice([0.0, 0.002, chance.random()]),
            lean_s=chance.choice([0.0, chance.random(), chance.random()]),
            lean_requests=chance.choice([0.5, 3.0, 40 * chance.random() + 0.1]),
        )
        snapshot = a_snapshot(chance)
        expected = costs(options, snapshot, drawn(snapshot, seed))
        crowded += max(expected.values()) > 1e6
        leaning[lean_kind(options, snapshot)] += 1
        found = Cost(options, random.Random(seed)).explain(make_request(), snapshot)
        assert found == pytest.approx(expected, rel=1e-9, abs=1e-9)
    assert crowded > 50
    assert len(leaning) == 4
    assert min(leaning.values()) > 30


def lean_kind(options: Cost.Options, snapshot: Snapshot) -> str:
    if options.lean_s == 0:
        return "none"
    if others_share(snapshot) == 0:
        return "alone"
    depth = sum(view.queue_depth for view in snapshot.replicas) / len(snapshot.replicas)
    return "full" if depth >= options.lean_requests else "in part"


@pytest.mark.parametrize(
    ("depths", "leases", "most_s"),
    [
        ((0, 0, 0), (0, 0, 0), 0.0),  # Nothing is there that others could have sent.
        ((0, 0, 0), (1, 2, 0), 0.0),  # Its own have just ended.
        ((9, 0, 0), (9, 3, 0), 0.0),  # More of its own than there are.
        ((5, 5, 0), (4, 5, 0), 0.0),  # A tenth may just be ending.
        ((5, 6, 0), (4, 5, 0), 0.4 * (2 / 11)),
        ((9, 0, 0), (0, 0, 0), 0.4),  # Three per replica in the mean, wherever they are.
        ((2, 1, 0), (0, 0, 0), 0.4 / 3),
        ((2, 1, 0), (1, 0, 0), 0.4 * (2 / 3) / 3),
        ((60, 0, 0), (15, 0, 0), 0.3),
    ],
)
def test_a_router_leans_by_the_share_and_the_number_of_others_requests(
    depths: tuple[int, ...], leases: tuple[int, ...], most_s: float
) -> None:
    pairs = enumerate(zip(depths, leases, strict=True))
    views = tuple(make_replica(f"replica-{i}", depth, leases=mine) for i, (depth, mine) in pairs)
    snapshot = Snapshot("model", views)
    leaning, upright = (
        Cost(Cost.Options(lean_s=lean_s), random.Random(20)).explain(make_request(), snapshot) for lean_s in (0.4, 0.0)
    )
    known = drawn(snapshot, 20)
    for name in known:
        assert leaning[name] - upright[name] == pytest.approx(known[name] * most_s, abs=1e-9)


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


def test_among_equal_costs_the_shorter_queue_wins() -> None:
    policy = Cost(Cost.Options(lean_s=0.0), random.Random(14))
    snapshot = Snapshot("model", tuple(make_replica(f"replica-{i}", depth) for i, depth in enumerate((3, 0, 2, 4))))
    assert {policy.choose(make_request(), snapshot).replica for _ in range(50)} == {"replica-1"}


def test_a_place_in_the_batch_is_worth_waiting_work_elsewhere() -> None:
    """Who holds the prompt but has no room begins only when others have ended."""
    policy = Cost(Cost.Options(), random.Random(17))
    outlook = Outlook(step_s=0.01, token_s=1e-4)
    depths = {"full": 8, "free": 7}
    views = tuple(make_replica(name, depth, max_num_seqs=8, outlook=outlook) for name, depth in depths.items())
    request, held = make_request(), make_prefix({"full": 8})
    assert policy.choose(request, Snapshot("model", views, held)).replica == "free"
    roomy = tuple(msgspec.structs.replace(view, max_num_seqs=256) for view in views)
    assert policy.choose(request, Snapshot("model", roomy, held)).replica == "full"


@pytest.mark.parametrize(
    ("ends_s", "waits_s"),
    [
        (0.010, 0.010),
        (0.0021, 0.0021),
        (0.0019, 0.0219),  # The request would come too late for the next step.
        (-0.001, 0.019),  # The step has ended, but for its report.
        (-0.015, 0.005),
        (-0.030, 0.0),  # Nothing is known of later steps.
    ],
)
def test_who_comes_too_late_for_a_step_waits_for_the_one_after(ends_s: float, waits_s: float) -> None:
    policy = Cost(Cost.Options(late_s=0.002, lean_s=0.0, price=0.0, queue_price=0.0), random.Random(21))
    outlook = Outlook(wait_s=0.02, step_s=0.02, token_s=1e-4, as_of=5.0)
    views = (make_replica("busy", 4, outlook=outlook), make_replica("idle", 0, outlook=outlook))
    costs = policy.explain(make_request(), Snapshot("model", views, now=5.02 - ends_s))
    assert costs["busy"] - 8.0 * 0.02 == pytest.approx(waits_s)
    # What runs nothing begins at once, however long ago it said so.
    assert costs["idle"] - 8.0 * 0.02 == pytest.approx(max(ends_s, 0.0))


def test_a_step_that_ends_at_once_is_no_place_to_hurry_to() -> None:
    """Of two replicas that run as many, the one in the midst of its step begins sooner."""
    policy = Cost(Cost.Options(lean_s=0.0), random.Random(22))
    ending, midway = (Outlook(wait_s=0.02, step_s=0.02, token_s=1e-4, as_of=as_of) for as_of in (4.981, 4.99))
    views = (make_replica("ending", 4, outlook=ending), make_replica("midway", 4, outlook=midway))
    assert policy.choose(make_request(), Snapshot("model", views, now=5.0)).replica == "midway"
    assert policy.choose(make_request(), Snapshot("model", views, now=4.99)).replica == "ending"


def four(leases: int, depth: int = 4) -> Snapshot:
    outlook = Outlook(wait_s=0.0, step_s=0.01, token_s=1e-4)
    views = tuple(make_replica(f"replica-{i}", depth, leases=leases, outlook=outlook) for i in range(4))
    return Snapshot("model", views)


def test_routers_that_see_the_same_lean_to_different_replicas() -> None:
    """Twenty routers, none of which sent what runs: each keeps to its own, all together use all."""
    favourites = set()
    for seed in range(20):
        policy = Cost(Cost.Options(), random.Random(seed))
        chosen = {policy.choose(make_request(), four(leases=0)).replica for _ in range(20)}
        assert len(chosen) <= 2  # It may like two of them alike.
        favourites |= chosen
    assert len(favourites) == 4


def test_leans_stay_with_their_replicas_when_the_pool_changes() -> None:
    policy = Cost(Cost.Options(), random.Random(18))
    before = policy.explain(make_request(), four(leases=0))
    views = four(leases=0).replicas
    other = msgspec.structs.replace(views[0], replica="replica-9")
    changed = policy.explain(make_request(), Snapshot("model", (other, *views[:0:-1])))
    assert {name: changed[name] for name in before if name in changed} == {
        name: before[name] for name in before if name != "replica-0"
    }
    assert policy.explain(make_request(), four(leases=0)) == before


def test_a_snapshot_of_other_replicas_does_not_keep_their_places() -> None:
    """Policies that ask another one for some of the replicas, or in another order."""
    policy = Cost(Cost.Options(lean_s=0.0), random.Random(19))
    outlook = Outlook(token_s=1e-3)
    views = tuple(make_replica(f"replica-{i}", outlook=outlook) for i in range(4))
    whole = Snapshot("model", views, make_prefix({"replica-3": 8}))
    for some in (views[2:], views[::-1], (views[1], views[3], views[2], views[0])):
        snapshot = msgspec.structs.replace(whole, replicas=some)
        assert policy.choose(make_request(), snapshot).replica == "replica-3"
        assert snapshot.view("replica-3") is views[3]


def test_a_router_whose_requests_are_all_there_are_does_not_lean() -> None:
    policy = Cost(Cost.Options(), random.Random(15))
    assert len({policy.choose(make_request(), four(leases=4)).replica for _ in range(100)}) == 4


def test_a_lean_is_given_up_for_less_than_its_most() -> None:
    policy = Cost(Cost.Options(), random.Random(16))
    costs = policy.explain(make_request(), four(leases=0))
    assert max(costs.values()) - min(costs.values()) <= 0.4


def test_where_few_requests_are_there_a_router_leans_little() -> None:
    """A lean that outweighs a prompt's cache is right only where others' requests come that fast."""
    spreads = {}
    for depth in (1, 2, 3, 6):
        costs = Cost(Cost.Options(), random.Random(16)).explain(make_request(), four(leases=0, depth=depth))
        spreads[depth] = max(costs.values()) - min(costs.values())
    assert [spreads[depth] / spreads[3] for depth in spreads] == pytest.approx([1 / 3, 2 / 3, 1, 1])


def test_forty_requests_at_once_with_one_prefix_do_not_all_follow_it() -> None:
    """No step comes in between; the router's own charges are all that changes."""
    chance = random.Random(17)
    policy = Cost(Cost.Options(), chance)
    fleet = new_fleet()
    accounts = {name: new_account(name, EngineInfo("sim", ()), Load(), fleet.foresight()) for name in "abcd"}
    holders: set[str] = set()
    for stream in range(1, 41):
        held = {name: Held(16, 1000, 16) for name in holders}
        prefix = PrefixView(None, 1020, held)
        views = tuple(account.view() for account in accounts.values())
        name = policy.choose(make_request(), Snapshot("model", views, prefix)).replica
        cached = 1000 if name in holders else 0
        accounts[name].submitted(stream, Charge(1020 - cached))
        accounts[name].leased(1)
        holders.add(name)
    assert max(account.unacked for account in accounts.values()) <= 20
