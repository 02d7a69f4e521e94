"""The end of a health watch: its last status arrives, and a client that does not read holds nothing up."""

from __future__ import annotations

import asyncio

import grpc
import pytest
from grpc_health.v1 import health_pb2

from router.ingress import grpc_health
from router.ingress.grpc_health import Health

NOT_SERVING, SERVING = health_pb2.HealthCheckResponse.NOT_SERVING, health_pb2.HealthCheckResponse.SERVING

pytestmark = pytest.mark.timeout(30)


class Aborted(Exception):
    """What a real context raises once it has set the status."""


class Context:
    """A call whose client takes messages when told to."""

    def __init__(self) -> None:
        self.takes = asyncio.Event()
        self.taken: list[int] = []
        self.writing = asyncio.Event()
        self.code: grpc.StatusCode | None = None

    async def write(self, message: health_pb2.HealthCheckResponse) -> None:
        self.writing.set()
        await self.takes.wait()
        self.taken.append(message.status)

    async def abort(self, code: grpc.StatusCode, _details: str) -> None:
        self.code = code
        raise Aborted


def watch(health: Health, context: Context) -> asyncio.Task[None]:
    return asyncio.create_task(health.Watch(health_pb2.HealthCheckRequest(), context))


async def test_a_status_that_is_being_sent_at_the_end_arrives_before_the_end() -> None:
    health, context = Health(), Context()
    call = watch(health, context)
    await context.writing.wait()
    health.leave()
    health.standing.end()
    await asyncio.sleep(0)
    assert not call.done()
    context.takes.set()
    with pytest.raises(Aborted):
        await call
    assert context.taken == [NOT_SERVING]
    assert context.code is grpc.StatusCode.UNAVAILABLE


async def test_a_change_behind_the_one_that_is_being_sent_arrives_too() -> None:
    health, context = Health(), Context()
    health.set_ready(True)
    call = watch(health, context)
    await context.writing.wait()
    health.leave()
    health.standing.end()
    context.takes.set()
    with pytest.raises(Aborted):
        await call
    assert context.taken == [SERVING, NOT_SERVING]


async def test_a_client_that_takes_nothing_holds_nothing_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpc_health, "TELL_S", 0.01)
    health, context = Health(), Context()
    call = watch(health, context)
    await context.writing.wait()
    health.leave()
    health.standing.end()
    with pytest.raises(Aborted):
        await call
    assert context.taken == []
    assert context.code is grpc.StatusCode.UNAVAILABLE


async def test_an_idle_watch_ends_at_once() -> None:
    health, context = Health(), Context()
    context.takes.set()
    call = watch(health, context)
    await context.writing.wait()
    await asyncio.sleep(0)
    health.standing.end()
    with pytest.raises(Aborted):
        await call
    assert context.taken == [NOT_SERVING]


async def test_a_watch_whose_client_leaves_is_no_end_of_ours() -> None:
    health, context = Health(), Context()
    call = watch(health, context)
    await context.writing.wait()
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert context.code is None
