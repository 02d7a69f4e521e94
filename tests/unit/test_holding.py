"""The hold's queues as a pure structure: order, bounds, turns, and a model of it that cannot be wrong."""

from __future__ import annotations

import math

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from router.errors import HoldFull
from router.holding import BATCH, Holding, Place, room
from router.types import Load, ReplicaView

MAX_REQUESTS, MAX_BYTES = 5, 100
MODELS = ("a", "b")


def view(depth: int = 0, leases: int = 0, batch: int = 8) -> ReplicaView:
    return ReplicaView("r", Load(running=depth), unacked=0, leases=leases, max_num_seqs=batch)


def place(model: str = "a", size: int = 1, since: float = 0.0, ring_at: float = math.inf, alone: bool = False) -> Place:
    return Place(model, size, since, since + 10.0, ring_at, alone=alone)


def joined(holding: Holding, *places: Place) -> list[Place]:
    for each in places:
        holding.join(each)
    return list(places)


def test_a_replica_gets_a_quarter_more_than_its_batch_and_no_more() -> None:
    assert room([view()]) == 10
    assert room([view(depth=9, leases=9)]) == 1
    assert room([view(depth=4, leases=4), view(depth=8, leases=8)]) == 6 + 2
    assert room([view(batch=0)]) == BATCH + BATCH // 4
    assert room([]) == 0


def test_where_others_keep_a_replica_busy_a_quarter_of_its_batch_is_ours() -> None:
    assert room([view(depth=500)]) == 2
    assert room([view(depth=500, leases=1)]) == 1
    assert room([view(depth=500, leases=2)]) == 0
    assert room([view(depth=500, batch=1)]) == 1


def test_requests_are_counted_over_all_models() -> None:
    holding = Holding(MAX_REQUESTS, MAX_BYTES)
    first, *_ = joined(holding, *(place("a") for _ in range(MAX_REQUESTS - 1)), place("b"))
    with pytest.raises(HoldFull, match="5 requests wait") as caught:
        holding.join(place("c"))
    assert (caught.value.http_status, caught.value.grpc_status, caught.value.retry_after_s) == (503, "UNAVAILABLE", 5.0)
    holding.leave(first)
    holding.join(place("c"))


def test_bytes_are_counted_over_all_models() -> None:
    holding = Holding(MAX_REQUESTS, MAX_BYTES)
    first, _ = joined(holding, place("a", 60), place("b", 40))
    with pytest.raises(HoldFull, match="100 bytes"):
        holding.join(place("c", 1))
    assert "c" not in holding.queues
    holding.leave(first)
    holding.join(place("c", 60))


def test_who_reads_its_prompt_in_slices_is_called_alone() -> None:
    holding = Holding(9, MAX_BYTES)
    small, large, last = joined(holding, place(), place(alone=True), place())
    assert holding.call("a", 9) == [small]
    holding.leave(small)
    assert holding.call("a", 9) == [large]
    holding.leave(large)
    assert holding.call("a", 9) == [last]


def test_who_is_put_back_keeps_its_turn() -> None:
    holding = Holding(9, MAX_BYTES)
    first, second, third = joined(holding, place(), place(), place())
    assert holding.call("a", 2) == [first, second]
    holding.leave(second)
    holding.put_back(first)
    assert holding.call("a", 2) == [first, third]


def test_clients_are_told_in_turns_and_again_after_the_interval() -> None:
    holding = Holding(9, MAX_BYTES)
    silent, first, second = joined(holding, place(), place(ring_at=15.0), place(ring_at=16.0))
    assert holding.ring(14.9, 15.0, 9) == []
    assert holding.next_ring() == 15.0
    assert holding.ring(16.0, 15.0, 1) == [first]
    assert holding.ring(16.0, 15.0, 9) == [second]
    holding.leave(second)
    assert holding.next_ring() == 31.0
    for each in (silent, first):
        holding.leave(each)
    assert (holding.next_ring(), holding.queues, holding.bytes) == (math.inf, {}, 0)


class HoldingMachine(RuleBasedStateMachine):
    """Compares with plain lists."""

    def __init__(self) -> None:
        super().__init__()
        self.holding = Holding(MAX_REQUESTS, MAX_BYTES)
        self.lists: dict[str, list[Place]] = {model: [] for model in MODELS}
        self.now = 0.0

    def everybody(self) -> list[Place]:
        return [each for model in MODELS for each in self.lists[model]]

    @rule(model=st.sampled_from(MODELS), size=st.integers(0, 60), alone=st.booleans(), rings=st.booleans())
    def join(self, model: str, size: int, alone: bool, rings: bool) -> None:
        new = place(model, size, self.now, self.now + 3.0 if rings else math.inf, alone)
        size_then = sum(each.size for each in self.everybody()) + size
        if sum(map(len, self.lists.values())) >= MAX_REQUESTS or size_then > MAX_BYTES:
            with pytest.raises(HoldFull):
                self.holding.join(new)
        else:
            self.holding.join(new)
            self.lists[model].append(new)

    @precondition(lambda self: self.everybody())
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        gone = data.draw(st.sampled_from(self.everybody()))
        self.holding.leave(gone)
        self.holding.leave(gone)
        self.lists[gone.model].remove(gone)

    @rule(model=st.sampled_from(MODELS), most=st.integers(0, 4))
    def call(self, model: str, most: int) -> None:
        expected: list[Place] = []
        for each in [each for each in self.lists[model] if not each.called][:most]:
            if each.alone and expected:
                break
            expected.append(each)
            if each.alone:
                break
        assert self.holding.call(model, most) == expected
        assert all(each.called for each in expected)

    @precondition(lambda self: self.everybody())
    @rule(data=st.data())
    def put_back(self, data: st.DataObject) -> None:
        back = data.draw(st.sampled_from(self.everybody()))
        self.holding.put_back(back)
        assert not back.called

    @rule(passed=st.floats(0.0, 8.0), most=st.integers(0, 4))
    def time_passes(self, passed: float, most: int) -> None:
        self.now += passed
        for model in self.holding.queues:
            late = [each for each in self.lists[model] if not each.called and each.deadline <= self.now]
            assert self.holding.overdue(model, self.now, most) == late[:most]
        due = [each for each in self.everybody() if each.ring_at <= self.now]
        rung = self.holding.ring(self.now, 3.0, len(due))
        assert set(rung) == set(due)
        assert self.holding.next_ring() > self.now

    @invariant()
    def counts_are_right(self) -> None:
        assert self.holding.bytes == sum(each.size for each in self.everybody())
        assert self.holding.queues.keys() == {model for model in MODELS if self.lists[model]}
        for model, queue in self.holding.queues.items():
            assert list(queue.places) == self.lists[model]
            assert queue.bytes == sum(each.size for each in self.lists[model])
            assert queue.called == sum(each.called for each in self.lists[model])


TestHolding = HoldingMachine.TestCase
TestHolding.settings = settings(max_examples=60, stateful_step_count=40, deadline=None, derandomize=True)
