"""The replicas' life as the router sees it: joining, ready, draining, gone, and back."""

import asyncio
import time
from array import array
from collections.abc import AsyncIterator

import msgspec
import pytest

from engine.cache_ledger import CacheLedger
from engine.cache_report import CacheFeed
from router.errors import ModelNotFound, NoReplica
from router.ingress.base import CacheStatus
from router.lane.carriers import SocketCarrier
from router.lane.client import Lane
from router.lane.frames import CacheReport
from router.load.model import FleetModel
from router.options import LaneOptions, PrefixOptions
from router.prefix.prefixes import Prefixes
from router.replica_life import LIFE, Event, State
from router.replicas import Replicas
from router.types import CacheMode, Chain, Load
from tests.fakes import DEADLINE_S, Fleet, eventually


@pytest.fixture
async def fleet() -> AsyncIterator[Fleet]:
    fleet = Fleet()
    yield fleet
    await fleet.close()


def test_every_state_but_gone_ends_and_gone_is_final() -> None:
    assert all(state is not State.GONE for state, _ in LIFE)
    leaving = {state for state, _ in LIFE}
    assert leaving == set(State) - {State.GONE}
    reached, frontier = {State.JOINING}, [State.JOINING]
    while frontier:
        here = frontier.pop()
        new = {after for (before, _), after in LIFE.items() if before is here} - reached
        reached |= new
        frontier += new
    assert reached == set(State)


def test_only_an_opened_lane_makes_a_replica_ready() -> None:
    into_ready = {(before, event) for (before, event), after in LIFE.items() if after is State.READY}
    assert into_ready == {(State.JOINING, Event.OPENED), (State.LEAVING, Event.LISTED)}


async def test_models_of_all_pools_are_known_with_their_ready_replicas(fleet: Fleet) -> None:
    await fleet.add("a", "llama")
    await fleet.add("b", "llama")
    await fleet.add("c", "qwen")
    await fleet.until(lambda: (fleet.ready("llama"), fleet.ready("qwen")) == (2, 1))
    assert [(m.card.name, m.ready_replicas) for m in fleet.router.models()] == [("llama", 2), ("qwen", 1)]
    assert fleet.router.readiness().ready
    await fleet.replicas["c"].close()
    await fleet.until(lambda: fleet.ready("qwen") == 0)
    assert fleet.router.readiness().ready  # no model is required, and one is there
    assert [(m.card.name, m.ready_replicas) for m in fleet.router.models()] == [("llama", 2), ("qwen", 0)]


async def test_paths_are_those_of_the_replicas_application(fleet: Fleet) -> None:
    await fleet.add("a")
    await fleet.until(lambda: fleet.ready() == 1)
    assert fleet.router.methods("/v1/chat/completions") == ("POST",)
    assert fleet.router.methods("/v1/responses/resp_1") == ("GET",)
    assert fleet.router.methods("/v1/responses/resp_1/more") == ()
    assert fleet.router.methods("/v1/nothing") == ()


async def test_an_unlisted_replica_gets_no_new_requests_but_keeps_its_lane(fleet: Fleet) -> None:
    await fleet.add("a")
    await fleet.until(lambda: fleet.ready() == 1)
    record = fleet.records["a"]
    fleet.list({})
    assert fleet.ready() == 0
    fleet.list({"a": record})
    assert fleet.ready() == 1


async def test_a_replica_at_a_new_address_is_reached_anew(fleet: Fleet) -> None:
    await fleet.add("a")
    await fleet.until(lambda: fleet.ready() == 1)
    old = fleet.records["a"]
    await fleet.add("b")
    await fleet.until(lambda: fleet.ready() == 2)
    moved = msgspec.structs.replace(fleet.records["b"], replica="a")
    fleet.list({"a": moved})
    await fleet.until(lambda: fleet.ready() == 1)
    assert old.port != moved.port
    await eventually(lambda: [lane.replica for lane in fleet.router.lanes()] == ["a"])


