"""Who waits for a replica, in which order, and who is next: the state of the hold.

Sans-IO: no clock, no event loop. Rule: requests of one model are called in the order in which they came, and who leaves
frees its place and its bytes at once, whichever way it leaves. Who was called keeps its place until it leaves, so that
it can be put back without losing its turn.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import Final

from router.errors import HoldFull, cut
from router.types import ReplicaView

BATCH: Final = 256
"""Taken for the batch of a replica that does not tell its largest."""
RETRY_AFTER_S: Final = 5.0
"""What clients are told that found no place."""


class Place:
    """One request's place; a subclass may add what its owner needs."""

    __slots__ = ("alone", "called", "deadline", "model", "ring_at", "since", "size")

    def __init__(
        self,
        model: str,
        size: int,
        since: float,
        deadline: float,
        ring_at: float = math.inf,
        *,
        alone: bool = False,
    ) -> None:
        self.model = model
        self.size = size
        """Bytes of the request's body."""
        self.alone = alone
        """It is called without others: between its call and its leaving they could overtake it."""
        self.since = since
        """When it came; this and the times below are in seconds of any one clock."""
        self.deadline = deadline
        """How long it may wait for a first replica."""
        self.ring_at = ring_at
        """When its client is next to be told that it still waits."""
        self.called = False
        """It was its turn, and it has not left yet."""


class Queue:
    """The places of one model, first come first."""

    __slots__ = ("bytes", "called", "places")

    def __init__(self) -> None:
        # Not a dict, which takes ever longer to find its first item while items are taken from its front.
        self.places: OrderedDict[Place, None] = OrderedDict()
        self.bytes = 0
        self.called = 0
        """How many of them were called and have not left yet."""

    def __len__(self) -> int:
        return len(self.places)

    def waiting(self) -> Iterator[Place]:
        """Those that were not called, in order."""
        return (place for place in self.places if not place.called)


class Holding:
    """All queues."""

    def __init__(self, max_requests: int, max_bytes: int) -> None:
        """At most so many requests, and so many bytes, of all models together."""
        self.queues: dict[str, Queue] = {}
        """By model; only those in which somebody is, whoever went on last behind the others."""
        self.bytes = 0
        self.count = 0
        self._max_requests = max_requests
        self._max_bytes = max_bytes
        self._bells: OrderedDict[Place, None] = OrderedDict()
        """By `ring_at`, as long as all are told at one interval."""

    def join(self, place: Place) -> None:
        """Puts a place behind all others of its model. Raises `HoldFull`."""
        queue = self.queues.get(place.model)
        if self.count >= self._max_requests:
            raise _full(place.model, f"{self._max_requests} requests")
        if self.bytes + place.size > self._max_bytes:
            raise _full(place.model, f"requests of {self.bytes} bytes")
        if queue is None:
            queue = self.queues[place.model] = Queue()
        queue.places[place] = None
        queue.bytes += place.size
        self.bytes += place.size
        self.count += 1
        if place.ring_at < math.inf:
            self._bells[place] = None

    def leave(self, place: Place) -> None:
        """Frees it; a second time does nothing."""
        queue = self.queues.get(place.model)
        if queue is None or place not in queue.places:
            return
        del queue.places[place]
        self._bells.pop(place, None)
        queue.called -= place.called
        queue.bytes -= place.size
        self.bytes -= place.size
        self.count -= 1
        if not queue.places:
            del self.queues[place.model]

    def call(self, model: str, most: int) -> list[Place]:
        """The next ones of a model, `most` at most; its queue is then the last one."""
        called: list[Place] = []
        queue = self.queues.get(model)
        if queue is None:
            return called
        for place in queue.waiting():
            if len(called) >= most or (place.alone and called):
                break
            called.append(place)
            if place.alone:
                break
        for place in called:
            place.called = True
        queue.called += len(called)
        if called:
            self.queues[model] = self.queues.pop(model)
        return called

    def put_back(self, place: Place) -> None:
        """What it was called for is gone: it waits on, where it stood."""
        if place.called and place in self.queues[place.model].places:
            place.called = False
            self.queues[place.model].called -= 1

    def overdue(self, model: str, now: float, most: int) -> list[Place]:
        """The first ones of a model that have waited too long and were not called, `most` at most."""
        found: list[Place] = []
        for place in self.queues[model].waiting():
            if place.deadline > now or len(found) >= most:
                break
            found.append(place)
        return found

    def ring(self, now: float, interval_s: float, most: int) -> list[Place]:
        """Those whose clients are to be told that they wait, `most` at most; each is due again after the interval."""
        due: list[Place] = []
        for place in self._bells:
            if place.ring_at > now or len(due) >= most:
                break
            due.append(place)
        for place in due:
            place.ring_at = now + interval_s
            self._bells.move_to_end(place)
        return due

    def next_ring(self) -> float:
        """When `ring` has the next one; infinity where there is none."""
        first = next(iter(self._bells), None)
        return math.inf if first is None else first.ring_at


def room(replicas: Iterable[ReplicaView]) -> int:
    """How many held requests these replicas shall get now.

    A replica is given a quarter more than its largest batch, so that it never runs dry between two looks; the others
    stay here, from where they can still go to a replica that comes up later. Where other routers keep it busy, a
    quarter of a batch is this router's in any case, so that those who wait here get on.
    """
    total = 0
    for view in replicas:
        batch = view.max_num_seqs or BATCH
        share = (batch + 3) // 4
        total += max(batch + share - view.queue_depth, share - view.leases, 0)
    return total


def _full(model: str, what: str) -> HoldFull:
    return HoldFull(
        f"no replica of model `{cut(model)}` is free, and {what} wait for one already", retry_after_s=RETRY_AFTER_S
    )
