"""Homes by rendezvous hashing: who keeps a key, known to all routers without a word between them. Pure.

Each replica bids for the key, and the highest bid is its home (Thaler and Ravishankar, "Using Name-Based Mappings to
Increase Hit Rates", 1998). When a replica leaves, only its own keys move; when one joins, it takes an equal share from
each of the others. Nothing is remembered, so a router that restarts forgets nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from xxhash import xxh3_64_intdigest

from router.types import ReplicaView


def key_of(text: str) -> int:
    """A text as a key."""
    # Clients choose it, and not all that JSON can say is valid Unicode.
    return xxh3_64_intdigest(text.encode("utf-8", "surrogatepass"))


def home(key: int, replicas: Sequence[ReplicaView], depths: Sequence[float], limit: float) -> tuple[int, bool]:
    """The position of the key's home, or of its next home where queues are above `limit`; and whether it is the first.

    At least one of the `depths` must be within the limit.
    """
    # Bids of 64 bits from names that differ: there are no ties.
    bids = [xxh3_64_intdigest(view.replica.encode(), key) for view in replicas]
    place = bids.index(max(bids))
    if depths[place] <= limit:
        return place, True
    within = [bid if depth <= limit else -1 for bid, depth in zip(bids, depths, strict=True)]
    return within.index(max(within)), False
