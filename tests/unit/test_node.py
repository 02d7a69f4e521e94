"""A router's own Ray node, with a stand-in for Ray's command: how it is started, kept, renewed and ended."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from ray.scripts import scripts

from router import node
from router.membership import node_address
from router.membership.node_address import Address
from router.options import MembershipOptions

DEADLINE_S = 30.0
STAND_IN = """
import signal, socket, sys
port, file, stubborn = int(sys.argv[1]), sys.argv[2], sys.argv[3]
if stubborn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
with socket.create_server(("127.0.0.1", port)), open(file, "a") as lives:
    print("up", file=lives, flush=True)
    print("some last words", flush=True)
    signal.pause()
"""


async def until(true: Callable[[], object]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not true():
            await asyncio.sleep(0.01)


class Stage:
    """A head that accepts connections, and a command that stands in for Ray's."""

    def __init__(self, folder: Path, head: int, port: int) -> None:
        self.options = MembershipOptions(ray_address=f"127.0.0.1:{head}", join=True)
        self.port = port
        self.stubborn = ""
        self._lives = folder / "lives"

    def command(self, options: MembershipOptions) -> list[str]:
        return [sys.executable, "-c", STAND_IN, str(self.port), str(self._lives), self.stubborn]

    def lives(self) -> int:
        """How many nodes were started."""
        return len(self._lives.read_text().splitlines()) if self._lives.exists() else 0


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port: int = sock.getsockname()[1]
        return port


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Stage:
    made = Stage(tmp_path, free_port(), free_port())
    monkeypatch.setattr(node, "command", made.command)
    monkeypatch.setattr(node_address, "NODE_MANAGER", made.port)
    monkeypatch.setattr(node, "RESTART_MIN_S", 0.01)
    monkeypatch.setattr(node, "LOOK_S", 0.01)
    return made


@asynccontextmanager
async def head(stage: Stage) -> AsyncIterator[None]:
    def drop(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    address = node_address.head(stage.options)
    assert address is not None
    async with await asyncio.start_server(drop, *address):
        yield


@asynccontextmanager
async def kept(stage: Stage, renewed: Callable[[], None] = lambda: None) -> AsyncIterator[node.Node]:
    made = node.Node(stage.options, renewed)
    running = asyncio.create_task(made.run())
    try:
        yield made
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await made.close()


def answers(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def test_the_command_makes_a_node_without_cpus_at_ports_that_a_policy_can_name() -> None:
    words = node.command(MembershipOptions(ray_address="127.0.0.1:6379", join=True, node_tmp_dir="/run/ray"))
    assert {"--address=127.0.0.1:6379", "--node-ip-address=127.0.0.1", "--temp-dir=/run/ray"} <= set(words)
    assert {"--num-cpus=0", "--num-gpus=0", "--labels=kvlane-role=router"} <= set(words)
    ports = {word for word in words if "-port=" in word}
    assert ports == {
        "--node-manager-port=6381",
        "--object-manager-port=6382",
        "--runtime-env-agent-port=6383",
        "--dashboard-agent-grpc-port=6384",
        "--dashboard-agent-listen-port=52365",
        "--metrics-export-port=6385",
        "--min-worker-port=10002",
        "--max-worker-port=10101",
    }


def test_the_deploy_jobs_node_which_soon_goes_bears_the_same_label() -> None:
    job = Path(__file__).parents[2] / "k8s/base/deploy-job.yaml"
    assert f"--labels={node_address.ROLE}={node_address.ROUTER}" in job.read_text()


def test_rays_command_knows_every_flag() -> None:
    words = node.command(MembershipOptions(ray_address="127.0.0.1:6379", join=True, node_tmp_dir="/run/ray"))
    flags = words[words.index("start") + 1 :]
    assert scripts.start.make_context("start", flags).params["node_manager_port"] == 6381


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("head:6379", Address("head", 6379)),
        ("[fd00::1]:6379", Address("fd00::1", 6379)),
        ("auto", None),
        ("local", None),
        ("head:", None),
        (":6379", None),
        ("head:70000", None),
    ],
)
def test_addresses_are_taken_apart(text: str, address: Address | None) -> None:
    assert node_address.parse(text) == address


