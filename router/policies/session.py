"""A session stays on one replica."""

from __future__ import annotations

import random

from router.policies.queues import Patience, queue_depths, shortest_queue
from router.policies.rendezvous import home, key_of
from router.types import Decision, Reason, Request, Snapshot


class Session:
    """Sends all requests of a session to its home, and to its next home while that is overloaded or gone.

    Homes come from rendezvous hashing of the session's id: all routers agree on them, and nothing is remembered. A
    session that left an overloaded home returns as soon as it can, for most of its KV cache is still there. Requests
    without a session go to the shortest queue.
    """

    class Options(Patience, frozen=True, forbid_unknown_fields=True):
        """How long a home's queue may be."""

    def __init__(self, options: Options, random: random.Random) -> None:
        self._options = options
        self._random = random

    def choose(self, request: Request, snapshot: Snapshot) -> Decision:
        replicas = snapshot.replicas
        depths = queue_depths(replicas)
        if len(replicas) == 1:
            return Decision(replicas[0].replica, Reason.ONLY_REPLICA, (), depths[0])
        if not request.session_id:
            return shortest_queue(replicas, depths, self._random)
        limit = self._options.limit(depths)
        place, first = home(key_of(request.session_id), replicas, depths, limit)
        return Decision(replicas[place].replica, Reason.SESSION if first else Reason.OVERLOADED, (), depths[place])