async def test_of_a_replica_that_goes_to_and_fro_between_addresses_no_lane_is_forgotten(fleet: Fleet) -> None:
    await fleet.add("a")
    await fleet.add("b")
    await fleet.until(lambda: fleet.ready() == 2)
    here, there = fleet.records["a"], msgspec.structs.replace(fleet.records["b"], replica="a")
    sessions = [fleet.replicas[name]._sessions for name in ("a", "b")]
    for at, record in enumerate([here, there] * 3, 1):
        fleet.list({"a": record})
        await fleet.until(lambda: fleet.ready() == 1)
        await eventually(lambda at=at: sum(map(len, sessions)) >= at)  # type: ignore[misc]
    await fleet.router.close()
    await eventually(lambda: not any(sessions))


async def test_a_replica_that_comes_up_late_is_joined_by_back_off(fleet: Fleet) -> None:
    await fleet.add("a")
    await fleet.until(lambda: fleet.ready() == 1)
    port = fleet.records["a"].port
    replica = fleet.replicas["a"]
    await replica.close()
    await fleet.until(lambda: fleet.ready() == 0)
    await replica.listen("127.0.0.1", port)
    await fleet.until(lambda: fleet.ready() == 1)


async def test_closing_leaves_no_lane_and_no_task(fleet: Fleet) -> None:
    await fleet.add("a")
    await fleet.add("b")
    await fleet.until(lambda: fleet.ready() == 2)
    await fleet.router.close()
    assert fleet.router.lanes() == ()
    await eventually(lambda: not any(replica._sessions for replica in fleet.replicas.values()))


async def test_required_models_decide_readiness() -> None:
    fleet = Fleet()
    required = Replicas("test", SocketCarrier(), LaneOptions(), required=["llama", "qwen"])
    fleet.router = required
    await fleet.add("a", "llama")
    await fleet.until(lambda: fleet.ready("llama") == 1)
    assert not required.readiness().ready
    await fleet.add("b", "qwen")
    await fleet.until(lambda: fleet.ready("qwen") == 1)
    assert required.readiness().ready
    await fleet.close()


