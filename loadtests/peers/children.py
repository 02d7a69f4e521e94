"""Peers' processes: started with a log of their own, awaited until they serve, and ended with all that they started."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from loadtests.peers.cost import family
from loadtests.peers.errors import PeerError
from loadtests.processes import descendants

START_TIMEOUT_S: Final = 60.0
POLL_S: Final = 0.1
STOP_GRACE_S: Final = 2.0
"""Some peers wait many seconds for a load balancer to take them out; there is none."""


def free_port() -> int:
    """A port that was free on loopback a moment ago."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


@contextmanager
def child(
    name: str,
    command: Sequence[str],
    log: Path,
    serves: Callable[[], bool],
    *,
    env: Mapping[str, str] | None = None,
    timeout_s: float = START_TIMEOUT_S,
) -> Iterator[int]:
    """A process that serves: its pid. Ended on the way out, with its descendants.

    Raises `PeerError` where it cannot be run, ends by itself or does not serve in time.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as out:
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=os.environ | dict(env or {})
            )
        except OSError as error:
            raise PeerError(name, f"could not be run: {error}", log) from error
    try:
        await_serving(name, serves, log, timeout_s, process)
        yield process.pid
    finally:
        _end(process)


def await_serving(
    name: str,
    serves: Callable[[], bool],
    log: Path,
    timeout_s: float = START_TIMEOUT_S,
    process: subprocess.Popen[bytes] | None = None,
) -> None:
    """Returns when `serves` says so. Raises `PeerError` when the process has ended or the time is up."""
    deadline = time.monotonic() + timeout_s
    while not serves():
        if process is not None and process.poll() is not None:
            raise PeerError(name, f"ended with status {process.returncode} before it served", log)
        if time.monotonic() > deadline:
            raise PeerError(name, f"does not serve after {timeout_s:g} s", log)
        time.sleep(POLL_S)


@contextmanager
def leaving_nothing() -> Iterator[None]:
    """On the way out, ends all processes that were started meanwhile and are still there.

    Whoever starts one ends it; this is for those that an exception, as from a signal, met between start and handle.
    """
    before = set(descendants(os.getpid()))
    try:
        yield
    finally:
        _kill(_handles(set(descendants(os.getpid())) - before))


def _end(process: subprocess.Popen[bytes]) -> None:
    """Asks it to end, and kills what is still there of it and its descendants after the grace."""
    handles = _handles(family([process.pid]))
    process.terminate()
    try:
        process.wait(STOP_GRACE_S)
    except subprocess.TimeoutExpired:
        process.kill()
    _kill(handles)
    process.wait()


def _handles(pids: Iterable[int]) -> list[int]:
    """Descriptors of processes: by the time they are used, a number may be another process's."""
    handles = []
    for pid in pids:
        try:
            handles.append(os.pidfd_open(pid))
        except ProcessLookupError:
            continue
    return handles


def _kill(handles: Iterable[int]) -> None:
    for handle in handles:
        try:
            signal.pidfd_send_signal(handle, signal.SIGKILL)
        except ProcessLookupError:
            continue
        finally:
            os.close(handle)
