"""The compiled arithmetic of `cost` beside the Python: the same costs to the last bit, the same draws and decisions."""

from __future__ import annotations

import gc
import math
import random
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any, cast

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.lane.client import Lane
from router.load.account import new_account
from router.load.model import new_fleet
from router.policies.cost import Cost
from router.pool import Pool
from router.testing import make_prefix, make_request
from router.types import (
    Charge,
    EngineInfo,
    Held,
    Holders,
    Load,
    Outlook,
    PrefixView,
    ReplicaView,
    Snapshot,
)
from tests.twins import built, resident_kb
from tests.unit.test_compiled_load import ODD_COUNTS, ODD_FIGURES, FakeLane, any_load, outcome

COSTS = "router.policies._costs"
ODD_HELD = (0, -5, 1 << 53, (1 << 53) + 1, 1 << 64, 10**400)


def pair(options: Cost.Options, seed: int) -> tuple[Cost, Cost]:
    """A policy in Python, and the same compiled."""
    built(COSTS)
    plain, compiled = Cost(options, random.Random(seed)), Cost(options, random.Random(seed))
    plain._arithmetic = None
    assert compiled._arithmetic is not None
    return plain, compiled


class Words(dict[str, int]):
    """A mapping that is no plain dict."""


usual = st.one_of(st.floats(0.0, 1.0), st.sampled_from([0.0, 0.25, 1.0]))
figures = st.one_of(usual, usual, usual, st.sampled_from([*ODD_FIGURES, 1e100, 1]))
counts = st.one_of(st.integers(0, 8), st.integers(0, 300), st.sampled_from(ODD_COUNTS))
sizes = st.one_of(st.integers(0, 20), st.integers(0, 5000), st.sampled_from(ODD_HELD))


@st.composite
def snapshots(draw: st.DrawFn) -> Snapshot:
    """Of few different figures, so that many cost the same; in some there are odd ones."""
    odd = draw(st.booleans())
    figure, count, size = (figures, counts, sizes) if odd else (usual, st.integers(0, 30), st.integers(0, 2000))
    kinds = draw(
        st.lists(
            st.builds(
                lambda running, waiting, usage, unacked, leases, most, outlook: ReplicaView(
                    "", Load(running, waiting, kv_usage=usage), unacked, leases, most, outlook
                ),
                count,
                count,
                figure,
                count,
                count,
                st.sampled_from([0, 4, 16]),
                st.builds(Outlook, figure, figure, figure, figure, figure, figure, figure),
            ),
            min_size=1,
            max_size=4,
        )
    )
    names = [f"r{at}" for at in range(draw(st.integers(0 if odd else 1, 12)))]
    views = tuple(msgspec.structs.replace(draw(st.sampled_from(kinds)), replica=name) for name in names)
    somebody = st.sampled_from([*names, "gone"])
    held = st.builds(Held, st.integers(0, 9), size)
    groups = draw(
        st.lists(st.tuples(st.none() | held, st.lists(somebody, max_size=5, unique=True).map(tuple)), max_size=3)
    )
    mapping: Mapping[str, Held] = draw(
        st.one_of(
            st.just(Holders(groups, draw(st.none() | held), tuple(names))),
            st.dictionaries(somebody, held, max_size=4),
        )
    )
    places: dict[str, int] = {}
    if odd and names:
        wrong = draw(st.sampled_from([0, -1, len(names), 1 << 70, 0.0, None]))
        places = cast(Any, draw(st.sampled_from([dict, Words])))(dict.fromkeys(names, wrong))
    now = draw(usual if not odd else st.one_of(usual, st.sampled_from([0, *ODD_FIGURES])))
    return Snapshot("m", views, PrefixView(None, draw(size), mapping), now, places)


options = st.builds(
    Cost.Options,
    price=usual,
    queue_price=usual,
    interference=st.floats(0.0, 10.0),
    crowd_factor=st.floats(1.0, 2.0),
    crowd_slack=st.sampled_from([0.0, 4.0]),
    lean_s=st.sampled_from([0.0, 0.4]),
    late_s=st.sampled_from([0.0, 0.002, 0.5]),
    lean_requests=st.sampled_from([1e-300, 0.5, 3.0]),
)


def judged(policy: Cost, snapshot: Snapshot) -> str:
    """Its decision and its costs, and what it would draw next."""
    decided = outcome(policy.choose, make_request(), snapshot)
    told = outcome(policy.explain, make_request(), snapshot)
    return f"{decided} {told} {policy._draw.getstate()[1][-1]}"


def chosen(policy: Cost, snapshot: Snapshot) -> str:
    return policy.choose(make_request(), snapshot).replica


def caught(work: Callable[..., str], *args: Any) -> str:
    """The same where it may raise anything."""
    try:
        return work(*args)
    except Exception as error:
        return type(error).__name__


