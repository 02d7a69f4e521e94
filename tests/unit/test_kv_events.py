"""vLLM's KV events against a plain model of vLLM's block pool."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.cache_ledger import CacheLedger
from engine.kv_events import KvEvents, KvIdentity, block_keys
from router.types import Chain

SIZE = 2
"""Tokens in a KV block."""

Event = dict[str, Any]
Prompt = tuple[tuple[int, ...], str | None, str | None, tuple[tuple[str, int, int], ...]]
"""Tokens, LoRA adapter, cache salt, media."""

STORED_FIELDS = ["block_hashes", "parent_block_hash", "token_ids", "block_size", "lora_id", "medium", "lora_name"]
STORED_FIELDS += ["extra_keys", "group_idx", "kv_cache_spec_kind"]
REMOVED_FIELDS = ["block_hashes", "medium", "group_idx"]


def as_map(event: Event) -> Event:
    return event | {"a_field_of_next_year": [1, {"x": None}]}


def as_array(event: Event) -> list[Any]:
    fields = {"BlockStored": STORED_FIELDS, "BlockRemoved": REMOVED_FIELDS}.get(event["type"], [])
    extra: list[Any] = [None, None, None, None, "a field of next year"] if event["type"] == "BlockStored" else []
    return [event["type"], *(event.get(field) for field in fields), *extra]


def as_old_array(event: Event) -> list[Any]:
    """As in the first versions: no medium, adapters' names or groups."""
    fields = {"BlockStored": STORED_FIELDS[:5], "BlockRemoved": REMOVED_FIELDS[:1]}.get(event["type"], [])
    return [event["type"], *(event[field] for field in fields)]


def encode(events: list[Event], style: Callable[[Event], Any] = as_map, rank: int | None = 0) -> bytes:
    return msgspec.msgpack.encode([1700000000.5, [style(event) for event in events], rank])


class Pool:
    """Physical KV blocks as vLLM's pool treats them: copies are not shared, the longest unused is evicted first."""

    def __init__(self, slots: int, wide: bool = False) -> None:
        self.events: list[Event] = []
        self._free = list(range(slots))
        self._refs = [0] * slots
        self._hash: list[int | bytes | None] = [None] * slots
        self._wide = wide

    def hashes(self, prompt: Prompt) -> list[int | bytes]:
        """vLLM's own hashes, as far as anyone outside can tell."""
        tokens, lora, salt, _ = prompt
        parent, hashes = 0, list[int | bytes]()
        for i in range(len(tokens) // SIZE):
            text = repr((parent, tokens[i * SIZE : (i + 1) * SIZE], self.extras(prompt, i), lora, salt if not i else 0))
            parent = xxhash.xxh64_intdigest(text.encode())
            hashes.append(parent.to_bytes(32, "big") if self._wide else parent)
        return hashes

    def extras(self, prompt: Prompt, i: int) -> list[Any] | None:
        _, lora, salt, media = prompt
        start, end = i * SIZE, (i + 1) * SIZE
        parts: list[Any] = [lora] if lora else []
        parts += [[name, at - start] for name, at, length in media if at < end and start < at + length]
        parts += [salt] if salt and i == 0 else []
        return parts or None

    def held(self, prompt: Prompt) -> int:
        held = set(self._hash) - {None}
        hashes = self.hashes(prompt)
        return next((i for i, block in enumerate(hashes) if block not in held), len(hashes))

    def begin(self, prompt: Prompt, chunk: int) -> list[int]:
        """Computes a prompt in chunks of `chunk` blocks; gives its slots, or none where they do not suffice."""
        hashes = self.hashes(prompt)
        hits = min(self.held(prompt), max(len(prompt[0]) - 1, 0) // SIZE)
        slots = [self._hash.index(block) for block in hashes[:hits]]
        if len(hashes) - hits > len([slot for slot in self._free if slot not in slots]):
            return []
        for slot in slots:
            self._take(slot)
        for start in range(hits, len(hashes), chunk):
            end = min(start + chunk, len(hashes))
            for block in hashes[start:end]:
                slot = self._free[0]
                self._take(slot)
                self._forget(slot)
                self._hash[slot] = block
                slots.append(slot)
            self._store(prompt, hashes, start, end)
        return slots

    def end(self, slots: list[int]) -> None:
        for slot in reversed(slots):
            self._refs[slot] -= 1
            if not self._refs[slot]:
                self._free.append(slot)

    def report(self, prompt: Prompt) -> None:
        """What vLLM says of the blocks that a prompt reuses, where it is asked to."""
        if hits := self.held(prompt):
            self._store(prompt, self.hashes(prompt), 0, hits)

    def clear(self) -> None:
        if not any(self._refs):
            self._hash = [None] * len(self._hash)
            self.events.append({"type": "AllBlocksCleared"})

    def take(self) -> list[Event]:
        events, self.events = self.events, []
        return events

    def _take(self, slot: int) -> None:
        if not self._refs[slot]:
            self._free.remove(slot)
        self._refs[slot] += 1

    def _forget(self, slot: int) -> None:
        if (block := self._hash[slot]) is not None:
            self._hash[slot] = None
            self.events.append({"type": "BlockRemoved", "block_hashes": [block], "medium": "GPU", "group_idx": 0})

    def _store(self, prompt: Prompt, hashes: list[int | bytes], start: int, end: int) -> None:
        tokens, lora, _, _ = prompt
        self.events.append(
            stored(hashes[start:end], hashes[start - 1] if start else None, tokens[start * SIZE : end * SIZE])
            | {"lora_name": lora, "extra_keys": [self.extras(prompt, i) for i in range(start, end)]}
        )


def stored(hashes: list[Any], parent: Any, tokens: tuple[int, ...], **others: Any) -> Event:
    return {
        "type": "BlockStored",
        "block_hashes": hashes,
        "parent_block_hash": parent,
        "token_ids": tokens,
        "block_size": SIZE,
        "lora_id": None,
        "medium": "GPU",
        "lora_name": None,
        "extra_keys": None,
        "group_idx": 0,
        "kv_cache_spec_kind": "full_attention",
    } | others


def removed(*hashes: Any, **others: Any) -> Event:
    return {"type": "BlockRemoved", "block_hashes": list(hashes), "medium": "GPU", "group_idx": 0} | others


CLEARED: Event = {"type": "AllBlocksCleared"}


class Follower:
    def __init__(self, replays: bool = False, reports_reuse: bool = False, **options: int) -> None:
        self.ledger = CacheLedger(SIZE)
        self.events = KvEvents(KvIdentity(self.ledger, reports_reuse=reports_reuse), replays=replays, **options)
        self._seq = 0

    def hear(self, *events: Event, style: Callable[[Event], Any] = as_map) -> None:
        self.events.receive(self._seq, encode(list(events), style))
        self._seq += 1

    def miss(self, *events: Event) -> bytes:
        self._seq += 1
        return encode(list(events))

    def holds(self, *tokens: int, **names: Any) -> int:
        return self.ledger.held_blocks(block_keys(tokens, SIZE, **names))


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


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xc1",
        b"\x93\x01",
        msgspec.msgpack.encode({"ts": 1.0}),
        msgspec.msgpack.encode([1.0, [[]], 0]),
        msgspec.msgpack.encode([1.0, [7], 0]),
        msgspec.msgpack.encode([1.0, [["BlockStored", "not a list"]], 0]),
        msgspec.msgpack.encode([1.0, [stored([1], None, (1, -2))], 0]),
        msgspec.msgpack.encode([1.0, [stored([1], None, (1, 1 << 40))], 0]),
    ],
)
def test_what_is_no_event_batch_degrades_and_holds_nothing(payload: bytes) -> None:
    follower = Follower()
    follower.hear(stored([1], None, (1, 2)))
    follower.events.receive(1, payload)
    assert follower.events.cause.startswith("not an event batch")
    assert follower.ledger.held == 0


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


