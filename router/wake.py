"""The seam to whoever starts replicas: it is told how many requests wait for one."""

from __future__ import annotations

from typing import Protocol


class Waker(Protocol):
    """Has replicas started for models that have none, and more for models that have too few."""

    def wanted(self, model: str, held: int) -> None:
        """`held` requests of the model wait for a replica now; 0 when none does any more. Never blocks, never raises.

        Called when the number changes, at most once in a turn of the event loop for each model; also of models that it
        has nothing to do with. Requests for an adapter count as its base model's.
        """

    async def close(self) -> None:
        """Nobody waits any more."""


class NoWaker:
    """Nobody needs to be told."""

    def wanted(self, model: str, held: int) -> None: ...

    async def close(self) -> None: ...
