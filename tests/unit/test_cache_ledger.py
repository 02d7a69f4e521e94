"""The ties between prefix blocks and KV blocks."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from engine.cache_ledger import CacheLedger
from router.types import Chain

TOKENS = 4
"""In a KV block."""


class Notes:
    """A watcher that writes down what it is told."""

    def __init__(self) -> None:
        self.blocks: list[int] = []
        self.voids = 0

    def changed(self, block: int) -> None:
        self.blocks.append(block)

    def voided(self) -> None:
        self.voids += 1


def chain(*blocks: int) -> Chain:
    return Chain(16, 0, blocks, 16 * len(blocks))


def test_a_prefix_block_is_held_while_the_kv_block_of_its_last_token_is() -> None:
    ledger = CacheLedger(TOKENS)
    ledger.prompt(chain(1, 2, 3), [10, 11], [3, 5, 8])
    ledger.stored(10)
    assert ledger.blocks() == [1]
    ledger.stored(11)
    assert ledger.blocks() == [1, 2, 3]
    assert [ledger.depth(block) for block in (1, 2, 3)] == [3, 5, 8]
    ledger.evicted(11)
    assert ledger.blocks() == [1]
    assert ledger.depth(3) is None


def test_prompts_and_stores_may_come_in_either_order() -> None:
    ledger = CacheLedger(TOKENS)
    ledger.stored(10)
    ledger.prompt(chain(1), [10], [4])
    assert ledger.blocks() == [1]


def test_a_block_that_ends_in_a_kv_block_that_is_not_full_stays_untied() -> None:
    ledger = CacheLedger(TOKENS)
    ledger.prompt(chain(1, 2), [10], [4, 5])
    ledger.stored(10)
    assert ledger.blocks() == [1]
    assert ledger.ties == 1


def test_a_kv_block_that_is_evicted_while_its_prompt_waits_counts_again_once_it_is_stored_again() -> None:
    ledger = CacheLedger(TOKENS)
    ledger.stored(10)
    ledger.prompt(chain(1), [10], [4])
    ledger.evicted(10)
    assert len(ledger) == 0
    ledger.stored(10)
    assert ledger.blocks() == [1]


def test_a_shared_block_is_held_while_any_prompt_has_its_end_in_a_held_kv_block() -> None:
    ledger = CacheLedger(TOKENS)
    # Two conversations share the first block; the KV block with its end reaches into the text of each.
    ledger.prompt(chain(1, 2), [10], [3, 4])
    ledger.prompt(chain(1, 3), [20], [3, 4])
    ledger.stored(10)
    ledger.stored(20)
    ledger.evicted(20)
    assert ledger.blocks() == [1, 2]
    ledger.evicted(10)
    assert ledger.blocks() == []


def test_the_same_news_twice_changes_nothing() -> None:
    ledger, notes = CacheLedger(TOKENS), Notes()
    ledger.watch(notes)
    ledger.prompt(chain(1), [10], [4])
    ledger.stored(10)
    ledger.stored(10)
    ledger.prompt(chain(1), [10], [4])
    assert notes.blocks == [1]
    ledger.evicted(10)
    ledger.evicted(10)
    assert notes.blocks == [1, 1]


def test_a_new_depth_is_told_and_an_old_one_is_not() -> None:
    ledger, notes = CacheLedger(TOKENS), Notes()
    ledger.watch(notes)
    ledger.stored(10)
    ledger.prompt(chain(1), [10], [3])
    ledger.prompt(chain(1), [10], [4])
    assert ledger.depth(1) == 4
    assert notes.blocks == [1, 1]
    assert ledger.ties == 1
    ledger.evicted(10)
    assert ledger.blocks() == []


def test_clearing_voids_everything_and_keeps_the_ties() -> None:
    ledger, notes = CacheLedger(TOKENS), Notes()
    ledger.watch(notes)
    ledger.prompt(chain(1), [10], [4])
    ledger.stored(10)
    ledger.cleared()
    assert (len(ledger), ledger.held, notes.voids) == (0, 0, 1)
    ledger.stored(10)
    assert ledger.blocks() == [1]


def test_held_blocks_counts_from_the_first_one_without_a_gap() -> None:
    ledger = CacheLedger(TOKENS)
    for key in (1, 2, 4):
        ledger.stored(key)
    assert [ledger.held_blocks(keys) for keys in ([1, 2, 3, 4], [2, 1], [3, 1], [])] == [2, 2, 0, 0]


def test_an_answer_that_comes_back_as_it_was_generated_is_confirmed() -> None:
    ledger = CacheLedger(TOKENS)
    ledger.answer([2, 3], [10, 11, 12], [8, 12])
    ledger.prompt(chain(1, 2, 3, 4), [10, 11, 12], [4, 8, 12, 16])
    assert (ledger.confirmed, ledger.refuted) == (2, 0)
    assert ledger.answers_return


def test_an_answer_that_comes_back_in_other_kv_blocks_is_no_longer_held_by_the_old_ones() -> None:
    ledger = CacheLedger(TOKENS)
    ledger.answer([2], [10, 11], [8])
    ledger.stored(11)
    assert ledger.blocks() == [2]
    ledger.prompt(chain(1, 2), [10, 99], [4, 8])
    assert ledger.blocks() == []
    assert (ledger.confirmed, ledger.refuted) == (0, 1)


def test_answers_that_keep_coming_back_otherwise_are_not_worth_tying() -> None:
    ledger = CacheLedger(TOKENS)
    tried = []
    for turn in range(100):
        if ledger.answers_return:
            tried.append(turn)
            ledger.answer([turn], [100 + turn], [4])
        ledger.prompt(chain(turn), [200 + turn], [4])
    assert len(tried) < 12
    for turn in range(100, 200):
        if ledger.answers_return:
            ledger.answer([1000 + turn], [5000 + turn], [4])
        ledger.prompt(chain(1000 + turn), [5000 + turn], [4])
    assert ledger.answers_return


def test_ties_are_bounded_and_those_not_held_go_first() -> None:
    ledger = CacheLedger(TOKENS, max_ties=4)
    ledger.stored(1)
    ledger.prompt(chain(101), [1], [4])
    for key in range(2, 40):
        ledger.prompt(chain(100 + key), [key], [4])
    assert ledger.ties == 4
    assert (ledger.blocks(), ledger.dropped) == ([101], 0)


def test_with_too_many_ties_of_held_blocks_the_oldest_are_said_to_be_evicted() -> None:
    ledger, notes = CacheLedger(TOKENS, max_ties=2), Notes()
    ledger.watch(notes)
    for key in (1, 2, 3):
        ledger.stored(key)
        ledger.prompt(chain(100 + key), [key], [4])
    assert ledger.blocks() == [102, 103]
    assert ledger.dropped == 1
    assert notes.blocks == [101, 102, 103, 101]


def test_prompts_with_a_namespace_each_share_the_ties_of_a_kv_block_and_the_oldest_goes() -> None:
    ledger, notes = CacheLedger(TOKENS, max_ties=100, max_ties_per_key=3), Notes()
    ledger.stored(9)
    ledger.prompt(chain(900), [9], [4])
    ledger.watch(notes)
    ledger.stored(1)
    for block in range(50):
        ledger.prompt(chain(block), [1], [4])
    # Nobody else's blocks go for it.
    assert ledger.blocks() == [900, 47, 48, 49]
    assert (ledger.ties, ledger.dropped) == (4, 47)
    assert sorted(notes.blocks) == sorted([*range(50), *range(47)])


def test_a_tie_that_is_made_again_is_not_the_oldest() -> None:
    ledger = CacheLedger(TOKENS, max_ties_per_key=3)
    ledger.stored(1)
    for block in range(20):
        ledger.prompt(chain(100), [1], [4])
        ledger.prompt(chain(block), [1], [4])
    assert ledger.blocks()[0] == 100
    assert len(ledger) == 3


def test_one_prompts_ties_of_a_kv_block_stay_together() -> None:
    ledger = CacheLedger(TOKENS, max_ties_per_key=3)
    ledger.stored(1)
    ledger.prompt(chain(7, 8), [1], [2, 3])
    ledger.prompt(chain(*range(10, 20)), [1], [4] * 10)
    assert ledger.blocks() == list(range(10, 20))
    ledger.prompt(chain(7), [1], [2])
    assert ledger.blocks() == [18, 19, 7]


def test_too_many_ties_of_a_kv_block_that_is_not_held_go_too() -> None:
    ledger = CacheLedger(TOKENS, max_ties_per_key=3)
    for block in range(10):
        ledger.prompt(chain(block), [1], [4])
    assert (ledger.ties, ledger.dropped) == (3, 7)
    ledger.stored(1)
    assert ledger.blocks() == [7, 8, 9]


KEYS = st.integers(0, 7)
BLOCKS = st.integers(0, 9)
PLACES = st.lists(st.tuples(BLOCKS, st.integers(1, 4 * TOKENS)), max_size=5, unique_by=lambda place: place[0])
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("prompt"), st.lists(KEYS, max_size=4, unique=True), PLACES),
        st.tuples(st.just("answer"), st.lists(KEYS, max_size=4, unique=True), PLACES),
        st.tuples(st.just("stored"), KEYS),
        st.tuples(st.just("evicted"), KEYS),
        st.tuples(st.just("cleared")),
    ),
    max_size=25,
)


class Reference:
    """The same in the plainest way: all ties ever made, looked through anew each time."""

    def __init__(self) -> None:
        self.ties: set[tuple[int, int]] = set()
        self.claims: dict[int, int] = {}
        self.held: set[int] = set()

    def place(self, keys: list[int], places: list[tuple[int, int]]) -> list[tuple[int, int]]:
        tied = []
        for block, end in places:
            if (end - 1) // TOKENS >= len(keys):
                break
            tied.append((keys[(end - 1) // TOKENS], block))
        return tied

    def prompt(self, keys: list[int], places: list[tuple[int, int]]) -> None:
        for key, block in self.place(keys, places):
            claimed = self.claims.pop(block, key)
            if claimed != key:
                self.ties.discard((claimed, block))
            self.ties.add((key, block))

    def answer(self, keys: list[int], places: list[tuple[int, int]]) -> None:
        for key, block in self.place(keys, places):
            self.claims[block] = key
            self.ties.add((key, block))

    def blocks(self) -> set[int]:
        return {block for key, block in self.ties if key in self.held}


@settings(derandomize=True, deadline=None, max_examples=200)
@given(STEPS)
def test_the_ledger_equals_a_plain_reference_under_any_order_of_events(steps: list[tuple[object, ...]]) -> None:
    ledger, reference, notes = CacheLedger(TOKENS), Reference(), Notes()
    ledger.watch(notes)
    for step in steps:
        before, told, voids = reference.blocks(), len(notes.blocks), notes.voids
        match step:
            case ("prompt" | "answer" as kind, list(keys), list(places)):
                places = sorted(places, key=lambda place: place[1])
                blocks, ends = [block for block, _ in places], [end for _, end in places]
                if kind == "prompt":
                    ledger.prompt(chain(*blocks), keys, ends)
                    reference.prompt(keys, places)
                else:
                    ledger.answer(blocks, keys, ends)
                    reference.answer(keys, places)
            case ("stored", int(key)):
                ledger.stored(key)
                reference.held.add(key)
            case ("evicted", int(key)):
                ledger.evicted(key)
                reference.held.discard(key)
            case _:
                ledger.cleared()
                reference.held.clear()
        now = reference.blocks()
        assert set(ledger.blocks()) == now
        # Whoever follows the watcher's calls knows what changed.
        assert before ^ now <= set(notes.blocks[told:]) or notes.voids > voids
        assert ledger.ties == len(reference.ties)


@settings(derandomize=True, deadline=None, max_examples=100)
@given(STEPS, st.integers(0, 6), st.integers(1, 4))
def test_a_bounded_ledger_never_says_more_than_is_held(
    steps: list[tuple[object, ...]], most: int, per_key: int
) -> None:
    ledger, reference = CacheLedger(TOKENS, max_ties=most, max_ties_per_key=per_key), Reference()
    for step in steps:
        match step:
            case ("prompt" | "answer" as kind, list(keys), list(places)):
                places = sorted(places, key=lambda place: place[1])
                blocks, ends = [block for block, _ in places], [end for _, end in places]
                if kind == "prompt":
                    ledger.prompt(chain(*blocks), keys, ends)
                    reference.prompt(keys, places)
                else:
                    ledger.answer(blocks, keys, ends)
                    reference.answer(keys, places)
            case ("stored", int(key)):
                ledger.stored(key)
                reference.held.add(key)
            case ("evicted", int(key)):
                ledger.evicted(key)
                reference.held.discard(key)
            case _:
                ledger.cleared()
                reference.held.clear()
        assert ledger.ties <= most
        assert set(ledger.blocks()) <= reference.blocks()
