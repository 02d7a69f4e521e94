"""Dispatch: the hot path, where the stages meet.

Job: admit a request, choose its replica, run it on that replica's lane, and try another replica if the first fails
before the client saw a byte. Rule: no await between the snapshot, the choice and the charge. It owns no state.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Protocol

from router.admission import Admission
from router.errors import DeadlineExceeded, KvlaneError, NoReplica
from router.lane.frames import End
from router.options import LimitOptions
from router.policies.base import Policy
from router.replicas import Replicas
from router.types import Decision, Reason, Receipt, Request, Sink, Snapshot

log = logging.getLogger(__name__)


class Observer(Protocol):
    """Who counts."""

    def began(self) -> float:
        """A request begins; the result is handed to `ended`."""

    def ended(self, request: Request, began: float, outcome: str) -> None:
        """A request ended: `ok`, `cancelled` or an error's name."""

    def retried(self, error: KvlaneError) -> None:
        """A request goes to another replica."""

    def policy_failed(self, error: Exception) -> None:
        """The policy raised or answered nonsense."""


class Dispatcher:
    """Runs requests (`router.ingress.base.Dispatch`)."""

    def __init__(
        self,
        admission: Admission,
        policy: Policy,
        policy_name: str,
        fallback: Policy,
        replicas: Replicas,
        limits: LimitOptions,
        observer: Observer,
        clock: Callable[[], float],
    ) -> None:
        self._admission = admission
        self._policy = policy
        self._policy_name = policy_name
        self._fallback = fallback
        self._replicas = replicas
        self._limits = limits
        self._observer = observer
        self._clock = clock

    async def run(self, request: Request, sink: Sink) -> End:
        """Routes `request` and streams its output into `sink`; raises a `KvlaneError` if it does not end whole."""
        began, outcome = self._observer.began(), "ok"
        try:
            with self._admission.admit():
                return await self._within_deadline(request, sink)
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

    async def _within_deadline(self, request: Request, sink: Sink) -> End:
        if request.timeout_s is None:
            return await self._route(request, sink)
        try:
            async with asyncio.timeout(request.timeout_s) as deadline:
                return await self._route(request, sink)
        except TimeoutError as error:
            if not deadline.expired():
                raise
            raise DeadlineExceeded(f"not done within {request.timeout_s:.3f} s") from error

    async def _route(self, request: Request, sink: Sink) -> End:
        tried: set[str] = set()
        fallbacks: tuple[str, ...] = ()
        lost: KvlaneError | None = None
        while True:
            try:
                snapshot = await self._candidates(request.model, tried)
            except NoReplica:
                if lost is None:
                    raise
                raise lost from None  # what happened to the request says more than that nobody else is there
            decision = self._choose(request, snapshot, fallbacks)
            with self._replicas.lease(decision.replica) as lane:
                sink.routed(self._receipt(request, snapshot, decision, retry=bool(tried)))
                try:
                    return await lane.run(request, sink)
                except KvlaneError as error:
                    tried.add(decision.replica)
                    fallbacks = fallbacks or decision.fallbacks
                    if sink.started or not error.retryable or len(tried) >= self._limits.max_tries:
                        raise
                    self._observer.retried(error)
                    lost = error

    async def _candidates(self, model: str, tried: set[str]) -> Snapshot:
        """The pool without the replicas that failed this request; while the pool is empty, waits for one to come."""
        deadline = self._clock() + self._limits.no_replica_wait_s
        while True:
            try:
                return self._replicas.snapshot(model, tried)
            except NoReplica:
                if self._replicas.ready(model):
                    raise  # all that are ready have failed it
            try:
                async with asyncio.timeout(deadline - self._clock()):
                    await self._replicas.wait_for_news()
            except TimeoutError:
                return self._replicas.snapshot(model, tried)

    def _choose(self, request: Request, snapshot: Snapshot, fallbacks: tuple[str, ...]) -> Decision:
        """The first of the earlier decision's fallbacks that is still there, or else what the policy says."""
        names = [view.replica for view in snapshot.replicas]
        for name in fallbacks:
            if name in names:
                return Decision(name, Reason.RETRY, fallbacks)
        try:
            decision = self._policy.choose(request, snapshot)
            if decision.replica in names:
                return decision
            raise LookupError(f"it chose {decision.replica!r}, which is not in the snapshot")
        except Exception as error:  # a plugin's defect must not cost a request
            self._observer.policy_failed(error)
            decision = self._fallback.choose(request, snapshot)
            return Decision(decision.replica, Reason.POLICY_FAILED)

    def _receipt(self, request: Request, snapshot: Snapshot, decision: Decision, *, retry: bool) -> Receipt:
        depth = next(view.queue_depth for view in snapshot.replicas if view.replica == decision.replica)
        reason = Reason.RETRY if retry else decision.reason
        return Receipt(request.request_id, decision.replica, self._policy_name, reason, depth)
