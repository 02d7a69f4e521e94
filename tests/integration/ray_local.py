"""A Ray cluster of the test's own on this machine, and its processes."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import ray
from ray import serve

from loadtests.processes import descendants

NAMESPACE = "kvlane-test"
DEADLINE_S = 90.0
"""For everything that another process has to do first; the machine may be busy."""


@contextmanager
def cluster(cpus: int = 8) -> Iterator[str]:
    """Starts a cluster, yields its address, and sees to it that none of its processes is left."""
    before = set(descendants(os.getpid()))
    context = ray.init(
        "local", num_cpus=cpus, include_dashboard=False, namespace=NAMESPACE, log_to_driver=False, logging_level="error"
    )
    try:
        yield context.address_info["gcs_address"]
    finally:
        started = set(descendants(os.getpid())) - before
        serve.shutdown()
        ray.shutdown()
        wait_until(lambda: not any(map(alive, started)), "the cluster's processes have ended")


def alive(pid: int) -> bool:
    """Whether the process runs; one that only waits for its parent to take notice does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def process(name: str) -> int:
    """The process of that name among those that this test started."""
    return next(pid for pid in descendants(os.getpid()) if Path(f"/proc/{pid}/comm").read_text().strip() == name)


def wait_until(true: Callable[[], object], what: str) -> None:
    """Looks again and again until it is true."""
    deadline = time.monotonic() + DEADLINE_S
    while not true():
        assert time.monotonic() < deadline, f"not so within {DEADLINE_S:g} s: {what}"
        time.sleep(0.05)


async def until(true: Callable[[], object], what: str) -> None:
    """The same without holding up the loop."""
    try:
        async with asyncio.timeout(DEADLINE_S):
            while not true():
                await asyncio.sleep(0.02)
    except TimeoutError:
        raise AssertionError(f"not so within {DEADLINE_S:g} s: {what}") from None


@asynccontextmanager
async def running(work: asyncio.Task[None]) -> AsyncIterator[None]:
    """Has the task run meanwhile, and ends it; a failure of the task fails the test."""
    try:
        yield
    finally:
        work.cancel()
        await asyncio.wait([work])
        if not work.cancelled():
            work.result()
