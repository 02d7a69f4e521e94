"""vLLM's KV events, batch by batch: which blocks are held, what degrades a cache, gaps, replays and keys."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from engine.kv_events import block_keys
from router.types import Chain
from tests.unit.kv_batches import (
    CLEARED,
    SIZE,
    Event,
    Follower,
    as_array,
    as_map,
    as_old_array,
    encode,
    removed,
    stored,
)


@pytest.mark.parametrize("style", [as_map, as_array, as_old_array])
def test_a_run_of_blocks_is_held_under_the_keys_of_its_prompt(style: Callable[[Event], Any]) -> None:
    follower = Follower()
    follower.hear(stored([71, 72], None, (1, 2, 3, 4)), stored([73], 72, (5, 6)), style=style)
    assert follower.holds(1, 2, 3, 4, 5, 6, 7) == 3
    assert follower.holds(1, 2, 9, 9, 5, 6) == 1
    follower.hear(removed(73), style=style)
    assert follower.holds(1, 2, 3, 4, 5, 6) == 2
    follower.hear(CLEARED, style=style)
    assert follower.holds(1, 2) == 0
    assert follower.events.cause == ""


def test_blocks_stored_twice_are_held_until_the_second_copy_goes() -> None:
    follower = Follower()
    follower.hear(stored([71, 72], None, (1, 2, 3, 4)), stored([72], 71, (3, 4)))
    follower.hear(removed(72))
    assert follower.holds(1, 2, 3, 4) == 2
    follower.hear(removed(72))
    assert follower.holds(1, 2, 3, 4) == 1


def test_where_reuse_is_reported_a_known_run_from_the_start_is_not_counted_as_a_copy() -> None:
    follower = Follower(reports_reuse=True)
    follower.hear(stored([71, 72], None, (1, 2, 3, 4)), stored([71, 72], None, (1, 2, 3, 4)))
    assert follower.events.counts.repeats == 2
    follower.hear(removed(72))
    assert follower.holds(1, 2, 3, 4) == 1


def test_several_hashes_of_one_key_hold_it_until_the_last_one_goes() -> None:
    follower = Follower()
    follower.hear(stored([71], None, (1, 2)), stored([91], None, (1, 2)))
    follower.hear(removed(71))
    assert follower.holds(1, 2) == 1
    follower.hear(removed(91))
    assert follower.holds(1, 2) == 0


def test_adapters_salts_and_media_make_other_keys() -> None:
    follower = Follower()
    follower.hear(
        stored([1, 2], None, (1, 2, 3, 4), lora_name="a", extra_keys=[["a"], ["a"]]),
        stored([3, 4], None, (1, 2, 3, 4), extra_keys=[["pepper"], None]),
        stored([5, 6], None, (1, 2, 3, 4), extra_keys=[None, [["image", 1]]]),
        stored([7], None, (1, 2), lora_name="a", extra_keys=[["a", ["image", 0], "pepper"]]),
    )
    tokens = (1, 2, 3, 4)
    assert follower.holds(*tokens) == 1  # The block before the image.
    assert follower.holds(*tokens, lora_name="a") == 2
    assert follower.holds(*tokens, lora_name="b") == 0
    assert follower.holds(*tokens, cache_salt="pepper") == 2
    assert follower.holds(*tokens, media=[("image", 3, 1)]) == 2
    assert follower.holds(*tokens, media=[("other", 3, 1)]) == 1
    assert follower.holds(*tokens, media=[("image", 2, 2)]) == 1
    assert follower.holds(*tokens, lora_name="a", cache_salt="pepper", media=[("image", 0, 1)]) == 1


def test_a_run_behind_an_unknown_parent_degrades_until_it_is_gone() -> None:
    follower = Follower()
    follower.hear(stored([72, 73], 71, (3, 4, 5, 6)), stored([74], 73, (7, 8)))
    assert follower.events.cause == "3 KV blocks stored behind unknown ones"
    assert follower.events.counts.orphans == 3
    follower.hear(removed(72), removed(74))
    assert follower.events.cause
    # It can be tied after all: its beginning is told anew.
    follower.hear(stored([71, 72, 73], None, (1, 2, 3, 4, 5, 6)))
    assert follower.events.cause == ""
    assert follower.holds(1, 2, 3, 4, 5, 6) == 3


@pytest.mark.parametrize(
    ("event", "cause"),
    [
        (
            stored([1], None, (1, 2), group_idx=1, kv_cache_spec_kind="sliding_window"),
            "KV cache group 1 is sliding_window",
        ),
        (stored([1], None, (1, 2, 3, 4), block_size=4), "KV blocks of 4 tokens, not 2"),
    ],
)
def test_a_cache_of_another_kind_degrades_for_good(event: Event, cause: str) -> None:
    follower = Follower()
    follower.hear(event)
    assert follower.events.cause == cause
    follower.hear(CLEARED)
    assert follower.events.cause == cause


def test_two_groups_of_blocks_degrade() -> None:
    follower = Follower()
    follower.hear(stored([1], None, (1, 2)), stored([1], None, (1, 2), group_idx=1))
    assert follower.events.cause == "more than one KV cache group"


@pytest.mark.parametrize("kind", ["full_attention", "mla_attention", "sink_full_attention", None])
def test_every_kind_of_full_attention_is_followed(kind: str | None) -> None:
    follower = Follower()
    follower.hear(stored([1], None, (1, 2), kv_cache_spec_kind=kind))
    assert (follower.holds(1, 2), follower.events.cause) == (1, "")


def test_other_media_and_remote_caches_are_not_this_cache() -> None:
    follower = Follower()
    follower.hear(stored([1], None, (1, 2)))
    follower.hear(
        stored([5], 4, (), medium="CPU", block_size=64), removed(1, medium="CPU"), removed(1, locality="REMOTE")
    )
    assert (follower.holds(1, 2), follower.events.cause) == (1, "")
    assert follower.events.counts.elsewhere == 3


@pytest.mark.parametrize("style", [as_map, as_array])
def test_an_unknown_type_of_event_degrades_until_the_cache_is_cleared(style: Callable[[Event], Any]) -> None:
    follower = Follower()
    follower.hear(stored([1], None, (1, 2)), {"type": "BlockMoved"}, style=style)
    assert follower.events.cause == "events of the unknown type 'BlockMoved'"
    follower.hear(CLEARED, stored([1], None, (1, 2)), style=style)
    assert (follower.events.cause, follower.holds(1, 2)) == ("", 1)


def test_a_hash_that_comes_back_with_other_tokens_degrades() -> None:
    follower = Follower()
    follower.hear(stored([1], None, (1, 2)), stored([1], None, (3, 4)))
    assert follower.events.cause == "a KV block's hash came back with other tokens"


def test_a_run_whose_tokens_do_not_fit_its_blocks_degrades() -> None:
    follower = Follower()
    follower.hear(stored([1, 2], None, (1, 2, 3)))
    assert follower.events.cause == "2 KV blocks with 3 tokens"


def test_events_of_another_data_parallel_rank_degrade() -> None:
    follower = Follower()
    follower.events.receive(0, encode([], rank=3))
    assert follower.events.cause == "events of data parallel rank 3"


def test_a_missing_batch_is_waited_for_and_replayed() -> None:
    follower = Follower(replays=True)
    lost = follower.miss(stored([1], None, (1, 2)))
    follower.hear(stored([2], 1, (3, 4)))
    assert (follower.events.missing, follower.events.cause) == (0, "event batch 0 is missing")
    follower.hear(removed(2))
    follower.events.receive(0, lost)
    assert (follower.events.missing, follower.events.cause) == (None, "")
    assert follower.holds(1, 2, 3, 4) == 1
    follower.events.receive(1, lost)
    assert follower.events.counts.duplicates == 1


def test_a_batch_that_cannot_be_replayed_degrades_until_the_cache_is_cleared() -> None:
    follower = Follower(replays=True)
    follower.hear(stored([1], None, (1, 2)))
    follower.miss(removed(1))
    follower.hear(stored([5], None, (5, 6)))
    follower.events.replay_ended()
    assert follower.events.cause == "event batches 1 to 1 were lost"
    assert follower.holds(1, 2) == 0
    follower.hear(CLEARED, stored([1], None, (1, 2)))
    assert (follower.events.cause, follower.holds(1, 2)) == ("", 1)


def test_without_replay_a_gap_is_lost_at_once() -> None:
    follower = Follower()
    follower.miss(removed(1))
    follower.hear(stored([1], None, (1, 2)))
    assert follower.events.cause == "event batches 0 to 0 were lost"


def test_batches_that_wait_are_bounded() -> None:
    follower = Follower(replays=True, max_waiting=3)
    follower.miss(removed(1))
    for _ in range(5):
        follower.hear(removed(1))
    assert follower.events.missing is None
    assert follower.events.counts.lost == 1


def test_several_gaps_are_given_up_together() -> None:
    follower = Follower(replays=True)
    for _ in range(3):
        follower.miss()
        follower.hear()
    follower.events.replay_ended()
    assert follower.events.missing is None
    assert follower.events.counts.lost == 3
    assert follower.events.cause == "event batches 4 to 4 were lost"


def test_what_is_remembered_goes_with_the_blocks() -> None:
    follower = Follower()
    for turn in range(50):
        follower.hear(stored([turn], None, (turn, turn)), stored([turn + 1000], 99999, (1, 2)))
        follower.hear(removed(turn), removed(turn + 1000))
    assert len(follower.events.identity) == follower.ledger.held == 0


def test_many_gaps_are_given_up_at_once() -> None:
    follower = Follower(replays=True)
    for _ in range(3000):
        follower.miss()
        follower.hear()
    follower.events.replay_ended()
    assert follower.events.counts.lost == 3000


def test_keys_of_a_longer_prompt_extend_those_of_its_beginning() -> None:
    tokens = list(range(23))
    names: dict[str, Any] = {"lora_name": "a", "cache_salt": "pepper", "media": [("x", 1, 4), ("y", 6, 1), ("z", 9, 9)]}
    for options in ({}, names):
        whole = block_keys(tokens, SIZE, **options)
        assert len(whole) == 11
        for length in range(len(tokens) + 1):
            known = block_keys(tokens[:length], SIZE, **options)
            assert known == whole[: length // SIZE]
            assert block_keys(tokens, SIZE, known=known, **options) == whole
    assert block_keys(tokens[:5], SIZE, known=block_keys(tokens, SIZE)) == block_keys(tokens[:5], SIZE)


class Counted(list[tuple[str, int, int]]):
    """Media that count how often they are looked at."""

    looks = 0

    def __getitem__(self, index: Any) -> Any:
        self.looks += 1
        return super().__getitem__(index)

    def __iter__(self) -> Any:
        for item in super().__iter__():
            self.looks += 1
            yield item


def test_each_medium_is_looked_at_once_for_each_of_its_blocks() -> None:
    media = Counted((f"image {i}", 10 * i, 6) for i in range(500))
    keys = block_keys([7] * 5000, SIZE, media=media)
    assert len(keys) == 2500
    assert media.looks < 4 * 500 * 3


def test_blocks_of_an_adapter_whose_name_is_given_to_another_one_are_no_longer_held() -> None:
    follower = Follower()
    old = stored([71, 72], None, (1, 2, 3, 4), lora_name="a", extra_keys=[["a"], ["a"]])
    follower.hear(old, stored([81], None, (1, 2), lora_name="b"), stored([91], None, (1, 2)))
    follower.ledger.prompt(Chain(16, 0, (5,), 16), block_keys((1, 2), SIZE, lora_name="a"), [2])
    assert follower.ledger.blocks() == [5]
    assert follower.events.identity.forget_lora("a") == 2
    assert follower.ledger.blocks() == []
    assert [follower.holds(1, 2, 3, 4, lora_name=name) for name in ("a", "b", None)] == [0, 1, 1]
    # vLLM still has them and says so; a request of the old adapter goes on.
    assert follower.ledger.held == 4
    follower.hear(stored([73], 72, (5, 6), lora_name="a"), old)
    assert follower.holds(1, 2, 3, 4, 5, 6, lora_name="a") == 0
    # The new adapter's blocks have other hashes.
    follower.hear(stored([171], None, (1, 2), lora_name="a"))
    assert follower.holds(1, 2, 3, 4, lora_name="a") == 1
    assert follower.ledger.blocks() == [5]
    follower.hear(removed(73, 72, 71), removed(72, 71))
    assert (follower.events.cause, follower.events.counts.strangers) == ("", 0)
    assert follower.holds(1, 2, lora_name="a") == 1
    follower.hear(removed(171), removed(81), removed(91))
    assert follower.ledger.held == len(follower.events.identity) == 0
