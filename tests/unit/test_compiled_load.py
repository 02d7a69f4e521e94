"""The compiled load model, accounts and pools beside the Python ones: the same to the last bit, whatever comes."""

from __future__ import annotations

import copy
import gc
import math
import pickle
import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.lane.client import Lane
from router.load import account as plain
from router.load import model
from router.load.account import Account, new_account
from router.load.model import new_fleet
from router.pool import Pool, Views
from router.types import CacheMode, Charge, EngineInfo, Load, PoolSnapshot, Snapshot
from tests.twins import built, resident_kb

OUTLOOKS = "router.load._outlooks"
ODD_COUNTS = (-1, -(1 << 63), 1 << 31, (1 << 40) + 1, (1 << 53) + 1, (1 << 64) - 1, 1 << 70)
ODD_FIGURES = (math.nan, math.inf, -math.inf, -0.0, -1.0, 5e-324, 1e99, 1e200, 1.7e308)

counts = st.one_of(st.integers(0, 300), st.integers(0, 200_000), st.sampled_from(ODD_COUNTS))
figures = st.one_of(st.floats(0.0, 500.0), st.floats(0.0, 1e9), st.sampled_from(ODD_FIGURES))
loads = st.builds(
    Load, counts, counts, counts, figures, figures, figures, counts, figures, counts, counts, st.booleans()
)


def outcome(work: Callable[..., Any], *args: Any) -> str:
    """What came of it, in words that tell every bit and make numbers that are none equal."""
    try:
        return repr(work(*args))
    except (ArithmeticError, ValueError) as error:
        return type(error).__name__


def any_load(chance: random.Random, odd: float) -> Load:
    """As engines report them, and some that no engine should."""
    prompt = chance.choice([0, 0, chance.randrange(1, 8000)])
    decodes = chance.randrange(0, 100)
    ms = 3 + 0.02 * (prompt + decodes) * chance.uniform(0.9, 1.1) * chance.choice([1, 1, 1, 3])
    load = Load(
        chance.randrange(0, 120),
        chance.randrange(0, 4),
        chance.choice([0, chance.randrange(10_000)]),
        chance.random(),
        ms * chance.choice([1.0] * 50 + [100.0]),
        chance.random() * 1e7,
        prompt,
        prompt * chance.random() * 5e3,
        decodes,
        decodes * chance.randrange(100, 10_000),
    )
    if chance.random() >= odd:
        return load
    name, value = chance.choice(list(msgspec.structs.asdict(load).items()))
    changed: Load = msgspec.structs.replace(
        load, **{name: chance.choice(ODD_FIGURES if type(value) is float else ODD_COUNTS)}
    )
    return changed


@pytest.mark.parametrize("odd", [0.0, 0.02, 0.5])
def test_both_learn_the_same_of_thousands_of_steps(odd: float) -> None:
    chance = random.Random(odd)
    fleets = [model.FleetModel(), built(OUTLOOKS).FleetModel()]
    replicas = [[fleet.foresight() for _ in range(4)] for fleet in fleets]
    now = 0.0
    for number in range(6000):
        now += chance.choice([0.001, 0.01, 0.1 if number % 7 else 3.0])
        load, which = any_load(chance, odd), chance.randrange(4)
        told = [outcome(mine[which].observe, load, now) for mine in replicas]
        assert told == ["None", "None"]
        asked = any_load(chance, odd)
        args = chance.randrange(5000), chance.random() * 1e6, chance.randrange(6)
        expected = [outcome(mine[which].outlook, asked, *args) for mine in replicas]
        assert expected[0] == expected[1]
        assert [(repr(fleet.budget), fleet.version) for fleet in fleets[:1]] == [
            (repr(fleet.budget), fleet.version) for fleet in fleets[1:]
        ]
    for name in ("prefill", "decode"):
        fits = [getattr(fleet, name) for fleet in fleets]
        assert repr(fits[0].coefficients) == repr(fits[1].coefficients)
        assert fits[0].steps == fits[1].steps > 256


