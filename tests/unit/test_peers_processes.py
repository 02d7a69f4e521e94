"""The bench of routers side by side: other routers' packages and processes, and what they take."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from loadtests.peers.children import child, free_port
from loadtests.peers.cost import FamilyCost, family, family_rss_mb
from loadtests.peers.environments import installed, run_logged
from loadtests.peers.errors import PeerError

pytestmark = pytest.mark.slow

BURN = "import time; end = time.process_time() + {0}\nwhile time.process_time() < end: pass\n"
PARENT = f"""
import subprocess, sys, threading
subprocess.run([sys.executable, "-c", {BURN.format(0.1)!r}])
thread = threading.Thread(target=lambda: exec({BURN.format(0.2)!r}))
thread.start(); thread.join()
other = subprocess.Popen([sys.executable, "-c", {BURN.format(0.1)!r} + "print(flush=True); input()"],
    stdin=subprocess.PIPE, stdout=subprocess.PIPE)
other.stdout.readline()
print("burnt", flush=True)
input()
"""


def started(code: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_a_familys_cost_holds_threads_and_children_ended_ones_too() -> None:
    with started("input()\n" + PARENT) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        cost = FamilyCost([process.pid])
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline() == "burnt\n"
        assert 0.4 <= cost.cpu_s() < 1.5
        assert len(family([process.pid])) == 2
        assert family_rss_mb([process.pid]) > 10
        process.stdin.write("\n")
    assert FamilyCost([process.pid]).cpu_s() == 0.0


def test_a_cost_is_finer_than_a_tick() -> None:
    cost = FamilyCost([os.getpid()])
    end = time.process_time() + 0.002
    while time.process_time() < end:
        pass
    assert 0.002 <= cost.cpu_s() < 0.05


SERVER = """
import socket, subprocess, sys, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
server = socket.create_server(("127.0.0.1", int(sys.argv[1])))
print(other.pid, flush=True)
time.sleep(600)
"""


def listens(port: int, log: Path) -> bool:
    return log.read_text().endswith("\n")


def gone(pid: int) -> bool:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].startswith("Z"):
                return True
        except OSError:
            return True
        time.sleep(0.02)
    return False


def test_nothing_of_a_peer_is_left_even_where_it_does_not_want_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loadtests.peers.children.STOP_GRACE_S", 0.1)
    port, log = free_port(), tmp_path / "logs" / "peer.log"
    with child("peer", [sys.executable, "-c", SERVER, str(port)], log, lambda: listens(port, log)) as pid:
        other = int(log.read_text())
        assert family([pid]) == [pid, other]
    assert gone(pid)
    assert gone(other)


@pytest.mark.parametrize(
    ("command", "cause"),
    [
        (["/nonexistent/program"], "could not be run"),
        ([sys.executable, "-c", "print('what was wrong'); exit(3)"], "ended with status 3"),
        ([sys.executable, "-c", "import time; time.sleep(600)"], "does not serve after"),
    ],
)
def test_a_peer_that_does_not_start_says_which_why_and_where_its_log_is(
    command: list[str], cause: str, tmp_path: Path
) -> None:
    log = tmp_path / "peer.log"
    with pytest.raises(PeerError) as caught, child("peer", command, log, lambda: False, timeout_s=1.0):
        pass
    message = str(caught.value)
    assert message.startswith("peer: ")
    assert cause in message
    assert str(log) in message
    assert "\n" not in message


def test_a_package_is_installed_once_with_its_version_into_an_environment_of_its_own(tmp_path: Path) -> None:
    ran: list[list[str]] = []

    def run(command: Sequence[str], log: Path) -> None:
        ran.append(list(command))
        (tmp_path / "peer-1.2.3").mkdir(exist_ok=True)

    for _ in range(2):
        assert installed("peer", "1.2.3", tmp_path, run) == tmp_path / "peer-1.2.3" / "bin"
    assert len(ran) == 2
    assert ran[0][1:] == ["-m", "venv", str(tmp_path / "peer-1.2.3")]
    assert ran[1][0] == str(tmp_path / "peer-1.2.3" / "bin" / "python")
    assert ran[1][-1] == "peer==1.2.3"


def test_an_installation_that_fails_is_told_and_tried_again(tmp_path: Path) -> None:
    tries = []

    def fail(command: Sequence[str], log: Path) -> None:
        tries.append(command)
        run_logged([sys.executable, "-c", "print('no such version'); exit(1)"], log)

    for _ in range(2):
        with pytest.raises(PeerError, match=r"^peer: version 1\.2\.3 could not be installed") as caught:
            installed("peer", "1.2.3", tmp_path, fail)
        log = tmp_path / "logs" / "peer-install.log"
        assert str(log) in str(caught.value)
        assert "no such version" in log.read_text()
    assert len(tries) == 2


def test_a_stopped_command_ends_what_it_started(tmp_path: Path) -> None:
    command = [
        *(sys.executable, "-m", "loadtests", "peers"),
        *("--systems", "direct", "--streams", "1", "--seconds", "600"),
    ]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 30
        while len(family([process.pid])) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        others = family([process.pid])[1:]
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 128 + signal.SIGTERM
    assert all(gone(pid) for pid in others)
