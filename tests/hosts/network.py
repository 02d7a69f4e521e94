"""Hosts on one machine: network namespaces, each with an address on a common bridge, and wires that can be broken.

Rule: everything bears a name with this process's id in it, so that runs do not meet and what a run left behind that
was killed is known for that, and taken away by the next one. Wires are processes; they and their devices end with the
test's own process.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from shlex import quote

ROOT = Path(__file__).resolve().parents[2]
PREFIX = "kvh"
_OURS = re.compile(rf"^{PREFIX}(\d+)[a-z]")
_UNSHARE = ("unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
_NO_CAPABILITIES = ("setpriv", "--no-new-privs", "--bounding-set=-all", "--inh-caps=-all")
_NO_ROOT = ("--reuid=65532", "--regid=65532", "--clear-groups")
NETWORK = "10.213.77"
"""Its hosts are not reachable from outside: the bridge has no address."""
TEMP = Path("/tmp")
END_S = 10.0


def missing() -> str:
    """Why hosts cannot be made here; empty where they can."""
    if os.geteuid() != 0:
        return "needs root, to make network namespaces"
    if absent := [command for command in ("ip", "unshare", "setpriv") if shutil.which(command) is None]:
        return f"needs {', '.join(absent)} (Debian: iproute2, util-linux)"
    if not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        return "needs /dev/net/tun"
    tried = subprocess.run(["ip", "netns", "add", f"{PREFIX}{os.getpid()}t"], capture_output=True, text=True)
    if tried.returncode:
        return f"network namespaces are not allowed here: {tried.stderr.strip()}"
    _ip("netns", "del", f"{PREFIX}{os.getpid()}t")
    return ""


def unprivileged() -> list[str]:
    """What takes a command's rights away; as much as leaves it the interpreter, which may be in root's own folder."""
    folders = Path(sys.executable).resolve().parents
    return [*_NO_CAPABILITIES, *(_NO_ROOT if all(folder.stat().st_mode & 0o001 for folder in folders) else ())]


class Container:
    """A process with a file system view and process numbers of its own, in which it is the first."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    @property
    def pid(self) -> int:
        """Of its first process, as seen from here; 0 while or after there is none."""
        path = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children")
        try:
            return int((path.read_text().split() or ["0"])[0])
        except OSError:
            return 0

    def ended(self) -> bool:
        return self._process.poll() is not None

    def stop(self, timeout_s: float) -> int:
        """Asks its first process to end, as Kubernetes does; returns its exit status."""
        os.kill(self.pid, signal.SIGTERM)
        return self._process.wait(timeout_s)