@settings(deadline=None)
@given(st.lists(st.tuples(loads, st.floats(0.0, 100.0)), max_size=50), loads, counts, figures, st.integers(0, 9))
def test_both_expect_the_same_after_any_steps(
    steps: list[tuple[Load, float]], load: Load, tokens: int, pairs: float, unacked: int
) -> None:
    replicas: list[Any] = [model.FleetModel().foresight(), built(OUTLOOKS).FleetModel().foresight()]
    for step, now in steps:
        told = [outcome(one.observe, step, now) for one in replicas]
        assert told[0] == told[1]
        first, second = (outcome(one.outlook, load, tokens, pairs, unacked) for one in replicas)
        assert first == second


@settings(deadline=None)
@given(st.lists(loads, max_size=30), loads)
def test_no_report_makes_the_model_raise(steps: list[Load], load: Load) -> None:
    for replica in (model.FleetModel().foresight(), built(OUTLOOKS).FleetModel().foresight()):
        for step in steps:
            replica.observe(step, 1.0)
        replica.outlook(load, 5, 5.0, 1)


@dataclass
class FakeLane:
    replica: str
    account: Account


INFOS = (
    EngineInfo("x", (), (), 8, 1000, 16),
    EngineInfo("x", (), (), 0, 0, 0, False),
    EngineInfo("x", (), (), 1 << 50, 1000, 16),
)


def a_pool(kinds: Any, fleet: Any, infos: tuple[EngineInfo, ...]) -> tuple[Pool, list[Any]]:
    """Those of even numbers learn, of the others each fifth is blind."""
    accounts = [
        kinds.Account(f"r{at}", info, Load(), plain.Blind() if at % 5 == 3 else fleet.foresight())
        for at, info in enumerate(infos)
    ]
    pool = Pool([cast(Lane, FakeLane(account.replica, account)) for account in accounts])
    pool.watch()
    return pool, accounts


Change = tuple[str, int, int, Load]
changes = st.lists(
    st.tuples(
        st.sampled_from(["submit", "step", "lease", "caches", "look", "snapshot"]),
        st.integers(0, 4),
        st.integers(0, 30),
        loads,
    ),
    max_size=40,
)


def told(snapshot: Snapshot) -> str:
    return repr((snapshot.replicas, snapshot.columns(), dict(snapshot.places), snapshot.now))


@settings(deadline=None)
@given(st.lists(st.sampled_from(INFOS), min_size=1, max_size=5), changes)
def test_pools_of_both_show_the_same(infos: list[EngineInfo], changed: list[Change]) -> None:
    compiled = built(OUTLOOKS)
    pools = [
        a_pool(plain, model.FleetModel(), tuple(infos)),
        a_pool(compiled, compiled.FleetModel(), tuple(infos)),
    ]
    assert [type(pool._kept) for pool, _ in pools] == [Views, compiled.Table]
    now = 0.0
    kept: list[tuple[Snapshot, str]] = []
    for streams, (kind, which, size, load) in enumerate(changed, 1):
        now += 0.1
        for _, accounts in pools:
            account = accounts[which % len(accounts)]
            if kind == "submit":
                account.submitted(streams, Charge(size, size * 2.5))
            elif kind == "step":
                account.stepped(load, streams - size % 3, now)
            elif kind == "lease":
                account.leased(1 if size % 2 else -1)
            elif kind == "caches":
                account.caches([CacheMode.EXACT, CacheMode.OFF][size % 2])
            elif kind == "look":
                assert account.view() is account.view()
        if kind == "snapshot":
            first, second = (pool.snapshot("m", now) for pool, _ in pools)
            assert briefs(first, size) == briefs(second, size)
            assert told(first) == told(second)
            assert pools[0][0].room() == pools[1][0].room()
            numbers(second)
            kept.append((pools[1][0].snapshot("m", now), told(first)))
    for snapshot, before in kept:  # Its views are made only now, and yet as they were.
        assert told(snapshot) == before


def briefs(snapshot: Snapshot, size: int) -> list[tuple[str, ...]]:
    """What receipts tell of each replica."""
    return [
        (
            repr(brief.queue_depth),
            repr(brief.asleep),
            outcome(brief.expects_s, snapshot.now, 100 * size, 64 * size),
        )
        for brief in map(snapshot.brief, snapshot.places)
    ]