@settings(deadline=None, max_examples=200)
@given(st.lists(snapshots(), min_size=1, max_size=3), options, st.integers(0, 5))
def test_both_decide_the_same_of_any_snapshots(found: list[Snapshot], weights: Cost.Options, seed: int) -> None:
    plain, compiled = pair(weights, seed)
    for snapshot in (*found, found[0]):
        first, second = (caught(judged, policy, snapshot) for policy in (plain, compiled))
        assert first == second


def ordinary(chance: random.Random, pool: Pool, now: float) -> Snapshot:
    """A pool's, and some groups of holders."""
    names = list(pool.places)
    chance.shuffle(names)
    cut = chance.randrange(len(names) + 1)
    most = chance.choice([None, Held(2, 500)])
    others = chance.choice([None, Held(1, 100)]) if most is not None else Held(1, 100)
    groups = [(Held(8, chance.randrange(3000)), tuple(names[:cut])), (others, (*names[cut : cut + 3], "gone"))]
    prefix = PrefixView(None, chance.randrange(4000), Holders(groups, most, tuple(pool.places)))
    return pool.snapshot("m", now).looked_up(prefix)


def busy(chance: random.Random, size: int, odd: float) -> tuple[Pool, Callable[[], None]]:
    """A pool, and what makes something happen in it."""
    fleet, streams = new_fleet(), iter(range(1, 1 << 40))
    info = EngineInfo("sim", (), (), 64, 1000, 16)
    accounts = [new_account(f"replica-{at}", info, Load(), fleet.foresight()) for at in range(size)]
    pool = Pool([cast(Lane, FakeLane(account.replica, account)) for account in accounts])
    pool.watch()

    def happen() -> None:
        for account in chance.sample(accounts, min(5, size)):
            stream = next(streams)
            account.submitted(stream, Charge(chance.randrange(3000), 5e5))
            account.leased(1)
            account.stepped(any_load(chance, odd), stream - chance.randrange(2), stream * 0.01)

    return pool, happen


@pytest.mark.parametrize("odd", [0.0, 0.05])
def test_both_decide_the_same_of_a_busy_pool(odd: float) -> None:
    built(COSTS)
    chance = random.Random(5)
    by_compiled = 0
    for size in (1, 2, 3, 17, 64, 200):
        plain, compiled = pair(Cost.Options(), size)
        pool, happen = busy(chance, size, odd)
        for number in range(150):
            happen()
            snapshot = ordinary(chance, pool, number * 0.05)
            assert judged(plain, snapshot) == judged(compiled, snapshot)
            assert compiled._arithmetic is not None
            by_compiled += compiled._arithmetic.choose(snapshot) is not None
            plain._draw.setstate(compiled._draw.getstate())
    assert by_compiled == 900 if not odd else by_compiled > 300


def test_a_snapshot_that_is_out_of_date_is_judged_as_it_was() -> None:
    chance = random.Random(6)
    plain, compiled = pair(Cost.Options(), 6)
    pool, happen = busy(chance, 9, 0.0)
    happen()
    old = ordinary(chance, pool, 1.0)
    before = judged(compiled, old)
    happen()
    assert judged(compiled, ordinary(chance, pool, 1.1)) != before
    for policy in (plain, compiled):
        assert outcome(policy.explain, make_request(), old) in before


@pytest.mark.parametrize("drawn", [1.0, 7.5, -0.5, math.nan, None])
def test_chance_that_is_none_ends_as_in_python(drawn: Any) -> None:
    """A source of chance of somebody's own."""
    view = ReplicaView("", Load(), 0, 0)
    views = tuple(msgspec.structs.replace(view, replica=f"r{at}") for at in range(5))
    for policy in pair(Cost.Options(), 1):
        source = cast(Any, random.Random(1))
        source.random = lambda: drawn
        policy._draw = source
        again = Cost(Cost.Options(), source)
        again._arithmetic = again._arithmetic if policy._arithmetic is not None else None
        found = caught(chosen, again, Snapshot("m", views))
        assert found == {"1.0": "ValueError", "7.5": "ValueError", "-0.5": "r0"}.get(
            str(drawn), "TypeError" if drawn is None else "ValueError"
        )


@pytest.mark.slow
def test_millions_of_decisions_keep_no_memory() -> None:
    _, policy = pair(Cost.Options(), 8)
    chance = random.Random(8)
    pool, happen = busy(chance, 16, 0.0)
    request = make_request()
    views = tuple(ReplicaView(f"r{at}", Load(running=at % 3), 0, 0) for at in range(8))
    by_hand = Snapshot("m", views, make_prefix({"r1": 5}))

    def run(rounds: int) -> int:
        for number in range(rounds):
            if number % 10 == 0:
                happen()
                snapshot = ordinary(chance, pool, 1.0)
            policy.choose(request, snapshot)
            policy.choose(request, by_hand)
        gc.collect()
        return resident_kb()

    found = [run(rounds) for rounds in (20_000, 50_000, 100_000)]
    assert max(after - before for before, after in pairwise(found)) < 4096  # kB
