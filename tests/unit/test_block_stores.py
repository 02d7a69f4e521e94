"""The two block stores against each other, and what the compiled one must stand."""

from __future__ import annotations

import gc
import random
from array import array
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.compiled import part
from router.prefix.base import BlockStore
from router.prefix.blocks import Blocks
from router.prefix.index import Hold, PrefixIndex
from router.types import Held, Holders
from tests.twins import resident_kb
from tests.unit.test_prefix_index import CHAINS, MOVES, Move

_compiled = part("router.prefix._blocks")
pytestmark = pytest.mark.skipif(_compiled is None, reason="router.prefix._blocks is not compiled, or left out")
TOP = 2**64 - 1


def compiled(max_blocks: int = 1_000_000) -> BlockStore:
    assert _compiled is not None
    return _compiled.Blocks(max_blocks)  # type: ignore[no-any-return]


def told(held: Holders) -> tuple[Any, ...]:
    return list(held.groups), held.most, held.names


class Twins:
    """An index of each kind, moved alike."""

    def __init__(self, limit: int, replicas: int) -> None:
        self.indexes = PrefixIndex(limit, Blocks), PrefixIndex(limit, compiled)
        self.names = [f"r{i}" for i in range(replicas)]
        self.there = set(self.names)
        self.holds: list[list[Hold]] = []
        for name in self.names:
            self.each(lambda index, name=name: index.join(name))

    def each(self, act: Callable[[PrefixIndex], Any]) -> list[Any]:
        return [act(index) for index in self.indexes]

    def move(self, move: Move, which: int, depth: int) -> None:
        blocks, name = move.blocks(), self.names[which % len(self.names)]
        kind = move.kind if name in self.there or move.kind in ("release", "sweep", "hold") else "join"
        if kind in ("store", "pieces"):
            depths = [depth + 7 * at for at in range(len(blocks))]  # Others than those reported before.
            self.each(lambda index: index.store(name, blocks, depths))
        elif kind == "evict":
            self.each(lambda index: index.evict(name, blocks))
        elif kind == "hold":
            self.holds.append(self.each(lambda index: index.hold(name, tuple(CHAINS[move.chain][: move.length]))))
        elif kind == "release" and self.holds:
            for index, hold in zip(self.indexes, self.holds.pop(move.start % len(self.holds)), strict=True):
                index.release(hold)
        elif kind in ("clear", "leave", "join"):
            self.each(lambda index: getattr(index, kind)(name))
            (self.there.discard if kind == "leave" else self.there.add)(name)
            for index in self.indexes:  # In which order they take out blocks is their own matter.
                while index.sweep():
                    pass

    def compare(self, tokens_per_block: float) -> None:
        mine, other = self.indexes
        assert (len(mine), mine.refused, mine.coming) == (len(other), other.refused, other.coming)
        for chain in CHAINS:
            assert told(mine.match(chain, tokens_per_block)) == told(other.match(chain, tokens_per_block))
        for name in self.there:
            assert mine.held(name) == other.held(name)
            assert sorted(mine.blocks(name)) == sorted(other.blocks(name))


@settings(derandomize=True, max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(MOVES, st.integers(0, 200), st.integers(0, 2**32 - 2000)), max_size=40),
    st.sampled_from((1, 2, 5, 64, 65, 130)),
    st.sampled_from((100, 300, 10_000)),
    st.floats(0, 1000),
)
def test_both_stores_tell_the_same(
    moves: list[tuple[Move, int, int]], replicas: int, limit: int, tokens_per_block: float
) -> None:
    twins = Twins(limit, replicas)
    for move, which, depth in moves:
        twins.move(move, which, depth)
        chain = CHAINS[move.chain]
        mine, other = (index.match(chain, tokens_per_block) for index in twins.indexes)
        assert told(mine) == told(other)
    twins.compare(tokens_per_block)