def numbers(snapshot: Snapshot) -> None:
    """A table's numbers are the terms, unless there are some that would not be exact."""
    table: Any = snapshot.pool
    terms = [view.terms for view in snapshot.replicas]
    if table.numbers is None:
        assert any(type(term) is int and abs(term) > 1 << 39 for row in terms for term in row)
    else:
        found = list(memoryview(table.numbers).cast("d"))
        assert repr(found) == repr([float(term) for row in terms for term in row])


def test_a_snapshot_of_rows_is_one_as_any_other() -> None:
    compiled = built(OUTLOOKS)
    pool, accounts = a_pool(compiled, compiled.FleetModel(), INFOS)
    snapshot = pool.snapshot("m", 1.0)
    same = Snapshot("m", tuple(account.view() for account in accounts), now=1.0)
    assert snapshot == same
    assert same == snapshot
    assert snapshot.replicas is snapshot.replicas
    assert all(one is two for one, two in zip(snapshot.replicas, same.replicas, strict=True))
    assert snapshot.view("r1") is snapshot.replicas[1]
    with pytest.raises(KeyError):
        snapshot.view("r9")
    assert repr(snapshot.replicas) in repr(snapshot)
    later = msgspec.structs.replace(snapshot, now=2.0)
    assert later.replicas == snapshot.replicas
    assert later != snapshot
    fewer = msgspec.structs.replace(snapshot, replicas=snapshot.replicas[1:])
    assert fewer.places == {"r1": 0, "r2": 1}
    assert fewer.view("r2") is snapshot.replicas[2]
    with pytest.raises(AttributeError):
        snapshot.replicas = ()  # type: ignore[misc]


def test_what_is_asked_of_no_replica_is_refused() -> None:
    compiled = built(OUTLOOKS)
    pool, accounts = a_pool(compiled, compiled.FleetModel(), INFOS)
    rows: Any = pool.snapshot("m", 1.0).pool.rows  # type: ignore[union-attr]
    for place in (-1, 3, 1 << 40, 1 << 70):
        with pytest.raises((IndexError, OverflowError)):
            rows[place]
        with pytest.raises((IndexError, OverflowError)):
            rows.view(place)
        with pytest.raises((IndexError, OverflowError)):
            rows.brief(place)
        table = compiled.Table(accounts)
        table.stale.add(place)
        with pytest.raises((IndexError, OverflowError)):
            table.snapshot("m", 1.0, {})
    for wrong in ([None], [object()], [plain.Account("r", INFOS[0], Load())]):
        with pytest.raises(TypeError):
            compiled.Table(wrong)
    assert len(compiled.Table([]).rows) == 0
    table = compiled.Table(accounts[:2])
    with pytest.raises(BufferError):
        table.numbers.clear()


@pytest.mark.slow
def test_millions_of_steps_and_snapshots_keep_no_memory() -> None:
    compiled = built(OUTLOOKS)
    pool, accounts = a_pool(compiled, compiled.FleetModel(), INFOS)
    chance = random.Random(3)
    some = [any_load(chance, 0.1) for _ in range(100)]

    def run(rounds: int) -> int:
        for number in range(rounds):
            account = accounts[number % len(accounts)]
            account.submitted(number, Charge(5, 2.0))
            account.stepped(some[number % 100], number, number * 0.01)
            snapshot = pool.snapshot("m", 1.0)
            if number % 16 == 0:
                assert snapshot.replicas
        gc.collect()
        return resident_kb()

    sizes = [run(rounds) for rounds in (100_000, 300_000, 600_000)]
    assert max(after - before for before, after in pairwise(sizes)) < 4096  # kB


def test_a_pools_snapshot_can_be_pickled_and_copied_deeply() -> None:
    built("router.load._outlooks")
    account = new_account("r0", EngineInfo("sim", (), max_num_seqs=8), Load(3, 1), new_fleet().foresight())
    lane = SimpleNamespace(account=account, replica="r0")
    snapshot = Pool([lane]).snapshot("m", 5.0)  # type: ignore[list-item]
    assert type(snapshot) is PoolSnapshot
    for copied in (pickle.loads(pickle.dumps(snapshot)), copy.deepcopy(snapshot)):
        assert copied == snapshot
        assert copied.view("r0").queue_depth == 4
