"""A Ray head, two engine hosts and two router hosts, each a network namespace, with Ray's token and TLS on.

The router hosts run what the router's container runs: `kvlane serve` as first process and as an unprivileged user over
a read-only file system, joining Ray by itself. Only the programs, the token and the certificates are shared; each host
has a certificate for its own address.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import httpx

from loadtests.certificates import Authority
from tests.hosts.client import Inside, Load, inside
from tests.hosts.network import ROOT, Container, Host, Network, network

DEADLINE_S: Final = 240.0
"""For all that other processes have to do first; the machine may be busy."""
REPLICAS: Final = 4
PER_HOST: Final = 2
PING_INTERVAL_S, PING_TIMEOUT_S = 0.5, 3.0
TOKENS: Final = 120
CLIENTS: Final = 3
RAY: Final = (sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats")
OUTLIVE: Final = {"RAY_gcs_rpc_server_reconnect_timeout_s": "600"}
"""For nodes: to wait so long for a head that is away, and not Ray's 60 s."""
SOON: Final = {"RAY_health_check_period_ms": "1000", "RAY_health_check_initial_delay_ms": "1000"}
"""For the head: nodes that refuse its calls are taken for dead soon. What does not answer has its usual 10 s a call."""
PORTS: Final = [
    "--runtime-env-agent-port=6383",
    "--dashboard-agent-grpc-port=6384",
    "--dashboard-agent-listen-port=52365",
    "--metrics-export-port=6385",
]
"""Given, so that a node need not wait until its agents have found some: on a busy machine it gives up."""
STARTED: Final = "Ray runtime started"
AGAIN_AND_AGAIN: Final = ("sh", "-c", 'while :; do "$@"; sleep 1; done', "sh")
"""Starts a command again that ends, as Kubernetes does with containers."""
_SAMPLE = re.compile(r"^(\w+(?:\{[^}]*\})?) (\S+)$", re.MULTILINE)

ROUTER = """
[http]
host = "0.0.0.0"
[grpc]
host = "0.0.0.0"
[membership]
join = true
ray_address = "{head}:6379"
relist_interval_s = 1.0
[policy]
name = "round-robin"  # However few clients there are, each router sends to all replicas.
[lane]
ping_interval_s = {ping_interval_s}
ping_timeout_s = {ping_timeout_s}
reconnect_max_s = 1.0
"""
ENGINES = """
[membership]
ray_address = "{head}:6379"
"""
ENGINE = """
[[engines]]
name = "sim"
kind = "sim"
replicas = {replicas}
num_cpus = 1.0
health_check_period_s = 2.0
[engines.args]
step_base_ms = 20.0
"""
RECORDS = """
import asyncio, json, sys
from router.membership.directory_client import DirectoryAway, DirectoryClient, join
from router.options import MembershipOptions

async def main():
    options = MembershipOptions(ray_address=sys.argv[1])
    client = DirectoryClient(options.ray_namespace, lambda: join(options))
    while True:
        try:
            listing = await client.watch("", -1, 0)
            break
        except DirectoryAway:
            await asyncio.sleep(0.5)
    print(json.dumps({name: record.host for name, record in listing.records.items()}))

asyncio.run(main())
"""


def wait_until(true: Callable[[], object], what: str, logs: Callable[[], str] = lambda: "") -> None:
    """Looks again and again until it is true."""
    deadline = time.monotonic() + DEADLINE_S
    while not true():
        assert time.monotonic() < deadline, f"not so within {DEADLINE_S:g} s: {what}\n{logs()}"
        time.sleep(0.1)


def _place(host: Host, name: str, text: str) -> None:
    (host.temp / name).unlink(missing_ok=True)
    (host.temp / name).write_text(text)
    (host.temp / name).chmod(0o444)


class Router:
    """A host with a router on it."""

    def __init__(self, host: Host, container: Container) -> None:
        self.host = host
        self.container = container

    @property
    def address(self) -> str:
        return self.host.address


