"""The index: which replica holds how much of a prompt.

Sans-IO, no clock. The rule: it answers exactly what it was told. A replica holds a prompt's first n blocks if it stored
each of them and evicted none since; blocks that requests in flight will bring count too, and are told apart.

Each replica is a bit in masks. A replica that leaves, or whose blocks are all void, only gives up its bit: nothing
matches it any more from that moment on, and its blocks are taken out in slices by `sweep`, after which the bit is free
again. What requests in flight will bring moves to a replica's new bit in slices too. `Prefixes` owns the index.
"""

from __future__ import annotations

import sys
from array import array
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import compress, repeat
from typing import Any, Final

from router.prefix.blocks import LONG_BLOCKS, Blocks, Slot
from router.prefix.pages import Page, ones
from router.types import NO_HOLDERS, Held, Holders

_TANGLED: Final = 64
"""Most chains that wait to be laid side by side; one that finds no place comes again with its next lookup."""
_SPELLED: Final = 1024
"""Masks whose names are remembered; of 64 replicas each takes at most 0.6 KB. Replicas that serve the same prompts come
again and again."""
_BITS: Final = bytes(48) + b"\0\1" + bytes(206)
"""Translates the digits 0 and 1 to their values."""
_CHUNK: Final = 64
_AT_ONCE: Final = 1024
"""So many blocks of holds move to a cleared replica's new bit at once."""

_Group = tuple[int, Held]
"""Mask of replicas, and what they hold."""


class _Member:
    """A replica in the index."""

    __slots__ = ("again", "gone", "holds", "slot")

    def __init__(self, slot: Slot) -> None:
        self.slot = slot
        self.gone = False
        self.holds: set[Hold] = set()
        self.again: dict[int, int] = {}
        """Blocks that several holds have, and how many more than one."""


class Hold:
    """Blocks that a request in flight will bring to a replica."""

    __slots__ = ("blocks", "member")

    def __init__(self) -> None:
        self.member: _Member | None = None
        self.blocks: Sequence[int] = ()