@pytest.mark.parametrize("extra", [5, None, True, 1.5, {"a": 1}, [], ["image"], ["image", None], ["image", 0, 1], [[]]])
def test_an_extra_key_of_an_unknown_form_degrades(extra: Any) -> None:
    follower = Follower()
    follower.hear(stored([1], None, (1, 2)), stored([2], 1, (3, 4), extra_keys=[[extra]]))
    assert follower.events.cause.startswith("not an event batch")
    assert follower.ledger.held == 0


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(1 << 63), (1 << 64) - 1),
    st.integers(0, 3),
    st.floats(),
    st.text(max_size=4),
    st.binary(max_size=4),
    st.datetimes(),
    st.builds(msgspec.msgpack.Ext, st.integers(-128, 127), st.binary(max_size=13)),
    st.sampled_from(["GPU", "a", "full_attention", "REMOTE"]),
)
VALUES = st.one_of(
    SCALARS, st.lists(st.one_of(SCALARS, st.just([[]])), max_size=2), st.dictionaries(st.just("x"), SCALARS, max_size=1)
)
SOUND: dict[str, st.SearchStrategy[Any]] = {
    "type": st.sampled_from(["BlockStored", "BlockRemoved", "AllBlocksCleared"]),
    "block_hashes": st.lists(st.integers(1, 4), max_size=2),
    "parent_block_hash": st.sampled_from([None, None, 1, 2]),
    "token_ids": st.lists(st.integers(0, 1), min_size=2, max_size=4),
    "block_size": st.just(SIZE),
    "lora_name": st.sampled_from([None, "a"]),
    "extra_keys": st.none() | st.lists(st.none() | st.lists(VALUES | st.just("a"), max_size=2), max_size=2),
}


@st.composite
def wild_events(draw: st.DrawFn) -> Any:
    """Events of which most fields are sound, so that what is wrong gets past the first check."""
    sound = {field: draw(values) for field, values in SOUND.items()}
    event = sound | draw(st.dictionaries(st.sampled_from([*STORED_FIELDS, "type", "locality"]), VALUES, max_size=2))
    if draw(st.booleans()):
        return event
    return [event["type"], *(event.get(field) for field in STORED_FIELDS), *draw(st.lists(VALUES, max_size=3))]


