"""A policy that keeps each session on one replica, whose KV cache then holds the conversation so far.

The choice depends on nothing but the session's id, the replicas' names and the load of the moment. So several routers
agree without talking to each other, and a router that restarts forgets nothing.
"""

from __future__ import annotations

import random
from hashlib import blake2b
from typing import Annotated

import msgspec

from router.types import Decision, Reason, Request, Snapshot


class StickySession:
    """Sends a session to its home, and to its next home where the queue there is too long."""

    class Options(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
        """What `[policy.options]` may hold. Limits stand in the types: a bad value stops the router's start."""

        max_lead: Annotated[int, msgspec.Meta(ge=0)] = 8
        """How many requests longer than the shortest queue a home's queue may be. Affinity must yield to load."""

    affinity = True
    """Says to `check_policy` that requests may gather on one replica on purpose."""

    def __init__(self, options: Options, random: random.Random) -> None:
        self._max_lead = options.max_lead
        self._random = random  # The only source of chance, so that a seeded policy can be reproduced.

    def choose(self, request: Request, snapshot: Snapshot) -> Decision:
        if len(snapshot.replicas) == 1:
            return Decision(snapshot.replicas[0].replica, Reason.ONLY_REPLICA)
        # A request without a session gets one for itself, which spreads such requests evenly.
        session = request.session_id.encode() or self._random.randbytes(8)
        # Rendezvous hashing: each replica bids for the session and the highest bid is its home. When a replica leaves,
        # only its own sessions move; when one joins, it takes an equal share from each of the others.
        homes = sorted(snapshot.replicas, key=lambda view: _bid(session, view.replica), reverse=True)
        longest = self._max_lead + min(view.queue_depth for view in homes)
        # The replica with the shortest queue always qualifies, so there is one.
        chosen = next(view for view in homes if view.queue_depth <= longest)
        # Where the chosen one fails before its first byte, the session's other homes come next, best first.
        fallbacks = tuple(view.replica for view in homes if view is not chosen)
        return Decision(chosen.replica, Reason.POLICY, fallbacks, score=chosen.queue_depth)


def _bid(session: bytes, replica: str) -> bytes:
    # Not `hash()`, which differs between processes: all routers must come to the same home.
    return blake2b(session + b"\0" + replica.encode(), digest_size=8).digest()
