"""vLLM's KV events: decoded, put in order, and told to the ledger under keys that prompts can be looked up by.

Sans-IO. vLLM names a KV block by a hash that depends on its version, algorithm and seed; here it gets a key of our own
over its tokens and those before it, so that a prompt's token ids say which KV blocks are its own. Rule: the ledger is
exact or `KvEvents.cause` says why it is not. Events that are wrong, missing or unknown set a cause; it goes away when
what it stands for is put right, at the latest when vLLM says that it holds nothing.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterator, Sequence
from typing import Any, Final, TypeAlias

import msgspec
import xxhash

from engine.cache_ledger import CacheLedger

END_OF_REPLAY: Final = (1 << 64) - 1
"""The sequence number that ends a replay: -1 in eight bytes."""
MAX_WAITING: Final = 10_000
"""Batches kept while one before them is missing; vLLM itself replays no more."""

_FULL: Final = frozenset({"full_attention", "mla_attention", "sink_full_attention", None})
"""Kinds of KV cache groups in which a prefix is held as long as its last block is. Older versions do not say."""

Media = Sequence[tuple[str, int, int]]
"""A prompt's images and the like in order: vLLM's identifier, the first placeholder token, how many of them."""

_Extra: TypeAlias = str | bytes | tuple[str, int]
"""An adapter's name or a salt, a digest, a medium with its place."""


def root_key(lora_name: str | None) -> int:
    """What a prompt's first key is seeded with."""
    return int(xxhash.xxh3_64_intdigest(f"lora:{lora_name}".encode())) if lora_name else 0


def block_keys(
    token_ids: Sequence[int],
    block_tokens: int,
    *,
    lora_name: str | None = None,
    cache_salt: str | None = None,
    media: Media = (),
    known: Sequence[int] = (),
) -> list[int]:
    """The keys of a prompt's full KV blocks: 64-bit hashes, each over its block's tokens and extras and all before it.

    The names are those of the request as vLLM has it; wrong ones give keys that no event matches. `known` are the keys
    that were given for these tokens' beginning under the same names: only those behind them are computed. 85 µs for
    2,048 tokens in blocks of 16.
    """
    last = len(token_ids) // block_tokens
    first = min(len(known), last)
    keys = list(known[:first])
    key = keys[-1] if keys else root_key(lora_name)
    data = _packed(token_ids[first * block_tokens : last * block_tokens])
    size = 4 * block_tokens
    digest = xxhash.xxh3_64_intdigest
    extras = _extras(media, cache_salt, block_tokens, first, last)
    for i, start in enumerate(range(0, len(data), size), first):
        block = data[start : start + size]
        key = digest(block + extras[i] if i in extras else block, key)
        keys.append(key)
    return keys


def _packed(token_ids: Sequence[int]) -> bytes:
    packed = array("I", token_ids)
    if struct.pack("=I", 1) != struct.pack("<I", 1):
        packed.byteswap()
    return packed.tobytes()


def _extras(media: Media, cache_salt: str | None, size: int, first: int, last: int) -> dict[int, bytes]:
    """What distinguishes the KV blocks from `first` to `last` beside their tokens; only of those that have any."""
    found = {block: list[_Extra](places) for block, places in _media_blocks(media, size, first, last)} if media else {}
    if cache_salt and first == 0 < last:
        found.setdefault(0, []).append(cache_salt)
    return {block: _extra_bytes(extras) for block, extras in found.items()}