class PrefixIndex:
    """The longest held prefix per replica. Blocks are 64-bit hashes; each stands for all blocks before it too."""

    def __init__(self, max_blocks: int = 2_000_000) -> None:
        self._blocks = Blocks(max_blocks)
        self._members: dict[str, _Member] = {}
        self._names: list[str] = []
        """By the place of the bit; those of bits that are not live are void."""
        self._roster: tuple[str, ...] = ()
        """Names of all live bits."""
        self._live = 0
        """Mask of the bits that match."""
        self._free: list[int] = []
        self._soon: dict[int, int] = {}
        """Block -> mask of the replicas that will hold it soon."""
        self._leaving: deque[Slot] = deque()
        self._void: deque[tuple[int, list[Sequence[int]]]] = deque()
        """Bits that left with the blocks from which they are still to be taken in `_soon`; never with none."""
        self._moving: deque[Hold] = deque()
        """Holds of replicas that were cleared, still to be entered in `_soon` under their new bits."""
        self._tangled: deque[Sequence[int]] = deque()
        """Chains that a lookup found scattered over many pages."""
        self._spelled: dict[int, tuple[str, ...]] = {}
        """The names of masks that were asked for, as long as no bit changes hands."""

    def __len__(self) -> int:
        """Blocks that are stored anywhere."""
        return len(self._blocks.table)

    @property
    def max_blocks(self) -> int:
        return self._blocks.max_blocks

    @property
    def refused(self) -> int:
        """Blocks that were not taken in because the index was full, since the start."""
        return self._blocks.refused

    # -- replicas

    def join(self, replica: str) -> None:
        """A replica that holds nothing yet; one that is there already stays as it is."""
        if replica not in self._members:
            self._members[replica] = _Member(self._new_slot(replica))

    def leave(self, replica: str) -> None:
        """Nothing matches the replica any more; its blocks go with the next sweeps."""
        member = self._members.pop(replica, None)
        if member is not None:
            member.gone = True
            self._retire(member.slot)
            self._forget(member)

    def clear(self, replica: str) -> None:
        """The replica stores nothing any more. Holds stay; where they have many blocks, they match again only after the
        next sweeps. Raises `KeyError` if it is not there."""
        member = self._members[replica]
        if member.slot.pages:
            self._retire(member.slot)
            self._moving.extend(member.holds)
            self._forget(member)
            member.slot = self._new_slot(replica)
            self._move(_AT_ONCE)

    def _forget(self, member: _Member) -> None:
        """What requests in flight will bring does not match any more."""
        if blocks := [hold.blocks for hold in member.holds if hold.blocks]:
            self._void.append((member.slot.bit, blocks))
        member.holds.clear()
        member.again.clear()

    def _move(self, budget: int) -> int:
        """Enters holds of cleared replicas anew, of about `budget` blocks; returns what is left of that."""
        while budget > 0 and self._moving:
            hold = self._moving.popleft()
            if hold.member is not None and not hold.member.gone:
                self._enter(hold, hold.member)
                budget -= len(hold.blocks) + 1
        return budget

    def _new_slot(self, replica: str) -> Slot:
        slots = self._blocks.slots
        bit = self._free.pop() if self._free else 1 << len(slots)
        slot = slots[bit] = Slot(bit)
        place = bit.bit_length() - 1
        if place == len(self._names):
            self._names.append(replica)
        else:
            self._names[place] = replica
        self._live |= bit
        self._changed_hands()
        return slot

    def _retire(self, slot: Slot) -> None:
        self._live &= ~slot.bit
        self._changed_hands()
        self._leaving.append(slot)

    def _changed_hands(self) -> None:
        self._spelled.clear()
        self._roster = self._names_of(self._live)

    def sweep(self, budget: int = 1024) -> bool:
        """Work that is put off, on about `budget` blocks: takes out those of replicas that left, and lays the scattered
        ones of a prompt side by side. Returns whether there is more to do."""
        budget = self._move(budget)
        while budget > 0 and self._void:
            bit, left = self._void[0]
            blocks = left.pop()
            part = blocks[-budget:]
            if len(part) < len(blocks):
                left.append(blocks[:-budget])
            for block in part:
                self._not_soon(block, bit)
            budget -= len(part)
            if not left:
                self._void.popleft()
        while budget > 0 and self._leaving and not self._void:  # A bit is free once nothing bears it.
            slot = self._leaving[0]
            budget -= self._blocks.remove(slot, budget) + 1
            if not slot.pages:
                self._leaving.popleft()
                del self._blocks.slots[slot.bit]
                self._free.append(slot.bit)
        while budget > 0 and self._tangled:
            budget -= self._blocks.untangle(self._tangled.popleft(), budget) + 8
        return bool(self._leaving or self._void or self._moving or self._tangled)

    # -- what replicas store

    def store(self, replica: str, hashes: Sequence[int], depths: Sequence[int]) -> None:
        """The replica holds these blocks now; `depths` are the tokens up to the end of each.

        Blocks of one prompt are best given in their order. Where the index is full, blocks that nobody held so far are
        refused, the last ones first, and counted: what is there stays until its replicas evict it, since the blocks
        that stay longest are the beginnings that many prompts share. Raises `KeyError` if the replica is not there.
        """
        self._blocks.store(self._members[replica].slot, hashes, depths)

    def evict(self, replica: str, hashes: Iterable[int]) -> None:
        """The replica holds these blocks no more; those that it did not hold are passed over. Raises `KeyError` if the
        replica is not there."""
        self._blocks.evict(self._members[replica].slot, hashes)

    # -- what requests in flight will bring

    def hold(self, replica: str, blocks: Sequence[int], stored: int | None = None, hold: Hold | None = None) -> Hold:
        """Until the hold is released, the replica matches these blocks as well, as ones that it will have soon.

        Those from the prompt's beginning that it has stored already are no part of the hold; `stored` tells how many
        they are where a look-up has just said so. A replica that is not there gets no hold, and a later one of the same
        name is not concerned. The caller may give a new `hold` of its own kind, which is returned.
        """
        if hold is None:
            hold = Hold()
        member = self._members.get(replica)
        if member is not None:
            if stored is None:
                known = blocks and blocks[0] in self._blocks.table
                stored = self._blocks.first(member.slot, blocks) if known else 0
            hold.member, hold.blocks = member, blocks[stored:] if stored else blocks
            self._enter(hold, member)
        return hold

    def _enter(self, hold: Hold, member: _Member) -> None:
        bit, soon, blocks = member.slot.bit, self._soon, hold.blocks
        if soon.keys().isdisjoint(blocks):
            soon.update(zip(blocks, repeat(bit)))
        else:
            again = member.again
            for block, mask in zip(blocks, list(map(soon.get, blocks, repeat(0))), strict=True):
                soon[block] = mask | bit
                if mask & bit:
                    again[block] = again.get(block, 0) + 1
        member.holds.add(hold)

    def release(self, hold: Hold) -> None:
        """Ends a hold; one that has ended stays so."""
        member, hold.member = hold.member, None
        if member is None or hold not in member.holds:
            return
        member.holds.discard(hold)
        bit, soon, again, blocks = member.slot.bit, self._soon, member.again, hold.blocks
        if not again or again.keys().isdisjoint(blocks):
            masks = list(map(soon.pop, blocks, repeat(0)))
            if masks.count(bit) < len(blocks):
                soon.update({block: mask & ~bit for block, mask in zip(blocks, masks, strict=True) if mask & ~bit})
            return
        for block in blocks:
            more = again.get(block, 0)
            if more > 1:
                again[block] = more - 1
            elif more:
                del again[block]
            else:
                self._not_soon(block, bit)

    def _not_soon(self, block: int, bit: int) -> None:
        mask = self._soon.get(block, 0)
        if mask == bit:
            del self._soon[block]
        elif mask & bit:
            self._soon[block] = mask ^ bit

    # -- lookups

    def match(self, chain: Sequence[int], tokens_per_block: float = 0.0) -> Holders:
        """Who holds how much of a prompt, without those that hold nothing.

        `tokens_per_block` estimates the tokens of blocks whose depth nobody has reported.
        """
        end = len(chain)
        table, soon = self._blocks.table, self._soon
        if not end or (chain[0] not in table and chain[0] not in soon):
            return NO_HOLDERS
        groups: list[_Group] = []
        alive = self._live  # The replicas that hold all blocks up to here.
        at = pages = 0
        last: tuple[Page, int] | None = None  # Page and place of the block before `at`; its depth is seldom asked for.
        while at < end and alive:
            page = table.get(chain[at])
            if page is None:
                break
            pages += 1
            place = page.place(chain[at])
            size = page.follows(place, chain, at)
            stay = 0
            for pattern, mask in page.holders.items():
                mask &= alive
                if mask:
                    lacking = ~pattern >> place
                    run = (lacking & -lacking).bit_length() - 1
                    if run >= size:
                        stay |= mask
                    elif run:
                        alive ^= mask
                        stored = at + run, page.depths[place + run - 1]
                        self._part(groups, mask, stored, chain, tokens_per_block)
            left = alive ^ stay
            if left and (last or soon):
                self._part(groups, left, (at, _depth(last)), chain, tokens_per_block)
            alive = stay
            last = page, place + size - 1
            at += size
        if alive and (last or soon):
            self._part(groups, alive, (at, _depth(last)), chain, tokens_per_block)
        if pages > 4 + at // LONG_BLOCKS and len(self._tangled) < _TANGLED:
            self._tangled.append(chain)
        return self._holders(groups) if groups else NO_HOLDERS

    def _part(
        self,
        groups: list[_Group],
        mask: int,
        stored: tuple[int, int],
        chain: Sequence[int],
        tokens_per_block: float,
    ) -> None:
        """The replicas in `mask` store so many (blocks, tokens) and not the next block; it may come with requests in
        flight."""
        at, tokens = stored
        if self._soon and at < len(chain):
            some = self._soon.get(chain[at], 0) & mask
            if some:
                self._go_on(groups, some, chain, stored, tokens_per_block)
                mask ^= some
        if at and mask:
            groups.append((mask, Held(at, tokens)))

    def _holders(self, groups: list[_Group]) -> Holders:
        """The same by name."""
        rest = self._live
        half = rest.bit_count() >> 1
        most: Held | None = None
        named: list[tuple[Held | None, tuple[str, ...]]] = []
        for mask, held in groups:
            rest ^= mask
            if mask.bit_count() > half:
                most = held
            else:
                named.append((held, self._names_of(mask)))
        if most is None:
            return Holders(named)
        if rest:
            named.append((None, self._names_of(rest)))
        return Holders(named, most, self._roster)

    def _names_of(self, mask: int) -> tuple[str, ...]:
        names = self._spelled.get(mask)
        if names is None:
            if len(self._spelled) >= _SPELLED:
                self._spelled.clear()
            digits = bin(mask)[:1:-1].encode()
            names = self._spelled[mask] = tuple(compress(self._names, digits.translate(_BITS)))
        return names

    def _go_on(
        self,
        groups: list[_Group],
        mask: int,
        chain: Sequence[int],
        stored: tuple[int, int],
        tokens_per_block: float,
    ) -> None:
        """To the replicas in `mask` requests in flight will bring the block after the `stored` (blocks, tokens)."""
        at, end = stored[0], len(chain)
        already: dict[int, int] = {}  # How many of the blocks from there on a replica stores.
        while mask:
            both, here, size = self._coming(chain, at, mask) if at < end else (0, 0, 0)
            left = mask & ~both
            if left:
                tokens = self._blocks.depth(chain[at - 1])
                if tokens is None:
                    tokens = stored[1] + round((at - stored[0]) * tokens_per_block)
                if already:
                    for place in ones(left):
                        groups.append((1 << place, Held(at, tokens, at - stored[0] - already.get(place, 0))))
                else:
                    groups.append((left, Held(at, tokens, at - stored[0])))
                mask &= both
            if here:
                for place in ones(here):
                    already[place] = already.get(place, 0) + size
            at += size

    def _coming(self, chain: Sequence[int], at: int, mask: int) -> tuple[int, int, int]:
        """Of the replicas in `mask`, those that hold a block now or soon, and those that hold it now, and for how many
        blocks from there on both are the same."""
        page = self._blocks.table.get(chain[at])
        here = 0
        if page is None:
            part = chain[at : at + _CHUNK]
            size = _equal(list(map(self._blocks.table.get, part)))
        else:
            place = page.place(chain[at])
            size = page.follows(place, chain, at)
            for pattern, holders in page.holders.items():
                holders &= mask
                if holders:
                    held = pattern >> place
                    if held & 1:
                        here |= holders
                        held = ~held
                    if held:
                        size = min(size, (held & -held).bit_length() - 1)
        coming = list(map(self._soon.get, chain[at : at + size], repeat(0)))
        return coming[0] & mask | here, here, _equal(coming)

    # -- figures

    def blocks(self, replica: str) -> list[int]:
        """What the replica stores. Raises `KeyError` if it is not there."""
        return [block for run in self.runs(replica) for block in run]

    def runs(self, replica: str) -> Iterator[list[int]]:
        """The same in pieces of at most a page, as it is now, whatever changes until they are read. Raises `KeyError`
        if it is not there."""
        slot = self._members[replica].slot
        return _read([(page.hashes[:], page.pattern_of(slot.bit)) for page in slot.pages])

    def held(self, replica: str) -> int:
        """How many blocks the replica stores. Raises `KeyError` if it is not there."""
        slot = self._members[replica].slot
        return sum(page.pattern_of(slot.bit).bit_count() for page in slot.pages)

    def bytes(self) -> int:
        """Estimated size in memory; costs a walk over all pages."""
        return self._blocks.bytes() + sys.getsizeof(self._soon)


def _read(pages: list[tuple[array[int], int]]) -> Iterator[list[int]]:
    while pages:
        hashes, pattern = pages.pop()
        whole = pattern.bit_count() == len(hashes)
        yield hashes.tolist() if whole else [hashes[place] for place in ones(pattern)]


def _equal(items: list[Any]) -> int:
    """How many of the first ones are the same."""
    first, size = items[0], len(items)
    if items.count(first) == size:
        return size
    at = 1
    while items[at] == first:
        at += 1
    return at


def _depth(last: tuple[Page, int] | None) -> int:
    return last[0].depths[last[1]] if last is not None else 0
