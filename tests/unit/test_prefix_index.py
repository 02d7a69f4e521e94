"""The index against a brute-force model, and what it promises beside exactness."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.compiled import part
from router.prefix.base import BlockStore
from router.prefix.blocks import Blocks
from router.prefix.index import Hold, PrefixIndex
from router.prefix.layout import Layout, Slot
from router.types import Held

PER_BLOCK = 10
REPLICAS = ("a", "b", "c", "d", "e")
Store = Callable[[int], BlockStore]


@pytest.fixture(scope="module", params=["python", "compiled"])
def store(request: pytest.FixtureRequest) -> Store:
    """Each of the two that an index can be given."""
    if request.param == "python":
        return Blocks
    compiled = part("router.prefix._blocks")
    if compiled is None:
        pytest.skip("router.prefix._blocks is not compiled, or left out by KVLANE_COMPILED")
    return compiled.Blocks  # type: ignore[no-any-return]


def family(length: int = 150) -> list[list[int]]:
    """Chains that share beginnings of several lengths, as prompts do; a hash stands for all before it too."""
    source = random.Random(7)
    chains = [[source.getrandbits(64) for _ in range(length)]]
    for shared in (0, 3, 40, 64, 65, 100, 149):
        parent = source.choice(chains)
        chains.append(parent[:shared] + [source.getrandbits(64) for _ in range(length - shared)])
    return chains


CHAINS = family()
DEPTHS = {block: (at + 1) * PER_BLOCK for chain in CHAINS for at, block in enumerate(chain)}


def depths(blocks: list[int]) -> list[int]:
    return [DEPTHS[block] for block in blocks]


class Model:
    """What an index shall answer, in the plainest way."""

    def __init__(self) -> None:
        self.stored: dict[str, set[int]] = {}
        self.holds: list[tuple[str, set[int]]] = []

    def prefix(self, replica: str, chain: list[int]) -> int:
        return next((at for at, block in enumerate(chain) if block not in self.stored[replica]), len(chain))

    def match(self, chain: list[int]) -> dict[str, Held]:
        found = {}
        for replica, stored in self.stored.items():
            soon = set().union(*(blocks for name, blocks in self.holds if name == replica))
            blocks = next((at for at, block in enumerate(chain) if block not in stored | soon), len(chain))
            if blocks:
                found[replica] = Held(blocks, blocks * PER_BLOCK, len(set(chain[:blocks]) - stored))
        return found


class Move(NamedTuple):
    kind: str
    replica: str
    chain: int
    start: int
    length: int
    order: int
    """1: as in the prompt, -1: backwards, 2: every second one, 0: shuffled."""

    def blocks(self) -> list[int]:
        part = CHAINS[self.chain][self.start : self.start + self.length]
        if self.order == 0:
            return random.Random(self.start).sample(part, len(part))
        return part[:: self.order]


MOVERS = ["hold", "hold", "release", "join", "leave", "clear", "sweep"]
MOVES = st.builds(
    Move,
    st.sampled_from(["store"] * 6 + ["pieces"] * 3 + ["evict"] * 5 + MOVERS),
    st.sampled_from(REPLICAS),
    st.integers(0, len(CHAINS) - 1),
    st.one_of(st.just(0), st.integers(0, 149)),
    st.one_of(st.just(150), st.integers(0, 150), st.integers(0, 5)),
    st.sampled_from((1, 1, 1, -1, -1, 2, 0)),
)


class Pair:
    """The index and its model, moved alike."""

    def __init__(self, store: Store) -> None:
        self.index = PrefixIndex(store=store)
        self.model = Model()
        self.holds: list[tuple[Hold, tuple[str, set[int]] | None]] = []
        for name in REPLICAS:
            self.join(name)

    def join(self, replica: str) -> None:
        self.index.join(replica)
        self.model.stored.setdefault(replica, set())

    def move(self, move: Move) -> None:
        replica, blocks = move.replica, move.blocks()
        if move.kind == "join":
            self.join(replica)
        elif move.kind == "sweep":
            self.index.sweep(move.length)
        elif move.kind == "release":
            if self.holds:
                self.release(move.start % len(self.holds))
        elif move.kind == "hold":
            self.hold(replica, CHAINS[move.chain][: move.length])
        elif replica in self.model.stored:
            self.change(move, blocks)

    def change(self, move: Move, blocks: list[int]) -> None:
        replica, stored = move.replica, self.model.stored
        if move.kind == "store":
            self.index.store(replica, blocks, depths(blocks))
            stored[replica] |= set(blocks)
        elif move.kind == "pieces":
            for block in blocks:  # With another chain's between them, so that they come to lie scattered.
                for one in {block, CHAINS[0][DEPTHS[block] // PER_BLOCK - 1]}:
                    self.index.store(replica, [one], [DEPTHS[one]])
                    stored[replica].add(one)
        elif move.kind == "evict":
            self.index.evict(replica, blocks)
            stored[replica] -= set(blocks)
        elif move.kind == "clear":
            self.index.clear(replica)
            stored[replica] = set()
        elif move.kind == "leave":
            self.index.leave(replica)
            del stored[replica]
            self.model.holds = [hold for hold in self.model.holds if hold[0] != replica]

    def hold(self, replica: str, chain: list[int]) -> None:
        known = replica in self.model.stored
        entry = (replica, set(chain[self.model.prefix(replica, chain) :])) if known else None
        if entry is not None:
            self.model.holds.append(entry)
        found = self.index.match(chain).at(replica)
        stored = found.blocks if found is not None and not found.soon else None  # As dispatch knows it.
        self.holds.append((self.index.hold(replica, chain, stored), entry))

    def release(self, which: int) -> None:
        hold, entry = self.holds.pop(which)
        self.index.release(hold)
        self.model.holds = [other for other in self.model.holds if other is not entry]

    def compare(self) -> None:
        for chain in CHAINS:
            found, expected = self.index.match(chain, PER_BLOCK), self.model.match(chain)
            assert found == expected
            names = {*self.model.stored, "somebody else"}
            assert {name: found.at(name) for name in names} == {name: expected.get(name) for name in names}
        for replica, stored in self.model.stored.items():
            assert sorted(self.index.blocks(replica)) == sorted(stored)
            assert self.index.held(replica) == len(stored)


@settings(derandomize=True, max_examples=150, deadline=None)
@given(st.lists(MOVES, max_size=40))
def test_the_index_answers_as_a_brute_force_model_does(store: Store, moves: list[Move]) -> None:
    pair = Pair(store)
    for move in moves:
        pair.move(move)
        chain = CHAINS[move.chain]
        assert pair.index.match(chain, PER_BLOCK) == pair.model.match(chain)
    pair.compare()
    while pair.index.sweep(7):
        pass
    pair.compare()
    assert len(pair.index) == len(set().union(*pair.model.stored.values()))
    while pair.holds:
        pair.release(0)
    pair.compare()
    for name in REPLICAS:
        pair.index.leave(name)
    while pair.index.sweep():
        pass
    assert len(pair.index) == 0


@settings(derandomize=True, max_examples=60, deadline=None)
@given(st.lists(MOVES.filter(lambda move: move.kind in ("store", "evict")), max_size=30), st.integers(1, 200))
def test_a_full_index_never_grows_and_never_claims_what_is_not_held(
    store: Store, moves: list[Move], limit: int
) -> None:
    index, stored = PrefixIndex(limit, store), {name: set[int]() for name in REPLICAS}
    for name in REPLICAS:
        index.join(name)
    for move in moves:
        blocks = move.blocks()
        if move.kind == "store":
            index.store(move.replica, blocks, depths(blocks))
            stored[move.replica] |= set(blocks)
        else:
            index.evict(move.replica, blocks)
            stored[move.replica] -= set(blocks)
        assert len(index) <= limit
    for name in REPLICAS:
        assert set(index.blocks(name)) <= stored[name]


def joined(store: Store, *names: str, max_blocks: int = 1000) -> PrefixIndex:
    index = PrefixIndex(max_blocks, store)
    for name in names:
        index.join(name)
    return index


def test_a_full_index_refuses_the_last_blocks_and_counts_them(store: Store) -> None:
    index, chain = joined(store, "a", "b", max_blocks=10), CHAINS[0]
    index.store("a", chain[:15], depths(chain[:15]))
    assert index.match(chain)["a"] == Held(10, 100)
    assert index.refused == 5
    index.store("b", chain[:10], depths(chain[:10]))  # Known already: takes no room.
    assert index.match(chain)["b"] == Held(10, 100)
    assert index.refused == 5
    index.evict("a", chain[8:10])
    index.evict("b", chain[8:10])
    index.store("a", chain[8:9], depths(chain[8:9]))
    assert index.match(chain) == {"a": Held(9, 90), "b": Held(8, 80)}


def test_a_hole_ends_the_match_until_it_is_filled(store: Store) -> None:
    index, chain = joined(store, "a"), CHAINS[0]
    index.store("a", chain, depths(chain))
    index.evict("a", [chain[70]])
    assert index.match(chain)["a"] == Held(70, 700)
    index.store("a", [chain[70]], [710])
    assert index.match(chain)["a"] == Held(150, 1500)


def test_a_replica_that_left_matches_nothing_from_that_moment_on(store: Store) -> None:
    index, chain = joined(store, "a", "b"), CHAINS[0]
    for name in ("a", "b"):
        index.store(name, chain, depths(chain))
    index.hold("a", CHAINS[1])
    assert index.match(CHAINS[1], PER_BLOCK)["a"].soon
    index.leave("a")
    assert index.match(chain) == {"b": Held(150, 1500)}
    assert index.match(CHAINS[1]) == {}
    assert index.sweep(10)
    index.join("a")
    assert index.match(chain) == {"b": Held(150, 1500)}


def test_leaving_takes_work_for_the_own_blocks_only(store: Store) -> None:
    index = joined(store, "a", "b", max_blocks=10_000)
    source = random.Random(3)
    many = [source.getrandbits(64) for _ in range(5000)]
    index.store("b", many, range(5000))
    index.store("a", CHAINS[0], depths(CHAINS[0]))
    index.leave("a")
    sweeps = 1
    while index.sweep(32):
        sweeps += 1
    assert sweeps <= 6
    assert len(index) == 5000


def test_a_bit_is_not_given_to_another_replica_before_it_is_swept(store: Store) -> None:
    index, chain = joined(store, "a"), CHAINS[0]
    for other in CHAINS:
        index.store("a", other, depths(other))
    index.leave("a")
    index.join("b")
    assert index.match(chain) == {}
    assert index.sweep(50)
    index.join("c")
    assert index.match(chain) == {}
    while index.sweep():
        pass
    index.join("d")
    assert index.match(chain) == {}
    assert len(index) == 0


def test_more_replicas_than_a_machine_word_has_bits_are_told_apart(store: Store) -> None:
    names = [f"r{i}" for i in range(200)]
    index, chain = joined(store, *names), CHAINS[0]
    for at, name in enumerate(names):
        index.store(name, chain[: at % 150 + 1], depths(chain[: at % 150 + 1]))
    assert index.match(chain) == {name: Held(at % 150 + 1, (at % 150 + 1) * 10) for at, name in enumerate(names)}


def test_clearing_a_replica_keeps_what_is_held_for_requests_in_flight(store: Store) -> None:
    index, chain = joined(store, "a"), CHAINS[0]
    index.store("a", chain[:5], depths(chain[:5]))
    hold = index.hold("a", chain[:8])
    index.clear("a")
    assert index.match(chain) == {}  # The first five are neither stored nor part of the hold.
    index.store("a", chain[:5], depths(chain[:5]))
    assert index.match(chain, PER_BLOCK) == {"a": Held(8, 80, 3)}
    index.release(hold)
    assert index.match(chain) == {"a": Held(5, 50)}


def test_clearing_a_replica_with_many_requests_in_flight_moves_their_blocks_in_slices(store: Store) -> None:
    index = joined(store, "a", "b")
    index.store("a", [1], [10])
    prompts = [[10_000 * n + i for i in range(1, 801)] for n in range(1, 31)]
    holds = [index.hold("a", prompt) for prompt in prompts]
    index.hold("b", prompts[0][:3])
    index.clear("a")
    seen = set()
    while index.sweep(1024):
        seen.add(sum("a" in index.match(prompt) for prompt in prompts))
    assert len(seen) > 10  # None of the slices moved all.
    for prompt in prompts:
        assert index.match(prompt)["a"].soon == 800
    assert index.match(prompts[0])["b"].soon == 3
    index.clear("a")  # Nothing is stored: nothing moves.
    for hold in holds:
        index.release(hold)
    assert [index.match(prompt).get("a") for prompt in prompts] == [None] * 30


@pytest.mark.parametrize("then", ["release", "leave", "clear"])
def test_blocks_that_wait_to_be_moved_end_with_their_request_or_replica(store: Store, then: str) -> None:
    index = joined(store, "a")
    index.store("a", [1], [10])
    prompts = [[10_000 * n + i for i in range(1, 801)] for n in range(1, 6)]
    holds = [index.hold("a", prompt) for prompt in prompts]
    index.clear("a")
    if then == "leave":
        index.leave("a")
        index.join("a")
    elif then == "clear":
        index.store("a", [1], [10])
        index.clear("a")
    for hold in holds[1:]:
        index.release(hold)
    while index.sweep(1024):
        pass
    expected = [prompts[0]] if then != "leave" else []
    assert [prompt for prompt in prompts if "a" in index.match(prompt)] == expected
    index.release(holds[0])
    assert index.match(prompts[0]) == {}
    assert not index.coming


def test_two_holds_of_one_block_end_with_the_second(store: Store) -> None:
    index, chain = joined(store, "a"), CHAINS[0]
    first, second = index.hold("a", chain[:4]), index.hold("a", chain[:2])
    index.release(first)
    index.release(first)
    assert index.match(chain, 10)["a"] == Held(2, 20, 2)
    index.release(second)
    assert index.match(chain, 10) == {}


def test_tokens_of_blocks_to_come_are_estimated_from_the_last_known_depth(store: Store) -> None:
    index, chain = joined(store, "a", "b"), CHAINS[0]
    index.store("a", chain[:2], [100, 110])
    index.hold("a", chain[:6])
    assert index.match(chain, 7.0)["a"] == Held(6, 110 + 28, 4)
    index.store("b", chain[:6], [100, 110, 115, 120, 130, 140])
    assert index.match(chain, 7.0)["a"] == Held(6, 140, 4)


def test_the_last_reported_depth_counts(store: Store) -> None:
    index, chain = joined(store, "a", "b"), CHAINS[0]
    index.store("a", chain[:2], [10, 20])
    index.store("b", chain[:2], [11, 21])
    assert index.match(chain) == dict.fromkeys("ab", Held(2, 21))


def test_a_block_given_twice_in_one_report_is_stored_once(store: Store) -> None:
    index, chain = joined(store, "a"), CHAINS[0]
    index.store("a", [*chain[:3], *chain[:3]], [1, 2, 3, 10, 20, 30])
    assert index.match(chain) == {"a": Held(3, 30)}
    assert len(index) == 3


def test_blocks_given_twice_in_a_long_report_are_stored_once_with_the_last_depth(store: Store) -> None:
    index, chain = joined(store, "a"), CHAINS[0][:40]
    index.store("a", CHAINS[1][:3], depths(CHAINS[1][:3]))
    index.store("a", [*chain, *chain], [*range(40), *depths(chain)])
    assert index.match(chain) == {"a": Held(40, 400)}
    assert index.match(CHAINS[1])["a"].blocks == 3
    assert len(index) == len({*chain, *CHAINS[1][:3]})
    index.evict("a", [*chain, *CHAINS[1][:3]])
    assert len(index) == 0


def test_memory_does_not_grow_while_blocks_come_and_go(store: Store) -> None:
    index, source = joined(store, "a", "b", max_blocks=100_000), random.Random(5)
    held: list[list[int]] = []
    sizes = []
    for turn in range(600):
        blocks = [source.getrandbits(64) for _ in range(source.randint(1, 90))]
        index.store("ab"[turn % 2], blocks, range(len(blocks)))
        held.append(blocks)
        if len(held) > 40:
            gone = held.pop(0)
            source.shuffle(gone)
            for name in "ab":
                index.evict(name, gone[: len(gone) // 2])
                index.evict(name, gone[len(gone) // 2 :])
        if turn >= 100:
            sizes.append(index.bytes())
    assert max(sizes) < 2.5 * min(sizes)
    assert len(index) == sum(map(len, held))


@pytest.mark.parametrize("act", ["store", "evict", "clear"])
def test_a_replica_that_did_not_join_is_an_error(store: Store, act: str) -> None:
    index = PrefixIndex(store=store)
    with pytest.raises(KeyError):
        {
            "store": lambda: index.store("x", [1], [1]),
            "evict": lambda: index.evict("x", [1]),
            "clear": lambda: index.clear("x"),
        }[act]()


def test_a_hold_at_a_replica_that_left_holds_nothing(store: Store) -> None:
    index = joined(store, "a")
    index.leave("a")
    hold = index.hold("a", CHAINS[0])
    index.join("a")
    assert index.match(CHAINS[0]) == {}
    index.release(hold)


def scattered(store: Store) -> tuple[PrefixIndex, dict[str, int]]:
    """Chains that were stored block by block in turn, so that each lies among all others, and how much who holds."""
    index = joined(store, "a", "b")
    for at in range(90):
        for chain in CHAINS[:4]:
            index.store("a", chain[at : at + 1], [DEPTHS[chain[at]]])
        if at < 60:
            index.store("b", CHAINS[1][at : at + 1], [DEPTHS[CHAINS[1][at]]])
    return index, {"a": 90, "b": 60}


def test_joining_scattered_blocks_changes_no_answer(store: Store) -> None:
    index, lengths = scattered(store)
    blocks = {name: sorted(index.blocks(name)) for name in lengths}
    answers = [index.match(chain) for chain in CHAINS]
    while index.sweep(50):
        pass
    assert [index.match(chain) for chain in CHAINS] == answers
    assert answers[1] == {name: Held(length, length * PER_BLOCK) for name, length in lengths.items()}
    assert {name: sorted(index.blocks(name)) for name in lengths} == blocks
    index.evict("a", CHAINS[1][30:])
    assert index.match(CHAINS[1])["a"] == Held(30, 300)
    for name in lengths:
        index.leave(name)
    while index.sweep():
        pass
    assert len(index) == 0


def test_scattered_blocks_are_joined_once_and_then_left_alone() -> None:
    blocks, slot, chain = Layout(10_000), Slot(1), CHAINS[0] + list(range(1, 701))
    blocks.slots[1] = slot
    for at, block in enumerate(chain):
        blocks.store(slot, [block], [at])
        blocks.store(slot, [10_000 + at], [at])  # Another chain's, between each two.
    assert 200 < blocks.untangle(chain, 200) < 500  # A page at a time.
    assert blocks.untangle(chain, 10_000)
    assert blocks.untangle(chain, 10_000) == 0
    assert blocks.first(slot, chain) == len(chain)
    assert [blocks.depth(block) for block in chain] == list(range(len(chain)))
    assert len(blocks.table) == 2 * len(chain)
    assert len(slot.pages) < 60
