"""Child processes of the load tests: engines and router, and what they cost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Literal

import msgspec

from loadtests.engines import SECRET
from router.control import Order, spawn_arguments
from router.options import (
    Config,
    GrpcOptions,
    HttpOptions,
    LogOptions,
    MembershipOptions,
    PolicyOptions,
    ShutdownOptions,
    StaticReplica,
)

_TICKS = os.sysconf("SC_CLK_TCK")
MODEL = "sim"


class Cost:
    """The CPU time of a process and its children since this was made."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._began = self._now()

    def _now(self) -> float:
        fields = Path(f"/proc/{self._pid}/stat").read_text().rpartition(") ")[2].split()
        return sum(int(field) for field in fields[11:15]) / _TICKS

    def cpu_s(self) -> float:
        """User and system time in seconds, in steps of a scheduler tick."""
        return self._now() - self._began


def descendants(pid: int) -> list[int]:
    """The processes that this one started, and theirs."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = [int(word) for word in task.read_text().split()]
        except OSError:
            continue  # It has ended meanwhile.
        for child in children:
            found += [child, *descendants(child)]
    return found


def peak_rss_mb(pid: int) -> float:
    """The most memory that the process has held, in MiB."""
    return _status_mb(pid, "VmHWM")


def rss_mb(pid: int) -> float:
    """The memory that the process holds now, in MiB."""
    return _status_mb(pid, "VmRSS")


def _status_mb(pid: int, name: str) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) / 1024
    raise ProcessLookupError(pid)


def engines(replicas: int, options: dict[str, Any]) -> AbstractContextManager[tuple[int, list[dict[str, Any]]]]:
    """A process of simulated replicas: its pid and their addresses."""
    return replica_process("loadtests.engines", str(replicas), json.dumps(options))


@contextmanager
def replica_process(module: str, *arguments: str, model: str = MODEL) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """A process that prints the addresses of its replicas when they listen: its pid, and those."""
    with _child([sys.executable, "-m", module, model, *arguments]) as child:
        assert child.stdout is not None
        yield child.pid, json.loads(child.stdout.readline())


@contextmanager
def router(
    addresses: list[dict[str, Any]],
    policy: str,
    *,
    workers: int = 1,
    env: dict[str, str] | None = None,
    edge: Literal["h2", "aio"] = "h2",
    command: list[str] | None = None,
    max_connections: int = HttpOptions().max_connections,
    notice_s: float = 0.0,
) -> Iterator[tuple[int, int, int]]:
    """A router over those replicas: its process, its HTTP port and its gRPC port. `command` runs it in another way."""
    with tempfile.NamedTemporaryFile() as secret:
        secret.write(SECRET)
        secret.flush()
        replicas = tuple(
            StaticReplica(name=address["replica"], port=address["lane"], secret_file=secret.name)
            for address in addresses
        )
        config = Config(
            http=HttpOptions(port=0, max_connections=max_connections),
            grpc=GrpcOptions(port=0, edge=edge),
            membership=MembershipOptions(kind="static", replicas=replicas),
            policy=PolicyOptions(name=policy),
            log=LogOptions(level="warning"),
            workers=workers,
            shutdown=ShutdownOptions(notice_s=notice_s),
        )
        with _child(command or spawn_arguments(), env) as child:
            assert child.stdin is not None
            assert child.stdout is not None
            child.stdin.write(msgspec.json.encode(Order(config)).decode() + "\n")
            child.stdin.flush()
            words = dict(word.split("=", 1) for word in child.stdout.readline().split()[1:])
            yield child.pid, int(words["http"].rpartition(":")[2]), int(words["grpc"].rpartition(":")[2])


@contextmanager
def _child(arguments: list[str], env: dict[str, str] | None = None) -> Iterator[subprocess.Popen[str]]:
    child = subprocess.Popen(
        arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | (env or {})
    )
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        yield child
    finally:
        child.stdin.close()
        try:
            child.wait(20)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
        child.stdout.close()
