"""Dispatch: the hot path, where the stages meet.

Job: admit a request, look its prompt up, choose its replica, run it on that replica's lane, and try another replica if
the first fails before the client saw a byte; where there is no replica, wait for one in the hold. Rule: no await
between the snapshot, the choice and the charge. It owns no state.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Generator
from typing import Final, Protocol

import msgspec

from router.admission import Admission
from router.errors import DeadlineExceeded, KvlaneError, NoReplica
from router.hold import LARGE_BODY_BYTES, Hold
from router.lane.frames import End
from router.options import LimitOptions
from router.policies.base import Policy
from router.prefix.prefixes import Prefixes
from router.receipts import Explainer, make_receipt
from router.replicas import Replicas
from router.turns import in_turns
from router.types import Chain, Charge, Decision, Held, Reason, Receipt, Request, Sink, Snapshot

EXPLAIN_HEADER: Final = ("x-kvlane-explain", "1")
"""A request that carries it is told of every replica that it could have gone to."""
TIMED: Final = 7
"""Of so many prompts that are not large, one is timed: to time each costs a twentieth of a decision."""


class Observer(Protocol):
    """Who counts."""

    def began(self) -> float:
        """A request begins; the result is handed to `ended`."""

    def ended(self, request: Request, began: float, outcome: str) -> None:
        """A request ended: `ok`, `cancelled` or an error's name."""

    def retried(self, error: KvlaneError) -> None:
        """A request goes to another replica."""

    def hashed(self, seconds: float, times: int = 1) -> None:
        """A prompt was read and hashed, in that time; it stands for so many of them."""

    def looked_up(self, seconds: float, times: int = 1) -> None:
        """It was looked up who holds how much of a prompt; that stands for so many look-ups."""

    def routed(self, request: Request, receipt: Receipt) -> None:
        """A replica was chosen; once per try."""


