"""The default policy: least expected cost, in seconds of all requests' time.

For each replica::

    cost = wait + batch + answer_tokens * step                                  the request's own time there
         + prefill * (1 + price + queue_price * mean wait                       its prompt, and what that takes from
                        + interference * running * pressure^4)                  those who come later or run there

`docs/policies.md` explains the terms. Its one rule is that of all time-sharing: work is not cheap because a replica is
idle now, it is dear in proportion to how many others will wait for it.
"""

from __future__ import annotations

import random
from typing import Annotated, Final

import msgspec

from router.types import Decision, Reason, ReplicaView, Request, Snapshot

_TIE: Final = 0.02
_TIE_S: Final = 1e-4
"""Costs that differ by less than that share and that many seconds are equal: no estimate is better."""
_CROWDED: Final = 1e6
"""Added to the cost of a crowded replica: it is taken only where all are."""

_TAKEN: Final = float("inf")

_ALONE: Final = 0.1
"""Requests that this router does not know as its own may just be ending."""
_MOST_LEANS: Final = 4096

NonNegative = Annotated[float, msgspec.Meta(ge=0)]


class Cost:
    """Sends a request where it costs least."""

    class Options(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
        price: NonNegative = 0.25
        """What a second of prompt computation costs those who come after it, in seconds, on a fleet without queues."""
        queue_price: NonNegative = 2.0
        """How much that price rises per second that requests wait on average over the fleet."""
        interference: NonNegative = 6.0
        """Weight of a running request's delay where all KV caches are full; their use to the fourth power scales it."""
        answer_tokens: NonNegative = 8.0
        """Output tokens whose time counts as much as the wait for the first one."""
        crowd_factor: Annotated[float, msgspec.Meta(ge=1)] = 1.5
        """A replica with more than so many times the mean number of requests, and `crowd_slack` more, gets none."""
        crowd_slack: NonNegative = 4.0
        lean_s: NonNegative = 0.4
        """How much this router prefers some replicas, drawn once for all, where all requests are other routers'."""

    def __init__(self, options: Options, random: random.Random) -> None:
        self._options = options
        self._random = random.random
        self._leans: dict[str, float] = {}
        """For each replica between 0 and 1."""

    def choose(self, request: Request, snapshot: Snapshot) -> Decision:
        replicas = snapshot.replicas
        if len(replicas) == 1:
            return Decision(replicas[0].replica, Reason.ONLY_REPLICA)
        costs = self._costs(snapshot)
        # Passes that run in C are cheaper than one with three cases in it.
        least = min(costs)
        best = costs.index(least)
        costs[best] = _TAKEN
        second = min(costs)
        bound = least + _TIE * least + _TIE_S
        if second <= bound:
            costs[best] = least
            # Estimates cannot tell these apart. Where an engine says nothing of its steps, that is all of them.
            ties = [(replicas[at].queue_depth, self._random(), at) for at, cost in enumerate(costs) if cost <= bound]
            best = min(ties)[2]
            costs[best] = _TAKEN
            second = min(costs)
        fallback = replicas[costs.index(second)].replica
        return Decision(replicas[best].replica, Reason.LEAST_COST, (fallback,), least)

    def explain(self, request: Request, snapshot: Snapshot) -> dict[str, float]:
        """The cost at each replica, in seconds."""
        return {view.replica: cost for view, cost in zip(snapshot.replicas, self._costs(snapshot), strict=True)}

    def _costs(self, snapshot: Snapshot) -> list[float]:
        options, replicas, prefix, now = self._options, snapshot.replicas, snapshot.prefix, snapshot.now
        count = len(replicas)
        outlooks = [view.outlook for view in replicas]
        waits = [
            outlook.sent_s + view.free_at - now if view.free_at > now else outlook.sent_s
            for view, outlook in zip(replicas, outlooks, strict=True)
        ]
        depths = [view.queue_depth for view in replicas]
        mean_wait = sum(waits) / count
        pressure = sum([view.load.kv_usage for view in replicas]) / count
        share = options.interference * pressure**4
        price = 1.0 + options.price + options.queue_price * mean_wait
        # Where all queue, numbers say little: many short requests may wait beside few long ones.
        everyone = sum(depths)
        crowd = (options.crowd_factor + 2.0 * mean_wait) * everyone / count + options.crowd_slack
        held, tokens, answer = prefix.held.get, prefix.tokens, options.answer_tokens
        half = 0.5 * tokens * tokens
        last, new, pairs = None, tokens, half
        costs = []
        for view, outlook, wait in zip(replicas, outlooks, waits, strict=True):
            found = held(view.replica)
            if found is not last:  # Most hold the same, and then share it.
                cached = min(found.tokens, tokens) if found is not None else 0
                last, new, pairs = found, tokens - cached, half - 0.5 * cached * cached
            prefill = new * outlook.token_s + pairs * outlook.pair_s
            costs.append(wait + outlook.batch_s + answer * outlook.step_s + prefill * (price + share * view.running))
        if everyone and options.lean_s:
            others = 1.0 - sum([view.leases for view in replicas]) / everyone
            if others > _ALONE:
                self._lean(costs, replicas, options.lean_s * others)
        if max(depths) > crowd:
            costs = [cost if there <= crowd else cost + _CROWDED for cost, there in zip(costs, depths, strict=True)]
        return costs

    def _lean(self, costs: list[float], replicas: tuple[ReplicaView, ...], most_s: float) -> None:
        """Other routers' requests show only in the next reports, so all would take what looks idle at once."""
        leans = self._leans
        if len(leans) > _MOST_LEANS:
            leans.clear()
        for at, view in enumerate(replicas):
            lean = leans.get(view.replica)
            if lean is None:
                lean = leans[view.replica] = self._random()
            costs[at] += lean * most_s
