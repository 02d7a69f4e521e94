"""The best weighted sum of scorers."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Annotated, Any

import msgspec

from router.errors import ConfigError
from router.policies import registry
from router.policies.queues import place_of
from router.policies.registry import Place
from router.types import Decision, Reason, Request, Snapshot


class Weighted:
    """Adds up what its scorers say of each replica, each times its weight, and takes the best; ties at random."""

    class Options(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
        scorers: dict[str, Annotated[float, msgspec.Meta(ge=0)]] = msgspec.field(
            default_factory=lambda: {"prefix": 3.0, "queue": 2.0, "kv-usage": 2.0}
        )
        """Weights by the scorers' names (see `kvlane policies`). These three are llm-d's proportions."""
        scorer_options: dict[str, dict[str, Any]] = {}
        """Scorers' own options, by their names."""

        def __post_init__(self) -> None:
            if not any(self.scorers.values()):
                raise ValueError("scorers: at least one weight must be above 0")
            for name in self.scorer_options:
                if name not in self.scorers:
                    raise ValueError(f"scorer_options.{name}: {name!r} is none of the scorers")
            try:
                registry.scorers.check_all(self.with_options(), _place)
            except ConfigError as error:
                raise ValueError(error.message.replace("\n", "; ")) from error

        def with_options(self) -> dict[str, dict[str, Any]]:
            """The scorers with their own options."""
            return {name: self.scorer_options.get(name, {}) for name in self.scorers}

    def __init__(self, options: Options, random: random.Random) -> None:
        self._random = random
        made = registry.scorers.create_all(options.with_options(), random, _place)
        scorers = [(weight, each) for weight, each in zip(options.scorers.values(), made, strict=True) if weight]
        self._scorers = [(weight, scorer.score) for weight, scorer in scorers]
        # A scorer that learns nothing from the choice is not told of it.
        self._told = [scorer.chosen for _, scorer in scorers if hasattr(scorer, "chosen")]

    def choose(self, request: Request, snapshot: Snapshot) -> Decision:
        replicas = snapshot.replicas
        sums = self._sums(request, snapshot)
        best = max(sums)
        chosen = replicas[place_of(sums, best, self._random)].replica
        for told in self._told:
            told(request, chosen)
        return Decision(chosen, Reason.BEST_SCORE if len(replicas) > 1 else Reason.ONLY_REPLICA, (), -best)

    def explain(self, request: Request, snapshot: Snapshot) -> Mapping[str, float]:
        """The measure of each replica, lower is better; for receipts."""
        sums = self._sums(request, snapshot)
        return {view.replica: -score for view, score in zip(snapshot.replicas, sums, strict=True)}

    def _sums(self, request: Request, snapshot: Snapshot) -> list[float]:
        (weight, score), *others = self._scorers
        sums = [weight * each for each in score(request, snapshot)]
        for weight, score in others:
            sums = [total + weight * each for total, each in zip(sums, score(request, snapshot), strict=True)]
        return sums


def _place(name: str) -> Place:
    return Place("scorers", ("scorer_options", name))
