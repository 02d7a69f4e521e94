"""Pages: pieces of the index that hold blocks which were stored together, and who holds which of them.

Sans-IO. A prompt's blocks are stored one after the other, so they come to lie side by side, and a lookup then takes one
hash table access per page instead of one per block. That matters because at a million blocks every access misses the
processor's caches: a plain hash table took 0.35 µs per block, 290 µs for a prompt of 200 KB.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from typing import Final

import msgspec

DEAD: Final = 0
"""Stands where a block was that is not in the page any more. The block that happens to have this hash is not lost: at
worst a match ends before it."""


class Page(msgspec.Struct, gc=False, eq=False):
    """Some blocks and who holds which. Patterns are integers: bit i stands for the block at place i.

    Not tracked by the garbage collector, and so neither is the table of a million blocks that points here.
    """

    hashes: array[int]
    """Raw, since integers that lie scattered in memory are slow to compare."""
    depths: array[int]
    """For each block, how many of the prompt's tokens its end takes."""
    holders: dict[int, int]
    """Pattern -> mask of the replicas that hold just these blocks. Replicas that hold the same share an entry, so that
    64 holders of a system prompt cost a lookup as much as one."""
    live: int = 0
    """Pattern of the places that are not dead."""
    chained: int = 0
    """So many of the first ones are known to be consecutive blocks of one chain."""

    def place(self, block: int) -> int:
        """Where a block lies that is in this page."""
        hashes = self.hashes
        return 0 if hashes[0] == block else hashes.index(block)

    def places(self, blocks: Sequence[int]) -> int:
        """The pattern of some blocks that are in this page."""
        mine, theirs = self.hashes, array("Q", blocks)
        for _ in range(2):  # As they lie here, or backwards, as engines evict.
            first = self.place(theirs[0])
            if mine[first : first + len(theirs)] == theirs:
                return ((1 << len(theirs)) - 1) << first
            theirs.reverse()
        pattern = 0
        for block in blocks:
            pattern |= 1 << self.place(block)
        return pattern

    def agrees(self, place: int, blocks: Sequence[int], at: int) -> int:
        """How many of `blocks` from `at` on lie here from `place` on, in the same order; at least one does."""
        hashes = self.hashes
        size = min(len(hashes) - place, len(blocks) - at)
        mine, theirs = hashes[place : place + size], array("Q", blocks[at : at + size])
        if mine == theirs:
            return size
        same = 1
        while size - same > 1:  # Equal up to `same`, and not up to `size`.
            middle = (same + size) // 2
            if mine[same:middle] == theirs[same:middle]:
                same = middle
            else:
                size = middle
        return same

    def follows(self, place: int, chain: Sequence[int], at: int) -> int:
        """As `agrees`, for the blocks of one chain.

        There a hash stands for all blocks before it too: once a page is known to begin with a piece of a chain, two
        pieces that are equal somewhere are equal up to there, and nothing between has to be read.
        """
        hashes = self.hashes
        known = min(self.chained - place, len(chain) - at)
        if known > 0:
            if hashes[place + known - 1] != chain[at + known - 1]:
                return self._parts(place, chain, at, known)
            whole = place + known == len(hashes) or at + known == len(chain)
            if whole or hashes[place + known] != chain[at + known]:
                return known
        size = self.agrees(place, chain, at)
        if place < self.chained or not place:
            self.chained = max(self.chained, place + size)
        return size

    def _parts(self, place: int, chain: Sequence[int], at: int, differs: int) -> int:
        """Up to where two pieces are equal whose first blocks are, and whose `differs`-th ones are not."""
        hashes, same = self.hashes, 1
        while differs - same > 1:
            middle = (same + differs) // 2
            if hashes[place + middle - 1] == chain[at + middle - 1]:
                same = middle
            else:
                differs = middle
        return same

    def append(self, hashes: Sequence[int], depths: Sequence[int]) -> int:
        """Adds new blocks at the end; returns their pattern."""
        pattern = ((1 << len(hashes)) - 1) << len(self.hashes)
        self.hashes.extend(hashes)
        self.depths.extend(depths)
        self.live |= pattern
        return pattern

    def pattern_of(self, bit: int) -> int:
        """What one replica holds."""
        for pattern, mask in self.holders.items():
            if mask & bit:
                return pattern
        return 0

    def holders_at(self, place: int) -> int:
        """Mask of the replicas that hold one block."""
        found = 0
        for pattern, mask in self.holders.items():
            if pattern >> place & 1:
                found |= mask
        return found

    def move(self, bit: int, old: int, new: int) -> None:
        """A replica that held the pattern `old` holds `new` from now on."""
        if old == new:
            return
        holders = self.holders
        if old:
            left = holders[old] ^ bit
            if left:
                holders[old] = left
            else:
                del holders[old]
        if new:
            holders[new] = holders.get(new, 0) | bit

    def cut(self, gone: int) -> int:
        """Takes blocks out for all who hold them; returns the mask of those who hold nothing here any more."""
        before = after = 0
        holders: dict[int, int] = {}
        for pattern, mask in self.holders.items():
            before |= mask
            left = pattern & ~gone
            if left:
                holders[left] = holders.get(left, 0) | mask
                after |= mask
        self.holders = holders
        self._bury(gone & self.live)
        return before & ~after

    def unheld(self) -> list[int]:
        """Takes out the blocks that nobody holds any more, and returns them."""
        alive = 0
        for pattern in self.holders:
            alive |= pattern
        dead = self.live & ~alive
        if not dead:
            return []
        first = (dead & -dead).bit_length() - 1
        size = dead.bit_count()
        if dead >> first == (1 << size) - 1:
            blocks = self.hashes[first : first + size].tolist()
        else:
            blocks = [self.hashes[place] for place in ones(dead)]
        self._bury(dead)
        return blocks

    def _bury(self, dead: int) -> None:
        self.live &= ~dead
        size = self.live.bit_length()
        # Engines evict a prompt's last blocks first: mostly the page just gets shorter.
        del self.hashes[size:], self.depths[size:]
        holes = dead & ((1 << size) - 1)
        for place in ones(holes):
            self.hashes[place] = DEAD
        self.chained = min(self.chained, (holes & -holes).bit_length() - 1 if holes else size)


def new_page() -> Page:
    return Page(array("Q"), array("I"), {})


def ones(pattern: int) -> Iterator[int]:
    """The places of the one bits, from the lowest."""
    while pattern:
        low = pattern & -pattern
        yield low.bit_length() - 1
        pattern ^= low


def run_of_ones(pattern: int) -> int:
    """How many one bits there are from the lowest place on without a zero between."""
    lacking = ~pattern
    return (lacking & -lacking).bit_length() - 1
