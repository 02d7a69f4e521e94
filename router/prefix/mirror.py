"""The mirror: what a replica that sends no usable reports may still have in its KV cache.

Sans-IO, no clock. It remembers the blocks of the prompts that were sent there, as many as fit, and forgets those
that were used least recently; of one prompt the last ones first, as engines evict. `Prefixes` owns one per such
replica.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence


class LruMirror:
    """Least recently used blocks of one replica."""

    def __init__(self, capacity: int, blocks: Iterable[int] = ()) -> None:
        """`capacity` in blocks; `blocks` are there from the start, as the least recently used ones."""
        self.capacity = capacity
        self._blocks: OrderedDict[int, None] = OrderedDict.fromkeys(blocks)
        self._trim()

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
        return blocks, self._trim()

    def resize(self, capacity: int) -> list[int]:
        """Returns the blocks that have to go."""
        self.capacity = capacity
        return self._trim()

    def _trim(self) -> list[int]:
        known = self._blocks
        return [known.popitem(last=False)[0] for _ in range(len(known) - self.capacity)]
