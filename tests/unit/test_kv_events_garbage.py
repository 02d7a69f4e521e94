"""KV events that are none, or have fields of any kind: nothing is raised and nothing is held."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.kv_batches import SIZE, STORED_FIELDS, Follower, stored


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