class Host:
    """A network namespace with one address, behind a wire to the bridge."""

    def __init__(self, name: str, namespace: str, address: str, wire: subprocess.Popen[str]) -> None:
        self.name = name
        self.address = address
        self.temp = TEMP / namespace
        """A folder of its own; short, since the names of Unix sockets in it may have 107 bytes."""
        self.namespace = namespace
        self._wire = wire
        self._started: list[subprocess.Popen[bytes]] = []

    def run(self, command: Sequence[str], env: dict[str, str], *, confined: bool = False) -> Container:
        """Starts a container that has this command as its first process; what it prints goes to the host's log.

        A `confined` one has no rights: no capabilities, a root file system that cannot be written to, and another user
        than root where others may run this Python.
        """
        with (self.temp / "log").open("ab") as log:
            process = subprocess.Popen(
                ["ip", "netns", "exec", self.namespace, *_UNSHARE, *self._inside(confined), *command],
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self._started.append(process)
        return Container(process)

    def call(self, command: Sequence[str], env: dict[str, str], timeout_s: float) -> str:
        """Runs a command to its end, beside the containers, and returns what it printed."""
        full = ["ip", "netns", "exec", self.namespace, "unshare", "--mount", *self._inside(False), *command]
        done = subprocess.run(full, env=env, capture_output=True, text=True, timeout=timeout_s)
        assert done.returncode == 0, f"{self.name}: {command[:4]}: {done.stdout}\n{done.stderr}"
        return done.stdout

    def _inside(self, confined: bool) -> list[str]:
        """What runs before a command: its /tmp is the host's, and hides those of the others. What all need of the
        machine's own /tmp, the checkout or its environment where they lie there, is found at its place."""
        script = "".join(f"mkdir -p {at} && mount --bind {path} {at} && " for path, at in self._shown())
        script += 'mount --rbind "$1" /tmp && shift'
        if confined:
            script += " && mount -o remount,bind,ro / && exec " + " ".join(unprivileged()) + ' "$@"'
        return ["sh", "-ec", script + ' && exec "$@"', "sh", str(self.temp)]

    def _shown(self) -> list[tuple[str, str]]:
        """Folders in the machine's /tmp, and where they come to be in the host's."""
        places = [ROOT, Path(sys.prefix)] if not Path(sys.prefix).is_relative_to(ROOT) else [ROOT]
        return [
            (quote(str(place)), quote(str(self.temp / place.relative_to(TEMP))))
            for place in places
            if place.is_relative_to(TEMP)
        ]

    def log(self) -> str:
        """What its processes printed."""
        path = self.temp / "log"
        return path.read_text(errors="replace") if path.exists() else ""

    def pids(self) -> list[int]:
        return [int(pid) for pid in _ip("netns", "pids", self.namespace).split()]

    def link(self, *, sends: bool = True, hears: bool = True, delay_s: float = 0.0) -> None:
        """What its wire does from now on: carry what it sends, and what others send it, each so late."""
        assert self._wire.stdin is not None
        assert self._wire.stdout is not None
        self._wire.stdin.write(json.dumps({"cut": [not sends, not hears], "delay_s": delay_s}) + "\n")
        self._wire.stdin.flush()
        assert self._wire.stdout.readline() == "done\n", f"the wire of {self.name} has ended"

    def crash(self) -> None:
        """Ends all its processes at once, as a machine does that loses its power: nobody is told over the wire."""
        self.link(sends=False, hears=False)
        for pid in self.pids():
            _kill(pid, signal.SIGKILL)
        deadline = time.monotonic() + END_S
        while self.pids() and time.monotonic() < deadline:
            time.sleep(0.05)
        for process in self._started:
            process.wait()
        self._started.clear()


class Network:
    """The hosts of one test run."""

    def __init__(self, number: int) -> None:
        self._number = number
        self._hosts: list[Host] = []
        self._bridge = f"{PREFIX}{number}br"
        _ip("link", "add", self._bridge, "type", "bridge")
        _ip("link", "set", self._bridge, "up")

    def host(self, name: str) -> Host:
        """One more."""
        place = len(self._hosts)
        mark = f"{PREFIX}{self._number}{chr(ord('a') + place)}"  # Names of devices have up to 15 characters.
        ends = f"{mark}0", f"{mark}1"
        wire = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("wire.py")), *ends],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert wire.stdout is not None
        assert wire.stdout.readline() == "ready\n", "the wire could not be made"
        address = f"{NETWORK}.{place + 1}"
        _ip("netns", "add", mark)
        _ip("link", "set", ends[0], "netns", mark)
        for command in (
            ("link", "set", "lo", "up"),
            ("addr", "add", f"{address}/24", "dev", ends[0]),
            ("link", "set", ends[0], "up"),
        ):
            _ip("-n", mark, *command)
        _ip("link", "set", ends[1], "master", self._bridge)
        _ip("link", "set", ends[1], "up")
        host = Host(name, mark, address, wire)
        host.temp.mkdir()
        host.temp.chmod(0o1777)
        self._hosts.append(host)
        return host

    def close(self) -> None:
        """Ends all processes of all hosts."""
        for host in self._hosts:
            host.crash()
            wire = host._wire
            for pipe in (wire.stdin, wire.stdout):
                if pipe is not None:
                    pipe.close()
            wire.wait()
        sweep(self._number)


@contextmanager
def network() -> Iterator[Network]:
    """A network; nothing of it is left afterwards, nor of runs that were killed."""
    for number in _numbers():
        if not Path(f"/proc/{number}").exists():
            sweep(number)
    made = Network(os.getpid())
    try:
        yield made
    finally:
        made.close()


def sweep(number: int) -> None:
    """Takes away what bears the number."""
    for name in _namespaces():
        if _number(name) == number:
            for pid in _ip("netns", "pids", name).split():
                _kill(int(pid), signal.SIGKILL)
            _ip("netns", "del", name)
    for device in Path("/sys/class/net").iterdir():
        if _number(device.name) == number:
            _ip("link", "del", device.name)
    for folder in TEMP.glob(f"{PREFIX}{number}[a-z]"):
        shutil.rmtree(folder, ignore_errors=True)


def _numbers() -> set[int]:
    names = [*_namespaces(), *(path.name for path in (*Path("/sys/class/net").iterdir(), *TEMP.glob(f"{PREFIX}*")))]
    return {number for name in names if (number := _number(name))}


def _number(name: str) -> int:
    found = _OURS.match(name)
    return int(found.group(1)) if found else 0


def _namespaces() -> list[str]:
    return [line.split()[0] for line in _ip("netns", "list").splitlines() if line.strip()]


def _kill(pid: int, how: signal.Signals) -> None:
    try:
        os.kill(pid, how)
    except ProcessLookupError:
        pass


def _ip(*arguments: str) -> str:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr.strip()}"
    return done.stdout
