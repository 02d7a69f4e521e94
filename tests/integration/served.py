"""`kvlane serve` as an operator runs it, over simulated replicas, and a load that counts what fails."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, Protocol
from urllib.request import urlopen

import httpx
from kvlane.client import Client

from loadtests.engines import SECRET
from loadtests.processes import MODEL, descendants
from tests.integration.ray_local import alive, wait_until

STOP_DEADLINE_S = 60.0
PATIENCE_S = 15.0
"""What a Pod's terminationGracePeriodSeconds has beyond notice and grace."""
TOKENS = 40
_SAMPLE = re.compile(r"^(\w+(?:\{[^}]*\})?) (\S+)$", re.MULTILINE)
_READY = re.compile(r"^ready http=https?://\S+:(\d+) grpc=\S+:(\d+) admin=http://\S+:(\d+)$")


class Served:
    """A running `kvlane serve`."""

    process: subprocess.Popen[str]
    http = grpc = admin = 0
    """Its ports."""

    def __init__(
        self,
        folder: Path,
        addresses: list[dict[str, Any]],
        *,
        notice_s: float = 0.0,
        grace_s: float = 30.0,
        watched: bool = False,
    ) -> None:
        self.config = folder / "config.toml"
        self.notice_s = notice_s
        self.grace_s = grace_s
        self._watched = watched
        self._log = folder / "log"
        self._addresses = addresses

    def write(self, text: str = "", *, workers: int = 2, secret: str = "secret", http: int = 0, grpc: int = 0) -> None:
        """Its configuration file, with more TOML at the end."""
        lines = [f"workers = {workers}", f"reload_on_change = {str(self._watched).lower()}"]
        lines += ["[shutdown]", f"notice_s = {self.notice_s}", f"grace_s = {self.grace_s}"]
        lines += ["[http]", f"port = {http}", "[grpc]", f"port = {grpc}"]
        lines += ["[admin]", "enabled = true", "port = 0", "[membership]", 'kind = "static"']
        for address in self._addresses:
            lines += ["[[membership.replicas]]", f'name = "{address["replica"]}"', f"port = {address['lane']}"]
            lines.append(f'secret_file = "{self.config.with_name(secret)}"')
        self.config.write_text("\n".join([*lines, text]))

    def log(self) -> str:
        return self._log.read_text()

    def workers(self) -> set[int]:
        return set(descendants(self.process.pid))

    def wait(self) -> int:
        """Its exit status, once no process of it is left. A Pod that is patient for that long kills nobody
        who does as the configuration says."""
        workers = self.workers()
        status = self.process.wait(self.notice_s + self.grace_s + PATIENCE_S)
        wait_until(lambda: not any(map(alive, workers)), "no worker is left")
        assert "did not stop in time" not in self.log()
        return status

    def reload(self) -> None:
        """Asks for it, and waits until it has come to an end."""
        before = self._reloads()
        self.process.send_signal(signal.SIGHUP)
        wait_until(lambda: self._reloads() != before, "the reload has ended")

    def _reloads(self) -> dict[str, float]:
        return {name: value for name, value in self.metrics().items() if name.startswith("kvlane_reloads_total")}

    def metrics(self, port: int = 0) -> dict[str, float]:
        """All samples, by name and labels; from the public port unless another is given."""
        # httpx would take longer to make a client than the answer takes, and many look again and again.
        with urlopen(f"http://127.0.0.1:{port or self.http}/metrics", timeout=30) as answer:
            return {name: float(value) for name, value in _SAMPLE.findall(answer.read().decode())}


