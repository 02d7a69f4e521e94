"""What the garbage collector and the C library's allocator are told.

Rule: requests leave no cycles (a test holds them to that), so there is next to nothing to collect, and what lives on
is not looked at again and again: a collection of everything holds all streams up for as long as it takes.
"""

from __future__ import annotations

import ctypes
import gc
from typing import Final

YOUNG: Final = 20_000
"""Objects made and not freed until the youngest are looked at. Python's 700 are made with every burst of requests, and
all of them still live then."""
MIDDLE: Final = 10
OLD: Final = 5
"""How many collections of a generation until the next older one is looked at too."""

LARGE_BYTES: Final = 8 << 20
"""Of what is given back at once; less would cost large bodies time for memory that they need again."""
_M_MMAP_THRESHOLD: Final = -3  # Of mallopt(3).


def settle() -> None:
    """Call it once start-up is over: what there is now stays, and is left alone."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG, MIDDLE, OLD)
    _give_back(LARGE_BYTES)


def _give_back(size: int) -> None:
    """Memory of so many bytes or more is the system's again once it is freed.

    glibc by itself keeps what was freed up to the largest size that was ever freed, and where such blocks come and go
    among others it takes new ones beside: the router grew by 20 MB now and then. Other C libraries lack the setting.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, size)
