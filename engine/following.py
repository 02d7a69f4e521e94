"""Whether requests can be followed: a tally of the last ones, and a log that a stream of failures does not flood.

Rule: requests that nobody can follow must not leave the cache's mode exact, since nothing is reported of them. Requests
that came without a chain are none of them.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from typing import Final

RECENT: Final = 100
LEAST: Final = 5
"""Failures among the recent requests that may be chance."""
SHARE: Final = 0.05
LOG_EVERY_S: Final = 60.0

_log = logging.getLogger(__name__)


class Following:
    """The last requests with a chain: which of them could be followed."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.failures = 0
        """Since the start."""
        self._clock = clock
        self._recent: deque[bool] = deque(maxlen=RECENT)
        self._failed = 0
        self._cause = ""
        self._logged: float | None = None
        self._unlogged = 0

    @property
    def cause(self) -> str:
        """Why what is reported cannot be exact; empty where it can.

        Begins with five failures that are more than 5% of the last 100 requests, and ends below half of that.
        """
        return self._cause

    def followed(self) -> None:
        """A request was followed."""
        self._add(False)
        if self._cause and self._failed <= SHARE / 2 * len(self._recent):
            self._cause = ""

    def failed(self, request_id: str, why: str, error: BaseException | None = None) -> None:
        """A request could not be followed. Logs at most once a minute, with the traceback of `error`."""
        self.failures += 1
        self._add(True)
        if not self._cause and self._failed >= LEAST and self._failed > SHARE * len(self._recent):
            # No figures: a cause that changes makes every router void what it knows.
            self._cause = f"more than {SHARE:.0%} of the last requests cannot be followed; one of them: {why}"
        self.note(request_id, why, error)

    def note(self, request_id: str, why: str, error: BaseException | None = None) -> None:
        """Logs alone, at most once a minute."""
        now = self._clock()
        if self._logged is not None and now - self._logged < LOG_EVERY_S:
            self._unlogged += 1
            return
        more = f" ({self._unlogged} more since the last such line)" if self._unlogged else ""
        self._logged, self._unlogged = now, 0
        _log.warning("request %s is not followed: %s%s", request_id, why, more, exc_info=error)

    def _add(self, failed: bool) -> None:
        if len(self._recent) == RECENT:
            self._failed -= self._recent[0]
        self._recent.append(failed)
        self._failed += failed