@settings(derandomize=True, deadline=None, max_examples=120)
@given(st.lists(st.lists(st.one_of(wild_events(), wild_events(), VALUES), max_size=2), max_size=3), VALUES)
def test_whatever_the_fields_of_events_are_nothing_is_raised(batches: list[list[Any]], rank: Any) -> None:
    follower = Follower()
    for seq, events in enumerate(batches):
        follower.events.receive(seq, msgspec.msgpack.encode([1.0, events, rank if seq == 2 else 0]))
        assert isinstance(follower.events.cause, str)
    follower.events.identity.cleared()
    assert follower.ledger.held == len(follower.events.identity) == 0


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.lists(wild_events(), min_size=1, max_size=2), st.lists(st.tuples(st.integers(0, 200), st.integers(0, 255))))
def test_whatever_bytes_a_batch_has_nothing_is_raised(events: list[Any], flips: list[tuple[int, int]]) -> None:
    payload = bytearray(msgspec.msgpack.encode([1.0, events, 0]))
    for at, byte in flips:
        payload[at % len(payload)] = byte
    follower = Follower()
    follower.events.receive(0, bytes(payload))
    follower.events.receive(1, b"\x93\x01\x91" + b"\x91" * 100_000)
    assert follower.events.cause.startswith(("not an event batch", "events of data parallel rank"))


@pytest.mark.parametrize("key", [b"\x81\x80\x01", b"\x81\x91\x80\x01", b"\x91" * 100_000 + b"\x01", b"\xa1\xff"])
def test_extra_keys_that_no_value_can_be_made_of_degrade(key: bytes) -> None:
    follower = Follower()
    event = msgspec.msgpack.encode(stored([1], None, (1, 2), extra_keys=[["here"]]))
    event = event.replace(b"\xa4here", key)
    follower.events.receive(0, b"\x93\x01\x91" + event + b"\x00")
    assert follower.events.cause.startswith("not an event batch")


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


PROMPTS = st.tuples(
    st.lists(st.integers(0, 1), max_size=9).map(tuple),
    st.sampled_from([None, None, "adapter"]),
    st.sampled_from([None, None, "salt"]),
    st.sampled_from([(), (), (("image", 1, 3),), (("image", 2, 3),), (("other", 1, 3), ("image", 6, 1))]),
)
ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("request"), PROMPTS, st.integers(1, 4)),
        st.tuples(st.just("begin"), PROMPTS, st.integers(1, 4)),
        st.tuples(st.just("end"), st.integers(0, 5)),
        st.tuples(st.sampled_from(["report"]), PROMPTS),
        st.tuples(st.sampled_from(["clear", "send", "send twice", "lose", "delay", "replay"])),
    ),
    max_size=30,
)
STYLES = st.sampled_from([as_map, as_array])


@settings(derandomize=True, deadline=None, max_examples=200)
@given(
    ACTIONS,
    st.integers(2, 8),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.lists(STYLES, min_size=1, max_size=4),
    PROMPTS,
)
def test_while_there_is_no_cause_the_ledger_holds_what_the_engine_holds(
    actions: list[tuple[Any, ...]],
    slots: int,
    wide: bool,
    replays: bool,
    reports: bool,
    styles: list[Callable[[Event], Any]],
    probe: Prompt,
) -> None:
    pool, follower = Pool(slots, wide), Follower(replays, reports)
    running: list[list[int]] = []
    probes = [probe]
    late: list[tuple[int, bytes]] = []
    seq = 0
    for action in [*actions, ("replay",), ("send",)]:
        match action:
            case ("request", prompt, chunk):
                pool.end(pool.begin(prompt, chunk))
                probes.append(prompt)
            case ("begin", prompt, chunk):
                running.append(pool.begin(prompt, chunk))
            case ("end", which) if running:
                pool.end(running.pop(which % len(running)))
            case ("report", prompt) if reports:
                pool.report(prompt)
            case ("clear",):
                pool.clear()
            case ("replay",):
                for number, payload in late:
                    follower.events.receive(number, payload)
                late.clear()
                follower.events.replay_ended()
            case ("send" | "send twice" | "lose" | "delay" as how,):
                payload = encode(pool.take(), styles[seq % len(styles)])
                if how == "delay":
                    late.append((seq, payload))
                for _ in range({"send": 1, "send twice": 2}.get(how, 0)):
                    follower.events.receive(seq, payload)
                seq += 1
            case _:
                pass
    # A batch that was lost last of all is noticed with the next one.
    follower.events.receive(seq, encode([]))
    if follower.events.cause:
        return
    for tokens, lora, salt, media in probes:
        ours = follower.ledger.held_blocks(block_keys(tokens, SIZE, lora_name=lora, cache_salt=salt, media=media))
        truth = pool.held((tokens, lora, salt, media))
        assert ours <= truth
        assert ours == truth or (reports and follower.events.counts.repeats)
