"""The directory: a small named actor where replicas say how to reach them, and routers ask.

It stores nothing: replicas repeat themselves every second, so a directory that was restarted fills itself again. Rule:
a record stands until its replica takes it back, dies, or is silent for `EXPIRY_S`. `Table` owns the records and knows
no clock; `Directory` is the actor around it. Whoever comes first creates the actor.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable
from typing import Any, Final

import msgspec
import ray
from ray.exceptions import ActorDiedError, RayError

from router import ray_private
from router.membership.base import ReplicaRecord
from router.membership.node_address import ENGINE, ROLE, ROUTER

log = logging.getLogger(__name__)

NAME: Final = "kvlane-directory"
HEARTBEAT_S: Final = 1.0
EXPIRY_S: Final = 10.0
"""Silence after which a replica is taken for gone; ten heartbeats, so that a busy host loses none."""
DEATHWATCH_S: Final = 60.0
"""How long one watch call stays parked in a replica; bounds what a directory that died leaves behind there."""
CALLERS: Final = 10_000
"""Calls at once: every router process keeps one waiting."""
PLACEMENT: Final = {ROLE: f"!in({ROUTER},{ENGINE})"}
"""A router's node comes and goes, and has no memory to spare; on an engine's node an actor, though it takes nothing,
would keep an autoscaler from ever taking the node for idle."""


class Listing(msgspec.Struct, frozen=True):
    """All replicas at one moment."""

    epoch: str
    """Identifies the directory's process: a new one has forgotten everything."""
    version: int
    """Rises with each change within an epoch."""
    records: dict[str, ReplicaRecord]


class Table:
    """The records with the times at which their replicas were last heard; times in seconds of any one clock."""

    def __init__(self, expiry_s: float = EXPIRY_S) -> None:
        self.version = 0
        self.records: dict[str, ReplicaRecord] = {}
        self._heard: dict[str, float] = {}
        self._expiry_s = expiry_s

    def register(self, record: ReplicaRecord, now: float) -> None:
        self._heard[record.replica] = now
        if self.records.get(record.replica) != record:
            self.records[record.replica] = record
            self.version += 1

    def heartbeat(self, replica: str, now: float) -> bool:
        """False where the replica is not known and must register."""
        if replica not in self.records:
            return False
        self._heard[replica] = now
        return True

    def deregister(self, replica: str) -> None:
        if self.records.pop(replica, None) is not None:
            del self._heard[replica]
            self.version += 1

    def expire(self, now: float) -> list[str]:
        """Drops the replicas that are silent for too long; returns their names."""
        silent = [name for name, heard in self._heard.items() if now - heard > self._expiry_s]
        for name in silent:
            self.deregister(name)
        return silent


class Directory:
    """The actor; all its methods run on its one event loop."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._table = Table()
        self._epoch = uuid.uuid4().hex
        self._changed = asyncio.Event()
        self._watches: dict[str, asyncio.Task[None]] = {}
        self._expirer: asyncio.Task[None] | None = None

    async def register(self, record: ReplicaRecord) -> None:
        """Adds a replica, or renews its record."""
        if self._expirer is None:
            self._expirer = asyncio.create_task(self._expire())
        self._table.register(record, self._clock())
        self._watch_actor(record)
        self._tell()

    async def heartbeat(self, replica: str) -> bool:
        """The replica lives; False where the directory does not know it."""
        return self._table.heartbeat(replica, self._clock())

    async def deregister(self, replica: str) -> None:
        """The replica is gone; harmless where it is not known."""
        self._remove(replica)

    async def watch(self, epoch: str, version: int, timeout_s: float) -> Listing:
        """The replicas, as soon as they differ from that version, or after `timeout_s` seconds anyway."""
        if (epoch, version) == (self._epoch, self._table.version):
            try:
                async with asyncio.timeout(timeout_s):
                    await self._changed.wait()
            except TimeoutError:
                return self._listing()
        return self._listing()

    def _listing(self) -> Listing:
        return Listing(self._epoch, self._table.version, dict(self._table.records))

    def _remove(self, replica: str) -> None:
        self._table.deregister(replica)
        watch = self._watches.pop(replica, None)
        if watch is not None:
            watch.cancel()
        self._tell()

    def _tell(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def _expire(self) -> None:
        while True:
            await asyncio.sleep(HEARTBEAT_S)
            for replica in self._table.expire(self._clock()):
                log.warning("replica %s has been silent for %g s", replica, EXPIRY_S)
                self._remove(replica)

    def _watch_actor(self, record: ReplicaRecord) -> None:
        if record.actor is not None and record.replica not in self._watches:
            self._watches[record.replica] = asyncio.create_task(self._until_dead(record))

    async def _until_dead(self, record: ReplicaRecord) -> None:
        while True:
            try:
                async for ref in ray_private.stream(record.actor, linger):
                    await ref
            except ActorDiedError:
                log.info("replica %s: its actor died", record.replica)
                del self._watches[record.replica]
                self._remove(record.replica)
                return
            except RayError as error:
                # Out of reach for now: heartbeats tell whether it lives.
                log.info("replica %s: actor out of reach: %s", record.replica, ray_private.reason(error))
                await asyncio.sleep(HEARTBEAT_S)


async def linger(_actor: object) -> AsyncIterator[None]:
    """Parked in a replica's actor by the directory: when that actor dies, the call fails at once."""
    await asyncio.sleep(DEATHWATCH_S)
    yield None


def find(namespace: str) -> Any:
    """The directory's actor handle, created where there is none. Blocks; raises `RayError` or `ValueError`."""
    actor_class = ray.remote(Directory).options(
        name=NAME,
        namespace=namespace,
        get_if_exists=True,
        lifetime="detached",
        num_cpus=0,
        max_restarts=-1,
        max_concurrency=CALLERS,
        label_selector=PLACEMENT,
    )
    return actor_class.remote()
