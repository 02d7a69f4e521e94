"""What routers told a replica that they hold: requests that wait there because all replicas are full.

They are load that the autoscaler must know of, and a replica's report is the one way to it. Rule: what a router has not
repeated lately is forgotten.
"""

from __future__ import annotations

from typing import Final

from engine.autoscaling import HELD

FORGET_S: Final = 3.0
"""Routers repeat it each second."""


class HeldInRouters:
    """Of each router the last number it told; times in seconds of any one clock."""

    def __init__(self) -> None:
        self._told: dict[str, tuple[int, float]] = {}

    def tell(self, router: str, held: int, now: float) -> None:
        """The router of that name holds so many now."""
        if router:
            self._told[router] = (held, now)

    def stats(self, now: float) -> dict[str, float]:
        """The numbers that still count, as statistics for `engine.autoscaling`."""
        self._told = {router: told for router, told in self._told.items() if now - told[1] <= FORGET_S}
        return {HELD + router: float(held) for router, (held, _) in self._told.items()}
