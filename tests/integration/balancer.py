"""HAProxy in front of several routers, as strict as it can be: it hides no failure by trying again."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.integration.ray_local import wait_until
from tests.integration.served import accepts, free_port

needs_haproxy = pytest.mark.skipif(shutil.which("haproxy") is None, reason="needs haproxy; `make system` installs it")

_CONFIG = """\
global
    maxconn 4000
defaults
    timeout connect 10s
    timeout client 120s
    timeout server 120s
    timeout check 10s
    retries 0
    option httpchk GET /readyz
    http-check expect status 200
    default-server check inter 200ms fastinter 200ms fall 1 rise 1
frontend http
    mode http
    bind 127.0.0.1:{http}
    default_backend http
backend http
    mode http
    http-reuse always
{http_servers}
frontend grpc_l4
    mode tcp
    bind 127.0.0.1:{grpc_l4}
    default_backend grpc_l4
backend grpc_l4
    mode tcp
{l4_servers}
frontend grpc_l7
    mode http
    bind 127.0.0.1:{grpc_l7} proto h2
    default_backend grpc_l7
backend grpc_l7
    mode http
{l7_servers}
"""


class Balancer:
    """Its ports: HTTP, gRPC as plain TCP connections, and gRPC as HTTP/2 streams each of which it places by itself.

    A router that is not ready gets no new connections, and no new requests on old ones; what is in flight there stays.
    """

    def __init__(self) -> None:
        self.http, self.grpc_l4, self.grpc_l7 = free_port(), free_port(), free_port()

    def config(self, routers: Sequence[tuple[int, int]]) -> str:
        """For routers with these HTTP and gRPC ports."""

        def servers(line: str) -> str:
            return "\n".join(
                f"    server router-{number} 127.0.0.1:" + line.format(http=http, grpc=grpc)
                for number, (http, grpc) in enumerate(routers)
            )

        return _CONFIG.format(
            http=self.http,
            grpc_l4=self.grpc_l4,
            grpc_l7=self.grpc_l7,
            http_servers=servers("{http}"),
            l4_servers=servers("{grpc} port {http}"),
            l7_servers=servers("{grpc} proto h2 port {http} check-proto h1"),
        )


@contextmanager
def balancing(folder: Path, routers: Sequence[tuple[int, int]]) -> Iterator[Balancer]:
    """HAProxy over routers with these HTTP and gRPC ports, once it listens."""
    balancer = Balancer()
    config = folder / "haproxy.cfg"
    config.write_text(balancer.config(routers))
    with (folder / "haproxy.log").open("w") as log:
        process = subprocess.Popen(["haproxy", "-db", "-f", str(config)], stdout=log, stderr=log)
    try:
        wait_until(lambda: process.poll() is not None or accepts(balancer.grpc_l7), "HAProxy listens")
        assert process.poll() is None, (folder / "haproxy.log").read_text()
        yield balancer
    finally:
        process.kill()
        process.wait()
