"""Admission: whether a request may begin now.

Job: bound what is in flight. Rule: a request that is not admitted has cost nothing and is told when to come again.
"""

from __future__ import annotations

from types import TracebackType

from router.errors import Overloaded, ShuttingDown


class Admission:
    """Counts the requests in flight in this process."""

    def __init__(self, max_streams: int) -> None:
        self._max = max_streams
        self._closed = False
        self.in_flight = 0
        self._place = _Place(self)

    def admit(self) -> _Place:
        """A place for one request, for a `with` block; entering it raises `Overloaded` or `ShuttingDown`."""
        return self._place

    def enter(self) -> None:
        """One more. Raises `Overloaded` or `ShuttingDown`."""
        if self._closed:
            raise ShuttingDown("this router is shutting down", retry_after_s=1)
        if self.in_flight >= self._max:
            raise Overloaded(f"{self._max} requests are in flight already", retry_after_s=1)
        self.in_flight += 1

    def close(self) -> None:
        """Admits no more."""
        self._closed = True


class _Place:
    """All requests share it: it has no state of its own."""

    __slots__ = ("_admission",)

    def __init__(self, admission: Admission) -> None:
        self._admission = admission

    def __enter__(self) -> None:
        self._admission.enter()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._admission.in_flight -= 1
