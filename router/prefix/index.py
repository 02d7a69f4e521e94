"""The index: which replica holds how much of a prompt.

Sans-IO, no clock. The rule: it answers exactly what it was told. A replica holds a prompt's first n blocks if it stored
each of them and evicted none since; blocks that requests in flight will bring count too, and are told apart.

Each replica is a bit in masks. A replica that leaves, or whose blocks are all void, only gives up its bit: nothing
matches it any more from that moment on, and its blocks are taken out in slices by `sweep`, after which the bit is free
again. What requests in flight will bring moves to a replica's new bit in slices too. The blocks themselves are behind a
`BlockStore`, of which there are two. `Prefixes` owns the index.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final

from router.prefix.base import BlockStore
from router.prefix.blocks import Blocks
from router.types import Holders

_AT_ONCE: Final = 1024
"""So many blocks of holds move to a cleared replica's new bit at once."""


class _Member:
    """A replica in the index."""

    __slots__ = ("again", "gone", "holds", "place")

    def __init__(self, place: int) -> None:
        self.place = place
        """Of its bit."""
        self.gone = False
        self.holds: set[Hold] = set()
        self.again: dict[int, int] = {}
        """Blocks that several holds have, and how many more than one."""


class Hold:
    """Blocks that a request in flight will bring to a replica."""

    __slots__ = ("blocks", "member")

    def __init__(self) -> None:
        self.member: _Member | None = None
        self.blocks: Sequence[int] = ()


