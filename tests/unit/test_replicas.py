"""The replicas' life as the router sees it: joining, ready, draining, gone, and back."""

from collections.abc import AsyncIterator

import msgspec
import pytest

from router.errors import ModelNotFound, NoReplica
from router.lane.carriers import SocketCarrier
from router.options import LaneOptions
from router.replicas import LIFE, Event, Replicas, State
from tests.fakes import Fleet, eventually


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
