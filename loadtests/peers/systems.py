"""The systems that are compared: how each is started over its own simulated replicas, and what it can do.

Every system has a process of replicas for itself, all with the same options: a router that is connected to replicas
takes part in their steps even where it has nothing to do, and would so be paid for by the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final

import msgspec

from loadtests.peers.base import Running, Setup, System, answers
from loadtests.peers.children import child, free_port
from loadtests.peers.clients import HttpClient
from loadtests.peers.environments import installed
from loadtests.peers.errors import PeerError
from loadtests.peers.grpc_client import GrpcClient
from loadtests.peers.load import Client
from loadtests.peers.ray_serve import HAPROXY, ray_serve
from loadtests.peers.replicas import Replicas
from loadtests.processes import replica_process, router


def _engines(setup: Setup) -> AbstractContextManager[tuple[int, list[dict[str, Any]]]]:
    order = Replicas(setup.replicas, setup.engine)
    return replica_process("loadtests.peers.replicas", msgspec.json.encode(order).decode())


@contextmanager
def _direct(setup: Setup) -> Iterator[Running]:
    with _engines(setup) as (pid, addresses):
        yield Running(HttpClient([address["http"] for address in addresses]), engine_pids=(pid,))


@contextmanager
def _kvlane(setup: Setup) -> Iterator[Running]:
    with ExitStack() as stack:
        engine, addresses = stack.enter_context(_engines(setup))
        try:
            pid, http, grpc = stack.enter_context(router(addresses, setup.policy))
        except KeyError as error:  # Its line on standard output did not come.
            raise PeerError("kvlane", "ended before it served; it has said why above") from error
        client: Client = HttpClient([http]) if setup.protocol == "http" else GrpcClient(grpc)
        yield Running(client, (pid,), (engine,))


Command = Callable[[Path, int, int, str, Sequence[str]], list[str]]
"""A command line, of the directory of its programs, its port, a port for its metrics, its policy and its workers."""


def _vllm_router(programs: Path, port: int, metrics: int, policy: str, workers: Sequence[str]) -> list[str]:
    return [
        str(programs / "vllm-router"),
        *("--host", "127.0.0.1", "--port", str(port)),
        *("--prometheus-host", "127.0.0.1", "--prometheus-port", str(metrics)),
        *("--policy", policy, "--log-level", "warning"),
        *("--worker-startup-check-interval", "1", "--worker-urls", *workers),
    ]


def _smg(programs: Path, port: int, metrics: int, policy: str, workers: Sequence[str]) -> list[str]:
    return [
        *(str(programs / "smg"), "launch", "--backend", "vllm", "--disable-tokenizer-autoload"),
        *("--host", "127.0.0.1", "--port", str(port)),
        *("--prometheus-host", "127.0.0.1", "--prometheus-port", str(metrics)),
        *("--policy", policy, "--log-level", "warn"),
        *("--worker-startup-check-interval", "1", "--worker-urls", *workers),
    ]


def _packaged(package: str, version: str, command: Command) -> Callable[[Setup], AbstractContextManager[Running]]:
    """Starts a router that comes as a package and relays to HTTP workers."""

    @contextmanager
    def start(setup: Setup) -> Iterator[Running]:
        programs = installed(package, version)
        with _engines(setup) as (engine, addresses):
            port = free_port()
            workers = [f"http://127.0.0.1:{address['http']}" for address in addresses]
            arguments = command(programs, port, free_port(), setup.policy, workers)
            with child(package, arguments, setup.log, lambda: answers(port)) as pid:
                yield Running(HttpClient([port]), (pid,), (engine,))

    return start


_THEIR_POLICIES: Final = {"cache_aware": "cache_aware", "round_robin": "round_robin"}

SYSTEMS: Final[dict[str, System]] = {
    "direct": System(_direct, protocols=("http", "grpc")),
    "kvlane": System(_kvlane, {"cache_aware": "cost", "round_robin": "round-robin"}, ("http", "grpc")),
    "vllm-router": System(_packaged("vllm-router", "0.1.17", _vllm_router), _THEIR_POLICIES),
    "smg": System(_packaged("smg", "1.13.0", _smg), _THEIR_POLICIES),
    "ray-serve": System(ray_serve("ray-serve"), quiet=False),
    "ray-serve-haproxy": System(ray_serve("ray-serve-haproxy", HAPROXY), quiet=False),
    "ray-serve-grpc": System(ray_serve("ray-serve-grpc"), protocols=("grpc",), quiet=False),
}
"""By the names that the command takes. The floor, `direct`, speaks HTTP whatever is asked for."""