@pytest.mark.slow
@pytest.mark.parametrize("replicas", [3, 200])
def test_blocks_stay_what_they_are_while_the_table_grows_and_shrinks(replicas: int) -> None:
    """Replicas come one by one, so that masks grow as well; each stores, and then evicts in another order."""
    index, source = PrefixIndex(10**6, compiled), random.Random(11)
    stored: dict[str, set[int]] = {}
    every = [source.getrandbits(64) for _ in range(60_000)]
    rounds = 600
    for turn in range(rounds):
        if len(stored) < replicas:
            index.join(f"r{turn}")
            stored[f"r{turn}"] = set()
        name = source.choice(list(stored))
        some = source.sample(every, 400)
        if turn < rounds // 2:
            index.store(name, some, range(400))
            stored[name].update(some)
        else:
            for one, theirs in stored.items():
                gone = [block for block in some if block in theirs]
                index.evict(one, [*gone, *some[:5]])
                theirs.difference_update(some)
        if turn % 20 == 0:
            assert len(index) == len(set().union(*stored.values()))
            for block in some[:50]:
                assert set(index.match((block,))) == {name for name in stored if block in stored[name]}
        if turn % 50 == 7:
            index.sweep(3)
    for name, theirs in stored.items():
        assert sorted(index.blocks(name)) == sorted(theirs)
        assert index.held(name) == len(theirs)
    for name in stored:
        index.leave(name)
    while index.sweep(5000):
        pass
    assert len(index) == 0
    assert index.bytes() < 300_000 + 2000 * replicas
    assert index.roughly_bytes() == index.bytes()


def test_hashes_at_the_ends_and_beside_each_other_are_blocks_like_others() -> None:
    index = PrefixIndex(100_000, compiled)
    index.join("a")
    blocks = [0, TOP, 1, TOP - 1, 2**63, *range(2, 3000), *(n << 40 for n in range(1, 3000))]
    index.store("a", blocks, range(len(blocks)))
    assert index.match(blocks)["a"] == Held(len(blocks), len(blocks) - 1)
    assert sorted(index.blocks("a")) == sorted(blocks)
    index.evict("a", [0, TOP])
    assert index.match(blocks) == {}
    assert index.match(blocks[2:])["a"].blocks == len(blocks) - 2
    index.store("a", array("Q", [0]), array("I", [2**32 - 1]))
    assert index.match([0, TOP])["a"] == Held(1, 2**32 - 1)
    hold = index.hold("a", [0, TOP, 5])
    assert index.match([0, TOP, 5], 2.0)["a"] == Held(3, 8, 1)  # The depth of the last one is known.
    index.release(hold)


@pytest.mark.parametrize(
    ("blocks", "depths"),
    [
        ([1, -1], [1, 2]),
        ([1, 2**64], [1, 2]),
        ([1, 2], [1, -2]),
        ([1, 2], [1, 2**32]),
        ([1, 2], [1]),
        ([1], [1, 2]),
        ([1, "2"], [1, 2]),
        ([1, 2.0], [1, 2]),
        ([1, None], [1, 2]),
        ([1, 2], [1, None]),
        (array("q", [1, -1]), array("I", [1, 2])),
        (array("Q", [1, 2]), array("I", [1])),
        (None, None),
    ],
)
def test_a_report_that_makes_no_sense_is_an_error_and_changes_nothing(blocks: Any, depths: Any) -> None:
    index = PrefixIndex(100, compiled)
    index.join("a")
    with pytest.raises((OverflowError, TypeError, ValueError)):
        index.store("a", blocks, depths)
    assert len(index) == index.held("a") == 0