class Dispatcher:
    """Runs requests (`router.ingress.base.Dispatch`)."""

    def __init__(
        self,
        admission: Admission,
        policy: Policy,
        policy_name: str,
        prefixes: Prefixes,
        replicas: Replicas,
        hold: Hold,
        limits: LimitOptions,
        observer: Observer,
        clock: Callable[[], float],
        explainer: Explainer,
        record: Callable[[Request, Receipt], None] | None = None,
    ) -> None:
        """`policy` must answer with a replica of the snapshot and not raise (see `router.policies.guard`). `record`,
        where it is given, gets every receipt with all candidates in it."""
        self._admission = admission
        self._policy = policy
        self._policy_name = policy_name
        self._prefixes = prefixes
        self._replicas = replicas
        self._hold = hold
        self._queues = hold.queues
        self._limits = limits
        self._observer = observer
        self._clock = clock
        self._explainer = explainer
        self._record = record
        self._hashings = self._look_ups = 0

    async def run(self, request: Request, sink: Sink) -> End:
        """Routes `request` and streams its output into `sink`; raises a `KvlaneError` if it does not end whole."""
        began, outcome = self._observer.began(), "ok"
        try:
            with self._admission:
                if request.timeout_s is None:
                    return await self._route(request, sink)
                return await self._within(request.timeout_s, request, sink)
        except KvlaneError as error:
            outcome = error.name
            raise
        except asyncio.CancelledError:
            outcome = "cancelled"
            raise
        except Exception:
            outcome = "internal"
            raise
        finally:
            self._observer.ended(request, began, outcome)

    async def _within(self, limit_s: float, request: Request, sink: Sink) -> End:
        try:
            async with asyncio.timeout(limit_s) as deadline:
                return await self._route(request, sink)
        except TimeoutError as error:
            if not deadline.expired():
                raise
            raise DeadlineExceeded(f"not done within {limit_s:.3f} s") from error

    async def _route(self, request: Request, sink: Sink) -> End:
        tried: set[str] = set()
        fallbacks: tuple[str, ...] = ()
        chain: Chain | None = None
        lost: KvlaneError | None = None
        while True:
            try:
                if lost is None and (len(request.body) >= LARGE_BODY_BYTES or request.model in self._queues):
                    pool, chain = await self._first_look(request, sink)
                else:
                    try:
                        pool = self._replicas.snapshot(request.model, tried)
                    except NoReplica:
                        pool, chain = await self._held(request, sink, tried, chain, first=lost is None)
                    else:
                        if lost is None:
                            chain = self._chain(request)
            except NoReplica:
                if lost is None:
                    raise
                raise lost from None  # what happened to the request says more than that nobody else is there
            snapshot = self._looked_up(pool, chain, request)
            decision = self._choose(request, snapshot, fallbacks)
            held = snapshot.prefix.at(decision.replica)
            charge = self._prefixes.charge(snapshot.prefix, held)
            with (
                self._replicas.lease(decision.replica) as lane,
                self._prefixes.hold(decision.replica, chain, held),
            ):
                receipt = self._receipt(request, snapshot, decision, held, charge, retry=bool(tried))
                sink.routed(receipt)
                try:
                    return await lane.run(request, sink, charge, receipt.expected_s)
                except KvlaneError as error:
                    tried.add(decision.replica)
                    fallbacks = fallbacks or decision.fallbacks
                    if sink.started or not error.retryable or len(tried) >= self._limits.max_tries:
                        raise
                    self._observer.retried(error)
                    lost = error.with_traceback(None)  # Which would hold this frame, which holds the error.

    async def _first_look(self, request: Request, sink: Sink) -> tuple[Snapshot, Chain | None]:
        """The pool and the prompt's hashes where these are not to be had at once: others of the model wait already, who
        came before, or the prompt is large."""
        chain, hashed = None, False
        if request.model not in self._queues:
            try:
                self._replicas.snapshot(request.model)
                chain, hashed = await in_turns(self._chain_in_slices(request)), True
                return self._replicas.snapshot(request.model), chain  # It may have changed meanwhile.
            except NoReplica:
                pass
        return await self._held(request, sink, (), chain, first=not hashed)

    async def _held(
        self, request: Request, sink: Sink, tried: Collection[str], chain: Chain | None, *, first: bool
    ) -> tuple[Snapshot, Chain | None]:
        """The pool without the replicas that failed this request, once there is one and those who came before have
        gone on; and the prompt's hashes, where this is the `first` time that they are asked for made there."""
        if tried and self._replicas.ready(request.model):
            raise NoReplica("all that are ready have failed it")
        with self._hold.place(request, sink) as place:
            while True:
                await place.turn()
                if first and self._replicas.ready(request.model):
                    chain, first = await self._chained(request), False
                try:
                    return self._replicas.snapshot(request.model, tried), chain
                except NoReplica:
                    if self._replicas.ready(request.model):
                        raise  # all that are ready have failed it
                place.put_back()

    async def _chained(self, request: Request) -> Chain | None:
        """The prompt's hashes, in slices where it is large."""
        if len(request.body) < LARGE_BODY_BYTES:
            return self._chain(request)
        return await in_turns(self._chain_in_slices(request))

    def _chain(self, request: Request) -> Chain | None:
        """The prompt's hashes; None without reading the body where no replica of the model reuses prefixes."""
        if not self._replicas.caching(request.model):
            return None
        number = self._hashings
        self._hashings = number + 1
        if number % TIMED:
            return self._prefixes.chain(request)
        began = self._clock()
        chain = self._prefixes.chain(request)
        self._observer.hashed(self._clock() - began, TIMED)
        return chain

    def _chain_in_slices(self, request: Request) -> Generator[None, None, Chain | None]:
        """The same of a large body; what other tasks take meanwhile does not count."""
        if not self._replicas.caching(request.model):
            return None
        slices, spent = self._prefixes.chain_in_slices(request), 0.0
        while True:
            began = self._clock()
            try:
                next(slices)
            except StopIteration as end:
                self._observer.hashed(spent + self._clock() - began)
                chain: Chain | None = end.value
                return chain
            spent += self._clock() - began
            yield

    def _looked_up(self, pool: Snapshot, chain: Chain | None, request: Request) -> Snapshot:
        """The pool, and who of it holds how much of the prompt now; without a chain only how long it may be."""
        if chain is None:
            return pool.looked_up(self._prefixes.unhashed(request))
        number = self._look_ups
        self._look_ups = number + 1
        if number % TIMED:
            return pool.looked_up(self._prefixes.view(pool.model, chain))
        began = self._clock()
        prefix = self._prefixes.view(pool.model, chain)
        self._observer.looked_up(self._clock() - began, TIMED)
        return pool.looked_up(prefix)

    def _choose(self, request: Request, snapshot: Snapshot, fallbacks: tuple[str, ...]) -> Decision:
        """The first of the earlier decision's fallbacks that is still there, or else what the policy says."""
        if fallbacks:
            for name in fallbacks:
                if name in snapshot.places:
                    return Decision(name, Reason.RETRY, fallbacks)
        return self._policy.choose(request, snapshot)

    def _receipt(
        self,
        request: Request,
        snapshot: Snapshot,
        decision: Decision,
        held: Held | None,
        charge: Charge,
        *,
        retry: bool,
    ) -> Receipt:
        receipt = make_receipt(request, snapshot, decision, held, charge, self._policy_name, retry=retry)
        asked = self._explainer.for_clients and EXPLAIN_HEADER in request.headers
        if self._record is not None or asked:
            candidates = self._explainer.candidates(request, snapshot, decision.replica)
            told = msgspec.structs.replace(receipt, candidates=candidates)
            if self._record is not None:
                self._record(request, told)
            if asked:
                receipt = told
        self._observer.routed(request, receipt)
        return receipt