@contextmanager
def serving(
    folder: Path,
    addresses: list[dict[str, Any]],
    text: str = "",
    workers: int = 2,
    *,
    http: int = 0,
    grpc: int = 0,
    ready: bool = True,
    **lifecycle: Any,
) -> Iterator[Served]:
    """The command with that configuration; `lifecycle` as in `Served`. Unless it shall be `ready`, nothing but its
    HTTP port is known."""
    (folder / "secret").write_bytes(SECRET)
    command = [sys.executable, "-m", "router", "serve", "--config", str(folder / "config.toml")]
    with (folder / "log").open("w") as log:
        served = Served(folder, addresses, **lifecycle)
        served.write(text, workers=workers, http=http, grpc=grpc)
        served.process = process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        assert process.stdout is not None
        served.http, served.grpc = http, grpc
        if ready:
            told = _READY.match(process.stdout.readline())
            assert told is not None, served.log()
            served.http, served.grpc, served.admin = map(int, told.groups())
        yield served
    finally:
        started = [process.pid, *served.workers()]
        process.send_signal(signal.SIGINT)  # Without notice.
        try:
            process.wait(STOP_DEADLINE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()
        wait_until(lambda: not any(map(alive, started)), "no process is left")


def accepts(port: int) -> bool:
    """Whether somebody listens there."""
    with socket.socket() as client:
        client.settimeout(5)
        return client.connect_ex(("127.0.0.1", port)) == 0


def free_port() -> int:
    """One that nobody listens on just now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


@asynccontextmanager
async def streaming(port: int, tokens: int) -> AsyncIterator[AsyncIterator[str]]:
    """A stream in flight, on a connection of its own: its lines from the second on."""
    body = {"model": MODEL, "prompt": "x", "max_tokens": tokens, "stream": True}
    url = f"http://127.0.0.1:{port}/v1/completions"
    async with httpx.AsyncClient(timeout=60) as client, client.stream("POST", url, json=body) as answer:
        lines = answer.aiter_lines()
        await anext(lines)
        yield lines


async def last_line(lines: AsyncIterator[str]) -> str:
    """Of all that still comes."""
    return [line async for line in lines if line][-1]


class Front(Protocol):
    """What clients connect to."""

    http: int
    grpc: int


class Load:
    """What clients of all kinds got while it ran."""

    def __init__(self, served: Front, tokens: int = TOKENS) -> None:
        """Its streams are so long."""
        self.whole: Counter[str] = Counter()
        """Answers that came whole, by kind of client."""
        self.broken: list[str] = []
        self._served = served
        self._tokens = tokens
        self._over = False

    @asynccontextmanager
    async def running(self, *, streams: int = 8, callers: int = 4, newcomers: int = 4) -> AsyncIterator[None]:
        """Streams over kept HTTP connections, gRPC streams, and requests on a connection of their own each."""
        limits = httpx.Limits(max_connections=streams)
        async with (
            httpx.AsyncClient(timeout=60, limits=limits) as http,
            Client(f"127.0.0.1:{self._served.grpc}") as grpc,
        ):
            tasks = [asyncio.create_task(self._repeat("http", self._stream, http)) for _ in range(streams)]
            tasks += [asyncio.create_task(self._repeat("grpc", self._call, grpc)) for _ in range(callers)]
            tasks += [asyncio.create_task(self._repeat("new", self._come_and_go, None)) for _ in range(newcomers)]
            try:
                yield
            finally:
                self._over = True
                await asyncio.gather(*tasks)

    async def more(self, count: int = 20) -> None:
        """Returns once each kind of client got so many more answers."""
        wanted = {kind: self.whole[kind] + count for kind in tuple(self.whole)}
        async with asyncio.timeout(60):
            while any(self.whole[kind] < least for kind, least in wanted.items()):
                await asyncio.sleep(0.02)

    async def _repeat(self, kind: str, ask: Any, client: Any) -> None:
        self.whole[kind] += 0
        while not self._over:
            try:
                fault = await ask(client)
            except Exception as error:
                fault = repr(error)
            if fault:
                self.broken.append(f"{kind}: {fault}")
                await asyncio.sleep(0.05)
            else:
                self.whole[kind] += 1

    async def _stream(self, client: httpx.AsyncClient) -> str:
        body = {"model": MODEL, "prompt": "hello", "max_tokens": self._tokens, "stream": True}
        async with client.stream("POST", f"http://127.0.0.1:{self._served.http}/v1/completions", json=body) as answer:
            lines = [line async for line in answer.aiter_lines() if line]
        chunks = sum(line.startswith("data: {") for line in lines)
        whole = answer.status_code == 200 and lines[-1] == "data: [DONE]" and chunks >= self._tokens
        return "" if whole else f"{answer.status_code}, {chunks} chunks, {lines[-1:]}"

    async def _call(self, client: Client) -> str:
        deltas = [delta async for delta in client.generate(MODEL, "hello", max_tokens=self._tokens, timeout_s=60)]
        tokens = sum(len(delta.token_ids) for delta in deltas)
        return "" if tokens == self._tokens else f"{tokens} tokens"

    async def _come_and_go(self, _: None) -> str:
        body = json.dumps({"model": MODEL, "prompt": "hello", "max_tokens": 1}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {len(body)}\r\n"
        async with asyncio.timeout(30):
            reader, writer = await asyncio.open_connection("127.0.0.1", self._served.http)
            try:
                writer.write(head.encode() + b"content-type: application/json\r\n\r\n" + body)
                answer = await reader.read()
            finally:
                writer.close()
        return "" if answer.startswith(b"HTTP/1.1 200 ") else repr(answer[:80])
