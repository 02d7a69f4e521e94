"""Dispatch over real lanes with engines under the test's control: choice, retry, leases, deadlines."""

import asyncio
import random
import time
from collections.abc import AsyncIterator

import pytest

from engine.base import StreamOut
from router.admission import Admission
from router.dispatch import Dispatcher
from router.errors import (
    DeadlineExceeded,
    InvalidRequest,
    KvlaneError,
    ModelNotFound,
    NoReplica,
    Overloaded,
    ReplicaLost,
    ShuttingDown,
)
from router.lane.frames import End, Submit
from router.options import LimitOptions
from router.policies import registry
from router.types import Decision, Reason, Request, Snapshot
from tests.fakes import DEADLINE_S, Fleet, RecordingSink, eventually, make_request


class Notes:
    """An observer that remembers."""

    def __init__(self) -> None:
        self.outcomes: list[str] = []
        self.retries: list[str] = []
        self.policy_errors: list[Exception] = []

    def began(self) -> float:
        return 0.0

    def ended(self, request: Request, began: float, outcome: str) -> None:
        self.outcomes.append(outcome)

    def retried(self, error: KvlaneError) -> None:
        self.retries.append(error.name)

    def policy_failed(self, error: Exception) -> None:
        self.policy_errors.append(error)


class First:
    """Chooses the first by name, so that tests know where a request goes."""

    def choose(self, request: Request, snapshot: Snapshot) -> Decision:
        return Decision(min(view.replica for view in snapshot.replicas), Reason.POLICY)


class Router:
    """A dispatcher with what it joins."""

    def __init__(self, **limits: float) -> None:
        self.fleet = Fleet()
        self.notes = Notes()
        self.policy = First()
        options = LimitOptions(**({"no_replica_wait_s": 0.05} | limits))  # type: ignore[arg-type]
        self.admission = Admission(options.max_streams)
        self.dispatcher = Dispatcher(
            self.admission,
            self.policy,
            "first",
            registry.create("least-queue", {}, random.Random(0)),
            self.fleet.router,
            options,
            self.notes,
            time.monotonic,
        )

    async def replicas(self, *names: str) -> None:
        for name in names:
            await self.fleet.add(name)
        await self.fleet.until(lambda: self.fleet.ready() == len(self.fleet.records))

    def leases(self) -> int:
        return sum(lane.view().leases + lane.streams for lane in self.fleet.router.lanes())


@pytest.fixture
async def router() -> AsyncIterator[Router]:
    router = Router()
    yield router
    await router.fleet.close()


def answer(call: Submit, out: StreamOut) -> None:
    out.head(200, [])
    out.data(b"hello", 1)
    out.end("stop")


async def test_a_request_runs_on_the_chosen_replica_and_its_receipt_says_so(router: Router) -> None:
    await router.replicas("a", "b")
    router.fleet.engines["a"].respond = answer
    sink = RecordingSink()
    assert await router.dispatcher.run(make_request(), sink) == End("stop")
    (receipt,) = sink.receipts
    assert (receipt.replica, receipt.policy, receipt.reason, receipt.queue_depth) == ("a", "first", "policy", 0)
    assert sink.payloads == [b"hello"]
    assert (router.notes.outcomes, router.leases(), router.admission.in_flight) == (["ok"], 0, 0)


async def test_a_request_without_a_byte_is_tried_on_another_replica_when_its_replica_is_lost(router: Router) -> None:
    await router.replicas("a", "b")
    router.fleet.engines["b"].respond = answer
    sink = RecordingSink()
    task = asyncio.create_task(router.dispatcher.run(make_request(), sink))
    await eventually(lambda: bool(router.fleet.engines["a"].calls))
    router.fleet.engines["a"].outs[0].head(200, [])
    await router.fleet.replicas["a"].close()
    assert await asyncio.wait_for(task, DEADLINE_S) == End("stop")
    assert [receipt.replica for receipt in sink.receipts] == ["a", "b"]
    assert sink.receipts[-1].reason is Reason.RETRY
    assert router.notes.retries == ["replica_lost"]
    assert router.leases() == 0


async def test_a_request_with_a_byte_out_is_not_tried_again(router: Router) -> None:
    await router.replicas("a", "b")
    sink = RecordingSink()
    task = asyncio.create_task(router.dispatcher.run(make_request(), sink))
    await eventually(lambda: bool(router.fleet.engines["a"].calls))
    router.fleet.engines["a"].outs[0].data(b"one", 1)
    await sink.got_data.wait()
    await router.fleet.replicas["a"].close()
    with pytest.raises(ReplicaLost):
        await asyncio.wait_for(task, DEADLINE_S)
    assert router.fleet.engines["b"].calls == []
    assert (router.notes.retries, router.notes.outcomes, router.leases()) == ([], ["replica_lost"], 0)


