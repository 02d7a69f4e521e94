"""Workers whose Ray node is gone are replaced however often that fails; an operator's reload is tried once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator

import pytest

from router import supervisor
from router.options import Config, GrpcOptions, HttpOptions
from router.supervisor import Supervisor
from tests.fakes import eventually


class Reloads:
    """A supervisor's, with outcomes of the test's own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.supervisor = Supervisor(Config(http=HttpOptions(port=0), grpc=GrpcOptions(port=0)), None)
        self.outcomes: Iterator[str] = iter(())
        self.tried: list[bool] = []
        monkeypatch.setattr(self.supervisor, "_reload", self._reload)

    async def _reload(self, forced: bool) -> str:
        self.tried.append(forced)
        return next(self.outcomes)


@pytest.fixture
async def reloads(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Reloads]:
    monkeypatch.setattr(supervisor, "RENEW_AGAIN_S", 0.01)
    made = Reloads(monkeypatch)
    task = asyncio.create_task(made.supervisor._reloads())
    yield made
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    made.supervisor._listeners.close()


async def test_workers_of_a_node_that_is_gone_are_replaced_in_the_end(reloads: Reloads) -> None:
    reloads.outcomes = iter(["failed", "refused", "", "ok"])
    reloads.supervisor.renew()
    await eventually(lambda: len(reloads.tried) == 4)
    await asyncio.sleep(0.05)
    assert reloads.tried == [True] * 4


async def test_a_reload_that_an_operator_asks_for_is_tried_once(reloads: Reloads) -> None:
    reloads.outcomes = iter(["failed"])
    reloads.supervisor._hung_up()
    await eventually(lambda: bool(reloads.tried))
    await asyncio.sleep(0.05)
    assert reloads.tried == [True]