def _media_blocks(media: Media, size: int, first: int, last: int) -> Iterator[tuple[int, list[tuple[str, int]]]]:
    """The blocks with media in them, each medium with its place relative to the block.

    Where media lie over each other, a block has those that vLLM sees as it goes through them once: none behind one that
    reaches past the block's end.
    """
    _, offset, length = media[-1]
    last = min(last, -(-(offset + length) // size))
    block, at = first, 0
    while block < last and at < len(media):
        start, places = block * size, list[tuple[str, int]]()
        while at < len(media):
            identifier, offset, length = media[at]
            if offset >= start + size:
                break
            if offset + length > start:
                places.append((identifier, offset - start))
            if offset + length > start + size:
                break
            at += 1
        if places:
            yield block, places
        block = max(block + 1, offset // size)


def _extra_bytes(extras: Sequence[_Extra]) -> bytes:
    """What distinguishes a block beside its tokens; each part marked by its kind, its length before it."""
    parts = list[bytes]()
    for extra in extras:
        if isinstance(extra, str):
            kind, data = b"s", extra.encode("utf-8", "surrogatepass")
        elif isinstance(extra, bytes):
            kind, data = b"e", extra
        else:
            kind, data = b"m", repr(extra).encode("utf-8", "surrogatepass")
        parts.append(kind + len(data).to_bytes(4, "little") + data)
    return b"".join(parts)


class _Batch(msgspec.Struct, array_like=True, gc=False):
    ts: float
    events: list[msgspec.Raw]
    rank: int | None = None


class _Tagged(msgspec.Struct):
    type: str


class _TaggedArray(msgspec.Struct, array_like=True):
    type: str


class _Stored(msgspec.Struct):
    """The fields are vLLM's, in the order of its arrays; the first is the tag."""

    type: str
    block_hashes: list[int | bytes]
    parent_block_hash: int | bytes | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None = None
    medium: str | None = None
    lora_name: str | None = None
    extra_keys: list[list[Any] | None] | None = None
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None
    kv_cache_spec_sliding_window: int | None = None
    locality: str | None = None


class _StoredArray(_Stored, array_like=True):
    pass


class _Removed(msgspec.Struct):
    type: str
    block_hashes: list[int | bytes]
    medium: str | None = None
    group_idx: int | None = None
    locality: str | None = None


class _RemovedArray(_Removed, array_like=True):
    pass


class Counts(msgspec.Struct):
    """What came, for metrics; nothing here is an error by itself."""

    batches: int = 0
    stored: int = 0
    """KV blocks, as are those below."""
    removed: int = 0
    cleared: int = 0
    """Times that the whole cache was cleared."""
    repeats: int = 0
    """Stored again as a run from a prompt's start; see `KvIdentity`."""
    orphans: int = 0
    """Stored behind a parent that is not known."""
    strangers: int = 0
    """Removed without being known."""
    elsewhere: int = 0
    """Events of other media than the GPU, and of remote caches."""
    unknown: int = 0
    """Events of an unknown type."""
    duplicates: int = 0
    """Batches that came again."""
    gaps: int = 0
    """Times that batches were missing."""
    lost: int = 0
    """Batches that never came."""


class KvIdentity:
    """Which key each of vLLM's block hashes stands for, and how many KV blocks hold it.

    vLLM stores a block a second time where two requests compute the same one, and removes each copy for itself. Several
    hashes may stand for one key, and the ledger hears of the first that comes and the last that goes.

    A request with `kv_cache_report_mode` "full" makes vLLM say of blocks that it reuses that they were stored, which
    looks like another copy. Keep such requests out, or say `reports_reuse`: then what is stored again from a prompt's
    start counts as no copy, and a block of which there were some after all is taken to be gone too early.
    """

    def __init__(self, ledger: CacheLedger, *, reports_reuse: bool = False) -> None:
        self.counts = Counts()
        self._ledger = ledger
        self._reports_reuse = reports_reuse
        self._keys: dict[int | bytes, int] = {}
        self._copies: dict[int | bytes, int] = {}  # Only of hashes with more than one.
        self._hashes: dict[int, int] = {}  # Per key how many hashes.
        self._orphans: dict[int | bytes, int] = {}  # Hash -> copies.
        self._loras: dict[int | bytes, str] = {}  # Hash -> adapter's name; only of hashes with a key.
        self._forgotten = set[int | bytes]()  # Hashes of adapters that were replaced.
        self._group: int | None = None
        self.defect = ""
        """What cannot be put right: the engine's cache is of another kind than is understood here."""
        self.fault = ""
        """What is wrong until the cache is cleared."""

    @property
    def cause(self) -> str:
        """Why the ledger is not exact; empty where it is."""
        if self.defect or self.fault:
            return self.defect or self.fault
        return f"{len(self._orphans)} KV blocks stored behind unknown ones" if self._orphans else ""

    def __len__(self) -> int:
        """Hashes known."""
        return len(self._keys) + len(self._orphans)

    def stored(self, event: _Stored) -> None:
        """Takes over a run of blocks behind one parent."""
        if self._elsewhere(event) or not self._understood(event):
            return
        hashes = event.block_hashes
        self.counts.stored += len(hashes)
        parent = event.parent_block_hash
        if parent is None:
            key = root_key(event.lora_name)
        elif parent in self._keys:
            key = self._keys[parent]
        else:
            self._orphaned(hashes)
            return
        data = _packed(event.token_ids)
        size = len(data) // len(hashes) if hashes else 0
        for i, block in enumerate(hashes):
            key = xxhash.xxh3_64_intdigest(data[i * size : (i + 1) * size] + _event_extras(event, i), key)
            key = self._enter(block, key, parent is None)
            if event.lora_name and block not in self._forgotten:
                self._loras[block] = event.lora_name

    def removed(self, event: _Removed) -> None:
        """Takes over removals, each of one copy."""
        if self._elsewhere(event) or not self._one_group(event.group_idx):
            return
        self.counts.removed += len(event.block_hashes)
        for block in event.block_hashes:
            self._leave(block)

    def cleared(self) -> None:
        """The engine holds nothing, and what was wrong before is of no account."""
        self.counts.cleared += 1
        self.forget()
        self.fault = ""

    def forget(self) -> None:
        """Holds nothing, whatever the engine holds."""
        self._keys.clear()
        self._copies.clear()
        self._hashes.clear()
        self._orphans.clear()
        self._loras.clear()
        self._forgotten.clear()
        self._ledger.cleared()

    def forget_lora(self, name: str) -> int:
        """The adapter of this name is another one from now on: no prompt finds what was stored under it before.

        vLLM tells the adapters apart but says only the name in its events. Its blocks of the old one stay known, under
        keys of no prompt, until it removes them. To be called before the first request with the new adapter; a request
        of the old one that shares no block with earlier ones and is stored later is taken for the new one's. Gives how
        many hashes were known.
        """
        old = [block for block, lora in self._loras.items() if lora == name]
        for block in old:
            del self._loras[block]
            key = self._keys[block]
            self._release(key)
            self._keys[block] = key = xxhash.xxh3_64_intdigest(b"forgotten", key)
            self._hold(key)
        self._forgotten.update(old)
        return len(old)

    def _enter(self, block: int | bytes, key: int, from_start: bool) -> int:
        """Takes over one block; gives its key, which is another where its adapter was replaced."""
        self._orphans.pop(block, None)
        known = self._keys.get(block)
        if known is None:
            self._keys[block] = key
            self._hold(key)
            return key
        if known != key and block not in self._forgotten:
            self.fault = "a KV block's hash came back with other tokens"
        else:
            self.counts.repeats += from_start
            if not (from_start and self._reports_reuse):
                self._copies[block] = self._copies.get(block, 1) + 1
        return known

    def _leave(self, block: int | bytes) -> None:
        copies = self._copies.get(block, 1)
        if copies > 2:
            self._copies[block] = copies - 1
            return
        if copies == 2:
            del self._copies[block]
            return
        key = self._keys.pop(block, None)
        if key is None:
            self._orphan_left(block)
            return
        self._loras.pop(block, None)
        self._forgotten.discard(block)
        self._release(key)

    def _hold(self, key: int) -> None:
        hashes = self._hashes.get(key, 0)
        self._hashes[key] = hashes + 1
        if not hashes:
            self._ledger.stored(key)

    def _release(self, key: int) -> None:
        left = self._hashes[key] - 1
        if left:
            self._hashes[key] = left
        else:
            del self._hashes[key]
            self._ledger.evicted(key)

    def _orphaned(self, hashes: Sequence[int | bytes]) -> None:
        self.counts.orphans += len(hashes)
        for block in hashes:
            if block in self._keys:
                self._copies[block] = self._copies.get(block, 1) + 1
            else:
                self._orphans[block] = self._orphans.get(block, 0) + 1

    def _orphan_left(self, block: int | bytes) -> None:
        copies = self._orphans.get(block)
        if copies is None:
            # The second copy of a block whose first one was not counted, most likely.
            self.counts.strangers += 1
        elif copies == 1:
            del self._orphans[block]
        else:
            self._orphans[block] = copies - 1

    def _elsewhere(self, event: _Stored | _Removed) -> bool:
        """Whether the event is about another cache than the one that prompts are computed in."""
        if event.medium in (None, "GPU") and event.locality != "REMOTE":
            return False
        self.counts.elsewhere += 1
        return True

    def _understood(self, event: _Stored) -> bool:
        if event.kv_cache_spec_kind not in _FULL:
            self.defect = f"KV cache group {event.group_idx} is {event.kv_cache_spec_kind}"
        elif event.block_size != self._ledger.block_tokens:
            self.defect = f"KV blocks of {event.block_size} tokens, not {self._ledger.block_tokens}"
        elif len(event.token_ids) != len(event.block_hashes) * event.block_size:
            self.fault = f"{len(event.block_hashes)} KV blocks with {len(event.token_ids)} tokens"
        else:
            return self._one_group(event.group_idx)
        return False

    def _one_group(self, group: int | None) -> bool:
        group = group or 0
        if self._group is None:
            self._group = group
        if group != self._group:
            self.defect = "more than one KV cache group"
            return False
        return True


def _event_extras(event: _Stored, i: int) -> bytes:
    keys = event.extra_keys[i] if event.extra_keys is not None and i < len(event.extra_keys) else None
    if not keys:
        return b""
    # vLLM puts the adapter's name first; it is in the root key already.
    return _extra_bytes([_extra(key) for key in (keys[1:] if event.lora_name and keys[0] == event.lora_name else keys)])


def _extra(key: Any) -> _Extra:
    if isinstance(key, str | bytes):
        return key
    if isinstance(key, list) and list(map(type, key)) == [str, int]:
        return key[0], key[1]
    raise msgspec.ValidationError(f"an extra key of the unknown form {key!r:.40}")


class KvEvents:
    """vLLM's publisher's messages in their order; `receive` takes them as they come.

    Missing batches are waited for where the publisher can replay them: while `missing` names one, ask for a replay from
    there, pass what comes to `receive` and call `replay_ended` at its end.
    """

    def __init__(self, identity: KvIdentity, *, replays: bool, max_waiting: int = MAX_WAITING) -> None:
        self.identity = identity
        self.counts = identity.counts
        self._replays = replays
        self._max_waiting = max_waiting
        self._next = 0
        self._waiting: dict[int, bytes] = {}

    @property
    def cause(self) -> str:
        """Why the ledger is not exact at the moment; empty where it is."""
        if self._waiting:
            return f"event batch {self._next} is missing"
        return self.identity.cause

    @property
    def missing(self) -> int | None:
        """The first batch that is missing while later ones are here; None where none is."""
        return self._next if self._waiting else None

    def receive(self, seq: int, payload: bytes) -> None:
        """Takes the batch numbered `seq`, from the publisher or from its replay. Never raises on what is in it."""
        if seq < self._next or seq in self._waiting:
            self.counts.duplicates += 1
            return
        if seq > self._next:
            if not self._waiting:
                self.counts.gaps += 1
            self._waiting[seq] = payload
            if not self._replays or len(self._waiting) > self._max_waiting:
                self._give_up()
            return
        self._apply(payload)
        self._catch_up()

    def replay_ended(self) -> None:
        """The replay brought all there is: what is still missing will never come."""
        if self._waiting:
            self._give_up()

    def lost(self, cause: str) -> None:
        """Events cannot be followed any more; to be undone only by the engine clearing its cache."""
        self.identity.forget()
        self.identity.fault = cause

    def _catch_up(self) -> None:
        self._next += 1
        while (payload := self._waiting.pop(self._next, None)) is not None:
            self._apply(payload)
            self._next += 1

    def _give_up(self) -> None:
        """Goes on behind the gap, holding nothing: whatever was removed in it would stay for ever."""
        while self._waiting:
            first = min(self._waiting)
            self.counts.lost += first - self._next
            self.lost(f"event batches {self._next} to {first - 1} were lost")
            self._next = first
            self._apply(self._waiting.pop(first))
            self._catch_up()

    def _apply(self, payload: bytes) -> None:
        self.counts.batches += 1
        try:
            batch = _batch(payload)
            if batch.rank:
                self.identity.defect = f"events of data parallel rank {batch.rank}"
                return
            for event in batch.events:
                self._event(bytes(event))
        except (msgspec.MsgspecError, UnicodeDecodeError, OverflowError, RecursionError) as error:
            self.lost(f"not an event batch: {error}")

    def _event(self, event: bytes) -> None:
        array_like = event[0] & 0xF0 == 0x90 or event[0] in (0xDC, 0xDD)
        kind = (_tagged_array(event) if array_like else _tagged(event)).type
        if kind == "BlockStored":
            self.identity.stored(_stored_array(event) if array_like else _stored(event))
        elif kind == "BlockRemoved":
            self.identity.removed(_removed_array(event) if array_like else _removed(event))
        elif kind == "AllBlocksCleared":
            self.identity.cleared()
        else:
            self.counts.unknown += 1
            self.identity.fault = f"events of the unknown type {kind[:40]!r}"


_batch = msgspec.msgpack.Decoder(_Batch).decode
_tagged = msgspec.msgpack.Decoder(_Tagged).decode
_tagged_array = msgspec.msgpack.Decoder(_TaggedArray).decode
_stored = msgspec.msgpack.Decoder(_Stored).decode
_stored_array = msgspec.msgpack.Decoder(_StoredArray).decode
_removed = msgspec.msgpack.Decoder(_Removed).decode
_removed_array = msgspec.msgpack.Decoder(_RemovedArray).decode