async def test_a_clients_mistake_is_not_tried_again(router: Router) -> None:
    await router.replicas("a", "b")
    router.fleet.engines["a"].respond = lambda call, out: out.fail(InvalidRequest("bad"))
    with pytest.raises(InvalidRequest):
        await router.dispatcher.run(make_request(), RecordingSink())
    assert router.fleet.engines["b"].calls == []


async def test_tries_are_bounded_and_never_repeat_a_replica(router: Router) -> None:
    await router.replicas("a", "b", "c", "d")
    for engine in router.fleet.engines.values():
        engine.respond = lambda call, out: out.fail(ReplicaLost("gone"))
    sink = RecordingSink()
    with pytest.raises(ReplicaLost):
        await router.dispatcher.run(make_request(), sink)
    assert [receipt.replica for receipt in sink.receipts] == ["a", "b", "c"]


async def test_a_request_whose_replicas_all_failed_gets_the_last_failure_at_once() -> None:
    router = Router(no_replica_wait_s=1000.0)
    await router.replicas("a")
    router.fleet.engines["a"].respond = lambda call, out: out.fail(ReplicaLost("a blip"))
    with pytest.raises(ReplicaLost, match="a blip"):
        await asyncio.wait_for(router.dispatcher.run(make_request(), RecordingSink()), DEADLINE_S)
    await router.fleet.close()


async def test_an_unknown_model_is_refused_and_a_known_one_without_replica_waits_then_fails(router: Router) -> None:
    await router.replicas("a")
    with pytest.raises(ModelNotFound, match="`other`"):
        await router.dispatcher.run(make_request(model="other"), RecordingSink())
    await router.fleet.replicas["a"].close()
    await router.fleet.until(lambda: router.fleet.ready() == 0)
    with pytest.raises(NoReplica):
        await router.dispatcher.run(make_request(), RecordingSink())
    assert router.notes.outcomes == ["model_not_found", "no_replica"]


async def test_a_request_that_waits_for_a_replica_runs_on_the_one_that_comes() -> None:
    router = Router(no_replica_wait_s=DEADLINE_S)
    await router.replicas("a")
    await router.fleet.replicas["a"].close()
    await router.fleet.until(lambda: router.fleet.ready() == 0)
    task = asyncio.create_task(router.dispatcher.run(make_request(), RecordingSink()))
    await asyncio.sleep(0)
    engine = await router.fleet.add("b")
    engine.respond = answer
    assert await asyncio.wait_for(task, DEADLINE_S) == End("stop")
    await router.fleet.close()


async def test_a_deadline_ends_the_request_and_aborts_it_in_the_engine(router: Router) -> None:
    await router.replicas("a")
    with pytest.raises(DeadlineExceeded):
        await router.dispatcher.run(make_request(timeout_s=0.05), RecordingSink())
    await eventually(lambda: router.fleet.engines["a"].aborted == ["r1"])
    assert (router.leases(), router.notes.outcomes) == (0, ["deadline_exceeded"])


async def test_a_cancelled_request_leaves_no_lease_and_is_counted(router: Router) -> None:
    await router.replicas("a")
    task = asyncio.create_task(router.dispatcher.run(make_request(), RecordingSink()))
    await eventually(lambda: bool(router.fleet.engines["a"].calls))
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await eventually(lambda: router.fleet.engines["a"].aborted == ["r1"])
    assert (router.leases(), router.admission.in_flight, router.notes.outcomes) == (0, 0, ["cancelled"])


async def test_requests_over_the_limit_are_refused_before_any_work() -> None:
    router = Router(max_streams=1)
    await router.replicas("a")
    first = asyncio.create_task(router.dispatcher.run(make_request(), RecordingSink()))
    await eventually(lambda: bool(router.fleet.engines["a"].calls))
    with pytest.raises(Overloaded) as caught:
        await router.dispatcher.run(make_request("r2"), RecordingSink())
    assert caught.value.retry_after_s == 1
    router.fleet.engines["a"].outs[0].end()
    await first
    router.fleet.engines["a"].respond = answer
    await router.dispatcher.run(make_request("r3"), RecordingSink())
    router.admission.close()
    with pytest.raises(ShuttingDown):
        await router.dispatcher.run(make_request("r4"), RecordingSink())
    await router.fleet.close()


@pytest.mark.parametrize("fault", ["raises", "nonsense"])
async def test_a_broken_policy_costs_no_request(router: Router, fault: str) -> None:
    await router.replicas("a", "b")
    for engine in router.fleet.engines.values():
        engine.respond = answer

    def choose(request: Request, snapshot: Snapshot) -> Decision:
        if fault == "raises":
            raise ZeroDivisionError
        return Decision("nobody", Reason.POLICY)

    router.policy.choose = choose  # type: ignore[method-assign]
    sink = RecordingSink()
    await router.dispatcher.run(make_request(), sink)
    assert sink.receipts[0].reason is Reason.POLICY_FAILED
    assert len(router.notes.policy_errors) == 1