class World:
    """All hosts; the one place that starts and stops what runs there."""

    def __init__(self, net: Network, clients: Inside, client: Host) -> None:
        self.clients = clients
        self._client = client
        self.head, self.engines = net.host("head"), [net.host("engines 1"), net.host("engines 2")]
        self._router_hosts = [net.host("router 1"), net.host("router 2")]
        self._heads = 0
        self._env = self._environment()
        self._put("token", secrets.token_hex(32))
        self._certify()
        self._write("router.toml", ROUTER + ENGINE)
        self._write("engines.toml", ENGINES + ENGINE)
        self.start_head()
        for host in self.engines:
            self.start_engines(host)
        self.routers = [Router(host, self._start_router(host)) for host in self._router_hosts]
        self._deploy()
        for router in self.routers:
            self.wait_for_replicas(router, REPLICAS)

    def _environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "KVLANE_"))}
        return {
            **kept,
            "HOME": "/tmp",
            "PYTHONPATH": f"{ROOT}:{ROOT / 'protos'}",
            "PYTHONDONTWRITEBYTECODE": "1",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": "/tmp/token",
            "RAY_USE_TLS": "1",
            "RAY_TLS_SERVER_CERT": "/tmp/node.pem",
            "RAY_TLS_SERVER_KEY": "/tmp/node.key",
            "RAY_TLS_CA_CERT": "/tmp/ca.pem",
        }

    def _write(self, name: str, text: str) -> None:
        """A file in /tmp of each host."""
        values = {"head": self.head.address, "replicas": REPLICAS}
        values |= {"ping_interval_s": PING_INTERVAL_S, "ping_timeout_s": PING_TIMEOUT_S}
        self._put(name, text.format(**values))

    def _put(self, name: str, text: str) -> None:
        for host in self._hosts():
            _place(host, name, text)

    def _certify(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            authority = Authority(Path(folder))
            self._put("ca.pem", Path(authority.ca).read_text())
            for host in self._hosts():
                pair = authority.issue("node", host.address, "127.0.0.1")
                _place(host, "node.pem", Path(pair.cert).read_text())
                _place(host, "node.key", Path(pair.key).read_text())

    def _hosts(self) -> list[Host]:
        return [self.head, *self.engines, *self._router_hosts, self._client]

    # What runs where.

    def start_head(self) -> None:
        """Its state is on its disk; the rest of what a head before it had is gone."""
        self._heads += 1
        flags = ["--head", "--port=6379", f"--node-ip-address={self.head.address}", "--num-cpus=0", "--num-gpus=0"]
        flags += ["--object-store-memory=80000000", "--include-dashboard=false", "--include-log-monitor=false"]
        flags += [f"--temp-dir=/tmp/ray{self._heads}", *PORTS]
        state = {"RAY_gcs_storage": "rocksdb", "RAY_gcs_storage_path": "/tmp/gcs", **SOON}
        (self.head.temp / "gcs").mkdir(exist_ok=True)
        before = self.head.log().count(STARTED)
        self.head.run([*AGAIN_AND_AGAIN, *RAY, *flags], {**self._env, **state})
        wait_until(lambda: self.head.log().count(STARTED) > before, "the head is up", self.head.log)

    def start_engines(self, host: Host) -> None:
        """A node for two replicas, which waits long for a head that is away."""
        flags = [f"--address={self.head.address}:6379", f"--node-ip-address={host.address}"]
        flags += [f"--num-cpus={PER_HOST}", "--num-gpus=0", "--object-store-memory=80000000"]
        flags += ["--include-log-monitor=false", *PORTS]
        host.run([*AGAIN_AND_AGAIN, *RAY, *flags], {**self._env, **OUTLIVE})

    def _start_router(self, host: Host, token: str = "/tmp/token") -> Container:
        command = [sys.executable, "-m", "router", "serve", "--config", "/tmp/router.toml"]
        return host.run(command, {**self._env, "RAY_AUTH_TOKEN_PATH": token}, confined=True)

    @contextmanager
    def stranger(self, token: str) -> Iterator[Router]:
        """A router that has another token, on the clients' host."""
        self._put("strange", token)
        router = Router(self._client, self._start_router(self._client, "/tmp/strange"))
        try:
            yield router
        finally:
            router.container.stop(DEADLINE_S)

    def _deploy(self) -> None:
        command = [sys.executable, "-m", "router", "deploy", "--no-wait", "--config", "/tmp/engines.toml"]
        self.head.call(command, self._env, DEADLINE_S)

    def records(self) -> dict[str, str]:
        """All replicas' names with their hosts' addresses, from the directory."""
        command = [sys.executable, "-c", RECORDS, f"{self.head.address}:6379"]
        found: dict[str, str] = json.loads(self.head.call(command, self._env, DEADLINE_S).splitlines()[-1])
        return found

    # What routers say.

    def get(self, router: Router, path: str) -> httpx.Response | None:
        """What it answers on its public port; None where it does not."""
        return self.clients.run(_get(f"http://{router.address}:8000{path}"))

    def replicas(self, router: Router) -> int:
        """How many are ready, as it knows."""
        answer = self.get(router, "/metrics")
        samples = dict(_SAMPLE.findall(answer.text)) if answer is not None else {}
        return int(float(samples.get('kvlane_replicas_ready{model="sim"}', 0)))

    def wait_for_replicas(self, router: Router, count: int) -> None:
        wait_until(lambda: self.replicas(router) == count, f"{router.host.name} has {count} replicas", router.host.log)

    @contextmanager
    def load(self, tokens: int = TOKENS) -> Iterator[Load]:
        """Clients at both routers meanwhile; afterwards all their streams have ended."""
        load = Load([router.address for router in self.routers], tokens)
        running = self.clients.start(load.run(CLIENTS))
        try:
            yield load
        finally:
            load.end()
            running.result(DEADLINE_S)


async def _get(url: str) -> httpx.Response | None:
    try:
        async with httpx.AsyncClient(timeout=10) as client:
            return await client.get(url)
    except httpx.HTTPError:
        return None


@contextmanager
def world() -> Iterator[World]:
    """It, once all replicas are ready at both routers."""
    with network() as net:
        client = net.host("clients")
        with inside(client.namespace) as clients:
            yield World(net, clients, client)
