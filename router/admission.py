"""Admission: whether a request may begin now.

Job: bound what is in flight. Rule: a request that is not admitted has cost nothing and is told when to come again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from router.errors import Overloaded, ShuttingDown


class Admission:
    """Counts the requests in flight in this process."""

    def __init__(self, max_streams: int) -> None:
        self._max = max_streams
        self._closed = False
        self.in_flight = 0

    @contextmanager
    def admit(self) -> Iterator[None]:
        """Holds a place for one request. Raises `Overloaded` or `ShuttingDown`."""
        if self._closed:
            raise ShuttingDown("this router is shutting down", retry_after_s=1)
        if self.in_flight >= self._max:
            raise Overloaded(f"{self._max} requests are in flight already", retry_after_s=1)
        self.in_flight += 1
        try:
            yield
        finally:
            self.in_flight -= 1

    def close(self) -> None:
        """Admits no more."""
        self._closed = True
