"""The default policy: least expected cost, in seconds of all requests' time.

For each replica::

    cost = wait + batch + answer_tokens * step + place                          the request's own time there
         + prefill * (1 + price + queue_price * mean wait                       its prompt, and what that takes from
                        + interference * running * pressure^4)                  those who come later or run there

where `place` is 0 while the batch has room. `docs/policies.md` explains the terms. Its one rule is that of all
time-sharing: work is not cheap because a replica is idle now, it is dear in proportion to how many others will wait for
it.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Final

import msgspec

from router.compiled import part
from router.policies.queues import place_of
from router.types import Decision, Held, Holders, Reason, Request, Snapshot

if TYPE_CHECKING:
    from router.policies._costs import Arithmetic

_TIE: Final = 0.02
_TIE_S: Final = 1e-4
"""Costs that differ by less than that share and that many seconds are equal: no estimate is better."""
_CROWDED: Final = 1e6
"""Added to the cost of a crowded replica: it is taken only where all are."""

_TAKEN: Final = float("inf")

_MOST_LEANS: Final = 4096
_ALONE: Final = 0.1
"""Requests that this router does not know as its own may just be ending."""

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
        late_s: NonNegative = 0.002
        """Seconds before the end of a running step from which on a request comes too late for the next one: it takes
        time to get there, and the report that would tell of the next step is on its way."""
        place_tokens: NonNegative = 200.0
        """Output tokens after which a request is taken to make room where the batch is full."""
        lean_s: NonNegative = 0.4
        """How much this router prefers some replicas, drawn once for all, where all requests are other routers'; in
        seconds."""
        lean_requests: Annotated[float, msgspec.Meta(gt=0)] = 3.0
        """Requests per replica from which on it leans that much; with fewer there, few can have come unseen."""

    def __init__(self, options: Options, random: random.Random) -> None:
        self._options = options
        self._draw = random
        self._random = random.random
        self._known: dict[str, float] = {}
        """How much this router leans away from each replica, between 0 and 1."""
        self._leaning: Mapping[str, int] = {}
        self._lean: list[float] = []
        """Of the replicas in `_leaning`, in their order; a pool has the same object as long as it has the same ones."""
        compiled = part("router.policies._costs")
        self._arithmetic: Arithmetic | None = None
        if compiled is not None:
            self._arithmetic = compiled.Arithmetic(options, self._leans, random)

    def choose(self, request: Request, snapshot: Snapshot) -> Decision:
        if self._arithmetic is not None:
            decision = self._arithmetic.choose(snapshot)
            if decision is not None:
                return decision
        replicas = snapshot.replicas
        if len(replicas) == 1:
            return Decision(replicas[0].replica, Reason.ONLY_REPLICA)
        costs = self._plain_costs(snapshot)
        # Passes that run in C are cheaper than one with three cases in it.
        least = min(costs)
        best = costs.index(least)
        costs[best] = _TAKEN
        second = min(costs)
        bound = least + _TIE * least + _TIE_S
        if second <= bound:
            costs[best] = least
            # Estimates cannot tell these apart. Where an engine says nothing of its steps, that is all of them.
            ties = [at for at, cost in enumerate(costs) if cost <= bound]
            depths = [replicas[at].queue_depth for at in ties]
            best = ties[place_of(depths, min(depths), self._draw)]
            costs[best] = _TAKEN
            second = min(costs)
        fallback = replicas[costs.index(second)].replica
        return Decision(replicas[best].replica, Reason.LEAST_COST, (fallback,), least)

    def explain(self, request: Request, snapshot: Snapshot) -> dict[str, float]:
        """The cost at each replica, in seconds."""
        return {view.replica: cost for view, cost in zip(snapshot.replicas, self._costs(snapshot), strict=True)}

    def _costs(self, snapshot: Snapshot) -> list[float]:
        costs = self._arithmetic.costs(snapshot) if self._arithmetic is not None else None
        return self._plain_costs(snapshot) if costs is None else costs

    def _plain_costs(self, snapshot: Snapshot) -> list[float]:
        options, prefix, now = self._options, snapshot.prefix, snapshot.now
        count = len(snapshot.replicas)
        frees, sents, batches, steps, tokens_s, pairs_s, running, depths, beyond, usages, leases = snapshot.columns()
        soon = now + options.late_s
        begins = [
            free if free > soon or there == 0 else free + step
            for free, step, there in zip(frees, steps, running, strict=True)
        ]
        waits = [sent + begin - now if begin > now else sent for begin, sent in zip(begins, sents, strict=True)]
        mean_wait = sum(waits) / count
        share = options.interference * (sum(usages) / count) ** 4
        price = 1.0 + options.price + options.queue_price * mean_wait
        answer, tokens = options.answer_tokens, float(prefix.tokens)  # Floats, of which sums are made faster.
        half = 0.5 * tokens * tokens
        held = prefix.held if type(prefix.held) is Holders else Holders.of(prefix.held)
        new, pairs = (tokens, half) if held.most is None else _uncached(tokens, half, held.most)
        costs = [
            wait + batch + answer * step + (new * token + pairs * pair) * (price + share * there)
            for wait, batch, step, token, pair, there in zip(
                waits, batches, steps, tokens_s, pairs_s, running, strict=True
            )
        ]
        places = snapshot.places
        for one, names in held.groups:
            other, other_pairs = (tokens, half) if one is None else _uncached(tokens, half, one)
            less, less_pairs = other - new, other_pairs - pairs
            for at in map(places.get, names):
                if at is not None:
                    costs[at] += (less * tokens_s[at] + less_pairs * pairs_s[at]) * (price + share * running[at])
        # Where all queue, numbers say little: many short requests may wait beside few long ones.
        everyone = sum(depths)
        crowd = (options.crowd_factor + 2.0 * mean_wait) * everyone / count + options.crowd_slack
        if max(depths) > crowd:
            for at, there in enumerate(depths):
                if there > crowd:
                    costs[at] += _CROWDED
        if max(beyond) >= 0:
            for at, over in enumerate(beyond):
                if over >= 0:  # Its batch is full: others must end before this request begins.
                    costs[at] += (over + 1) * options.place_tokens * steps[at] / max(depths[at] - over, 1)
        if everyone and options.lean_s:
            others = 1.0 - sum(leases) / everyone
            if others > _ALONE:
                most_s = options.lean_s * others * min(everyone / (count * options.lean_requests), 1.0)
                costs = [cost + lean * most_s for cost, lean in zip(costs, self._leans(places), strict=True)]
        return costs

    def _leans(self, places: Mapping[str, int]) -> list[float]:
        """Other routers' requests show only in the next reports, so all would take what looks idle at once."""
        if places is not self._leaning:
            known = self._known
            if len(known) > _MOST_LEANS:
                known.clear()
            for name in places:
                if name not in known:
                    known[name] = self._random()
            self._leaning, self._lean = places, [known[name] for name in places]
        return self._lean


def _uncached(tokens: float, half: float, held: Held) -> tuple[float, float]:
    """Tokens and attention pairs of a prompt that are not cached where so much is held; `half` is half its square."""
    cached = min(held.tokens, tokens)
    return tokens - cached, half - 0.5 * cached * cached
