"""A policy behind a guard: its defects and its slowness cost no request.

The rule: `Guard.choose` never raises and always answers with a replica of the snapshot. What the guarded policy raises,
an answer that is none and an answer that comes too late give way to the fallback's. A call cannot be cut short, so a
policy that is late several times in a row is left alone for a while, and then tried again.

An answer is too late where the policy itself held the event loop for too long: it computed or slept. Where the machine
gave the processor to others meanwhile, the policy can do nothing about it, and its answer stands. To tell the two apart
takes two system calls before each answer, so it is done from the first late answer on; that one counts as the policy's.
"""

from __future__ import annotations

import enum
import logging
import math
import resource
import time
from collections.abc import Callable
from typing import Final, Protocol

from router.policies.base import Policy
from router.types import Decision, Reason, Request, Snapshot

log = logging.getLogger(__name__)

STALLS_TO_REST = 3
"""Late answers in a row after which the policy rests."""
REST_S = 60.0
"""How long it rests; a single late answer after that sends it to rest again."""
LOG_INTERVAL_S = 60.0
_WHOSE: Final = getattr(resource, "RUSAGE_THREAD", resource.RUSAGE_SELF)  # The latter where there is no other.

Usage = tuple[float, int]
"""Seconds of CPU time that a thread took, and how often it gave the processor up to wait for something."""


def thread_usage() -> Usage:
    """Of the calling thread; takes 0.8 µs. To wait for the interpreter's lock is to wait."""
    return time.thread_time(), resource.getrusage(_WHOSE).ru_nvcsw


class Failure(enum.StrEnum):
    """Why the fallback decided; a closed set, so that it can be a metric label."""

    RAISED = "raised"
    INVALID = "invalid"
    """It answered with something that is no decision, or with a replica that is not there."""
    STALLED = "stalled"
    """It answered too late."""
    RESTING = "resting"
    """It was not asked, for its last answers came too late."""


class GuardObserver(Protocol):
    """Who counts (`router.observe.policies.PolicyMetrics`)."""

    def policy_took(self, policy: str, seconds: float) -> None:
        """The policy was asked, and answered or raised after that time."""

    def policy_failed(self, policy: str, kind: str) -> None:
        """The fallback decided instead; `kind` is a `Failure`."""


class Guard:
    """A policy (`router.policies.base.Policy`) that stands in front of another one.

    `fallback` must not fail: it is `least-queue`. `clock` counts in seconds and never goes back; `stall_s` is the
    longest that an answer may take on it. `name` is how metrics and the log call the policy; `instead` is how the log
    says what the fallback does; `usage` tells what the calling thread did.
    """

    def __init__(
        self,
        policy: Policy,
        name: str,
        fallback: Policy,
        observer: GuardObserver,
        clock: Callable[[], float],
        stall_s: float,
        instead: str = "requests go to the shortest queue instead",
        usage: Callable[[], Usage] = thread_usage,
    ) -> None:
        self._policy = policy
        self._name = name
        self._fallback = fallback
        self._observer = observer
        self._clock = clock
        self._stall_s = stall_s
        self._usage = usage
        self._watches = False
        """Whether an answer was late, so that it is looked at what the thread does."""
        self._stalls = 0
        """Late answers in a row."""
        self._rests_until = float("-inf")
        self._log = _SparseLog(instead)

    def choose(self, request: Request, snapshot: Snapshot) -> Decision:
        before = self._usage() if self._watches else None
        began = self._clock()
        if began < self._rests_until:
            return self._instead(Failure.RESTING, request, snapshot)
        try:
            decision = self._policy.choose(request, snapshot)
            now = self._clock()
            fault = _fault(decision, snapshot)
        except Exception as error:  # a plugin's defect must not cost a request
            now = self._clock()
            self._timed(now - began, now, before)
            self._log.failed(Failure.RAISED, f"policy {self._name!r} raised {type(error).__name__}", now, error)
            return self._instead(Failure.RAISED, request, snapshot)
        took = now - began
        if took <= self._stall_s and not fault:  # As nearly all are.
            self._observer.policy_took(self._name, took)
            self._stalls = 0
            return decision
        if self._timed(took, now, before):
            return self._instead(Failure.STALLED, request, snapshot)
        if not fault:
            return decision
        self._log.failed(Failure.INVALID, f"policy {self._name!r} {fault}", now)
        return self._instead(Failure.INVALID, request, snapshot)

    def _timed(self, took: float, now: float, before: Usage | None) -> bool:
        """Whether that was too long, and the policy's doing."""
        self._observer.policy_took(self._name, took)
        if took <= self._stall_s:
            self._stalls = 0
            return False
        if not self._held_the_loop(before):
            return False
        self._stalls += 1
        told = f"policy {self._name!r} took {took * 1e3:.1f} ms, above the limit of {self._stall_s * 1e3:g} ms"
        if self._stalls < STALLS_TO_REST:
            self._log.failed(Failure.STALLED, told, now)
        else:
            self._rests_until = now + REST_S
            self._log.failed(Failure.RESTING, f"{told}, {self._stalls} times in a row; it rests {REST_S:g} s", now)
        return True

    def _held_the_loop(self, before: Usage | None) -> bool:
        """Whether the thread computed or slept for all that time, and was not just kept from running."""
        if before is None:
            self._watches = True
            return True
        worked_s, waits = self._usage()
        return worked_s - before[0] > self._stall_s or waits > before[1]

    def _instead(self, kind: Failure, request: Request, snapshot: Snapshot) -> Decision:
        self._observer.policy_failed(self._name, kind)
        decision = self._fallback.choose(request, snapshot)
        late = kind is Failure.STALLED or kind is Failure.RESTING
        reason = Reason.POLICY_STALLED if late else Reason.POLICY_FAILED
        return Decision(decision.replica, reason, decision.fallbacks, decision.score)


def _fault(decision: Decision, snapshot: Snapshot) -> str:
    """What is wrong with an answer, be it a `Decision` or not; empty where nothing is."""
    if not isinstance(decision, Decision):
        return f"answered with a {type(decision).__name__}, which is no Decision"
    if not isinstance(decision.replica, str) or decision.replica not in snapshot.places:
        return f"chose {decision.replica!r}, which is not in the snapshot"
    if not isinstance(decision.reason, Reason):
        return f"gave a {type(decision.reason).__name__} as its reason, which is no Reason"
    if not isinstance(decision.fallbacks, tuple):
        return f"gave a {type(decision.fallbacks).__name__} of fallbacks, which is no tuple"
    for name in decision.fallbacks:
        if not isinstance(name, str):
            return f"gave a {type(name).__name__} among its fallbacks, which is no replica's name"
    if not isinstance(decision.score, (float, int)) or not math.isfinite(decision.score):
        return f"gave the score {decision.score!r:.50}, which is no finite number"
    return ""


class _SparseLog:
    """Logs each kind of failure at most once a minute, with how many were kept back."""

    def __init__(self, instead: str) -> None:
        self._instead = instead
        self._logged_at: dict[Failure, float] = {}
        self._kept_back = dict.fromkeys(Failure, 0)

    def failed(self, kind: Failure, told: str, now: float, error: Exception | None = None) -> None:
        if now - self._logged_at.get(kind, float("-inf")) < LOG_INTERVAL_S:
            self._kept_back[kind] += 1
            return
        kept_back, self._kept_back[kind] = self._kept_back[kind], 0
        self._logged_at[kind] = now
        before = f" ({kept_back} more like it since the last such line)" if kept_back else ""
        log.error("%s; %s%s", told, self._instead, before, exc_info=error)