def test_places_that_are_not_there_are_errors() -> None:
    store = compiled()
    store.open(0, "a")
    acts: list[Callable[[int], object]] = [
        lambda place: store.store(place, [1], [1]),
        lambda place: store.evict(place, [1]),
        lambda place: store.first(place, [1]),
        lambda place: store.enter(place, [1], {}),
        lambda place: store.withdraw(place, [1], {}),
        lambda place: store.remove(place, 1),
        lambda place: store.retire(place),
        lambda place: store.held(place),
        lambda place: store.runs(place),
    ]
    for act in acts:
        for place in (-1, 64, 10**6, TOP):
            with pytest.raises((IndexError, OverflowError)):
                act(place)
    with pytest.raises(ValueError, match="nobody"):
        store.store(1, [1], [1])


def test_sequences_of_all_kinds_are_read_alike() -> None:
    store, blocks = compiled(), CHAINS[0][:40]
    store.open(0, "a")
    kinds: list[Callable[[Sequence[int]], Any]] = [list, tuple, lambda some: array("Q", some), lambda some: (*some,)]
    for kind in kinds:
        store.store(0, kind(blocks), array("L", range(40)))
        assert store.first(0, kind(blocks)) == 40
        assert store.match(kind(blocks), 0.0)["a"] == Held(40, 39)
        store.enter(0, kind(blocks), {})
        store.withdraw(0, kind(blocks), {})
        store.evict(0, iter(kind(blocks)))
        assert len(store) == store.coming == 0
    for kind in kinds:
        assert store.match(kind([]), 0.0) == {}
        store.store(0, kind([]), [])
        store.evict(0, kind([]))


class _Cycle:
    """Garbage whose finalizer uses the index."""

    def __init__(self, act: Callable[[], object]) -> None:
        self.act = act
        self.self = self

    def __del__(self) -> None:
        self.act()


def test_finalizers_that_use_the_index_while_it_answers_do_no_harm() -> None:
    index, source, ran = PrefixIndex(10**6, compiled), random.Random(3), []
    for i in range(70):
        index.join(f"r{i}")
        index.store(f"r{i}", CHAINS[0][: i + 1], range(1, i + 2))
    expected = {f"r{i}": Held(i + 1, i + 1) for i in range(70)}

    def act() -> None:
        ran.append(len(index.match(CHAINS[0])))
        index.release(index.hold("r3", [source.getrandbits(64) for _ in range(source.randint(1, 600))]))
        index.store("r1", [source.getrandbits(64) for _ in range(50)], range(50))
        index.join(f"late{len(ran)}")

    before = gc.get_threshold()
    gc.set_threshold(5, 1, 1)
    try:
        for _ in range(300):
            _Cycle(act)
            assert index.match(CHAINS[0]) == expected
    finally:
        gc.set_threshold(*before)
    gc.collect()
    assert len(ran) == 300


def test_memory_is_given_back_and_none_leaks() -> None:
    index, source = PrefixIndex(200_000, compiled), random.Random(4)
    for name in ("a", "b"):
        index.join(name)

    def churn(rounds: int) -> None:
        for _ in range(rounds):
            blocks = array("Q", source.randbytes(8 * 4000))
            index.store("a", blocks, array("I", bytes(4 * 4000)))
            index.store("b", blocks[:100], range(100))
            hold = index.hold("b", blocks)
            index.match(blocks[:500], 3.0)
            sum(map(len, index.runs("b")))
            index.release(hold)
            index.evict("a", blocks)
            index.evict("b", blocks[::-1])
        assert len(index) == index.coming == 0

    churn(50)
    before = resident_kb()
    churn(500)  # Two million blocks.
    assert resident_kb() - before < 4096  # KiB.
    assert index.bytes() < 1_000_000


