"""Ray with token authentication and TLS on, in a cluster of the test's own: who may join, and what others are told."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import httpx
import pytest

from loadtests.certificates import Authority
from loadtests.processes import descendants
from tests.integration.ray_local import DEADLINE_S, wait_until
from tests.integration.secured_ray import LANE_PORT, leaks

pytestmark = [pytest.mark.ray, pytest.mark.slow]


class Cluster(NamedTuple):
    address: str
    env: dict[str, str]
    """What a process needs that may join."""
    authority: Authority
    folder: Path


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head with token authentication and TLS."""
    folder = Path(tempfile.mkdtemp(prefix="kvs"))  # Short, for Ray's sockets are in it.
    authority = Authority(folder / "tls")
    cert, key = authority.issue("node", "127.0.0.1", _own_address())
    token = folder / "token"
    token.write_text(secrets.token_hex(24))
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    env |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_USE_TLS": "1"}
    env |= {"RAY_TLS_SERVER_CERT": cert, "RAY_TLS_SERVER_KEY": key, "RAY_TLS_CA_CERT": authority.ca}
    port = _free_port()
    ray = str(Path(sys.executable).with_name("ray"))
    command = [ray, "start", "--head", "--block", f"--port={port}", "--num-cpus=2", "--include-dashboard=false"]
    command += ["--disable-usage-stats", f"--temp-dir={folder / 'r'}", "--min-worker-port=0", "--max-worker-port=0"]
    command += ["--dashboard-agent-listen-port=0", "--object-store-memory=80000000"]
    env_of_head = env | {"PYTHONUNBUFFERED": "1"}
    with (folder / "log").open("w") as log:
        head = subprocess.Popen(command, env=env_of_head, stdout=log, stderr=log)
    try:
        wait_until(lambda: "Ray runtime started" in (folder / "log").read_text(), "the head has started")
        yield Cluster(f"127.0.0.1:{port}", env, authority, folder)
    finally:
        for pid in (head.pid, *descendants(head.pid)):  # The head first, which would take their ends for failures.
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        head.wait(DEADLINE_S)
        shutil.rmtree(folder, ignore_errors=True)


def _own_address() -> str:
    import ray

    address: str = ray.util.get_node_ip_address()
    return address


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port: int = sock.getsockname()[1]
        return port


def test_lanes_of_both_carriers_go_through_a_secured_cluster_and_no_secret_is_in_its_logs(cluster: Cluster) -> None:
    replica, router = cluster.authority.issue("replica"), cluster.authority.issue("router")
    command = [sys.executable, "-m", "tests.integration.secured_ray", cluster.address, cluster.authority.ca]
    done = subprocess.run([*command, *replica, *router], env=cluster.env, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["socket"], found["actor"], found["tls"], found["leaks"]) == (5, 5, True, [])
    assert LANE_PORT <= found["port"] < LANE_PORT + 64
    assert "(tls)" in found["stranger"]
    assert "this router has no lane.tls_ca_file" in found["plain"]
    token = Path(cluster.env["RAY_AUTH_TOKEN_PATH"]).read_bytes()
    assert not leaks([token], [path for path in (cluster.folder / "r").rglob("logs/**/*") if path.is_file()])


def _wrong_token(cluster: Cluster) -> dict[str, str]:
    path = cluster.folder / "wrong"
    path.write_text("wrong" + secrets.token_hex(24))
    return cluster.env | {"RAY_AUTH_TOKEN_PATH": str(path)}


def _without(cluster: Cluster, *names: str) -> dict[str, str]:
    return {name: value for name, value in cluster.env.items() if name not in names} | {"HOME": str(cluster.folder)}


@pytest.mark.parametrize("case", ["wrong token", "no token", "no authentication", "no TLS", "another CA"])
def test_deploying_on_a_cluster_that_refuses_this_process_is_one_clear_line(cluster: Cluster, case: str) -> None:
    other = Authority(cluster.folder / "other", "other").ca
    env, words = {
        "wrong token": (_wrong_token(cluster), "refuses this process's token"),
        "no token": (_without(cluster, "RAY_AUTH_TOKEN_PATH"), "this process has no Ray token"),
        "no authentication": (cluster.env | {"RAY_AUTH_MODE": "disabled"}, "refuses this process's token"),
        "no TLS": (cluster.env | {"RAY_USE_TLS": "0"}, "it may want TLS (RAY_USE_TLS)"),
        "another CA": (cluster.env | {"RAY_TLS_CA_CERT": other}, "no TLS with the Ray cluster"),
    }[case]
    config = _config(cluster, '[[engines]]\nkind = "sim"')
    done = subprocess.run(
        [sys.executable, "-m", "router", "deploy", "--config", config],
        env=env,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2, done.stderr
    told = [line for line in done.stderr.splitlines() if line.startswith("kvlane")]
    assert len(told) == 1, done.stderr
    assert "membership.ray_address: " in told[0]
    assert words in told[0]
    assert "Traceback" not in done.stderr
    if token := env.get("RAY_AUTH_TOKEN_PATH"):
        assert Path(token).read_text() not in done.stderr + done.stdout


def _config(cluster: Cluster, text: str = "", port: int = 0) -> str:
    path = cluster.folder / "config.toml"
    path.write_text(
        f'[http]\nport = {port}\n[grpc]\nenabled = false\n[membership]\nray_address = "{cluster.address}"\n{text}\n'
    )
    return str(path)


def test_a_router_with_a_wrong_token_says_so_stays_unready_and_heals_once_its_file_is_right(cluster: Cluster) -> None:
    env, port = _wrong_token(cluster), _free_port()
    wrong = Path(env["RAY_AUTH_TOKEN_PATH"])
    before = wrong.read_bytes()
    log = cluster.folder / "router.log"
    command = [sys.executable, "-m", "router", "serve", "--config", _config(cluster, port=port)]
    with log.open("w") as file:
        router = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=file)
    try:
        wait_until(lambda: "may not join Ray" in log.read_text(), "the router says why it cannot join")
        assert "refuses this process's token" in log.read_text()
        wait_until(lambda: _refusals(port) >= 2, "it is tried again, and counted")
        assert httpx.get(f"http://127.0.0.1:{port}/readyz", timeout=10).status_code == 503
        wrong.write_text(Path(cluster.env["RAY_AUTH_TOKEN_PATH"]).read_text())
        wait_until(lambda: "the directory answers again" in log.read_text(), "the router has joined")
        router.terminate()
        assert router.wait(60) == 0
    finally:
        if router.poll() is None:
            router.kill()
            router.wait()
    text = log.read_text()
    assert text.count("may not join Ray") == 1, "one line per outage"
    assert "Traceback" not in text
    assert not leaks([before, wrong.read_bytes()], [log])


def _refusals(port: int) -> float:
    try:
        page = httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=10).text
    except httpx.HTTPError:
        time.sleep(0.2)
        return 0.0
    line = next(line for line in page.splitlines() if line.startswith('kvlane_membership_failures_total{kind="token"}'))
    return float(line.split()[1])
