"""Lanes that a replica refused: counted by cause, logged without flooding the log.

Rule: whoever knocks decides how often this is called, so a cause is logged at most once a second, with how many there
were. `Refusals` is one replica's own.
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, Final

log = logging.getLogger(__name__)

LOG_GAP_S: Final = 1.0


class Refusals:
    """By code: ``secret``, ``version``, ``protocol`` and ``tls``; ``silent``, no hello in time; ``busy``."""

    def __init__(
        self,
        replica: str,
        count: Callable[[str], None] = lambda code: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`count` takes each refusal's code, for metrics."""
        self.counts: Counter[str] = Counter()
        self._replica = replica
        self._count = count
        self._clock = clock
        self._logged: dict[str, tuple[float, int]] = {}
        """When each code was last logged, and how many there had been then."""

    def add(self, code: str, peer: Any, message: str) -> None:
        """A lane was refused; `peer` is the transport's ``peername``."""
        self.counts[code] += 1
        self._count(code)
        now = self._clock()
        at, before = self._logged.get(code, (-math.inf, 0))
        if now - at < LOG_GAP_S:
            return
        self._logged[code] = (now, self.counts[code])
        since = self.counts[code] - before
        others = f" (and {since - 1} more since the last such line)" if since > 1 else ""
        log.warning("replica %s: lane from %s refused: %s%s", self._replica, _address(peer), message, others)


def _address(peer: Any) -> str:
    return str(peer[0]) if isinstance(peer, tuple) and peer else str(peer or "a router")
