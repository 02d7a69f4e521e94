"""How often a worker that dies is started again, and what becomes of one that cannot be started."""

from __future__ import annotations

import asyncio
import os
import socket
from pathlib import Path
from typing import Any

import pytest

from router.generation import RESTART_MAX_S, restart_delay_s
from router.listeners import Listeners
from router.options import Config, GrpcOptions, HttpOptions
from router.supervisor import Supervisor
from router.worker_process import WorkerProcess

CONFIG = Config(http=HttpOptions(port=0), grpc=GrpcOptions(enabled=False))
DEADLINE_S = 30.0


def test_the_first_time_it_is_started_again_at_once() -> None:
    assert restart_delay_s(1) == 0


def test_one_that_dies_again_and_again_is_started_more_and_more_seldom() -> None:
    assert [restart_delay_s(count) for count in range(2, 9)] == [1, 2, 4, 8, 16, RESTART_MAX_S, RESTART_MAX_S]
    assert restart_delay_s(1000) == RESTART_MAX_S


async def test_a_worker_that_cannot_be_started_leaves_no_descriptor_open(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("router.worker_process.spawn_arguments", lambda: [str(tmp_path / "nothing")])
    listeners = Listeners(CONFIG)

    async def tries(count: int) -> int:
        for _ in range(count):
            with pytest.raises(FileNotFoundError):
                await WorkerProcess.start(0, CONFIG, listeners, lambda: None, lambda worker, number: None)
        return len(os.listdir("/proc/self/fd"))

    assert await tries(1) == await tries(5)
    listeners.close()


async def test_a_reload_that_fails_for_a_reason_nobody_thought_of_is_not_the_last(
    caplog: pytest.LogCaptureFixture,
) -> None:
    tried: asyncio.Queue[None] = asyncio.Queue()

    def read_again() -> Config:
        tried.put_nowait(None)
        raise KeyError("a defect")

    supervisor = Supervisor(CONFIG, read_again)
    reloads = asyncio.create_task(supervisor._reloads())
    async with asyncio.timeout(DEADLINE_S):
        for _ in range(2):
            supervisor._hangup.set()
            await tried.get()
    reloads.cancel()
    await asyncio.gather(reloads, return_exceptions=True)
    supervisor._listeners.close()
    assert "the configuration in use stays" in caplog.text


class Candidate:
    """Workers of a new configuration, ready at once."""

    ready = started = True
    closed = False

    async def close(self) -> None:
        self.closed = True


async def test_a_reload_whose_address_was_taken_meanwhile_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    supervisor, candidate = Supervisor(CONFIG, None), Candidate()
    before = supervisor._listeners
    serving: Any = object()
    supervisor._generations.append(serving)
    monkeypatch.setattr(supervisor, "_generation", lambda config, listeners: candidate)
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("127.0.0.1", 0))
        config = Config(http=HttpOptions(port=other.getsockname()[1]), grpc=GrpcOptions(enabled=False))
        listeners = Listeners(config, before)
        other.listen()
        assert await supervisor._replace(config, listeners) == "failed"
    assert candidate.closed
    assert supervisor._config is CONFIG
    assert supervisor._listeners is before
    assert supervisor._generations == [serving]
    assert listeners.http is not None
    assert [sock.fileno() for slot in listeners.http.slots for sock in slot] == [-1]
    assert "in use" in caplog.text
    before.close()
