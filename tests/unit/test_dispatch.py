"""Dispatch over real lanes with engines under the test's control: choice, retry, leases, deadlines."""

import asyncio
import gc
import time
import weakref
from array import array
from collections.abc import AsyncIterator, Collection, Sequence

import pytest

from engine.base import StreamOut
from router import dispatch
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
from router.hold import Hold
from router.lane.frames import CacheReport, End, Submit, unpack_chain
from router.options import HoldOptions, LimitOptions, PrefixOptions
from router.prefix.prefixes import Prefixes
from router.receipts import Explainer
from router.types import CacheMode, Chain, Decision, Reason, Receipt, Request, Rpc, Snapshot
from router.wake import Waker
from tests.fakes import DEADLINE_S, Fleet, RecordingSink, eventually, make_request


class Notes:
    """An observer that remembers."""

    def __init__(self) -> None:
        self.outcomes: list[str] = []
        self.retries: list[str] = []
        self.receipts: list[Receipt] = []
        self.hashes = self.lookups = 0
        self.unexplained: list[str] = []
        self.holds: list[tuple[str, str]] = []

    def held(self, model: str, outcome: str, waited_s: float) -> None:
        assert waited_s >= 0
        self.holds.append((model, outcome))

    def explain_failed(self, kind: str) -> None:
        self.unexplained.append(kind)

    def began(self) -> float:
        return 0.0

    def ended(self, request: Request, began: float, outcome: str) -> None:
        self.outcomes.append(outcome)

    def retried(self, error: KvlaneError) -> None:
        self.retries.append(error.name)

    def hashed(self, seconds: float, times: int = 1) -> None:
        self.hashes += 1

    def looked_up(self, seconds: float, times: int = 1) -> None:
        self.lookups += 1

    def routed(self, request: Request, receipt: Receipt) -> None:
        self.receipts.append(receipt)


class First:
    """Chooses the first by name, so that tests know where a request goes."""

    def choose(self, request: Request, snapshot: Snapshot) -> Decision:
        return Decision(min(view.replica for view in snapshot.replicas), Reason.POLICY)


class Router:
    """A dispatcher with what it joins."""

    def __init__(
        self,
        *,
        record: bool = False,
        explain: bool = True,
        hold: HoldOptions = HoldOptions(),  # noqa: B008
        from_zero: Collection[str] = (),
        waker: Waker | None = None,
        **limits: float,
    ) -> None:
        self.prefixes = Prefixes(PrefixOptions(block_bytes=16), time.monotonic)
        self.fleet = Fleet(self.prefixes, held=from_zero)
        self.notes = Notes()
        self.scores: dict[str, float] = {}
        self.recorded: list[tuple[Request, Receipt]] = []
        self.policy = First()
        options = LimitOptions(**({"no_replica_wait_s": 0.05} | limits))  # type: ignore[arg-type]
        self.admission = Admission(options.max_streams)
        self.hold = Hold(
            hold, options.no_replica_wait_s, self.fleet.router, time.monotonic, self.notes, from_zero, waker
        )
        self.dispatcher = Dispatcher(
            self.admission,
            self.policy,
            "first",
            self.prefixes,
            self.fleet.router,
            self.hold,
            options,
            self.notes,
            time.monotonic,
            Explainer(
                lambda request, snapshot: self.scores, self.notes, time.monotonic, DEADLINE_S, for_clients=explain
            ),
            (lambda request, receipt: self.recorded.append((request, receipt))) if record else None,
        )

    async def replicas(self, *names: str) -> None:
        for name in names:
            await self.fleet.add(name)
        await self.fleet.until(lambda: self.fleet.ready() == len(self.fleet.records))

    def leases(self) -> int:
        return sum(lane.account.view().leases + lane.streams for lane in self.fleet.router.lanes())


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


async def test_a_request_that_was_tried_again_leaves_nothing_to_the_garbage_collector(router: Router) -> None:
    def refuse(call: Submit, out: StreamOut) -> None:
        out.fail(ReplicaLost("not now"))

    await router.replicas("a", "b")
    router.fleet.engines["a"].respond = refuse
    router.fleet.engines["b"].respond = answer
    sink = RecordingSink()
    left = weakref.ref(sink)
    gc.disable()
    try:
        await router.dispatcher.run(make_request(), sink)
        assert router.notes.retries == ["replica_lost"]
        del sink
        assert left() is None
    finally:
        gc.enable()


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


# What the router knows of KV caches.

PROMPT = b'{"model":"m","messages":[{"role":"user","content":"%b"}]}' % (b"all work and no play " * 20)


def report(seq: int, hashes: Sequence[int], *, snapshot: bool = False, mode: str = "exact") -> CacheReport:
    """A replica holds these blocks, one token per byte."""
    depths = [16 * (i + 1) for i in range(len(hashes))]
    return CacheReport(seq, snapshot, array("Q", hashes).tobytes(), array("I", depths).tobytes(), mode=mode)


