"""Batches of KV events as vLLM's versions write them, and a ledger that follows them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from engine.cache_ledger import CacheLedger
from engine.kv_events import KvEvents, KvIdentity, block_keys

SIZE = 2
"""Tokens in a KV block."""

Event = dict[str, Any]

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
