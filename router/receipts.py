"""Route receipts: why a request went where it went.

From what dispatch knew when it chose to what clients and operators are told. Rule: nothing of the prompt itself is in a
receipt, only how much of it was held where.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from typing import Final, Protocol

from router.types import (
    Brief,
    Candidate,
    Charge,
    Decision,
    Held,
    PrefixView,
    Reason,
    Receipt,
    ReplicaView,
    Request,
    Snapshot,
)

log = logging.getLogger(__name__)

Explain = Callable[[Request, Snapshot], Mapping[str, float]]
"""A policy's optional method of that name: its measure of each replica, lower is better, without any side effect."""


def make_receipt(
    request: Request,
    snapshot: Snapshot,
    decision: Decision,
    held: Held | None,
    charge: Charge,
    policy: str,
    *,
    retry: bool,
) -> Receipt:
    """Of a decision for one of the snapshot's replicas, without candidates; `held` is what it holds of the prompt."""
    prefix = snapshot.prefix
    brief = snapshot.brief(decision.replica)
    return Receipt(
        request.request_id,
        decision.replica,
        policy,
        Reason.RETRY if retry else decision.reason,
        brief.queue_depth,
        charge.matched,
        len(prefix.chain.blocks) if prefix.chain is not None else 0,
        prefix.tokens - charge.tokens,
        prefix.tokens,
        _expected_s(brief, prefix, held, snapshot.now),
        decision.score,
        asleep=brief.asleep,
    )


REST_S: Final = 60.0
"""How long an `explain` that failed or took too long is not asked."""


class ExplainObserver(Protocol):
    """Who counts (`router.observe.policies.PolicyMetrics`)."""

    def explain_failed(self, kind: str) -> None:
        """A policy's explain failed, or was not asked; `kind` is raised, stalled or resting."""


class Explainer:
    """Makes the candidates of a receipt; a policy whose `explain` fails or stalls rests for a while."""

    def __init__(
        self,
        explain: Explain | None,
        observer: ExplainObserver,
        clock: Callable[[], float],
        stall_s: float,
        *,
        for_clients: bool = True,
    ) -> None:
        """`clock` and `stall_s` are in seconds, as the guard's. Without `for_clients`, no client is told."""
        self.for_clients = for_clients
        self._explain = explain
        self._observer = observer
        self._clock = clock
        self._stall_s = stall_s
        self._rests_until = float("-inf")

    def candidates(self, request: Request, snapshot: Snapshot, chosen: str) -> tuple[Candidate, ...]:
        """What was known of each replica: the chosen one first, then by score, then by what they hold."""
        scores = self._scores(request, snapshot)
        found = [_candidate(view, snapshot, scores.get(view.replica)) for view in snapshot.replicas]
        found.sort(key=lambda one: (one.replica != chosen, one.score is None, one.score or 0.0, -one.cached_tokens))
        return tuple(found)

    def _scores(self, request: Request, snapshot: Snapshot) -> dict[str, float]:
        if self._explain is None:
            return {}
        began = self._clock()
        if began < self._rests_until:
            self._observer.explain_failed("resting")
            return {}
        try:
            scores = {replica: float(score) for replica, score in self._explain(request, snapshot).items()}
            if not all(map(math.isfinite, scores.values())):
                raise ValueError("a score that is no finite number")
        except Exception:  # a plugin's defect must not cost a request
            self._rest("raised")
            log.exception("the policy's explain failed; it rests %g s", REST_S)
            return {}
        took = self._clock() - began
        if took > self._stall_s:
            self._rest("stalled")
            log.error("the policy's explain took %.1f ms; it rests %g s", took * 1e3, REST_S)
        return scores

    def _rest(self, kind: str) -> None:
        """All streams wait while it runs, and any client may ask for it."""
        self._observer.explain_failed(kind)
        self._rests_until = self._clock() + REST_S


def _candidate(view: ReplicaView, snapshot: Snapshot, score: float | None) -> Candidate:
    prefix = snapshot.prefix
    held = prefix.held.get(view.replica)
    expected_s = _expected_s(view, prefix, held, snapshot.now)
    if held is None:
        return Candidate(view.replica, view.queue_depth, 0, 0, expected_s, score, view.load.asleep)
    cached_tokens = min(held.tokens, prefix.tokens)
    return Candidate(view.replica, view.queue_depth, held.blocks, cached_tokens, expected_s, score, view.load.asleep)


def _expected_s(brief: Brief, prefix: PrefixView, held: Held | None, now: float) -> float:
    # Both are estimates, from different sources: what is held may seem to be more than there is.
    return brief.expects_s(now, prefix.tokens, min(held.tokens, prefix.tokens) if held is not None else 0)
