"""What the garbage collector is told.

Rule: requests leave no cycles (a test holds them to that), so there is next to nothing to collect, and what lives on
is not looked at again and again: a collection of everything holds all streams up for as long as it takes.
"""

from __future__ import annotations

import gc
from typing import Final

YOUNG: Final = 20_000
"""Objects made and not freed until the youngest are looked at. Python's 700 are made with every burst of requests, and
all of them still live then."""
MIDDLE: Final = 10
OLD: Final = 5
"""How many collections of a generation until the next older one is looked at too."""


def settle() -> None:
    """Call it once start-up is over: what there is now stays, and is left alone."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG, MIDDLE, OLD)
