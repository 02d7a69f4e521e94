"""Membership from the directory actor in a Ray cluster.

Job: join Ray, follow the directory, and report its replicas. Rule: a directory that is away, empty after its restart,
or out of reach takes no replica from the router; only a directory that knows better does. `RayMembership.run` is the
one task.

Who notices what: a replica's process that dies resets its lanes at once, which the router's replicas see by themselves;
the directory sees the death of its actor at once and stops listing it, so that nobody tries to reach it again; a host
that vanishes is noticed by the lanes' pings first, then by missing heartbeats, then by Ray.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from typing import Final

import ray

from router import ray_private
from router.membership import directory
from router.membership.base import OnMembers, ReplicaRecord
from router.membership.directory import Listing
from router.membership.directory_client import DirectoryAway, DirectoryClient, join
from router.options import MembershipOptions

log = logging.getLogger(__name__)

RETRY_S: Final = 0.5
REFUSED_RETRY_S: Final = 5.0
"""Where the cluster does not take this process: somebody has to mend that, and a mounted token may be replaced."""
REFUSALS: Final = ("token", "tls")
RESTART_GRACE_S: Final = 5 * directory.HEARTBEAT_S
"""How long replicas that a restarted directory does not list yet are kept: they repeat themselves every second."""


class MemberView:
    """The members as the router shall see them, made from listings; times in seconds of any one clock."""

    def __init__(self, grace_s: float = RESTART_GRACE_S) -> None:
        self.members: Mapping[str, ReplicaRecord] = {}
        self.epoch, self.version = "", -1
        self._grace_s = grace_s
        self._kept_until: float | None = None

    def take(self, listing: Listing, now: float) -> bool:
        """Takes a listing in; returns whether the members changed."""
        if self.epoch not in ("", listing.epoch):
            self._kept_until = now + self._grace_s
        self.epoch, self.version = listing.epoch, listing.version
        members = dict(listing.records)
        if self._kept_until is not None:
            if now < self._kept_until:
                members = {**self.members, **members}
            else:
                self._kept_until = None
        changed = members != self.members
        self.members = members
        return changed

    def wait_s(self, interval_s: float, now: float) -> float:
        """How long the next watch may wait: until the next listing is due for this view."""
        if self._kept_until is None:
            return interval_s
        return min(interval_s, max(0.0, self._kept_until - now))


class RayMembership:
    """Follows the directory of one Ray cluster."""

    def __init__(
        self,
        options: MembershipOptions,
        joined: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
        failed: Callable[[str], None] = lambda kind: None,
    ) -> None:
        """`joined` is called on the event loop each time this process has become part of the cluster; `failed` with the
        kind of each try that came to nothing (``token``, ``tls``, ``timeout``, ``unreachable``).

        Raises `ConfigError` where Ray's version is one that kvlane was not tried with.
        """
        ray_private.check_version()
        self._options = options
        self._joined = joined
        self._interval_s = options.relist_interval_s
        self._clock = clock
        self._view = MemberView()
        self._directory = DirectoryClient(options.ray_namespace, self._join)
        self._failed = failed
        self._out = ""
        """The kind of the outage that there is; empty while there is none."""

    async def run(self, on_members: OnMembers) -> None:
        """See `Membership.run`. Joins the cluster first, and never leaves it: that is for the process's owner."""
        self._loop = asyncio.get_running_loop()
        told = False
        while True:
            view = self._view
            wait_s = view.wait_s(self._interval_s, self._clock())
            try:
                listing = await self._directory.watch(view.epoch, view.version, wait_s)
            except DirectoryAway as error:
                self._outage(error)
                await asyncio.sleep(REFUSED_RETRY_S if error.kind in REFUSALS else RETRY_S)
                continue
            self._recovered()
            if view.take(listing, self._clock()) or not told:
                on_members(view.members)
                told = True

    def _join(self) -> None:
        """Runs in the directory client's thread."""
        if not ray.is_initialized():
            join(self._options)
            self._loop.call_soon_threadsafe(self._joined)

    def _outage(self, error: DirectoryAway) -> None:
        self._failed(error.kind)
        if self._out == error.kind or (self._out and error.kind not in REFUSALS):
            return
        self._out = error.kind
        kept = len(self._view.members)
        if error.kind in REFUSALS:
            log.error("this router may not join Ray (%s); it tries on, and %d replicas are kept", error, kept)
        else:
            log.warning("the directory is out of reach (%s); %d replicas are kept", error, kept)

    def _recovered(self) -> None:
        if self._out:
            self._out = ""
            log.info("the directory answers again")
