"""What is compiled of `router.policies.cost`."""

from collections.abc import Callable, Mapping
from random import Random

from router.types import Decision, Snapshot

class Arithmetic:
    def __init__(self, options: object, leans: Callable[[Mapping[str, int]], list[float]], random: Random) -> None: ...
    def costs(self, snapshot: Snapshot) -> list[float] | None: ...
    def choose(self, snapshot: Snapshot) -> Decision | None: ...
