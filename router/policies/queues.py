"""Queues as policies compare them: their lengths, the shortest, and when one is too long for affinity. Pure."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Annotated, TypeVar

import msgspec

from router.types import Decision, Reason, ReplicaView

T = TypeVar("T")


class Patience(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Options of policies that keep requests together: how much longer a queue they put up with.

    A replica is overloaded where its queue is above both bounds. The shortest queue never is.
    """

    max_lead: Annotated[int, msgspec.Meta(ge=0)] = 8
    """Requests above the shortest queue. A few more in a batch cost little; recomputing a prompt costs more."""
    load_factor: Annotated[float, msgspec.Meta(ge=1)] = 1.25
    """Times the mean queue: the bound of "Consistent Hashing with Bounded Loads" (Mirrokni et al., 2016). The lead of
    `max_lead` means less the longer all queues are."""

    def limit(self, depths: Sequence[int]) -> float:
        """The longest queue that is not overloaded yet."""
        return max(min(depths) + self.max_lead, self.load_factor * sum(depths) / len(depths))


def queue_depths(replicas: Sequence[ReplicaView]) -> list[int]:
    """Each replica's `queue_depth`, in their order."""
    # Written out: the property's calls would be half of a policy's cost.
    return [view.load.running + view.load.waiting + view.unacked for view in replicas]


def place_of(values: list[T], value: T, random: random.Random) -> int:
    """The position of one of the items that equal `value`, drawn at random. Raises `ValueError` where there is none."""
    ties = values.count(value)
    place = values.index(value)
    for _ in range(int(random.random() * ties) if ties > 1 else 0):
        place = values.index(value, place + 1)
    return place


def shortest_queue(
    replicas: Sequence[ReplicaView], depths: list[int], random: random.Random, reason: Reason = Reason.SHORTEST_QUEUE
) -> Decision:
    """The decision for the shortest queue; ties at random.

    It names no fallbacks: when one is needed the queues have changed, and asking again is better.
    """
    shortest = min(depths)
    return Decision(replicas[place_of(depths, shortest, random)].replica, reason, (), shortest)