class PrefixIndex:
    """The longest held prefix per replica. Blocks are 64-bit hashes; each stands for all blocks before it too."""

    def __init__(self, max_blocks: int = 2_000_000, store: Callable[[int], BlockStore] = Blocks) -> None:
        self._blocks = store(max_blocks)
        self._members: dict[str, _Member] = {}
        self._places = 0
        """So many have been in use."""
        self._free: list[int] = []
        self._leaving: deque[int] = deque()
        """Places that are free once their blocks are taken out."""
        self._void: deque[tuple[int, list[Sequence[int]]]] = deque()
        """Places that left with the blocks that do not come there any more; never with none."""
        self._moving: deque[Hold] = deque()
        """Holds of replicas that were cleared, whose blocks are still to be entered under their new bits."""

    def __len__(self) -> int:
        """Blocks that are stored anywhere."""
        return len(self._blocks)

    @property
    def max_blocks(self) -> int:
        return self._blocks.max_blocks

    @property
    def refused(self) -> int:
        """Blocks that were not taken in because the index was full, since the start."""
        return self._blocks.refused

    @property
    def coming(self) -> int:
        """Blocks that requests in flight will bring."""
        return self._blocks.coming

    # -- replicas

    def join(self, replica: str) -> None:
        """A replica that holds nothing yet; one that is there already stays as it is."""
        if replica not in self._members:
            self._members[replica] = _Member(self._new_place(replica))

    def leave(self, replica: str) -> None:
        """Nothing matches the replica any more; its blocks go with the next sweeps."""
        member = self._members.pop(replica, None)
        if member is not None:
            member.gone = True
            self._retire(member.place)
            self._forget(member)

    def clear(self, replica: str) -> None:
        """The replica stores nothing any more. Holds stay; where they have many blocks, they match again only after the
        next sweeps. Raises `KeyError` if it is not there."""
        member = self._members[replica]
        if self._blocks.holds(member.place):
            self._retire(member.place)
            self._moving.extend(member.holds)
            self._forget(member)
            member.place = self._new_place(replica)
            self._move(_AT_ONCE)

    def _forget(self, member: _Member) -> None:
        """What requests in flight will bring does not match any more."""
        if blocks := [hold.blocks for hold in member.holds if hold.blocks]:
            self._void.append((member.place, blocks))
        member.holds.clear()
        member.again.clear()

    def _move(self, budget: int) -> int:
        """Enters holds of cleared replicas anew, of about `budget` blocks; returns what is left of that."""
        while budget > 0 and self._moving:
            hold = self._moving.popleft()
            if hold.member is not None and not hold.member.gone:
                self._enter(hold, hold.member)
                budget -= len(hold.blocks) + 1
        return budget

    def _new_place(self, replica: str) -> int:
        if self._free:
            place = self._free.pop()
        else:
            place = self._places
            self._places += 1
        self._blocks.open(place, replica)
        return place

    def _retire(self, place: int) -> None:
        self._blocks.retire(place)
        self._leaving.append(place)

    def sweep(self, budget: int = 1024) -> bool:
        """Work that is put off, on about `budget` blocks: takes out those of replicas that left, and tidies the others'
        layout. Returns whether there is more to do."""
        budget = self._move(budget)
        while budget > 0 and self._void:
            place, left = self._void[0]
            blocks = left.pop()
            part = blocks[-budget:]
            if len(part) < len(blocks):
                left.append(blocks[:-budget])
            self._blocks.withdraw(place, part, {})
            budget -= len(part)
            if not left:
                self._void.popleft()
        while budget > 0 and self._leaving and not self._void:  # A bit is free once nothing bears it.
            place = self._leaving[0]
            budget -= self._blocks.remove(place, budget) + 1
            if not self._blocks.holds(place):
                self._leaving.popleft()
                self._free.append(place)
        if budget > 0:
            self._blocks.tidy(budget)
        return bool(self._leaving or self._void or self._moving or self._blocks.untidy)

    # -- what replicas store

    def store(self, replica: str, hashes: Sequence[int], depths: Sequence[int]) -> None:
        """The replica holds these blocks now; `depths` are the tokens up to the end of each.

        Blocks of one prompt are best given in their order. Where the index is full, blocks that nobody held so far are
        refused, the last ones first, and counted: what is there stays until its replicas evict it, since the blocks
        that stay longest are the beginnings that many prompts share. Raises `KeyError` if the replica is not there.
        """
        self._blocks.store(self._members[replica].place, hashes, depths)

    def evict(self, replica: str, hashes: Iterable[int]) -> None:
        """The replica holds these blocks no more; those that it did not hold are passed over. Raises `KeyError` if the
        replica is not there."""
        self._blocks.evict(self._members[replica].place, hashes)

    # -- what requests in flight will bring

    def hold(self, replica: str, blocks: Sequence[int], stored: int | None = None, hold: Hold | None = None) -> Hold:
        """Until the hold is released, the replica matches these blocks as well, as ones that it will have soon.

        Those from the prompt's beginning that it has stored already are no part of the hold; `stored` tells how many
        they are where a look-up has just said so. A replica that is not there gets no hold, and a later one of the same
        name is not concerned. The caller may give a new `hold` of its own kind, which is returned.
        """
        if hold is None:
            hold = Hold()
        member = self._members.get(replica)
        if member is not None:
            if stored is None:
                stored = self._blocks.first(member.place, blocks)
            hold.member, hold.blocks = member, blocks[stored:] if stored else blocks
            self._enter(hold, member)
        return hold

    def _enter(self, hold: Hold, member: _Member) -> None:
        self._blocks.enter(member.place, hold.blocks, member.again)
        member.holds.add(hold)

    def release(self, hold: Hold) -> None:
        """Ends a hold; one that has ended stays so."""
        member, hold.member = hold.member, None
        if member is not None and hold in member.holds:
            member.holds.remove(hold)
            self._blocks.withdraw(member.place, hold.blocks, member.again)

    # -- lookups

    def match(self, chain: Sequence[int], tokens_per_block: float = 0.0) -> Holders:
        """Who holds how much of a prompt, without those that hold nothing.

        `tokens_per_block` estimates the tokens of blocks whose depth nobody has reported.
        """
        return self._blocks.match(chain, tokens_per_block)

    # -- figures

    def blocks(self, replica: str) -> list[int]:
        """What the replica stores. Raises `KeyError` if it is not there."""
        return [block for run in self.runs(replica) for block in run]

    def runs(self, replica: str) -> Iterator[list[int]]:
        """The same in pieces, each block once. Blocks that come or go until they are read may be among them or not;
        the others are, and those of other replicas never. Raises `KeyError` if it is not there."""
        member = self._members[replica]
        return self._read(member, member.place, self._blocks.runs(member.place))

    def _read(self, member: _Member, place: int, runs: Iterator[list[int]]) -> Iterator[list[int]]:
        while not member.gone and member.place == place:  # Else the bit may be another replica's by now.
            run = next(runs, None)
            if run is None:
                return
            yield run

    def held(self, replica: str) -> int:
        """How many blocks the replica stores. Raises `KeyError` if it is not there."""
        return self._blocks.held(self._members[replica].place)

    def bytes(self) -> int:
        """Estimated size in memory; may cost a walk over all of it."""
        return self._blocks.bytes()

    def roughly_bytes(self) -> int:
        """The same at once, less exactly."""
        return self._blocks.roughly_bytes()
