"""What replicas store and what requests in flight will bring them, and the look-up, in Python.

Sans-IO. The rule: a look-up goes through a prompt page by page and drops replicas where they lack a block.
`_blocks.pyx` does the same in C, with one cell per block instead of pages. `PrefixIndex` owns it.
"""

from __future__ import annotations

import sys
from array import array
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import repeat
from typing import Any, Final

from router.prefix.base import Group
from router.prefix.layout import LONG_BLOCKS, Layout, Slot
from router.prefix.names import Names
from router.prefix.pages import Page, ones
from router.types import NO_HOLDERS, Held, Holders

_BLOCK_BYTES: Final = 120
"""Of memory per block, all told, rounded up from what `loadtests.index_cost` measures; to count anew takes tens of
milliseconds."""
_TANGLED: Final = 64
"""Most chains that wait to be laid side by side; one that finds no place comes again with its next lookup."""
_CHUNK: Final = 64

_Found = tuple[int, int, int, int]
"""Blocks, their tokens, how many of them are coming, and the mask of those who hold just that."""


class Blocks:
    """A `BlockStore`."""

    def __init__(self, max_blocks: int) -> None:
        self._layout = Layout(max_blocks)
        self._names = Names()
        self._soon: dict[int, int] = {}
        """Block -> mask of the places that will hold it soon."""
        self._tangled: deque[Sequence[int]] = deque()
        """Chains that a lookup found scattered over many pages."""

    def __len__(self) -> int:
        return len(self._layout.table)

    @property
    def max_blocks(self) -> int:
        return self._layout.max_blocks

    @property
    def refused(self) -> int:
        return self._layout.refused

    @property
    def coming(self) -> int:
        return len(self._soon)

    @property
    def untidy(self) -> bool:
        return bool(self._tangled)

    def open(self, place: int, replica: str) -> None:
        bit = 1 << place
        self._layout.slots[bit] = Slot(bit)
        self._names.open(place, replica)

    def retire(self, place: int) -> None:
        self._names.retire(place)

    def remove(self, place: int, budget: int) -> int:
        return self._layout.remove(self._layout.slots[1 << place], budget)

    def tidy(self, budget: int) -> int:
        while budget > 0 and self._tangled:
            budget -= self._layout.untangle(self._tangled.popleft(), budget) + 8
        return budget

    def store(self, place: int, hashes: Sequence[int], depths: Sequence[int]) -> None:
        self._layout.store(self._layout.slots[1 << place], hashes, depths)

    def evict(self, place: int, hashes: Iterable[int]) -> None:
        self._layout.evict(self._layout.slots[1 << place], hashes)

    def held(self, place: int) -> int:
        slot = self._layout.slots[1 << place]
        return sum(page.pattern_of(slot.bit).bit_count() for page in slot.pages)

    def holds(self, place: int) -> bool:
        return bool(self._layout.slots[1 << place].pages)

    def runs(self, place: int) -> Iterator[list[int]]:
        slot = self._layout.slots[1 << place]
        return _read([(page.hashes[:], page.pattern_of(slot.bit)) for page in slot.pages])

    def first(self, place: int, chain: Sequence[int]) -> int:
        if not chain or chain[0] not in self._layout.table:
            return 0
        return self._layout.first(self._layout.slots[1 << place], chain)

    def bytes(self) -> int:
        return self._layout.bytes() + sys.getsizeof(self._soon)

    def roughly_bytes(self) -> int:
        return len(self) * _BLOCK_BYTES

    # -- what requests in flight will bring

    def enter(self, place: int, blocks: Sequence[int], again: dict[int, int]) -> None:
        bit, soon = 1 << place, self._soon
        if soon.keys().isdisjoint(blocks):
            soon.update(zip(blocks, repeat(bit)))
            return
        for block, mask in zip(blocks, list(map(soon.get, blocks, repeat(0))), strict=True):
            soon[block] = mask | bit
            if mask & bit:
                again[block] = again.get(block, 0) + 1

    def withdraw(self, place: int, blocks: Sequence[int], again: dict[int, int]) -> None:
        bit, soon = 1 << place, self._soon
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
                mask = soon.get(block, 0) & ~bit
                if mask:
                    soon[block] = mask
                else:
                    soon.pop(block, None)

    # -- lookups

    def match(self, chain: Sequence[int], tokens_per_block: float) -> Holders:
        end = len(chain)
        table, soon = self._layout.table, self._soon
        if not end or (chain[0] not in table and chain[0] not in soon):
            return NO_HOLDERS
        found: list[_Found] = []
        alive = self._names.live  # The replicas that hold all blocks up to here.
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
                        self._part(found, mask, stored, chain, tokens_per_block)
            left = alive ^ stay
            if left and (last or soon):
                self._part(found, left, (at, _depth(last)), chain, tokens_per_block)
            alive = stay
            last = page, place + size - 1
            at += size
        if alive and (last or soon):
            self._part(found, alive, (at, _depth(last)), chain, tokens_per_block)
        if pages > 4 + at // LONG_BLOCKS and len(self._tangled) < _TANGLED:
            self._tangled.append(chain)
        return self._names.holders(_joined(found)) if found else NO_HOLDERS

    def _part(
        self,
        found: list[_Found],
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
                self._go_on(found, some, chain, stored, tokens_per_block)
                mask ^= some
        if at and mask:
            found.append((at, tokens, 0, mask))

    def _go_on(
        self,
        found: list[_Found],
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
                tokens = self._layout.depth(chain[at - 1])
                if tokens is None:
                    tokens = stored[1] + round((at - stored[0]) * tokens_per_block)
                if already:
                    for place in ones(left):
                        found.append((at, tokens, at - stored[0] - already.get(place, 0), 1 << place))
                else:
                    found.append((at, tokens, at - stored[0], left))
                mask &= both
            if here:
                for place in ones(here):
                    already[place] = already.get(place, 0) + size
            at += size

    def _coming(self, chain: Sequence[int], at: int, mask: int) -> tuple[int, int, int]:
        """Of the replicas in `mask`, those that hold a block now or soon, and those that hold it now, and for how many
        blocks from there on both are the same."""
        page = self._layout.table.get(chain[at])
        here = 0
        if page is None:
            part = chain[at : at + _CHUNK]
            size = _equal(list(map(self._layout.table.get, part)))
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


def _joined(found: list[_Found]) -> list[Group]:
    """In order, and those that hold the same together."""
    if len(found) > 1:
        found.sort()
        joined = [found[0]]
        for blocks, tokens, soon, mask in found[1:]:
            last = joined[-1]
            if last[:3] == (blocks, tokens, soon):
                joined[-1] = (blocks, tokens, soon, last[3] | mask)
            else:
                joined.append((blocks, tokens, soon, mask))
        found = joined
    return [(mask, Held(blocks, tokens, soon)) for blocks, tokens, soon, mask in found]


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
