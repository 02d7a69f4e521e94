"""A replica's entry in the directory: made at start, repeated every second, taken back at the end.

Rule: a directory that is away changes nothing for the replica; the next heartbeat that gets through enters it anew.
`Registration` owns the task that repeats.
"""

from __future__ import annotations

import asyncio
import logging

from router.membership.base import ReplicaRecord
from router.membership.directory import HEARTBEAT_S
from router.membership.directory_client import DirectoryAway, DirectoryClient

log = logging.getLogger(__name__)


class Registration:
    """One replica's entry; use it from one event loop."""

    def __init__(self, record: ReplicaRecord, namespace: str) -> None:
        self._record = record
        self._directory = DirectoryClient(namespace)
        self._task: asyncio.Task[None] | None = None
        self._out = False

    async def enter(self) -> None:
        """Registers, and keeps at it in the background where the directory is away."""
        await self._beat()
        self._task = asyncio.create_task(self._repeat(), name=f"heartbeat of {self._record.replica}")

    async def leave(self) -> None:
        """Takes the entry back. Where the directory is away the entry runs out by itself."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        try:
            await self._directory.deregister(self._record.replica)
        except DirectoryAway as error:
            log.warning("replica %s left without telling the directory: %s", self._record.replica, error)

    async def _repeat(self) -> None:
        while True:
            await asyncio.sleep(HEARTBEAT_S)
            await self._beat()

    async def _beat(self) -> None:
        name = self._record.replica
        try:
            if not await self._directory.heartbeat(name):
                await self._directory.register(self._record)
                log.info("replica %s is registered", name)
        except DirectoryAway as error:
            if not self._out:
                self._out = True
                log.warning("replica %s cannot reach the directory: %s", name, error)
        else:
            self._out = False