def test_reading_what_a_replica_holds_goes_on_while_blocks_come_and_go() -> None:
    """The others are read once each; beginnings of prompts first."""
    index, source = PrefixIndex(10**6, compiled), random.Random(6)
    for name in ("a", "b"):
        index.join(name)
    mine = {source.getrandbits(64): source.choice((100, 2000, 8000, 40_000, 10**6)) for _ in range(20_000)}
    index.store("a", list(mine), list(mine.values()))
    gone = set(source.sample(list(mine), 2000))
    read: list[int] = []
    for at, run in enumerate(index.runs("a")):
        read += run
        if at < 100:
            index.store("b", [source.getrandbits(64) for _ in range(1000)], range(1000))  # It grows.
            index.evict("a", list(gone)[20 * at : 20 * at + 20])
        elif at == 100:
            index.sweep()
    assert len(read) == len(set(read))
    assert set(mine) - gone <= set(read) <= set(mine)
    depths = [mine[block] for block in read]
    assert depths == sorted(depths)


def test_reading_ends_when_the_replica_leaves() -> None:
    index = PrefixIndex(10**6, compiled)
    for name in ("a", "b"):
        index.join(name)
    index.store("a", range(1, 5001), range(5000))
    runs = index.runs("a")
    next(runs)
    index.leave("a")
    while index.sweep():
        pass
    index.join("c")
    index.store("c", range(1, 5001), range(5000))
    assert list(runs) == []


def test_many_that_leave_at_once_are_taken_out_together() -> None:
    index, source = PrefixIndex(10**6, compiled), random.Random(8)
    names = [f"r{i}" for i in range(150)]
    for name in names:
        index.join(name)
        index.store(name, [source.getrandbits(64) for _ in range(500)] + CHAINS[0][:50], range(550))
    for name in names[:149]:
        index.leave(name)
    sweeps = 0
    while index.sweep(8192):
        sweeps += 1
    assert sweeps < 40
    assert len(index) == 550
    assert index.match(CHAINS[0]) == {names[149]: Held(50, 549)}


@pytest.mark.parametrize("small", [False, True], ids=["all", "a small one first"])
@pytest.mark.parametrize("kind", [Blocks, compiled], ids=["python", "compiled"])
def test_blocks_stored_and_evicted_while_others_leave_are_all_there(small: bool, kind: Callable[..., Any]) -> None:
    """A walk takes blocks out in the order of keys: meanwhile those that are left lie unevenly."""
    rng = random.Random(5)
    index = PrefixIndex(2_000_000, kind)
    for number in range(64):
        index.join(f"r{number}")
        for _ in range(4):
            index.store(f"r{number}", [rng.getrandbits(64) for _ in range(512)], range(512))
    while index.sweep():
        pass
    if small:
        index.join("small")
        index.store("small", [rng.getrandbits(64) for _ in range(6)], range(6))
        index.leave("small")
    for number in range(64):
        index.leave(f"r{number}")
    index.join("back")
    kept: list[int] = []
    more = True
    while more:
        more = index.sweep(rng.choice([64, 256, 1024]))
        blocks = [rng.getrandbits(64) for _ in range(8)]
        index.store("back", blocks, range(8))
        kept += blocks
        if rng.random() < 0.3:
            index.evict("back", [kept.pop()])
    assert index.refused == 0
    assert index.held("back") == len(kept)
    assert all(index.match([block]).at("back") is not None for block in kept)


@pytest.mark.parametrize("kind", [Blocks, compiled], ids=["python", "compiled"])
def test_a_report_as_large_as_the_table_does_not_crowd_it(kind: Callable[..., Any]) -> None:
    rng = random.Random(6)
    index = PrefixIndex(2_000_000, kind)
    index.join("a")
    stored: list[int] = []
    for size in (2690, 8192, 30_000):
        blocks = [rng.getrandbits(64) for _ in range(size)]
        index.store("a", blocks, [0] * size)
        stored += blocks
    assert index.held("a") == len(stored)
    for number in range(200):  # More places than masks have room for, while the table grows.
        index.join(f"r{number}")
        index.store(f"r{number}", [stored[number]], [0])
    assert all(index.match([stored[number]]).at(f"r{number}") is not None for number in range(200))
    index.evict("a", stored)
    assert len(index) == 200
    while index.sweep():
        pass
    assert index.held("a") == 0
