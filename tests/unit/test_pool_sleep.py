"""Who of a pool is on duty: sleepers come last, no more of them than are needed, and the next is woken in time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from hypothesis import given, settings
from hypothesis import strategies as st

from router.lane.client import Lane
from router.load.account import Account, new_account
from router.pool import WAKE_INTERVAL_S, Pool
from router.types import EngineInfo, Load, ModelCard
from tests.twins import twins

both = twins("router.load._outlooks")

BATCH = 10
INFO = EngineInfo("x", (ModelCard("m"),), max_num_seqs=BATCH)


@dataclass
class FakeLane:
    replica: str
    account: Account
    woken: int = 0

    def wake(self) -> None:
        self.woken += 1

    def __hash__(self) -> int:
        return id(self)


class Fleet:
    """A watched pool of replicas in some load."""

    def __init__(self, *depths: int, asleep: int = 0, info: EngineInfo = INFO) -> None:
        """The last `asleep` of them sleep."""
        self.lanes: list[FakeLane] = []
        for at, depth in enumerate(depths):
            load = Load(running=depth, asleep=at >= len(depths) - asleep)
            self.lanes.append(FakeLane(f"r{at:02}", new_account(f"r{at:02}", info, load)))
        self.pool = Pool([cast(Lane, lane) for lane in self.lanes])
        self.pool.watch()

    def put(self, at: int, depth: int, *, asleep: bool = False) -> None:
        """The replica's next step."""
        account = self.lanes[at].account
        flips = asleep is not account.load.asleep
        account.stepped(Load(running=depth, asleep=asleep), 0, 0.0)
        if flips:
            self.pool.regroup()

    def on_duty(self, now: float = 100.0) -> list[int]:
        """Places of those that a request may go to."""
        pool = self.pool.on_duty(now) if self.pool.asleep else self.pool
        snapshot = pool.snapshot("m", now)
        for view in snapshot.replicas:
            assert view is next(lane for lane in self.lanes if lane.replica == view.replica).account.view()
        return [int(view.replica[1:]) for view in snapshot.replicas]

    def woken(self) -> list[int]:
        """Who was told to wake, and how often."""
        return [lane.woken for lane in self.lanes]


def test_who_sleeps_gets_nothing_while_somebody_awake_has_room() -> None:
    fleet = Fleet(BATCH, BATCH // 2, 0, 0, asleep=2)
    assert fleet.on_duty() == [0, 1]
    fleet.put(1, BATCH)
    assert fleet.on_duty() == [0, 1, 2]
    fleet.put(0, 2)
    assert fleet.on_duty() == [0, 1]


def test_where_all_sleep_one_is_enough_until_it_is_full() -> None:
    fleet = Fleet(0, 0, 0, 0, 0, 0, asleep=6)
    assert fleet.on_duty() == [0]
    fleet.put(0, BATCH, asleep=True)
    assert fleet.on_duty() == [0, 1]
    fleet.put(1, BATCH, asleep=True)
    assert fleet.on_duty() == [0, 1, 2, 3]
    for at in range(2, 6):
        fleet.put(at, BATCH, asleep=True)
    assert fleet.on_duty() == [0, 1, 2, 3, 4, 5]


def test_the_next_sleeper_is_woken_while_there_is_still_a_little_room() -> None:
    fleet = Fleet(7, BATCH, 0, 0, asleep=2)
    fleet.on_duty()
    assert fleet.woken() == [0, 0, 0, 0]
    fleet.put(0, 8)
    for now in (100.0, 100.1, 100.0 + WAKE_INTERVAL_S - 0.1):
        assert fleet.on_duty(now) == [0, 1]
    assert fleet.woken() == [0, 0, 1, 0]
    fleet.on_duty(100.0 + WAKE_INTERVAL_S)
    assert fleet.woken() == [0, 0, 2, 0]
    fleet.put(0, BATCH)
    fleet.on_duty(200.0)  # The one that wakes takes what comes, and is empty enough.
    assert fleet.woken() == [0, 0, 2, 0]
    fleet.put(2, 9, asleep=True)
    fleet.on_duty(200.0)
    assert fleet.woken() == [0, 0, 2, 1]


def test_what_is_on_its_way_counts_as_no_room() -> None:
    fleet = Fleet(BATCH - 1, 0, asleep=1)
    assert fleet.on_duty() == [0]
    fleet.lanes[0].account.submitted(1)
    assert fleet.on_duty() == [0, 1]


def test_a_batch_of_unknown_size_has_always_room() -> None:
    fleet = Fleet(10_000, 0, asleep=1, info=EngineInfo("x", (ModelCard("m"),)))
    assert fleet.on_duty() == [0]
    assert fleet.woken() == [0, 0]


def test_an_awake_fleet_is_one_pool_and_nobody_looks() -> None:
    fleet = Fleet(BATCH, BATCH, 0, asleep=1)
    assert fleet.pool.asleep
    fleet.put(2, 0)
    assert not fleet.pool.asleep
    assert fleet.on_duty() == [0, 1, 2]
    assert [len(lane.account._watchers) for lane in fleet.lanes] == [1, 1, 1]


def test_a_part_of_a_pool_that_nobody_keeps_leaves_nothing_behind() -> None:
    fleet = Fleet(BATCH, 0, 0, asleep=2)
    part = Pool([cast(Lane, lane) for lane in fleet.lanes[1:]])
    part.on_duty(0.0).snapshot("m", 0.0)
    assert [len(lane.account._watchers) for lane in fleet.lanes] == [1, 1, 1]


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 5), st.integers(0, 2 * BATCH), st.booleans(), st.booleans()), min_size=1, max_size=60
    )
)
def test_somebody_has_room_on_duty_wherever_anybody_has(steps: list[tuple[int, int, bool, bool]]) -> None:
    fleet = Fleet(*[0] * 6)
    for at, depth, asleep, look in steps:
        fleet.put(at, depth, asleep=asleep)
        if not look:
            continue
        loads = [lane.account.load for lane in fleet.lanes]
        awake = {place for place, load in enumerate(loads) if not load.asleep}
        free = {place for place, load in enumerate(loads) if load.running < BATCH}
        on_duty = set(fleet.on_duty())
        assert awake <= on_duty
        if awake & free:
            assert on_duty == awake
        assert on_duty & free or not free
        if not free:
            assert on_duty == set(range(6))
    assert all(len(lane.account._watchers) <= 1 + len(fleet.pool._parts) for lane in fleet.lanes)
