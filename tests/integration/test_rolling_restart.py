"""Two routers behind a load balancer, restarted one after the other under load: nobody notices."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path
from typing import Any

import pytest

from loadtests.processes import engines
from tests.integration.balancer import Balancer, balancing, needs_haproxy
from tests.integration.ray_local import wait_until
from tests.integration.served import Load, Served, free_port, serving

pytestmark = [pytest.mark.slow, needs_haproxy]

NOTICE_S = 3.0
"""Some times what the balancer takes to notice, on a machine that is busy with other things."""
GRACE_S = 60.0
LONG = 800
"""Tokens of streams that go on through the notice and far into the grace: four seconds."""


@pytest.fixture(scope="module")
def addresses() -> Iterator[list[dict[str, Any]]]:
    """Two simulated replicas that take 5 ms for a token."""
    with engines(2, {"step_base_ms": 5.0, "prefill_ms_per_token": 0.0}) as (_, found):
        yield found


class Router:
    """One of the two; it comes back at the same ports."""

    def __init__(self, folder: Path, addresses: list[dict[str, Any]], workers: int) -> None:
        folder.mkdir()
        self._workers = workers
        self.ports = free_port(), free_port()
        self._folder = folder
        self._addresses = addresses
        self._running = ExitStack()

    def start(self) -> None:
        http, grpc = self.ports
        timing = {"notice_s": NOTICE_S, "grace_s": GRACE_S}
        self.served: Served = self._running.enter_context(
            serving(self._folder, self._addresses, "", self._workers, http=http, grpc=grpc, **timing)
        )

    def restart(self) -> None:
        """As a rolling update does; returns once it serves again, so that the next one may go."""
        self.served.process.terminate()
        assert self.served.wait() == 0
        assert "are cut" not in self.served.log()
        assert "cut " not in self.served.log()
        self.close()
        self.start()
        wait_until(lambda: {"http", "grpc"} <= self._asked(), "the balancer sends it requests again")

    def _asked(self) -> set[str]:
        """The protocols of which it has answered requests since it began."""
        metrics = self.served.metrics()
        return {rpc for rpc in ("http", "grpc") if metrics.get(f'kvlane_requests_total{{outcome="ok",rpc="{rpc}"}}')}

    def close(self) -> None:
        self._running.close()


class Front:
    def __init__(self, http: int, grpc: int) -> None:
        self.http = http
        self.grpc = grpc


@pytest.fixture
def routers(tmp_path: Path, addresses: list[dict[str, Any]]) -> Iterator[list[Router]]:
    found = [Router(tmp_path / f"with {workers} workers", addresses, workers) for workers in (1, 2)]
    try:
        for each in found:
            each.start()
        yield found
    finally:
        for each in found:
            each.close()


def loads(balancer: Balancer) -> list[Load]:
    """Short streams, and long ones, with gRPC placed by call and by connection."""
    return [
        Load(Front(balancer.http, balancer.grpc_l7)),
        Load(Front(balancer.http, balancer.grpc_l7), LONG),
        Load(Front(balancer.http, balancer.grpc_l4), LONG),
    ]


async def test_a_rolling_restart_behind_a_balancer_fails_no_request_and_cuts_no_stream(
    tmp_path: Path, routers: list[Router]
) -> None:
    with balancing(tmp_path, [router.ports for router in routers]) as balancer:
        short, *long = loads(balancer)
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(short.running(streams=4, callers=2, newcomers=1))
            for load in long:
                await stack.enter_async_context(load.running(streams=3, callers=3, newcomers=0))
            await short.more()
            for router in routers:
                await asyncio.to_thread(router.restart)
                await short.more()
        for load in (short, *long):
            assert load.broken == []
            assert min(load.whole.values()) > 0
