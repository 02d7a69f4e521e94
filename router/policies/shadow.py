"""A second policy that decides on live traffic without effect, so that it can be judged before it routes.

The rule: the live policy's decision is what counts, and nothing that the shadow does changes it.
"""

from __future__ import annotations

from typing import Protocol

from router.policies.base import Policy
from router.policies.expectations import first_tokens_s
from router.types import Decision, Reason, Request, Snapshot

_NO_OPINION = frozenset({Reason.POLICY_FAILED, Reason.POLICY_STALLED})
"""What a guard says where the policy behind it did not decide."""


class ShadowObserver(Protocol):
    """Who counts (`router.observe.policies.PolicyMetrics`)."""

    def shadow_decided(self, agreed: bool, difference_s: float) -> None:
        """Both decided: whether for the same replica, and by how much later the first token is expected where the
        shadow pointed than where the request goes; below 0 the shadow's choice is the better one."""

    def shadow_failed(self) -> None:
        """The shadow raised."""


class Shadow:
    """A policy (`router.policies.base.Policy`) that answers with what `live` says and compares it with `shadow`.

    Both are best each behind a `Guard` of their own, with a random source of their own::

        live = Guard(policy, name, least_queue, metrics.policies, time.perf_counter, stall_s)
        shadow = Guard(other, f"{other_name} (shadow)", least_queue, metrics.policies, time.perf_counter, stall_s)
        policy = Shadow(live, shadow, metrics.policies)

    What the shadow raises is caught here; a shadow that is slow holds up the loop as a live policy would, and only its
    guard sends it to rest. A shadow that remembers where it sent things remembers what it would have done. Requests
    with one candidate are no comparison and are left out.
    """

    def __init__(self, live: Policy, shadow: Policy, observer: ShadowObserver) -> None:
        self._live = live
        self._shadow = shadow
        self._observer = observer

    def choose(self, request: Request, snapshot: Snapshot) -> Decision:
        decision = self._live.choose(request, snapshot)
        if len(snapshot.replicas) > 1:
            try:
                self._compare(request, snapshot, decision)
            except Exception:  # counted, and without any effect by the rule of this module
                self._observer.shadow_failed()
        return decision

    def _compare(self, request: Request, snapshot: Snapshot, live: Decision) -> None:
        shadow = self._shadow.choose(request, snapshot)
        if shadow.reason in _NO_OPINION or live.reason in _NO_OPINION:
            return
        if shadow.replica == live.replica:
            self._observer.shadow_decided(True, 0.0)
            return
        names = [view.replica for view in snapshot.replicas]
        expected = first_tokens_s(snapshot)
        difference = expected[names.index(shadow.replica)] - expected[names.index(live.replica)]
        self._observer.shadow_decided(False, difference)
