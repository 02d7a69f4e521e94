"""Where a router's own Ray node is reached: its address, and its ports.

Rule: the ports are fixed, so that a firewall or NetworkPolicy can name them, and a router's workers can see whether
their node is up without asking Ray, whose calls wait for it.
"""

from __future__ import annotations

import os
import socket
from typing import Final, NamedTuple

from router.options import MembershipOptions

NODE_MANAGER: Final = 6381
OBJECT_MANAGER: Final = 6382
RUNTIME_ENV_AGENT: Final = 6383
DASHBOARD_AGENT_GRPC: Final = 6384
DASHBOARD_AGENT_HTTP: Final = 52365
METRICS_EXPORT: Final = 6385
FIRST_WORKER: Final = 10002
LAST_WORKER: Final = 10101
"""One port for each router process, those of a reload included, and for each that Ray may start here."""

PORTS: Final = {
    "node-manager-port": NODE_MANAGER,
    "object-manager-port": OBJECT_MANAGER,
    "runtime-env-agent-port": RUNTIME_ENV_AGENT,
    "dashboard-agent-grpc-port": DASHBOARD_AGENT_GRPC,
    "dashboard-agent-listen-port": DASHBOARD_AGENT_HTTP,
    "metrics-export-port": METRICS_EXPORT,
    "min-worker-port": FIRST_WORKER,
    "max-worker-port": LAST_WORKER,
}
"""By the names that `ray start` gives them."""

ROLE: Final = "kvlane-role"
ROUTER: Final = "router"
"""The label that such a node bears, and its value: what belongs to the whole cluster is kept off it."""
ENGINE: Final = "engine"
"""Its value at nodes of engines that an autoscaler may take away, where somebody gave it to them."""


class Address(NamedTuple):
    """Of one TCP port."""

    host: str
    port: int


def parse(text: str) -> Address | None:
    """``HOST:PORT`` taken apart, brackets around an IPv6 address removed; None for anything else."""
    host, _, port = text.rpartition(":")
    return Address(host.strip("[]"), int(port)) if host and port.isdigit() and int(port) < 1 << 16 else None


def head(options: MembershipOptions) -> Address | None:
    """Of the cluster's head; None where the configuration does not tell."""
    address = options.ray_address
    return parse(os.environ.get("RAY_ADDRESS", address) if address == "auto" else address)


def node_ip(options: MembershipOptions) -> str:
    """This node's address: the configured one, else that from which packets to the head go.

    Nothing is sent. Raises `OSError` where the head's name is not known or no route leads there.
    """
    if options.node_ip:
        return options.node_ip
    there = head(options)
    if there is None:
        raise OSError(f"{options.ray_address!r} is no HOST:PORT")
    family, kind, protocol, _, address = socket.getaddrinfo(*there, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(address)
        found: str = probe.getsockname()[0]
        return found