def prompt_request(request_id: str = "r1", *headers: tuple[str, str]) -> Request:
    return Request(request_id, "m", Rpc.HTTP, "/v1/chat/completions", PROMPT, headers=headers)


def holds(router: Router, replica: str, blocks: int) -> Chain:
    """The replica reported that it holds so many blocks of the prompt."""
    chain = router.prefixes.chain(prompt_request())
    assert chain is not None
    assert router.prefixes.reported(replica, report(1, chain.blocks[:blocks], snapshot=True))
    return chain


async def test_the_chain_and_what_is_held_there_travel_with_the_submit(router: Router) -> None:
    await router.replicas("a", "b")
    router.fleet.engines["a"].respond = answer
    chain = holds(router, "a", 5)
    await router.dispatcher.run(prompt_request(), RecordingSink())
    (call,) = router.fleet.engines["a"].calls
    assert (unpack_chain(call.chain), call.matched) == (chain, 5)
    (receipt,) = router.notes.receipts
    assert (receipt.matched, receipt.blocks, receipt.cached_tokens) == (5, len(chain.blocks), 80)
    assert receipt.prompt_tokens == 80 + round((chain.prompt_bytes - 80) * 0.25)
    assert (router.notes.hashes, router.notes.lookups) == (1, 1)


async def test_a_policy_sees_who_holds_how_much_of_the_prompt(router: Router) -> None:
    await router.replicas("a", "b")
    chain, seen = holds(router, "b", 3), []

    def choose(request: Request, snapshot: Snapshot) -> Decision:
        seen.append(snapshot)
        return Decision("b", Reason.LONGEST_PREFIX)

    router.policy.choose = choose  # type: ignore[method-assign]
    router.fleet.engines["b"].respond = answer
    await router.dispatcher.run(prompt_request(), RecordingSink())
    (snapshot,) = seen
    assert snapshot.prefix.chain == chain
    assert {replica: held.blocks for replica, held in snapshot.prefix.held.items()} == {"b": 3}
    assert {view.replica: view.cache for view in snapshot.replicas} == {
        "a": CacheMode.APPROXIMATE,
        "b": CacheMode.EXACT,
    }


async def test_a_prompt_on_its_way_is_soon_held_there_and_charged_until_the_load_counts_it(router: Router) -> None:
    await router.replicas("a")
    chain = holds(router, "a", 0)
    task = asyncio.create_task(router.dispatcher.run(prompt_request(), RecordingSink()))
    await asyncio.sleep(0)
    (view,) = router.fleet.router.snapshot("m").replicas
    assert (view.unacked, view.unacked_tokens) == (1, round(chain.prompt_bytes * 0.25))
    held = router.prefixes.view("m", chain).held["a"]
    assert (held.blocks, held.soon) == (len(chain.blocks), len(chain.blocks))
    await eventually(lambda: bool(router.fleet.engines["a"].calls))
    router.fleet.engines["a"].outs[0].end()
    await task
    assert router.prefixes.view("m", chain).held == {}
    (view,) = router.fleet.router.snapshot("m").replicas
    assert (view.unacked, view.unacked_tokens) == (0, 0)


async def test_however_a_request_ends_nothing_is_held_for_it_any_more(router: Router) -> None:
    await router.replicas("a")
    chain = holds(router, "a", 0)
    task = asyncio.create_task(router.dispatcher.run(prompt_request(), RecordingSink()))
    await eventually(lambda: bool(router.fleet.engines["a"].calls))
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert router.prefixes.view("m", chain).held == {}
    router.fleet.engines["a"].respond = lambda call, out: out.fail(InvalidRequest("bad"))
    with pytest.raises(InvalidRequest):
        await router.dispatcher.run(prompt_request(), RecordingSink())
    assert (router.prefixes.view("m", chain).held, router.prefixes.status().holds) == ({}, 0)


async def test_another_try_looks_the_prompt_up_anew_without_hashing_it_again(
    router: Router, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "TIMED", 1)
    await router.replicas("a", "b")
    holds(router, "b", 4)
    router.fleet.engines["a"].respond = lambda call, out: out.fail(ReplicaLost("gone"))
    router.fleet.engines["b"].respond = answer
    sink = RecordingSink()
    await router.dispatcher.run(prompt_request(), sink)
    assert [(one.replica, one.matched) for one in sink.receipts] == [("a", 0), ("b", 4)]
    assert (router.notes.hashes, router.notes.lookups) == (1, 2)
    assert router.fleet.engines["b"].calls[0].matched == 4


