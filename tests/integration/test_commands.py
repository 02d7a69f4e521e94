"""The commands as an operator types them, on real Ray, with simulated engines."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import msgspec
import pytest

from engine import deployment
from loadtests.processes import descendants
from router import config as config_files
from tests.integration.ray_local import DEADLINE_S, NAMESPACE, alive, cluster, wait_until
from tests.integration.stack import kvlane_up

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(3 * DEADLINE_S)]

FREE_PORTS = ("--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0")
TWO_MODELS = """
[shutdown]
notice_s = 0.5
[membership]
ray_address = "{address}"
ray_namespace = "{namespace}"
[[engines]]
name = "large"
kind = "sim"
num_cpus = 0.1
args = {{ step_base_ms = 1.0 }}
[[engines]]
name = "small"
kind = "sim"
replicas = 2
num_cpus = 0.1
args = {{ step_base_ms = 1.0 }}
"""


def kvlane(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "router", *arguments]


def test_up_once_shows_two_streamed_answers_and_leaves_nothing() -> None:
    env = os.environ | {"KVLANE_MEMBERSHIP_RAY_ADDRESS": "local"}
    command = kvlane("up", "--engine", "sim", "--once", *FREE_PORTS)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env) as process:
        started: set[int] = set()
        printed = ""
        assert process.stdout is not None
        for line in process.stdout:
            printed += line
            started.update(descendants(process.pid))
        assert process.wait(DEADLINE_S) == 0, printed
    assert re.search(r"^ready http=http://127.0.0.1:\d+ grpc=127.0.0.1:\d+$", printed, re.MULTILINE), printed
    receipts = re.findall(r"-> replica=(\S+)  policy=cost  reason=\w+  queue=\d+.*  ttft=\d+ ms", printed)
    assert len(receipts) == 2, printed
    assert "Traceback" not in printed
    assert len(started) > 5
    wait_until(lambda: not any(map(alive, started)), "no process is left")


def test_up_says_what_is_wrong_and_leaves_nothing() -> None:
    env = os.environ | {"KVLANE_MEMBERSHIP_RAY_ADDRESS": "local"}
    arguments = kvlane("up", "--engine", "sim", "--once", *FREE_PORTS)
    env["KVLANE_ENGINES_0_ARGS"] = '{"step_bas_ms": 1}'
    done = subprocess.run(arguments, capture_output=True, text=True, env=env, timeout=2 * DEADLINE_S, check=False)
    assert done.returncode != 0
    assert "step_base_ms" in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr


@contextmanager
def serving(config: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    command = kvlane("serve", "--config", str(config), *FREE_PORTS)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            ready = re.match(r"ready http=(\S+) grpc=(\S+)$", process.stdout.readline())
            assert ready is not None
            yield process, ready[1]
        finally:
            process.kill()


def test_deploy_and_serve_bring_up_two_models_each_with_its_pool(tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    with cluster() as address:
        config.write_text(TWO_MODELS.format(address=address, namespace=NAMESPACE))
        subprocess.run(kvlane("deploy", "--config", str(config)), check=True, timeout=2 * DEADLINE_S)
        assert {name: state.ready for name, state in deployment.statuses().items()} == {
            "kvlane-large": 1,
            "kvlane-small": 2,
        }
        with serving(config) as (process, url), httpx.Client(base_url=url, timeout=DEADLINE_S) as client:
            wait_until(lambda: client.get("/readyz").json()["models"] == {"large": 1, "small": 2}, "all are ready")
            assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["large", "small"]
            for model in ("large", "small"):
                body = {"model": model, "prompt": "hello", "max_tokens": 2}
                answer = client.post("/v1/completions", json=body)
                assert answer.status_code == 200
                assert answer.headers["x-kvlane-route"].startswith(f"replica={model}-")
            assert client.post("/v1/completions", json={"model": "medium", "prompt": "x"}).status_code == 404
            process.send_signal(signal.SIGTERM)
            assert process.wait(DEADLINE_S) == 0
        deployment.undeploy(["large", "small"])


def test_a_stop_before_all_models_are_ready_is_as_clean_as_one_after(tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    with cluster() as address, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        both = TWO_MODELS.format(address=address, namespace=NAMESPACE)
        config.write_text(both)
        alone = config_files.load(str(config), env={})
        deployment.deploy(msgspec.structs.replace(alone, engines=alone.engines[1:]))
        command = kvlane("serve", "--config", str(config), "--http", f"127.0.0.1:{port}", "--grpc", "127.0.0.1:0")
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            wait_until(lambda: ready_models(port) == {"large": 0, "small": 2}, "one model is there, one is not")
            process.send_signal(signal.SIGTERM)
            _, log = process.communicate(timeout=DEADLINE_S)
        assert process.returncode == 0, log
        assert "*** SIGTERM" not in log
        deployment.undeploy(["small"])


def ready_models(port: int) -> dict[str, int]:
    try:
        models: dict[str, int] = httpx.get(f"http://127.0.0.1:{port}/readyz", timeout=DEADLINE_S).json()["models"]
    except httpx.HTTPError:
        return {}
    return models


def test_up_takes_everything_down_on_sigterm(tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text('[membership]\nray_address = "local"\n')
    with kvlane_up(tmp_path / "log", "--engine", "sim", "--config", str(config)) as stack:
        started = [stack.process.pid, *descendants(stack.process.pid)]
        stack.process.terminate()
        assert stack.process.wait(DEADLINE_S) == 0
        wait_until(lambda: not any(map(alive, started)), "no process is left")
        assert "Traceback" not in stack.log()


def test_deploy_without_a_cluster_says_so(tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text(TWO_MODELS.format(address="127.0.0.1:1", namespace=NAMESPACE))
    done = subprocess.run(
        kvlane("deploy", "--config", str(config)), capture_output=True, text=True, timeout=2 * DEADLINE_S, check=False
    )
    assert done.returncode == 2
    assert "no Ray cluster answers at '127.0.0.1:1'" in done.stderr
    assert "Traceback" not in done.stderr
