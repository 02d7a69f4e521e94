"""Several router processes on the same ports, and the supervisor over them."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from loadtests.processes import MODEL, descendants, engines, router
from tests.integration.ray_local import alive, wait_until

pytestmark = pytest.mark.slow

BODY = {"model": MODEL, "prompt": "hello", "max_tokens": 3}


def ask(port: int) -> int:
    """The status of one completion on a connection of its own."""
    try:
        return httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=BODY, timeout=30).status_code
    except httpx.HTTPError:
        return 0


def test_workers_share_the_ports_and_a_dead_one_is_started_again() -> None:
    with (
        engines(2, {"step_base_ms": 1.0}) as (_, addresses),
        router(addresses, "round-robin", workers=3) as (supervisor, http, _),
    ):
        workers = descendants(supervisor)
        assert len(workers) == 3
        assert {ask(http) for _ in range(30)} == {200}
        os.kill(workers[0], signal.SIGKILL)
        wait_until(lambda: len(descendants(supervisor)) == 3 and workers[0] not in descendants(supervisor), "a new one")
        wait_until(lambda: {ask(http) for _ in range(20)} == {200}, "all workers serve")
    assert not any(map(alive, [supervisor, *workers]))


def test_a_router_that_cannot_reload_says_so_and_serves_on() -> None:
    with engines(1, {"step_base_ms": 1.0}) as (_, addresses):
        for workers in (1, 2):
            with router(addresses, "random", workers=workers) as (process, http, _):
                for each in (process, *descendants(process)):
                    os.kill(each, signal.SIGHUP)
                assert {ask(http) for _ in range(10)} == {200}
                assert len(descendants(process)) == workers * (workers > 1)


def test_a_worker_ends_when_its_supervisor_is_killed() -> None:
    with engines(1, {}) as (_, addresses), router(addresses, "random", workers=2) as (supervisor, _, _):
        workers = descendants(supervisor)
        os.kill(supervisor, signal.SIGKILL)
        wait_until(lambda: not any(map(alive, workers)), "no worker is left")


def test_one_router_alone_refuses_a_port_that_is_taken(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        config = tmp_path / "config.toml"
        config.write_text('[membership]\nkind = "static"\n[[membership.replicas]]\nname = "a"\nport = 1\n')
        command = [sys.executable, "-m", "router", "serve", "--config", str(config), "--http", f"127.0.0.1:{port}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "cannot listen" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_router_stops_at_once_by_a_signal_and_finishes_what_is_in_flight() -> None:
    with (
        engines(1, {"step_base_ms": 10.0}) as (_, addresses),
        router(addresses, "random") as (process, http, _),
        httpx.Client(timeout=60) as client,
        client.stream(
            "POST",
            f"http://127.0.0.1:{http}/v1/completions",
            json={"model": MODEL, "prompt": "x", "max_tokens": 100, "stream": True},
        ) as response,
    ):
        lines = response.iter_lines()
        next(lines)
        os.kill(process, signal.SIGTERM)
        assert [line for line in lines if line][-1] == "data: [DONE]"
        deadline = time.monotonic() + 30
        while alive(process) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not alive(process)


def test_workers_that_cannot_start_end_the_supervisor_instead_of_restarting_for_ever(tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text(
        '[membership]\nkind = "static"\n[[membership.replicas]]\nname = "a"\nport = 1\nsecret_file = "/nowhere"\n'
    )
    command = [sys.executable, "-m", "router", "serve", "--config", str(config), "--workers", "2"]
    command += ["--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "/nowhere" in done.stderr
    assert "ready" not in done.stdout