async def test_of_short_prompts_one_in_seven_is_timed_the_first_one_among_them(router: Router) -> None:
    await router.replicas("a")
    holds(router, "a", 0)
    router.fleet.engines["a"].respond = answer
    for count in (1, *[1] * 6, 2):
        await router.dispatcher.run(prompt_request(), RecordingSink())
        assert (router.notes.hashes, router.notes.lookups) == (count, count)


async def test_where_no_replica_reuses_prefixes_the_prompt_is_not_even_read(router: Router) -> None:
    engine = await router.fleet.add("a", prefix_caching=False)
    await router.fleet.until(lambda: router.fleet.ready() == 1)
    engine.respond = answer
    await router.dispatcher.run(prompt_request(), RecordingSink())
    assert (router.notes.hashes, router.notes.lookups) == (0, 0)
    (call,) = engine.calls
    assert (call.chain, call.matched) == (b"", 0)
    (receipt,) = router.notes.receipts
    assert (receipt.blocks, receipt.prompt_tokens) == (0, round(len(PROMPT) * 0.25))


async def test_prompts_that_are_not_hashed_are_charged_by_their_size(router: Router) -> None:
    await router.fleet.add("a", prefix_caching=False)
    await router.fleet.until(lambda: router.fleet.ready() == 1)
    task = asyncio.create_task(router.dispatcher.run(prompt_request(), RecordingSink()))
    await asyncio.sleep(0)
    (view,) = router.fleet.router.snapshot("m").replicas
    tokens = round(len(PROMPT) * 0.25)
    assert (view.unacked, view.unacked_tokens, view.unacked_pairs) == (1, tokens, tokens * tokens / 2)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_candidates_are_told_to_who_asks_and_to_nobody_else(router: Router) -> None:
    await router.replicas("a", "b")
    router.fleet.engines["a"].respond = answer
    router.scores = {"a": 2.5, "b": 1.5}
    holds(router, "a", 0)
    chain = holds(router, "b", 2)
    sink = RecordingSink()
    await router.dispatcher.run(prompt_request("r1"), sink)
    await router.dispatcher.run(prompt_request("r2", ("x-kvlane-explain", "1")), sink)
    silent, told = sink.receipts
    assert silent.candidates == ()
    assert [(one.replica, one.matched, one.score) for one in told.candidates] == [("a", 0, 2.5), ("b", 2, 1.5)]
    assert f";matched=0/{len(chain.blocks)};" in told.header()
    assert (
        ";candidates=a(matched=0 cached=0 queue=0 score=2.5),b(matched=2 cached=32 queue=0 score=1.5)" in told.header()
    )


async def test_an_explanation_that_fails_costs_no_request(router: Router, caplog: pytest.LogCaptureFixture) -> None:
    await router.replicas("a")
    router.fleet.engines["a"].respond = answer
    router.scores = None  # type: ignore[assignment]
    for i in range(3):
        await router.dispatcher.run(prompt_request(f"r{i}", ("x-kvlane-explain", "1")), RecordingSink())
    assert [[one.score for one in receipt.candidates] for receipt in router.notes.receipts] == [[None]] * 3
    assert [record.message for record in caplog.records if record.name == "router.receipts"] == [
        "the policy's explain failed; it rests 60 s"
    ]
    assert router.notes.unexplained == ["raised", "resting", "resting"]


async def test_clients_are_told_nothing_of_candidates_where_that_is_off() -> None:
    router = Router(record=True, explain=False)
    await router.replicas("a")
    router.fleet.engines["a"].respond = answer
    sink = RecordingSink()
    await router.dispatcher.run(prompt_request("r1", ("x-kvlane-explain", "1")), sink)
    assert sink.receipts[0].candidates == ()
    assert router.recorded[0][1].candidates != ()
    await router.fleet.close()


async def test_a_record_gets_every_receipt_with_its_candidates() -> None:
    router = Router(record=True)
    await router.replicas("a", "b")
    router.fleet.engines["a"].respond = answer
    await router.dispatcher.run(prompt_request(), RecordingSink())
    ((request, receipt),) = router.recorded
    assert request.request_id == "r1"
    assert {one.replica for one in receipt.candidates} == {"a", "b"}
    await router.fleet.close()


async def test_a_fallback_decision_keeps_its_order_over_tries(router: Router) -> None:
    await router.replicas("a", "b", "c")

    def choose(request: Request, snapshot: Snapshot) -> Decision:
        return Decision("a", Reason.POLICY, ("gone", "c", "b"))

    router.policy.choose = choose  # type: ignore[method-assign]
    router.fleet.engines["a"].respond = lambda call, out: out.fail(ReplicaLost("gone"))
    router.fleet.engines["c"].respond = answer
    sink = RecordingSink()
    await router.dispatcher.run(make_request(), sink)
    assert [receipt.replica for receipt in sink.receipts] == ["a", "c"]
