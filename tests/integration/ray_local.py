"""A Ray cluster of the test's own on this machine, and its processes."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import subprocess
import time
import traceback
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
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
    address = _started(cpus) or _started(cpus, again=True)
    try:
        yield address
    finally:
        started = set(descendants(os.getpid())) - before
        serve.shutdown()
        ray.shutdown()
        wait_until(lambda: not any(map(alive, started)), "the cluster's processes have ended")


def _started(cpus: int, *, again: bool = False) -> str:
    """The address of a cluster that was started; empty where Ray could not, unless that was the second time: a node
    gets 30 s to start, which on a machine that vLLM's tests keep busy may not do."""
    before = set(descendants(os.getpid()))
    try:
        context = ray.init(
            "local",
            num_cpus=cpus,
            include_dashboard=False,
            namespace=NAMESPACE,
            log_to_driver=False,
            logging_level="error",
        )
    except Exception:
        _end(set(descendants(os.getpid())) - before)  # While the exception keeps Ray's own notes of them.
        if again:
            raise
        traceback.print_exc()
        return ""
    address: str = context.address_info["gcs_address"]
    return address


def _end(processes: set[int]) -> None:
    """Ends what is left of a cluster that did not start."""
    ray.shutdown()
    for pid in processes:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not any(map(alive, processes)), "what had been started of the cluster has ended")
    for each in gc.get_objects():  # Who is not waited for would be a warning in some later test.
        if issubclass(type(each), subprocess.Popen) and each.pid in processes:
            each.wait()


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
