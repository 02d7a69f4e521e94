"""Prompts that begin alike go to the same replica, by hashing: affinity that needs to know nothing of any cache."""

from __future__ import annotations

import random
from typing import Annotated

import msgspec

from router.policies.queues import Patience, queue_depths, shortest_queue
from router.policies.rendezvous import home, key_of
from router.types import CacheMode, Decision, Reason, Request, Snapshot


class PrefixHash:
    """Sends prompts with the same leading prefix blocks to one home, and to their next homes while that is overloaded.

    "Consistent Hashing with Bounded Loads" (Mirrokni et al., 2016), with rendezvous hashing in the place of the ring.
    A prompt shorter than one prefix block goes by its session, without one to the shortest queue; so do all where the
    engines reuse no prefixes.
    """

    class Options(Patience, frozen=True, forbid_unknown_fields=True):
        blocks: Annotated[int, msgspec.Meta(ge=1)] = 4
        """Leading prefix blocks that must be the same: 4 are 1 KB unless `[prefix] block_bytes` says otherwise. Fewer
        gather more prompts on one home. A shorter prompt goes by the blocks that it has."""

    def __init__(self, options: Options, random: random.Random) -> None:
        self._options = options
        self._random = random

    def choose(self, request: Request, snapshot: Snapshot) -> Decision:
        replicas = snapshot.replicas
        depths = queue_depths(replicas)
        if len(replicas) == 1:
            return Decision(replicas[0].replica, Reason.ONLY_REPLICA, (), depths[0])
        key, reason = self._key(request, snapshot)
        if key is None:
            return shortest_queue(replicas, depths, self._random)
        place, first = home(key, replicas, depths, self._options.limit(depths))
        return Decision(replicas[place].replica, reason if first else Reason.OVERLOADED, (), depths[place])

    def _key(self, request: Request, snapshot: Snapshot) -> tuple[int | None, Reason]:
        chain = snapshot.prefix.chain
        if chain is not None and chain.blocks and _reuses_prefixes(snapshot):
            # A block's hash stands for all blocks before it too.
            return chain.blocks[min(self._options.blocks, len(chain.blocks)) - 1], Reason.PREFIX_HASH
        return (key_of(request.session_id) if request.session_id else None), Reason.SESSION


def _reuses_prefixes(snapshot: Snapshot) -> bool:
    return any(view.cache is not CacheMode.OFF for view in snapshot.replicas)
