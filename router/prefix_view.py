"""A prompt as chained hashes, and who holds how much of it.

Imports nothing of ours; `router.types` has all of it, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import msgspec


class Chain(msgspec.Struct, frozen=True, gc=False):
    """A prompt as chained hashes of its prefix blocks; each hash stands for its block and all before it."""

    block_bytes: int
    """Size of a prefix block in canonical prompt bytes."""
    seed: int
    """Hash of the namespace: model, LoRA adapter, cache salt, tools. 64 bits, as all hashes here."""
    blocks: tuple[int, ...]
    """Of the full blocks; the prompt's last `prompt_bytes % block_bytes` bytes are in none."""
    prompt_bytes: int


class Held(msgspec.Struct, frozen=True, gc=False):
    """What one replica holds of a prompt."""

    blocks: int
    """Prefix blocks from the prompt's beginning, without a gap."""
    tokens: int
    """KV-cached tokens that these blocks stand for."""
    soon: int = 0
    """How many of `blocks` are not computed yet, but will be by a request that was sent there before."""


class Holders(Mapping[str, Held]):
    """Who holds how much of a prompt: a mapping from replicas to what they hold, kept by groups.

    Replicas mostly hold one of a few things: nothing, a system prompt, or a conversation. Who goes through the groups
    takes a few steps where one who asks for each replica takes as many as there are.
    """

    __slots__ = ("_all", "groups", "most", "names")

    def __init__(
        self,
        groups: Sequence[tuple[Held | None, tuple[str, ...]]],
        most: Held | None = None,
        names: tuple[str, ...] = (),
    ) -> None:
        """`most` is what all hold that are in no group, and `names` who may be meant; no replica is in two groups. A
        group of those who hold nothing sets them apart from the most."""
        self.groups = groups
        self.most = most
        self.names = names
        self._all: dict[str, Held] | None = None

    def _found(self) -> dict[str, Held]:
        found = self._all
        if found is None:
            found = dict.fromkeys(self.names, self.most) if self.most is not None else {}
            for held, names in self.groups:
                for name in names:
                    if held is not None:
                        found[name] = held
                    else:
                        found.pop(name, None)
            self._all = found
        return found

    def __getitem__(self, replica: str) -> Held:
        return self._found()[replica]

    def __contains__(self, replica: object) -> bool:
        return replica in self._found()

    # What `Mapping` makes of `__getitem__` raises an error for each replica that holds nothing.
    def get(self, replica: str, default: Any = None) -> Any:
        return self._found().get(replica, default)

    def __iter__(self) -> Iterator[str]:
        return iter(self._found())

    def __len__(self) -> int:
        return len(self._found())

    def __repr__(self) -> str:
        return f"Holders({self._found()!r})"

    def at(self, replica: str) -> Held | None:
        """What one replica holds, without going through all."""
        for held, names in self.groups:
            if replica in names:
                return held
        return self.most if self.most is not None and replica in self.names else None

    @classmethod
    def of(cls, held: Mapping[str, Held]) -> Holders:
        """From any mapping."""
        return held if isinstance(held, cls) else cls([(one, (name,)) for name, one in held.items()])


NO_HOLDERS: Final = Holders(())


class PrefixView(msgspec.Struct, frozen=True):
    """A prompt, and who holds how much of it."""

    chain: Chain | None = None
    """None for requests without a prompt that could be hashed."""
    tokens: int = 0
    """Estimated length of the prompt in tokens."""
    held: Mapping[str, Held] = NO_HOLDERS
    """Replicas that hold at least one of its blocks; `Holders` where the index says it."""

    def at(self, replica: str) -> Held | None:
        """What one replica holds."""
        held = self.held
        return held.at(replica) if type(held) is Holders else held.get(replica)


NO_PREFIX: Final = PrefixView()


class Charge(msgspec.Struct, frozen=True, gc=False):
    """What a request is expected to cost its replica."""

    tokens: int = 0
    """Uncached prompt tokens."""
    pairs: float = 0.0
    """Their attention pairs."""
    chain: Chain | None = None
    matched: int = 0
    """Prefix blocks that the router believes to be held there."""


NO_CHARGE: Final = Charge()
