"""The prefix stage's seam: what stands behind the index.

The rule: whichever store the index is given, it answers the same. Replicas are *places* here, counted from 0, each a
bit in masks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

from router.types import Held, Holders

Group = tuple[int, Held]
"""Mask of places, and what they hold."""


class BlockStore(Protocol):
    """The blocks that replicas store, and those that requests in flight will bring. `PrefixIndex` owns one."""

    @property
    def max_blocks(self) -> int: ...
    @property
    def refused(self) -> int:
        """Blocks that found no room, since the start."""
        ...

    @property
    def coming(self) -> int:
        """Blocks that are entered as coming, at any place."""
        ...

    @property
    def untidy(self) -> bool:
        """Whether `tidy` has work."""
        ...

    def __len__(self) -> int:
        """Blocks that are stored at any place, live or not."""
        ...

    def open(self, place: int, replica: str) -> None:
        """The place is the replica's from now on. It holds nothing, and nothing comes."""
        ...

    def retire(self, place: int) -> None:
        """Nothing matches the place any more; its blocks are to be taken out by `remove` before it is opened again."""
        ...

    def remove(self, place: int, budget: int) -> int:
        """Takes out what a retired place holds, with work as for about `budget` blocks; returns how much was done."""
        ...

    def tidy(self, budget: int) -> int:
        """Work on the layout as for about `budget` blocks; returns what is left of that."""
        ...

    def store(self, place: int, hashes: Sequence[int], depths: Sequence[int]) -> None:
        """As `PrefixIndex.store`."""
        ...

    def evict(self, place: int, hashes: Iterable[int]) -> None:
        """As `PrefixIndex.evict`."""
        ...

    def held(self, place: int) -> int:
        """How many blocks the place stores."""
        ...

    def holds(self, place: int) -> bool:
        """Whether that is any."""
        ...

    def runs(self, place: int) -> Iterator[list[int]]:
        """As `PrefixIndex.runs`."""
        ...

    def first(self, place: int, chain: Sequence[int]) -> int:
        """How many of a chain's first blocks the place stores."""
        ...

    def enter(self, place: int, blocks: Sequence[int], again: dict[int, int]) -> None:
        """Blocks come to the place. `again` counts those that were entered there already: how often more than once."""
        ...

    def withdraw(self, place: int, blocks: Sequence[int], again: dict[int, int]) -> None:
        """Takes back what was entered."""
        ...

    def match(self, chain: Sequence[int], tokens_per_block: float) -> Holders:
        """As `PrefixIndex.match`. No two groups hold the same; those that hold less come first."""
        ...

    def bytes(self) -> int:
        """Estimated size in memory; may cost a walk over all of it."""
        ...

    def roughly_bytes(self) -> int:
        """The same at once, less exactly."""
        ...
