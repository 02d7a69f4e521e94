"""The seam for policies.

A policy is a class registered under the entry-point group ``kvlane.policies``::

    class Mine:
        class Options(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
            stickiness: float = 0.5

        def __init__(self, options: Options, random: random.Random) -> None: ...
        def choose(self, request: Request, snapshot: Snapshot) -> Decision: ...

`Options` names what `[policy.options]` in the configuration may hold. The random source is the only source of chance,
so that a seeded policy is reproducible. One instance serves one router process, from one thread.
"""

from __future__ import annotations

import random
from typing import Any, Protocol

import msgspec

from router.types import Decision, Request, Snapshot


class NoOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """For policies without options."""


class Policy(Protocol):
    """Picks the replica that a request goes to."""

    def choose(self, request: Request, snapshot: Snapshot) -> Decision:
        """The replica for `request` among `snapshot.replicas`, which are never empty.

        Must not block, await or do I/O: it runs on the event loop, in well under a millisecond. Ties are broken at
        random, never by position.
        """


class PolicyClass(Protocol):
    """What an entry point of the group ``kvlane.policies`` names."""

    @property
    def Options(self) -> type[msgspec.Struct]:
        """What ``[policy.options]`` may hold."""

    def __call__(self, options: Any, random: random.Random) -> Policy: ...
