"""Admission: whether a request may begin now.

Job: bound what is in flight. Rule: a request that is not admitted has cost nothing and is told when to come again.
"""

from __future__ import annotations

from types import TracebackType

from router.errors import Overloaded, ShuttingDown


class Admission:
    """Counts the requests in flight in this process; a request is in flight within its `with` block."""

    def __init__(self, max_streams: int) -> None:
        self._max = max_streams
        self._closed = False
        self.in_flight = 0

    def __enter__(self) -> None:
        """One more. Raises `Overloaded` or `ShuttingDown`."""
        if self._closed:
            raise ShuttingDown("this router is shutting down", retry_after_s=1)
        if self.in_flight >= self._max:
            raise Overloaded(f"{self._max} requests are in flight already", retry_after_s=1)
        self.in_flight += 1

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.in_flight -= 1

    def close(self) -> None:
        """Admits no more."""
        self._closed = True