async def test_a_model_that_is_gone_is_known_for_a_while_and_then_forgotten(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    await fleet.add("a", "old")
    await fleet.until(lambda: fleet.ready("old") == 1)
    fleet.list({})
    await fleet.replicas["a"].close()
    await eventually(lambda: all(member.gone for member in fleet.router._members.values()))
    with pytest.raises(NoReplica):
        fleet.router.snapshot("old")
    monkeypatch.setattr("router.replicas.FORGET_S", 0.0)
    fleet.router.changed()
    with pytest.raises(ModelNotFound):
        fleet.router.snapshot("old")
    assert fleet.router.models() == ()


# What replicas say of their KV caches.


@pytest.fixture
async def caching() -> AsyncIterator[tuple[Fleet, Prefixes]]:
    prefixes = Prefixes(PrefixOptions(), time.monotonic)
    fleet = Fleet(prefixes)
    yield fleet, prefixes
    await fleet.close()


def reports(lane: Lane, report: CacheReport) -> None:
    """As if a step had brought it."""
    lane._listener.cache_reported(lane, report)


def snapshot(seq: int, *blocks: int, mode: str = "exact", cause: str = "") -> CacheReport:
    stored, depths = array("Q", blocks).tobytes(), array("I", [16] * len(blocks)).tobytes()
    return CacheReport(seq, True, stored, depths, mode=mode, cause=cause)


def held(prefixes: Prefixes, *blocks: int) -> dict[str, int]:
    chain = Chain(256, 0, blocks, 256 * len(blocks))
    return {replica: held.blocks for replica, held in prefixes.view("m", chain).held.items()}


async def test_a_snapshot_shows_what_the_load_model_learned_from_others() -> None:
    """An idle replica's view is made anew when the fleet's model is, though nothing happens at the replica itself."""
    model = FleetModel()
    fleet = Fleet(foresee=lambda info: model.foresight())
    try:
        for name in ("a", "b"):
            await fleet.add(name)
        await fleet.until(lambda: fleet.ready() == 2)
        lanes = {lane.replica: lane for lane in fleet.router.lanes()}
        before = fleet.router.snapshot("m").view("b")
        for step in range(200):
            load = Load(1, step_ms=5 + 0.02 * (step % 50), step_prefill_tokens=step % 50, step_prefill_pairs=1.0)
            lanes["a"].account.stepped(load, 0, step * 0.01)
        after = fleet.router.snapshot("m").view("b")
        assert (before.outlook.token_s, before.outlook.batch_s) == (5e-5, 0.0)  # Nothing is learned yet.
        assert after.outlook.token_s == pytest.approx(2e-5, rel=0.2)
        assert after.outlook.batch_s == pytest.approx(5e-3, rel=0.2)
    finally:
        await fleet.close()


async def test_a_long_report_is_no_reason_to_warn(
    caching: tuple[Fleet, Prefixes], caplog: pytest.LogCaptureFixture
) -> None:
    """At thousands of requests a second every other report is one."""
    caplog.set_level("INFO")
    fleet, prefixes = caching
    await fleet.add("a")
    await fleet.until(lambda: fleet.ready() == 1)
    (lane,) = fleet.router.lanes()
    reports(lane, snapshot(1, 11))
    reports(lane, snapshot(2, *range(1, 3_000)))
    assert lane.account.view().cache is CacheMode.APPROXIMATE
    while prefixes.status().late:
        prefixes.sweep()
    assert lane.account.view().cache is CacheMode.EXACT
    reports(lane, snapshot(5, 11, mode="approximate", cause="something is amiss"))
    said = [(record.levelname, record.message) for record in caplog.records if "KV cache" in record.message]
    assert said[-3:] == [
        ("INFO", "replica a: KV cache approximate: what it reported is being taken in"),
        ("INFO", "replica a: KV cache exact"),
        ("WARNING", "replica a: KV cache approximate: something is amiss"),
    ]


async def test_a_replicas_reports_are_kept_until_its_lane_is_lost(caching: tuple[Fleet, Prefixes]) -> None:
    fleet, prefixes = caching
    await fleet.add("a")
    await fleet.until(lambda: fleet.ready() == 1)
    (lane,) = fleet.router.lanes()
    reports(lane, snapshot(1, 11, 12))
    assert held(prefixes, 11, 12, 13) == {"a": 2}
    reports(lane, CacheReport(2, evicted=array("Q", [12]).tobytes()))
    assert held(prefixes, 11, 12, 13) == {"a": 1}
    await fleet.replicas["a"].close()
    await fleet.until(lambda: fleet.ready() == 0)
    assert held(prefixes, 11, 12, 13) == {}
    assert fleet.router.reports == 2


async def test_what_is_known_of_a_cache_shows_in_snapshots_and_readiness(caching: tuple[Fleet, Prefixes]) -> None:
    fleet, _ = caching
    await fleet.add("a")
    await fleet.until(lambda: fleet.ready() == 1)
    (lane,) = fleet.router.lanes()
    assert fleet.router.snapshot("m").replicas[0].cache is CacheMode.APPROXIMATE
    assert fleet.router.readiness().caches["a"].cause
    reports(lane, snapshot(1, 11))
    assert fleet.router.snapshot("m").replicas[0].cache is CacheMode.EXACT
    assert fleet.router.readiness().caches == {"a": CacheStatus(CacheMode.EXACT)}
    reports(lane, CacheReport(2, mode="approximate", cause="a KV event of an unknown kind"))
    assert fleet.router.snapshot("m").replicas[0].cache is CacheMode.APPROXIMATE
    assert fleet.router.readiness().caches["a"].cause == "a KV event of an unknown kind"


async def test_a_missed_report_makes_the_lane_ask_for_a_snapshot(caching: tuple[Fleet, Prefixes]) -> None:
    fleet, prefixes = caching
    await fleet.add("a")
    await fleet.until(lambda: fleet.ready() == 1)
    (lane,) = fleet.router.lanes()
    reports(lane, snapshot(1, 11))
    reports(lane, CacheReport(3))
    assert lane._resyncing
    assert fleet.router.snapshot("m").replicas[0].cache is CacheMode.APPROXIMATE
    reports(lane, snapshot(4, 21))
    assert fleet.router.snapshot("m").replicas[0].cache is CacheMode.EXACT
    assert (held(prefixes, 11), held(prefixes, 21)) == ({}, {"a": 1})


async def test_only_the_newest_lane_of_a_name_is_believed(caching: tuple[Fleet, Prefixes]) -> None:
    fleet, prefixes = caching
    await fleet.add("a")
    await fleet.until(lambda: fleet.ready() == 1)
    (old,) = fleet.router.lanes()
    await fleet.add("b")
    await fleet.until(lambda: fleet.ready() == 2)
    fleet.list({"a": msgspec.structs.replace(fleet.records["b"], replica="a")})
    await eventually(lambda: [lane.replica for lane in fleet.router.lanes()] == ["a"])
    await eventually(lambda: fleet.router.lanes()[0] is not old)
    (new,) = fleet.router.lanes()
    reports(new, snapshot(1, 11))
    reports(old, snapshot(9, 99))
    assert (held(prefixes, 11), held(prefixes, 99)) == ({"a": 1}, {})
    fleet.router.retired(old)
    assert held(prefixes, 11) == {"a": 1}


async def test_a_model_whose_replicas_all_cache_nothing_needs_no_hashing(caching: tuple[Fleet, Prefixes]) -> None:
    fleet, _ = caching
    await fleet.add("a", prefix_caching=False)
    await fleet.until(lambda: fleet.ready() == 1)
    assert not fleet.router.caching("m")
    await fleet.add("b")
    await fleet.until(lambda: fleet.ready() == 2)
    assert fleet.router.caching("m")
    (lane,) = [lane for lane in fleet.router.lanes() if lane.replica == "b"]
    reports(lane, CacheReport(1, True, mode="off", cause="turned off"))
    assert not fleet.router.caching("m")
    assert not fleet.router.caching("nobody")


async def test_without_an_observer_all_caches_count_as_off(fleet: Fleet) -> None:
    await fleet.add("a")
    await fleet.until(lambda: fleet.ready() == 1)
    assert fleet.router.snapshot("m").replicas[0].cache is CacheMode.OFF
    assert (fleet.router.caching("m"), fleet.router.caches()) == (False, {})


async def test_an_adapters_parent_is_told_and_nobody_elses(fleet: Fleet) -> None:
    await fleet.add("a", adapters=("m-sql",))
    await fleet.until(lambda: fleet.ready() == 1)
    assert [fleet.router.parent(name) for name in ("m-sql", "m", "unknown")] == ["m", "", ""]
    assert fleet.ready("m-sql") == 1


async def test_what_was_put_off_is_done_in_slices_between_which_others_run() -> None:
    left = 3
    turns: list[str] = []

    class Slices(Prefixes):
        def sweep(self) -> bool:
            nonlocal left
            turns.append("sweep")
            left -= 1
            return left > 0

    fleet = Fleet(Slices(PrefixOptions(), time.monotonic))
    sweeping = asyncio.create_task(fleet.router.sweep())
    async with asyncio.timeout(DEADLINE_S):
        while left:
            turns.append("other")
            await asyncio.sleep(0)
    sweeping.cancel()
    await asyncio.gather(sweeping, return_exceptions=True)
    assert turns.count("sweep") == 3
    assert "sweep sweep" not in " ".join(turns)
    await fleet.close()


async def test_what_the_first_lanes_put_off_does_not_wait_for_an_idle_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("router.replicas.IDLE_SWEEP_INTERVAL_S", 10 * DEADLINE_S)
    slices = 0
    again = asyncio.Event()

    class Idle(Prefixes):
        def sweep(self) -> bool:
            nonlocal slices
            slices += 1
            if slices == 2:
                again.set()
            return False

    fleet = Fleet(Idle(PrefixOptions(), time.monotonic))
    sweeping = asyncio.create_task(fleet.router.sweep())
    async with asyncio.timeout(DEADLINE_S):
        await again.wait()
    sweeping.cancel()
    await asyncio.gather(sweeping, return_exceptions=True)
    await fleet.close()


async def test_a_slice_that_fails_is_logged_and_the_next_ones_follow(caplog: pytest.LogCaptureFixture) -> None:
    slices = 0
    done = asyncio.Event()

    class Broken(Prefixes):
        def sweep(self) -> bool:
            nonlocal slices
            slices += 1
            if slices < 3:
                raise KeyError("a defect")
            done.set()
            return False

    fleet = Fleet(Broken(PrefixOptions(), time.monotonic))
    sweeping = asyncio.create_task(fleet.router.sweep())
    async with asyncio.timeout(DEADLINE_S):
        await done.wait()
    sweeping.cancel()
    await asyncio.gather(sweeping, return_exceptions=True)
    assert len([record for record in caplog.records if record.name == "router.replicas"]) == 1
    await fleet.close()


async def test_a_long_snapshot_makes_the_cache_exact_once_it_is_taken_in(caching: tuple[Fleet, Prefixes]) -> None:
    fleet, prefixes = caching
    await fleet.add("a")
    await fleet.until(lambda: fleet.ready() == 1)
    (lane,) = fleet.router.lanes()
    reports(lane, snapshot(1, *range(1, 5000)))
    assert fleet.router.snapshot("m").replicas[0].cache is CacheMode.APPROXIMATE
    while prefixes.sweep():
        pass
    assert fleet.router.snapshot("m").replicas[0].cache is CacheMode.EXACT


async def test_reports_reach_the_index_over_a_lane_and_a_lost_one_is_healed_by_a_snapshot(
    caching: tuple[Fleet, Prefixes],
) -> None:
    fleet, prefixes = caching
    ledger = CacheLedger(64)
    ledger.prompt(Chain(256, 0, (11, 12, 13), 768), keys=[1, 2, 3], ends=[64, 128, 192])
    ledger.stored(1)
    await fleet.add("a", feed=CacheFeed(ledger, CacheMode.EXACT))
    await fleet.until(lambda: fleet.ready() == 1)
    await eventually(lambda: held(prefixes, 11, 12, 13) == {"a": 1})
    ledger.stored(2)
    await eventually(lambda: held(prefixes, 11, 12, 13) == {"a": 2})
    ledger.evicted(2)
    await eventually(lambda: held(prefixes, 11, 12, 13) == {"a": 1})
    (session,) = fleet.replicas["a"]._sessions
    assert session._cursor is not None
    ledger.stored(2)
    assert session._cursor.take() is not None  # It never reaches the router.
    ledger.stored(3)
    await eventually(lambda: held(prefixes, 11, 12, 13) == {"a": 3})
    status = prefixes.status()
    assert (status.gaps, status.healed, prefixes.mode("a")) == (1, 1, CacheMode.EXACT)


async def test_a_lane_that_opens_again_begins_with_all_that_its_replica_holds(caching: tuple[Fleet, Prefixes]) -> None:
    fleet, prefixes = caching
    ledger = CacheLedger(64)
    ledger.prompt(Chain(256, 0, (11, 12), 512), keys=[1, 2], ends=[64, 128])
    ledger.stored(1)
    await fleet.add("a", feed=CacheFeed(ledger, CacheMode.EXACT))
    await eventually(lambda: held(prefixes, 11, 12) == {"a": 1})
    (lane,) = fleet.router.lanes()
    lane.close()
    assert held(prefixes, 11, 12) == {}
    ledger.stored(2)
    await eventually(lambda: held(prefixes, 11, 12) == {"a": 2})
    assert prefixes.status().gaps == 0
