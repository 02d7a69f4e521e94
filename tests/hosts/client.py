"""Clients on a host of their own: an event loop in a thread that has entered the host's network namespace."""

from __future__ import annotations

import asyncio
import ctypes
import threading
from collections import Counter
from collections.abc import Coroutine, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, Final, TypeVar

import httpx
from kvlane.client import Client

from tests.integration.asking import WHOLE, ask, ask_grpc

T = TypeVar("T")

CLONE_NEWNET: Final = 0x40000000
LIMIT_S: Final = 240.0
MODEL: Final = "sim"


class Inside:
    """Runs coroutines in a network namespace."""

    def __init__(self, namespace: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._entered = threading.Event()
        self._error: OSError | None = None
        self._thread = threading.Thread(target=self._run, args=(namespace,), name=f"in {namespace}")
        self._thread.start()
        self._entered.wait()
        if self._error is not None:
            raise self._error

    def _run(self, namespace: str) -> None:
        with open(f"/run/netns/{namespace}") as file:
            if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), CLONE_NEWNET):
                self._error = OSError(ctypes.get_errno(), f"cannot enter {namespace}")
        self._entered.set()
        if self._error is None:
            self._loop.run_forever()
            self._loop.run_until_complete(self._loop.shutdown_default_executor())
            self._loop.close()

    def run(self, work: Coroutine[Any, Any, T], limit_s: float = LIMIT_S) -> T:
        """Its result."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(limit_s)

    def start(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Has it run."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()


class Load:
    """Clients of both protocols at some routers, each with one stream after the other, and how those ended."""

    def __init__(self, addresses: list[str], tokens: int) -> None:
        self.ends: Counter[str] = Counter()
        """By how they ended."""
        self.broken: list[tuple[str, str]] = []
        """Those that did not end whole: their replica, and how they ended."""
        self.replicas: dict[str, Counter[str]] = {address: Counter() for address in addresses}
        """Who answered, by the router that was asked."""
        self._tokens = tokens
        self._over = False

    async def run(self, clients: int) -> None:
        """So many of each kind at each router, until told to end; streams in flight come to their own end then."""
        async with asyncio.TaskGroup() as group:
            for address in self.replicas:
                for _ in range(clients):
                    group.create_task(self._http(address))
                    group.create_task(self._grpc(address))

    def end(self) -> None:
        self._over = True

    async def _http(self, address: str) -> None:
        async with httpx.AsyncClient(timeout=60) as client:
            while not self._over:
                await self._note(address, ask(client, f"http://{address}:8000", MODEL, self._tokens, stream=True))

    async def _grpc(self, address: str) -> None:
        async with Client(f"{address}:9000") as client:
            while not self._over:
                await self._note(address, ask_grpc(client, MODEL, self._tokens))

    async def _note(self, address: str, asking: Coroutine[Any, Any, tuple[str, str]]) -> None:
        replica, end = await asking
        self.ends[end] += 1
        self.replicas[address][replica] += 1
        if end != WHOLE:
            self.broken.append((replica, end))
            await asyncio.sleep(0.1)


@contextmanager
def inside(namespace: str) -> Iterator[Inside]:
    """A loop in that namespace; it ends afterwards."""
    entered = Inside(namespace)
    try:
        yield entered
    finally:
        entered.close()
