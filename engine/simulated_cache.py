"""The KV blocks of the simulated engine: counted references, prefix reuse by block hash, LRU eviction.

A block's number means nothing to a simulation, so blocks are only counted; those that hold a known prefix are named by
their hash. A block is blank (free, holds nothing), evictable (free, holds a prefix), named (in use under its hash) or
anonymous (in use, not full yet or the second copy of a named one). State is owned by `SimulatedCore`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import TypeAlias

import msgspec


class Stored(msgspec.Struct, frozen=True):
    """A run of blocks that became known, each behind the one before."""

    parent: int | None
    """Hash of the block before the run; None at the prompt's start."""
    hashes: tuple[int, ...]
    request: int | str
    """The request that computed them."""
    first_block: int
    """Position of the run's first block in that request."""


class Evicted(msgspec.Struct, frozen=True):
    """Blocks that are gone."""

    hashes: tuple[int, ...]


CacheEvent: TypeAlias = Stored | Evicted


class BlockPool:
    """All KV blocks of one engine."""

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks
        self._blank = blocks
        self._evictable: OrderedDict[int, None] = OrderedDict()  # Least recently used first.
        self._references: dict[int, int] = {}
        self._events: list[CacheEvent] = []

    @property
    def used(self) -> int:
        """Blocks that some request refers to."""
        return self.blocks - self._blank - len(self._evictable)

    def holds(self, block: int) -> bool:
        """Whether a block of this hash is known."""
        return block in self._references or block in self._evictable

    def evictable(self) -> tuple[int, ...]:
        """Hashes of the free blocks in the order in which they will be evicted."""
        return tuple(self._evictable)

    def match(self, hashes: Sequence[int], limit: int) -> int:
        """How many of the first `limit` hashes are known without a gap."""
        references, evictable = self._references, self._evictable
        hits = 0
        for block in hashes[:limit]:
            if block not in references and block not in evictable:
                break
            hits += 1
        return hits

    def fits(self, count: int, hits: Sequence[int]) -> bool:
        """Whether `count` blocks can be taken beside the known blocks `hits`."""
        free = self._blank + len(self._evictable)
        # Looking at each hit is needed only where it could matter.
        return free >= count + len(hits) or free - sum(block in self._evictable for block in hits) >= count

    def refer(self, hashes: Sequence[int]) -> None:
        """One more request uses these known blocks."""
        for block in hashes:
            if block in self._references:
                self._references[block] += 1
            else:
                del self._evictable[block]
                self._references[block] = 1

    def take(self, count: int) -> bool:
        """Takes anonymous blocks, evicting what was used longest ago. Where too few are free: False, and takes none."""
        if self._blank >= count:
            self._blank -= count
            return True
        missing = count - self._blank
        if len(self._evictable) < missing:
            return False
        self._blank = 0
        self._events.append(Evicted(tuple(self._evictable.popitem(last=False)[0] for _ in range(missing))))
        return True

    def name(self, hashes: Sequence[int], start: int, stop: int, request: int | str) -> list[int]:
        """Names anonymous blocks `start` to `stop` of a request whose block hashes are given.

        Returns the hashes named. Blocks whose hash is known already stay anonymous second copies.
        """
        named: list[int] = []
        run = start
        for position in range(start, stop):
            block = hashes[position]
            if self.holds(block):
                self._report(hashes, run, position, request)
                run = position + 1
            else:
                self._references[block] = 1
                named.append(block)
        self._report(hashes, run, stop, request)
        return named

    def release(self, hashes: Sequence[int], anonymous: int) -> None:
        """Gives back one request's blocks. The last ones are evicted first: prefixes are shared more than ends."""
        self._blank += anonymous
        references = self._references
        for block in reversed(hashes):
            if references[block] > 1:
                references[block] -= 1
            else:
                del references[block]
                self._evictable[block] = None

    def take_events(self) -> list[CacheEvent]:
        """What changed since the last call, in order."""
        events = self._events
        if events:
            self._events = []
            return events
        return []

    def _report(self, hashes: Sequence[int], start: int, stop: int, request: int | str) -> None:
        if stop > start:
            parent = hashes[start - 1] if start else None
            self._events.append(Stored(parent, tuple(hashes[start:stop]), request, start))
