"""A pool's snapshots: always the replicas as they are, whatever changed and whoever looked before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from router.lane.client import Lane
from router.load.account import Account, new_account
from router.load.model import FleetModel, new_fleet
from router.pool import Pool
from router.types import CacheMode, Charge, Columns, EngineInfo, Load, ModelCard, Snapshot
from tests.twins import twins

both = twins("router.load._outlooks")

INFO = EngineInfo("x", (ModelCard("m"),), (), 8, 1000, 16)


@dataclass
class FakeLane:
    replica: str
    account: Account


def lanes(count: int, fleet: FleetModel) -> list[Lane]:
    made = [FakeLane(f"r{i}", new_account(f"r{i}", INFO, Load(), fleet.foresight())) for i in range(count)]
    return [cast(Lane, lane) for lane in made]


Change = tuple[str, int, int]
CHANGES = st.lists(
    st.tuples(
        st.sampled_from(["submit", "step", "lease", "caches", "look", "small", "large"]),
        st.integers(0, 4),
        st.integers(0, 30),
    ),
    max_size=60,
)


def check(pool: Pool, now: float) -> None:
    snapshot = pool.snapshot("m", now)
    views = tuple(account.view() for account in pool.accounts)
    assert snapshot.replicas == views
    assert snapshot.columns() == Columns(views).values
    assert list(snapshot.places) == [view.replica for view in views]


@settings(deadline=None)
@given(CHANGES)
def test_a_snapshot_shows_every_change_to_every_pool_that_has_the_replica(changes: list[Change]) -> None:
    fleet = new_fleet()
    all_lanes = lanes(5, fleet)
    pools = {"large": Pool(all_lanes), "small": Pool(all_lanes[1:3])}
    for pool in pools.values():
        pool.watch()
    now, streams = 0.0, [0] * 5
    for kind, which, size in changes:
        now += 0.05
        account = all_lanes[which].account
        if kind == "submit":
            streams[which] += 1
            account.submitted(streams[which], Charge(size, size * 2.0))
        elif kind == "step":
            load = Load(running=size, step_ms=10.0 + size, step_decodes=size, step_prefill_tokens=100 * (size % 3))
            account.stepped(load, streams[which], now)
        elif kind == "lease":
            account.leased(1)
        elif kind == "caches":
            account.caches([CacheMode.EXACT, CacheMode.OFF][size % 2])
        elif kind == "look":
            account.view()
        else:
            check(pools[kind], now)
    for pool in pools.values():
        check(pool, now)


def test_a_pool_without_some_replicas_takes_nothing_from_the_one_that_has_them() -> None:
    all_lanes = lanes(3, new_fleet())
    whole = Pool(all_lanes)
    whole.watch()
    all_lanes[1].account.leased(1)
    part = Pool(all_lanes[1:])
    assert [view.leases for view in part.snapshot("m", 0.0).replicas] == [1, 0]
    check(whole, 0.0)


def test_a_replica_that_nobody_watches_costs_no_pool_anything() -> None:
    (lane,) = lanes(1, new_fleet())
    pool = Pool([lane])
    pool.watch()
    lane.account.unwatch()
    lane.account.leased(1)
    assert pool.snapshot("m", 0.0).replicas[0].leases == 0


def test_a_snapshot_of_other_replicas_than_its_pools_works_everything_out_anew() -> None:
    pool = Pool(lanes(3, new_fleet()))
    snapshot = pool.snapshot("m", 1.0)
    fewer: Snapshot = msgspec.structs.replace(snapshot, replicas=snapshot.replicas[1:])
    assert list(fewer.places.items()) == [("r1", 0), ("r2", 1)]
    assert fewer.columns() == Columns(fewer.replicas).values
    copied: Any = snapshot.looked_up(snapshot.prefix)
    assert copied.columns() is snapshot.columns()
