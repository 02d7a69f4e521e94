"""The default policy: least expected cost, in seconds.

    cost = wait + prefill + price * prefill + interference

`wait` is the work that the replica still has before this request, `prefill` what it must compute of this prompt (all
that its KV cache does not hold), both from the load model. The price is what that work costs everybody else: those who
come after it on the same replica, and the running requests whose next tokens wait while a prompt is computed.
"""

from __future__ import annotations

import random
from typing import Annotated

import msgspec

from router.types import Decision, Reason, Request, Snapshot

_TIE_S = 1e-4
"""Costs that differ by less are equal: no estimate is better than that."""


class Cost:
    """Sends a request where it costs least."""

    affinity = True

    class Options(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
        price: Annotated[float, msgspec.Meta(ge=0)] = 1.0
        """Seconds that one second of prompt computation is taken to cost others, on a fleet that is not busy."""
        busy_price: Annotated[float, msgspec.Meta(ge=0)] = 4.0
        """The same on a fleet whose KV caches are full of running requests."""

    def __init__(self, options: Options, random: random.Random) -> None:
        self._options = options
        self._random = random

    def choose(self, request: Request, snapshot: Snapshot) -> Decision:
        replicas = snapshot.replicas
        if len(replicas) == 1:
            return Decision(replicas[0].replica, Reason.ONLY_REPLICA)
        prefix, now = snapshot.prefix, snapshot.now
        held, tokens = prefix.held, prefix.tokens
        price = 1.0 + self._options.price
        pairs = tokens * tokens * 0.5
        best, second, least = "", "", float("inf")
        ties = 1
        draw = self._random.random
        for view in replicas:
            outlook = view.outlook
            new, these = tokens, pairs
            if view.replica in held:
                cached = min(held[view.replica].tokens, tokens)
                new = tokens - cached
                these = pairs - cached * cached * 0.5
            wait = outlook.wait_s - (now - outlook.as_of)
            if wait < 0.0:
                wait = 0.0
            prefill = new * outlook.token_s + these * outlook.pair_s
            cost = wait + outlook.batch_s + price * prefill
            if cost < least - _TIE_S:
                best, second, least, ties = view.replica, best, cost, 1
            elif cost < least + _TIE_S:
                ties += 1
                if draw() * ties < 1.0:
                    best, second, least = view.replica, best, min(cost, least)
        return Decision(best, Reason.LEAST_COST, (second,) if second else (), least)