def test_the_nodes_address_is_the_configured_one_or_that_of_the_route_to_the_head() -> None:
    options = MembershipOptions(ray_address="127.0.0.1:6379", join=True)
    assert node_address.node_ip(options) == "127.0.0.1"
    assert node_address.node_ip(MembershipOptions(ray_address="h:1", node_ip="10.0.0.7", join=True)) == "10.0.0.7"
    with pytest.raises(OSError, match="HOST:PORT"):
        node_address.node_ip(MembershipOptions())


async def test_a_node_that_dies_is_started_again_and_the_second_one_is_told(
    stage: Stage, caplog: pytest.LogCaptureFixture
) -> None:
    renewed: list[int] = []
    async with head(stage), kept(stage, lambda: renewed.append(stage.lives())) as made:
        await until(lambda: made._ups == 1)
        assert renewed == []
        assert made._process is not None
        made._process.kill()
        await until(lambda: renewed == [2])
    assert "some last words" in caplog.text
    assert not answers(stage.port)


async def test_nothing_is_started_before_the_head_answers(stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
    async with kept(stage) as made:
        await until(lambda: "the node waits for it" in caplog.text)
        assert made._process is None
        async with head(stage):
            await until(lambda: made._ups == 1)
    assert caplog.text.count("the node waits for it") == 1


async def test_a_node_that_does_not_leave_in_time_is_killed(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    stage.stubborn = "yes"
    monkeypatch.setattr(node, "STOP_LIMIT_S", 0.05)
    async with head(stage), kept(stage) as made:
        await until(lambda: made._ups == 1)
    assert made._process is not None
    assert made._process.returncode == -9


async def test_a_node_whose_command_cannot_run_is_tried_again(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(node, "command", lambda options: ["/no/such/program"])
    async with head(stage), kept(stage):
        await until(lambda: caplog.text.count("cannot be started") >= 2)


async def test_a_port_that_another_process_has_is_not_taken_for_the_node(
    stage: Stage, caplog: pytest.LogCaptureFixture
) -> None:
    async with head(stage), kept(stage) as made:
        with socket.create_server(("127.0.0.1", stage.port)):
            await until(lambda: "is in use" in caplog.text)
            assert (made._process, made._ups) == (None, 0)
        await until(lambda: made._ups == 1)


async def test_without_join_nothing_is_started(stage: Stage) -> None:
    async with head(stage), node.beside(MembershipOptions(ray_address=stage.options.ray_address), lambda: None):
        pass
    assert stage.lives() == 0


def test_orphans_are_buried_and_children_of_the_loop_left_to_it() -> None:
    done = subprocess.run([sys.executable, "-c", ORPHANS], capture_output=True, text=True, timeout=DEADLINE_S)
    assert (done.returncode, done.stdout) == (0, "buried, and the child of the loop ended with 7\n"), done.stderr


ORPHANS = """
import asyncio, ctypes, os, sys
from router import node
import uvloop

PR_SET_CHILD_SUBREAPER = 36
assert ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0

async def main():
    burial = asyncio.create_task(node.bury_orphans(0.05))
    child = await asyncio.create_subprocess_exec("sh", "-c", "sleep 0.5; exit 7")
    inner = await asyncio.create_subprocess_exec("sh", "-c", "(sleep 0.2; exit 3) & exit 0")  # It leaves an orphan.
    await inner.wait()
    status = await child.wait()
    async with asyncio.timeout(20):
        while open(f"/proc/self/task/{os.getpid()}/children").read().split():
            await asyncio.sleep(0.02)
    burial.cancel()
    print(f"buried, and the child of the loop ended with {status}")

uvloop.run(main())
"""
