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
    """All KV blocks of one engine.

    Pools that are given one `shared` dict are one cache: a block that any of them knows is known to all and kept once.
    Who uses another pool's block has a copy of it in an anonymous one.
    """

    def __init__(self, blocks: int, shared: dict[int, BlockPool] | None = None) -> None:
        self.blocks = blocks
        self._shared = shared
        """Which pool holds a block."""
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
        if self._shared is not None:
            return block in self._shared
        return block in self._references or block in self._evictable

    def evictable(self) -> tuple[int, ...]:
        """Hashes of the free blocks in the order in which they will be evicted."""
        return tuple(self._evictable)

    def match(self, hashes: Sequence[int], limit: int) -> int:
        """How many of the first `limit` hashes are known without a gap."""
        references, evictable = self._references, self._evictable
        if self._shared is not None:
            references, evictable = self._shared, OrderedDict()  # type: ignore[assignment]
        hits = 0
        for block in hashes[:limit]:
            if block not in references and block not in evictable:
                break
            hits += 1
        return hits

    def own(self, hashes: Sequence[int]) -> list[int]:
        """Those among known blocks that are this pool's own."""
        if self._shared is None:
            return list(hashes)
        return [block for block in hashes if self._shared[block] is self]

    def copy(self, hashes: Sequence[int]) -> None:
        """Takes anonymous blocks for those of the known blocks that are other pools', to whom it is a use of them."""
        assert self._shared is not None
        others = [(block, self._shared[block]) for block in hashes if self._shared[block] is not self]
        for block, owner in others:
            if block in owner._evictable:
                owner._evictable.move_to_end(block)
        if not self.take(len(others)):
            raise RuntimeError("no room for copies: ask `fits` first")

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
        evicted = tuple([self._evictable.popitem(last=False)[0] for _ in range(missing)])
        if self._shared is not None:
            for block in evicted:
                del self._shared[block]
        self._events.append(Evicted(evicted))
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
                if self._shared is not None:
                    self._shared[block] = self
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

    def forget(self) -> None:
        """Empties the cache; blocks in use stay. There is no event of it."""
        if self._shared is not None:
            for block in self._evictable:
                del self._shared[block]
        self._blank += len(self._evictable)
        self._evictable.clear()

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
