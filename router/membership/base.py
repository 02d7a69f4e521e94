"""The seam for membership: a source that tells, whole and anew at each change, which replicas there are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, Protocol

import msgspec

DEPLOYMENT: Final = "engine"
"""The one Serve deployment of each engine's application."""


def application_name(engine: str) -> str:
    """The Serve application of the engine of that name."""
    return f"kvlane-{engine}"


class ReplicaRecord(msgspec.Struct, frozen=True):
    """How to reach one replica. Two records of one replica that differ mean that it must be reached anew."""

    replica: str
    host: str
    port: int
    secret: bytes
    application: str = ""
    """The Serve application it belongs to."""
    actor: Any = None
    """The replica's Ray actor handle where there is one; carriers that go through Ray need it."""
    tls: bool = False
    """Whether its lane port speaks TLS."""

    def __repr__(self) -> str:
        return f"ReplicaRecord({self.replica!r} at {self.host}:{self.port})"  # Never the secret: this gets into logs.

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        return [("replica", self.replica), ("host", self.host), ("port", self.port)]

    def __reduce__(self) -> tuple[type[ReplicaRecord], tuple[Any, ...]]:
        """Trailing defaults are left out: a directory or router of an older version does not know the latest field."""
        values = [getattr(self, name) for name in self.__struct_fields__]
        required = len(values) - len(self.__struct_defaults__)
        while len(values) > required and values[-1] == self.__struct_defaults__[len(values) - 1 - required]:
            values.pop()
        return ReplicaRecord, tuple(values)


OnMembers = Callable[[Mapping[str, ReplicaRecord]], None]
"""Takes all replicas there are now, by name."""


class Membership(Protocol):
    """A source of replicas."""

    async def run(self, on_members: OnMembers) -> None:
        """Reports the replicas at once and after each change, until cancelled. Outages of the source are outlived."""
