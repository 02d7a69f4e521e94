"""The blocks that replicas store, laid out in pages.

Sans-IO. The rule: a block that any replica holds lies in exactly one page, and the table says in which; a block that
nobody holds is in neither. Replicas are slots here, bits in the pages' masks. `Blocks` owns it.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable, Sequence
from itertools import repeat
from typing import Final

from router.prefix.pages import Page, new_page, ones, run_of_ones

OWN_PAGE: Final = 16
"""So many new blocks at once begin a page of their own, so that a prompt lies across few pages;
fewer share the page in which the replica's last blocks lie, so that pages do not stay small."""
SHARED_BLOCKS: Final = 64
"""Most blocks in a page that is filled little by little."""
LONG_BLOCKS: Final = 128
"""Pieces of a chain that are as long stay where they are; shorter ones are joined when a lookup finds many of them."""
PAGE_BLOCKS: Final = 256
"""Most blocks in a page at all."""


class Slot:
    """One bit in the masks, and the pages in which it occurs."""

    __slots__ = ("bit", "open", "pages")

    def __init__(self, bit: int) -> None:
        self.bit = bit
        self.pages: set[Page] = set()
        self.open: Page | None = None
        """Where its next few blocks go."""


class Layout:
    """The table of blocks and their pages."""

    def __init__(self, max_blocks: int) -> None:
        self.max_blocks = max_blocks
        self.refused = 0
        """Blocks that found no room, since the start."""
        self.table: dict[int, Page] = {}
        self.slots: dict[int, Slot] = {}
        """By bit."""
        self._shelf: Page | None = None
        """Where the last blocks of pages that are given up go."""

    # -- changes

    def store(self, slot: Slot, hashes: Sequence[int], depths: Sequence[int]) -> None:
        """As `BlockStore.store`."""
        blocks = list(hashes)
        if OWN_PAGE <= len(blocks) <= PAGE_BLOCKS and self._takes_page(slot, blocks, depths):
            return
        if len(set(blocks)) < len(blocks):
            last = dict(zip(blocks, depths, strict=True))
            blocks, depths = list(last), list(last.values())
        pages = list(map(self.table.get, blocks))
        at, end = 0, len(blocks)
        while at < end:
            page = pages[at]
            if page is None:
                size = _nones(pages, at)
                self._take(slot, blocks[at : at + size], depths[at : at + size])
            else:
                place = page.place(blocks[at])
                size = page.agrees(place, blocks, at)
                for i in range(size):
                    page.depths[place + i] = depths[at + i]
                self._mark(slot, page, ((1 << size) - 1) << place)
            at += size

    def _takes_page(self, slot: Slot, blocks: list[int], depths: Sequence[int]) -> bool:
        """Takes in what most reports have, a prompt whose blocks are all new and begin a page, in few steps. False
        where they are something else, and nothing was done."""
        table, size = self.table, len(blocks)
        before, last = len(table), slot.open
        if before + size > self.max_blocks or (last is not None and 0 < len(last.hashes) < OWN_PAGE):
            return False
        if not table.keys().isdisjoint(blocks):
            return False
        pattern = (1 << size) - 1
        page = Page(array("Q", blocks), array("I", depths), {pattern: slot.bit}, pattern)
        table.update(zip(blocks, repeat(page)))
        if len(table) < before + size:  # Some came twice.
            for block in set(blocks):
                del table[block]
            return False
        slot.pages.add(page)
        slot.open = page
        return True

    def _take(self, slot: Slot, blocks: list[int], depths: Sequence[int]) -> None:
        """Takes in blocks that nobody held."""
        room = self.max_blocks - len(self.table)
        if len(blocks) > room:
            self.refused += len(blocks) - room
            blocks = blocks[:room]
        at, end = 0, len(blocks)
        while at < end:
            page = slot.open
            filled = len(page.hashes) if page is not None else 0
            if page is None or not filled or filled >= (OWN_PAGE if end - at >= OWN_PAGE else SHARED_BLOCKS):
                page, filled = new_page(), 0
                slot.open = page
            size = min(end - at, PAGE_BLOCKS - filled if end - at >= OWN_PAGE else SHARED_BLOCKS - filled)
            part = blocks[at : at + size]
            self._mark(slot, page, page.append(part, depths[at : at + size]))
            self.table.update(zip(part, repeat(page)))
            at += size

    def _mark(self, slot: Slot, page: Page, pattern: int) -> None:
        old = page.pattern_of(slot.bit)
        page.move(slot.bit, old, old | pattern)
        if not old:
            slot.pages.add(page)

    def evict(self, slot: Slot, hashes: Iterable[int]) -> None:
        """As `BlockStore.evict`."""
        blocks = list(hashes)
        pages = list(map(self.table.get, blocks))
        gone: dict[Page, int] = {}
        at, end = 0, len(blocks)
        while at < end:
            page, first = pages[at], at
            at += 1
            while at < end and pages[at] is page:
                at += 1
            if page is not None:
                pattern = 1 << page.place(blocks[first]) if at - first == 1 else page.places(blocks[first:at])
                gone[page] = gone.get(page, 0) | pattern
        for page, pattern in gone.items():
            self._unmark(slot, page, pattern)

    def remove(self, slot: Slot, budget: int) -> int:
        """Takes away what the slot holds, about `budget` blocks of it; returns how many."""
        removed = 0
        while slot.pages and removed < budget:
            page = next(iter(slot.pages))
            pattern = page.pattern_of(slot.bit)
            removed += pattern.bit_count()
            self._unmark(slot, page, pattern)
        return removed

    def _unmark(self, slot: Slot, page: Page, pattern: int) -> None:
        old = page.pattern_of(slot.bit)
        if not old & pattern:
            return
        page.move(slot.bit, old, old & ~pattern)
        if not old & ~pattern:
            slot.pages.discard(page)
        for block in page.unheld():
            del self.table[block]
        self._tidy(page)

    # -- layout

    def _tidy(self, page: Page) -> None:
        """Gives a page up that is full of holes: what is left goes to the shelf."""
        if page.live.bit_count() * 2 >= len(page.hashes):
            return
        if page is self._shelf:
            self._shelf = None
        while page.live:
            shelf = self._shelf
            if shelf is None or not 0 < len(shelf.hashes) < SHARED_BLOCKS:
                shelf = self._shelf = new_page()
            place = (page.live & -page.live).bit_length() - 1
            size = min(run_of_ones(page.live >> place), SHARED_BLOCKS - len(shelf.hashes))
            self._carry(page, place, size, shelf)

    def _carry(self, page: Page, place: int, size: int, target: Page) -> None:
        """Moves blocks that lie side by side to the end of another page."""
        end, first = place + size, len(target.hashes)
        part = page.hashes[place:end]
        target.append(part, page.depths[place:end])
        self.table.update(zip(part, repeat(target)))
        pattern = (1 << size) - 1
        for held, mask in page.holders.items():
            carried = (held >> place & pattern) << first
            if carried:
                for holder in ones(mask):
                    self._mark(self.slots[1 << holder], target, carried)
        for holder in ones(page.cut(pattern << place)):
            self.slots[1 << holder].pages.discard(page)

    def untangle(self, chain: Sequence[int], budget: int) -> int:
        """Lays the scattered blocks of a chain side by side, about `budget` of them; returns how many were moved.

        An answer's blocks are stored one by one, among those of other answers. Each is moved two or three times until
        it lies in a page that is long enough.
        """
        moved = at = 0
        pieces: list[tuple[int, int]] = []
        while at < len(chain) and moved < budget:
            page = self.table.get(chain[at])
            if page is None:
                break
            size = page.agrees(page.place(chain[at]), chain, at)
            if size < LONG_BLOCKS:
                pieces.append((at, size))
            at += size
            if size >= LONG_BLOCKS or at - pieces[0][0] >= PAGE_BLOCKS:
                moved += self._join(chain, pieces)
                pieces = []
        return moved + self._join(chain, pieces)

    def _join(self, chain: Sequence[int], pieces: list[tuple[int, int]]) -> int:
        if len(pieces) < 2:
            return 0
        at, end = pieces[0][0], sum(pieces[-1])
        moved, target = end - at, new_page()
        while at < end:
            if len(target.hashes) >= PAGE_BLOCKS:
                target = new_page()
            page = self.table[chain[at]]
            place = page.place(chain[at])
            size = min(page.agrees(place, chain, at), end - at, PAGE_BLOCKS - len(target.hashes))
            self._carry(page, place, size, target)
            self._tidy(page)
            at += size
        return moved

    # -- questions

    def first(self, slot: Slot, chain: Sequence[int]) -> int:
        """How many of a chain's first blocks the slot holds."""
        at = 0
        while at < len(chain):
            page = self.table.get(chain[at])
            if page is None:
                break
            place = page.place(chain[at])
            size = page.follows(place, chain, at)
            run = run_of_ones(page.pattern_of(slot.bit) >> place)
            if run < size:
                return at + run
            at += size
        return at

    def depth(self, block: int) -> int | None:
        """The tokens up to a block's end, where anybody holds it."""
        page = self.table.get(block)
        return page.depths[page.place(block)] if page is not None else None

    def holders(self, block: int) -> int:
        """Mask of those who hold a block."""
        page = self.table.get(block)
        return page.holders_at(page.place(block)) if page is not None else 0

    def bytes(self) -> int:
        """Estimated size in memory; costs a walk over all pages."""
        pages: set[Page] = set().union(*(slot.pages for slot in self.slots.values()))
        total = sys.getsizeof(self.table) + len(self.table) * 48
        for page in pages:
            total += sys.getsizeof(page) + sys.getsizeof(page.hashes) + sys.getsizeof(page.depths)
            total += sys.getsizeof(page.holders) + 96 * len(page.holders)
        return total + sum(sys.getsizeof(slot.pages) for slot in self.slots.values())


def _nones(pages: list[Page | None], at: int) -> int:
    """How many None there are from `at` on."""
    end = at + 1
    while end < len(pages) and pages[end] is None:
        end += 1
    return end - at
