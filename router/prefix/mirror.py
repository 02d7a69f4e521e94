"""The mirror: what a replica that sends no usable reports may still have in its KV cache.

Sans-IO, no clock. It remembers the blocks of the prompts that were sent there, as many as fit, and forgets those
that were used least recently; of one prompt the last ones first, as engines evict. No call does more work than it
was given blocks, and some: where much has to go at once, `trim` is to be called again. `Prefixes` owns one per such
replica.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Final

_MORE: Final = 64
"""Blocks that go with a prompt, beside as many as it brings."""


class LruMirror:
    """Least recently used blocks of one replica."""

    def __init__(self, capacity: int) -> None:
        """`capacity` in blocks."""
        self.capacity = capacity
        self._blocks: OrderedDict[int, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._blocks)

    def __contains__(self, block: object) -> bool:
        return block in self._blocks

    def sent(self, blocks: Sequence[int]) -> tuple[Sequence[int], list[int]]:
        """A prompt went there. Returns the blocks of it that are there now, and the blocks that had to go for them."""
        blocks = blocks[: self.capacity]
        known = self._blocks
        for block in reversed(blocks):
            known[block] = None
            known.move_to_end(block)
        return blocks, self.trim(len(blocks) + _MORE)

    def known(self, blocks: Sequence[int]) -> list[int]:
        """These were there before all others, so they are the first to go. Returns those for which there is no room."""
        there = self._blocks
        new = [block for block in blocks if block not in there]
        room = max(self.capacity - len(there), 0)
        for block in new[:room]:
            there[block] = None
            there.move_to_end(block, last=False)
        return new[room:]

    @property
    def surplus(self) -> int:
        """How many blocks have to go."""
        return max(len(self._blocks) - self.capacity, 0)

    def trim(self, budget: int) -> list[int]:
        """Returns blocks that have to go, at most so many."""
        return [self._blocks.popitem(last=False)[0] for _ in range(min(self.surplus, budget))]
