"""Ray Serve in its three ways in: its own HTTP proxy, HAProxy, and its gRPC proxy; the same engines as replicas.

What counts as the router side is what stands in a request's way, the proxies; not the controller, nor Ray's own
processes, which have more to do than to relay.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Final

import msgspec

from loadtests.peers.base import Running, Setup, answers, answers_grpc
from loadtests.peers.children import child, free_port
from loadtests.peers.clients import HttpClient
from loadtests.peers.cost import family
from loadtests.peers.errors import PeerError
from loadtests.peers.grpc_client import GrpcClient
from loadtests.peers.load import Client
from loadtests.peers.replicas import EngineOrder

START_TIMEOUT_S: Final = 240.0
HAPROXY: Final = {"RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"}
APP: Final = "sim"
_METADATA: Final = (("application", APP),)
# Names of processes as the kernel keeps them, in 15 characters.
_PROXIES: Final = frozenset({"ray::ProxyActor", "ray::HAProxyManager"[:15]})
_REPLICAS: Final = frozenset({"ray::ServeReplica"[:15]})


class Order(msgspec.Struct, frozen=True):
    """What `loadtests.peers.ray_app` is to serve."""

    protocol: str
    port: int
    replicas: int
    engine: EngineOrder
    temp_dir: str
    """For Ray's own files."""


def ray_serve(name: str, env: Mapping[str, str] | None = None) -> Callable[[Setup], AbstractContextManager[Running]]:
    """Starts a Ray of its own with the application on it."""

    @contextmanager
    def start(setup: Setup) -> Iterator[Running]:
        port = free_port()
        with tempfile.TemporaryDirectory(prefix="peers-", ignore_cleanup_errors=True) as temp_dir:
            order = Order(setup.protocol, port, setup.replicas, setup.engine, temp_dir)
            command = [sys.executable, "-m", "loadtests.peers.ray_app", msgspec.json.encode(order).decode()]

            def serves() -> bool:
                return answers_grpc(port, metadata=_METADATA) if setup.protocol == "grpc" else answers(port)

            with child(
                name,
                command,
                setup.log,
                serves,
                env=_own_places(temp_dir, env),
                timeout_s=START_TIMEOUT_S,
            ) as pid:
                client: Client = (
                    GrpcClient(port, metadata=_METADATA) if setup.protocol == "grpc" else HttpClient([port])
                )
                yield Running(client, _named(name, pid, _PROXIES), _named(name, pid, _REPLICAS))

    return start


def _own_places(temp_dir: str, env: Mapping[str, str] | None) -> dict[str, str]:
    """HAProxy's files and ports would else be those of all clusters on a machine."""
    return {
        **(env or {}),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": f"{temp_dir}/haproxy.cfg",
        "RAY_SERVE_HAPROXY_SOCKET_PATH": f"{temp_dir}/haproxy.sock",
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": temp_dir,
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": f"{temp_dir}/haproxy-state",
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(free_port()),
        "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(free_port()),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(free_port()),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(free_port()),
    }


def _named(name: str, pid: int, names: frozenset[str]) -> tuple[int, ...]:
    """Those of a cluster's processes that have one of the names. Raises `PeerError` where there is none."""
    found = tuple(each for each in family([pid]) if Path(f"/proc/{each}/comm").read_text().strip() in names)
    if not found:
        raise PeerError(name, f"has none of the processes {', '.join(sorted(names))}")
    return found
