"""How `kvlane serve` ends, gives addresses up, and what it makes of workers that no replica is ready for."""

from __future__ import annotations

import asyncio
import os
import re
import signal
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from loadtests.processes import engines
from tests.integration.ray_local import until, wait_until
from tests.integration.served import Served, accepts, free_port, last_line, serving, streaming

pytestmark = pytest.mark.slow

STREAMS = 8
STARTED, READY = 'kvlane_workers{state="started"}', 'kvlane_workers{state="ready"}'


@pytest.fixture(scope="module")
def addresses() -> Iterator[list[dict[str, Any]]]:
    """Two simulated replicas that take 5 ms for a token."""
    with engines(2, {"step_base_ms": 5.0, "prefill_ms_per_token": 0.0}) as (_, found):
        yield found


async def test_a_stop_refuses_newcomers_and_takes_no_longer_than_the_streams_in_flight(
    tmp_path: Path, addresses: list[dict[str, Any]]
) -> None:
    with serving(tmp_path, addresses) as served:
        async with AsyncExitStack() as stack:
            # So many that both workers have some, and neither is through when the other begins to end.
            streams = [await stack.enter_async_context(streaming(served.http, 1200)) for _ in range(STREAMS)]
            served.process.terminate()
            await until(lambda: not accepts(served.http), "HTTP clients are refused")
            await until(lambda: not accepts(served.grpc), "gRPC clients are refused")
            assert len(served.workers()) == 2, "before the streams have ended"
            assert {await last_line(lines) for lines in streams} == {"data: [DONE]"}
        assert await asyncio.to_thread(served.process.wait) == 0
        assert "did not stop in time" not in served.log()


async def test_a_stop_while_replaced_workers_drain_ends_all_of_them_at_once(
    tmp_path: Path, addresses: list[dict[str, Any]]
) -> None:
    with serving(tmp_path, addresses) as served:
        async with streaming(served.http, 1500) as lines:
            before = served.workers()
            await asyncio.to_thread(served.reload)
            await until(lambda: len(before & served.workers()) == 1, "the one with the stream drains")
            served.process.terminate()
            await until(lambda: not served.workers() - before, "the new workers have ended")
            assert len(before & served.workers()) == 1
            assert await last_line(lines) == "data: [DONE]"
        assert await asyncio.to_thread(served.process.wait) == 0


async def test_a_stop_ends_a_reload_that_hangs(tmp_path: Path, addresses: list[dict[str, Any]]) -> None:
    with serving(tmp_path, addresses) as served:
        before = served.workers()
        served.process.send_signal(signal.SIGHUP)
        await until(lambda: started(served.workers() - before), "its workers are there")
        hung = served.workers() - before
        try:
            for each in hung:
                os.kill(each, signal.SIGSTOP)
            served.process.terminate()
            await until(lambda: not before & served.workers(), "the old workers have ended")
        finally:
            for each in hung:
                os.kill(each, signal.SIGCONT)
        assert await asyncio.to_thread(served.process.wait) == 0


def started(pids: set[int]) -> bool:
    """Whether there are two and each is what it was started as: whoever starts a process waits for that."""
    return len(pids) == 2 and all(b"worker" in Path(f"/proc/{pid}/cmdline").read_bytes() for pid in pids)


def moved(served: Served, http: str, admin: int = 0, workers: int = 2) -> None:
    """Reloads with that HTTP address. Not `Served.reload`, which asks at the old one."""
    host, _, port = http.rpartition(":")
    served.write(workers=workers)
    text = served.config.read_text().replace("[http]\nport = 0", f'[http]\nhost = "{host}"\nport = {port}')
    served.config.write_text(text.replace("enabled = true\nport = 0", f"enabled = true\nport = {admin}"))
    before = ends(served)
    served.process.send_signal(signal.SIGHUP)
    wait_until(lambda: ends(served) != before, "the reload has ended")
    assert ends(served)[-1] == "reloaded", served.log()
    served.http = int(port)


def ends(served: Served) -> list[str]:
    return re.findall(r"router\.supervisor: (reloaded|reload refused|reload failed)", served.log())


async def test_addresses_that_reloads_drop_are_refused_at_once_and_can_be_taken_again(
    tmp_path: Path, addresses: list[dict[str, Any]]
) -> None:
    first, second, admin = free_port(), free_port(), free_port()
    with serving(tmp_path, addresses) as served:
        await asyncio.to_thread(moved, served, f"127.0.0.1:{first}", admin)
        async with streaming(first, 1500) as one, streaming(first, 1500) as other:  # Old workers stay.
            await asyncio.to_thread(moved, served, f"127.0.0.1:{second}", admin, 1)
            await until(lambda: not accepts(first), "clients of the old address are refused")
            await until(lambda: not accepts(admin + 1), "clients of the second worker's admin port are refused")
            await asyncio.to_thread(moved, served, f"127.0.0.1:{first}", admin)
            assert accepts(first)
            assert accepts(admin + 1)
            assert {await last_line(one), await last_line(other)} == {"data: [DONE]"}


async def test_a_reload_can_change_the_host_and_keep_the_port(tmp_path: Path, addresses: list[dict[str, Any]]) -> None:
    port = free_port()
    with serving(tmp_path, addresses) as served:
        for host in ("127.0.0.1", "0.0.0.0", "127.0.0.1"):
            await asyncio.to_thread(moved, served, f"{host}:{port}")
            assert (await asyncio.to_thread(served.metrics))[READY] == 2


def test_a_worker_that_dies_before_any_replica_is_ready_is_started_again(tmp_path: Path) -> None:
    nobody = [{"replica": "nobody", "lane": free_port()}]
    with serving(tmp_path, nobody, http=free_port(), ready=False) as served:
        wait_until(lambda: accepts(served.http) and served.metrics()[STARTED] == 2, "its workers have started")
        for reloads in (False, True):
            if reloads:
                served.reload()
            killed = min(served.workers())
            os.kill(killed, signal.SIGKILL)
            wait_until(lambda killed=killed: killed not in served.workers(), "it has gone")
            wait_until(lambda: len(served.workers()) == 2, "another worker is there")
            wait_until(lambda: served.metrics()[STARTED] == 2, "it has started")
        assert served.process.poll() is None


def test_workers_without_replicas_are_not_ready_and_can_be_reloaded(tmp_path: Path) -> None:
    with engines(1, {}) as (replicas, addresses), serving(tmp_path, addresses) as served:
        assert served.metrics()[READY] == 2
        os.kill(replicas, signal.SIGKILL)
        wait_until(lambda: served.metrics()[STARTED] == 2, "none is ready")
        before = served.workers()
        served.reload()
        assert served.metrics()['kvlane_reloads_total{outcome="ok"}'] == 1
        assert httpx.get(f"http://127.0.0.1:{served.http}/readyz").status_code == 503
        wait_until(lambda: not before & served.workers(), "the old workers have gone")
