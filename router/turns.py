"""Long work in slices: a generator does it and yields where other tasks may run.

Rule: a slice takes a few milliseconds at most, since every stream's token waits for it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Generator
from typing import TypeVar

T = TypeVar("T")


async def in_turns(slices: Generator[None, None, T]) -> T:
    """What the generator returns. Raises what it raises. The caller's own work is a turn of its own."""
    while True:
        try:
            next(slices)
        except StopIteration as end:
            result: T = end.value
            break
        await asyncio.sleep(0)
    await asyncio.sleep(0)
    return result
