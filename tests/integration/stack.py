"""`kvlane up` as a user runs it: a process of its own with Ray, replicas and router, watched from outside."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from loadtests.processes import descendants
from tests.integration.ray_local import alive, wait_until

START_DEADLINE_S = 300.0
STOP_DEADLINE_S = 120.0
_REPLICA = re.compile(r'^kvlane_replica_running\{[^}]*?replica="([^"]+)"', re.MULTILINE)
_SAMPLE = re.compile(r"^(\w+)(?:\{[^}]*\})? (\S+)$", re.MULTILINE)
_READY = re.compile(r"^ready http=(http://\S+) grpc=(\S+)$", re.MULTILINE)


class Stack:
    """A running `kvlane up`."""

    def __init__(
        self, process: subprocess.Popen[bytes], arguments: tuple[str, ...], log: Path, url: str, grpc: str
    ) -> None:
        self.process = process
        self._arguments = arguments
        self._log = log
        self.http = url
        self.grpc = grpc
        # One kept connection: a client that is built for each look takes longer than what is looked for.
        self._scraper = http.client.HTTPConnection(url.removeprefix("http://"), timeout=60)

    def close(self) -> None:
        self._scraper.close()

    def log(self) -> str:
        """What it has printed so far."""
        return self._log.read_text(errors="replace")

    def metric(self, name: str) -> float:
        """The sum of a metric's samples, all labels together."""
        return self.metrics().get(name, 0.0)

    def metrics(self) -> dict[str, float]:
        """All metrics, the samples of each summed over its labels."""
        sums: dict[str, float] = defaultdict(float)
        for name, value in _SAMPLE.findall(self._scraped()):
            sums[name] += float(value)
        return sums

    def _scraped(self) -> str:
        self._scraper.request("GET", "/metrics")
        return self._scraper.getresponse().read().decode()

    def replica_names(self) -> set[str]:
        """The replicas that the router has a lane to, by the names that its answers bear."""
        return set(_REPLICA.findall(self._scraped()))

    def in_engines(self) -> int:
        """How many requests the engines run or have waiting, as their last steps said."""
        metrics = self.metrics()
        return int(metrics["kvlane_replica_running"] + metrics["kvlane_replica_waiting"])

    def held(self) -> tuple[float, float, float]:
        """How many requests there are in the router, on its lanes, and in the engines."""
        metrics = self.metrics()
        engines = metrics["kvlane_replica_running"] + metrics["kvlane_replica_waiting"]
        return metrics["kvlane_streams_in_flight"], metrics["kvlane_replica_leases"], engines

    def holds(self, count: int) -> bool:
        """Whether there are so many of them everywhere."""
        return self.held() == (count, count, count)

    def idle(self) -> bool:
        """Whether no request is left: not in the router, not on a lane, not in an engine."""
        return self.holds(0)

    def replicas(self) -> list[int]:
        """The processes of the engine replicas."""
        return [pid for pid in descendants(self.process.pid) if b"ServeReplica" in command_line(pid)]

    def deploy(self, **changed: object) -> None:
        """Runs `kvlane deploy` on its Ray cluster, the first engine's options changed; returns once all is ready."""
        words = b"\0".join(command_line(pid) for pid in descendants(self.process.pid))
        address = next(found[1].decode() for found in re.finditer(rb"--gcs-address=([^ \0]+)", words))
        options = {f"KVLANE_ENGINES_0_{name.upper()}": json.dumps(value) for name, value in changed.items()}
        subprocess.run(
            [sys.executable, "-m", "router", "deploy", *self._arguments],
            env=os.environ | options | {"KVLANE_MEMBERSHIP_RAY_ADDRESS": address, "RAY_AUTH_MODE": "token"},
            check=True,
            timeout=START_DEADLINE_S,
        )

    def replica_logs(self) -> dict[str, str]:
        """What the processes of Ray's workers, the engine replicas among them, have written to their logs, by file."""
        (head,) = [pid for pid in descendants(self.process.pid) if b"gcs_server" in command_line(pid).split(b"\0")[0]]
        flag = b"--log_dir="
        words = command_line(head).split(b"\0")
        (folder,) = [Path(word.removeprefix(flag).decode()) for word in words if word.startswith(flag)]
        files = [*folder.glob("worker-*.err"), *folder.glob("worker-*.out"), *(folder / "serve").rglob("*.log")]
        return {str(file.relative_to(folder)): file.read_text(errors="replace") for file in files}

    def stop(self) -> int:
        """Ends it by Ctrl-C; returns its exit status once no process of it is left."""
        started = [self.process.pid, *descendants(self.process.pid)]
        self.process.send_signal(signal.SIGINT)
        status = self.process.wait(STOP_DEADLINE_S)
        wait_until(lambda: not any(map(alive, started)), "no process is left")
        return status


def command_line(pid: int) -> bytes:
    """A process's words, each ended by a zero byte; nothing where it has ended meanwhile."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


@contextmanager
def kvlane_up(log: Path, *arguments: str) -> Iterator[Stack]:
    """Runs `kvlane up` on free ports; its output goes to the file `log`."""
    # Where the tests run in the background, interrupts are ignored, and so they would be here.
    command = [
        "env",
        "--default-signal=INT",
        sys.executable,
        "-m",
        "router",
        "up",
        "--http",
        "127.0.0.1:0",
        "--grpc",
        "127.0.0.1:0",
        *arguments,
    ]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        deadline = time.monotonic() + START_DEADLINE_S
        while "serving; Ctrl-C stops" not in (text := log.read_text(errors="replace")):
            if process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"kvlane up did not come up:\n{text[-4000:]}")
            time.sleep(0.2)
        ready = _READY.search(text)
        assert ready is not None, text
        stack = Stack(process, arguments, log, ready[1], ready[2])
        try:
            yield stack
        finally:
            stack.close()
    finally:
        if process.poll() is None:
            stopping = [process.pid, *descendants(process.pid)]
            process.send_signal(signal.SIGINT)
            try:
                process.wait(STOP_DEADLINE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            wait_until(lambda: not any(map(alive, stopping)), "no process is left")
