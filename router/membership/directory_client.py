"""Calls to the directory actor: each with a deadline, none of them on the event loop, and one error for all that fails.

Ray's calls hang while the cluster's head is away, and its blocking ones would stop an event loop. Rule: after a failure
the handle is dropped and looked up anew, since the directory may have been started elsewhere.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final, TypeVar

import ray
from ray.exceptions import RayError

from router import ray_private
from router.membership import directory, node_address
from router.membership.base import ReplicaRecord
from router.membership.directory import Listing
from router.options import MembershipOptions

T = TypeVar("T")

CONNECT_TIMEOUT_S: Final = 5.0
FIND_TIMEOUT_S: Final = 30.0
"""Joining the cluster included."""
ANSWER_TIMEOUT_S: Final = 5.0
"""On top of the time for which the directory may keep a call waiting."""


def join(options: MembershipOptions) -> None:
    """Makes this process a driver of the running cluster; no effect where it is one. Blocks.

    Never starts a cluster. Raises `ConnectionError` where there is none, or not yet the node that it shall be on, and
    what else `ray.init` raises.
    """
    if not ray.is_initialized():
        _look_for(options.ray_address)
        if options.join:
            _look_for_node(options)
        ray.init(
            address=options.ray_address,
            namespace=options.ray_namespace,
            ignore_reinit_error=True,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )


def _look_for(address: str) -> None:
    """Raises `ConnectionError` where nobody listens: Ray itself waits for as long as it outlives the cluster's head.

    And `ray_private.RayRefused` where the head does not take this process.
    """
    address = os.environ.get("RAY_ADDRESS", address) if address == "auto" else address
    host, _, port = address.rpartition(":")
    if not (host and port.isdigit()):
        return
    try:
        with socket.create_connection((host.strip("[]"), int(port)), CONNECT_TIMEOUT_S):
            pass
    except OSError as error:
        raise ConnectionError(f"no Ray cluster answers at {address!r}: {error}") from error
    ray_private.knock(address, CONNECT_TIMEOUT_S)


def _look_for_node(options: MembershipOptions) -> None:
    """Raises `ConnectionError` where this host's own node is not up: Ray itself waits half a minute for it."""
    here = node_address.node_ip(options), node_address.NODE_MANAGER
    try:
        with socket.create_connection(here, CONNECT_TIMEOUT_S):
            return
    except OSError as error:
        raise ConnectionError(f"the Ray node of this host is not up at {here[0]}:{here[1]}: {error}") from error


class DirectoryAway(Exception):
    """The directory cannot be asked now; says why in one line."""

    def __init__(self, message: str, kind: str = "unreachable") -> None:
        super().__init__(message)
        self.kind = kind
        """See `ray_private.kind`."""


class DirectoryClient:
    """One process's way to the directory; use it from one event loop. Every call may raise `DirectoryAway`."""

    def __init__(self, namespace: str, join: Callable[[], None] = lambda: None) -> None:
        """`join` runs before each look-up, in a thread, and makes sure that the process is part of the cluster."""
        self._namespace = namespace
        self._join = join
        self._handle: Any = None
        self._thread: threading.Thread | None = None

    async def register(self, record: ReplicaRecord) -> None:
        await self._call("register", record)

    async def heartbeat(self, replica: str) -> bool:
        """False where the directory does not know the replica."""
        known: bool = await self._call("heartbeat", replica)
        return known

    async def deregister(self, replica: str) -> None:
        await self._call("deregister", replica)

    async def watch(self, epoch: str, version: int, wait_s: float) -> Listing:
        """See `Directory.watch`."""
        listing: Listing = await self._call("watch", epoch, version, wait_s, wait_s=wait_s)
        return listing

    async def _call(self, method: str, *args: object, wait_s: float = 0.0) -> Any:
        try:
            if self._handle is None:
                self._handle = await self._in_thread(self._find, FIND_TIMEOUT_S)
            async with asyncio.timeout(wait_s + ANSWER_TIMEOUT_S):
                return await getattr(self._handle, method).remote(*args)
        except TimeoutError as error:
            self._handle = None
            raise DirectoryAway("no answer in time", ray_private.kind(error)) from error
        except (RayError, OSError, RuntimeError, ValueError) as error:
            # RuntimeError and ValueError: how Ray says that it cannot join, or has no such actor any more.
            self._handle = None
            raise DirectoryAway(ray_private.reason(error), ray_private.kind(error)) from error

    def _find(self) -> Any:
        self._join()
        return directory.find(self._namespace)

    async def _in_thread(self, blocking: Callable[[], T], timeout_s: float) -> T:
        """Runs a call that blocks. One that overstays its deadline is left alone, and no other starts before it ends.

        A daemon thread, unlike an executor's, does not hold up the end of the process when the cluster's head is away.
        """
        if self._thread is not None and self._thread.is_alive():
            raise TimeoutError
        loop = asyncio.get_running_loop()
        result: asyncio.Future[T] = loop.create_future()

        def settle(set_outcome: Callable[[Any], None], outcome: object) -> None:
            if not result.done():
                set_outcome(outcome)

        def run() -> None:
            try:
                value = blocking()
            except Exception as error:
                _hand_over(loop, settle, result.set_exception, error)
            else:
                _hand_over(loop, settle, result.set_result, value)

        self._thread = threading.Thread(target=run, name="ray-directory", daemon=True)
        self._thread.start()
        async with asyncio.timeout(timeout_s):
            return await result


def _hand_over(loop: asyncio.AbstractEventLoop, callback: Callable[..., None], *args: object) -> None:
    """Runs the callback on the loop, unless the loop has ended while the call overstayed."""
    with suppress(RuntimeError):
        loop.call_soon_threadsafe(callback, *args)
