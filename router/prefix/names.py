"""Names: which replicas the bits of a mask stand for.

Sans-IO. A store of blocks owns one.
"""

from __future__ import annotations

from itertools import compress
from typing import Final

from router.prefix.base import Group
from router.types import Held, Holders

_SPELLED: Final = 1024
"""Masks whose names are remembered; of 64 replicas each takes at most 0.6 KB. Replicas that serve the same prompts come
again and again."""
_BITS: Final = bytes(48) + b"\0\1" + bytes(206)
"""Translates the digits 0 and 1 to their values."""


class Names:
    """The replicas by their places."""

    __slots__ = ("_names", "live", "roster", "spelled")

    def __init__(self) -> None:
        self._names: list[str] = []
        """By place; those of places that are not live are void."""
        self.live = 0
        """Mask of the places that match."""
        self.roster: tuple[str, ...] = ()
        """Names of all live places."""
        self.spelled: dict[int, tuple[str, ...]] = {}
        """The names of masks that were asked for, as long as no place changes hands."""

    def open(self, place: int, name: str) -> None:
        """The place is live from now on."""
        self._names.extend([""] * (place + 1 - len(self._names)))
        self._names[place] = name
        self.live |= 1 << place
        self._changed_hands()

    def retire(self, place: int) -> None:
        """Nothing matches the place any more."""
        self.live &= ~(1 << place)
        self._changed_hands()

    def _changed_hands(self) -> None:
        self.spelled.clear()
        self.roster = self.of(self.live)

    def of(self, mask: int) -> tuple[str, ...]:
        """In the order of their places."""
        names = self.spelled.get(mask)
        if names is None:
            if len(self.spelled) >= _SPELLED:
                self.spelled.clear()
            digits = bin(mask)[:1:-1].encode()
            names = self.spelled[mask] = tuple(compress(self._names, digits.translate(_BITS)))
        return names

    def holders(self, groups: list[Group]) -> Holders:
        """Groups by name. What more than half of all hold is told once, and the others are told apart."""
        rest = self.live
        half = rest.bit_count() >> 1
        most: Held | None = None
        named: list[tuple[Held | None, tuple[str, ...]]] = []
        for mask, held in groups:
            rest ^= mask
            if mask.bit_count() > half:
                most = held
            else:
                named.append((held, self.of(mask)))
        if most is None:
            return Holders(named)
        if rest:
            named.append((None, self.of(rest)))
        return Holders(named, most, self.roster)
