"""The log of what is refused before it is a request: wrong keys and failed handshakes, however many come.

Rule: a line names who and why, never what was shown, and a flood is told by its number.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Final

from router.ingress.h2_guard import Bucket

log = logging.getLogger(__name__)

BURST: Final = 20
PER_S: Final = 1.0


class RefusalLog:
    """Lines at a bounded rate."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._bucket = Bucket(BURST, PER_S, clock)
        self._untold = 0

    def tell(self, text: str, *arguments: object) -> None:
        """One line, where there is room for it; the next one says how many were left out."""
        if not self._bucket.take():
            self._untold += 1
            return
        if self._untold:
            text, arguments = f"{text} (%d more were not logged)", (*arguments, self._untold)
            self._untold = 0
        log.warning(text, *arguments)
