"""The load model: how long a replica's steps take, learned from its steps, and what that says of the next request.

Sans-IO. Two linear models of a step's duration are fitted online by least squares over decayed sums, one for steps that
compute prompts and one for those that only decode::

    step = batch + token * (prompt tokens + decodes) + pair * attention pairs + context * context tokens

Replicas of one model learn together, since they run on the same hardware; what one replica is slower or faster than the
others is one factor of its own, from its latest steps. No constant of any GPU is set by hand: before the first step a
weak guess stands in. `FleetModel` owns what was learned.
"""

from __future__ import annotations

import math
from typing import Final, cast

from router.compiled import part
from router.types import Load, Outlook

_UNITS: Final = (1.0, 1e3, 1e6, 1e5)
"""Of tokens, pairs and context, so that all sums are of one magnitude."""
_MEMORY: Final = 0.999
"""What a step counts after the next one came: about the last thousand steps of the fleet decide."""
_RIDGE: Final = 1e-3
"""Holds a coefficient that no step has told about at its last value."""
_REFIT_STEPS: Final = 32
_OUTLIER: Final = 5.0
"""Steps that take this much longer than expected (a pause of the machine) count as if they took only so much longer."""
_FACTOR_RANGE: Final = (0.1, 10.0)
_CHANCE: Final = 1.25
"""A factor nearer to 1 is noise: believed, it would send all requests of a quiet fleet to one replica."""
_HALF_LIFE_S: Final = 5.0
"""Of the evidence that a replica is slower or faster than the others. Who is thought slow gets no requests, so that
nothing but time could ever show that it was only warming up or disturbed."""
_PRIOR_MS: Final = 500.0
"""As much time in steps speaks for every replica being like the others."""
_LEARN_EVERY: Final = 4
_LEARNED_STEPS: Final = 256
_FRESH_S: Final = 0.5
"""How old an idle replica's outlook may be; to make all of them anew takes as long as several decisions."""
_FACTOR_S: Final = 0.25
"""How old its factor may be: evidence for it loses half of its weight in twenty times as long."""
_MOST: Final = 1e100
"""Of any figure: sums of the squares of larger ones may be no numbers any more."""
_GUESS_TOKEN_MS: Final = 0.05
"""Before anything is known; the first steps override it."""
_GUESS_BUDGET: Final = 2048.0


class StepFit:
    """step ms as a linear function of (1, tokens, pairs, context)."""

    def __init__(self, guess: tuple[float, float, float, float]) -> None:
        self.coefficients = guess
        """Milliseconds per step, token, pair and context token."""
        self.steps = 0
        self._products = [[0.0] * 4 for _ in range(4)]
        self._targets = [0.0] * 4
        self._due = 1

    def expect_ms(self, tokens: float, pairs: float, context: float) -> float:
        batch, token, pair, read = self.coefficients
        return batch + token * tokens + pair * pairs + read * context

    def learn(self, tokens: float, pairs: float, context: float, ms: float) -> bool:
        """Takes one step in; fits anew now and then, often at the beginning: true where it did."""
        row = (1.0, tokens / _UNITS[1], pairs / _UNITS[2], context / _UNITS[3])
        products, targets = self._products, self._targets
        # Relative errors count, so that short steps weigh as much as long ones.
        slow = max(ms, 1.0)
        weight = 1.0 / (slow * slow)
        for i in range(4):
            scaled = row[i] * weight
            line = products[i]
            for j in range(i, 4):
                line[j] = line[j] * _MEMORY + scaled * row[j]
            targets[i] = targets[i] * _MEMORY + scaled * ms
        self.steps += 1
        if self.steps < self._due:
            return False
        self._fit()
        self._due = self.steps + min(self.steps, _REFIT_STEPS)
        return True

    def _fit(self) -> None:
        """Least squares with a ridge toward the last solution; negative coefficients are left out one by one."""
        last = [value * unit for value, unit in zip(self.coefficients, _UNITS, strict=True)]
        free = [0, 1, 2, 3]
        while free:
            solution = self._solve(free, last)
            if min(solution) >= 0.0:
                break
            free.pop(solution.index(min(solution)))
        values = [0.0] * 4
        for i, value in zip(free, solution, strict=False):  # Where all are negative, one is left that is not free.
            values[i] = value / _UNITS[i]
        self.coefficients = (values[0], values[1], values[2], values[3])

    def _solve(self, free: list[int], last: list[float]) -> list[float]:
        products = self._products
        ridge = _RIDGE * max(products[i][i] for i in free) * 1e-3 + 1e-12
        size = len(free)
        rows = []
        for i in free:
            row = [products[min(i, j)][max(i, j)] for j in free]
            row[free.index(i)] += ridge
            rows.append([*row, self._targets[i] + ridge * last[i]])
        for k in range(size):
            pivot = rows[k][k]
            for i in range(k + 1, size):
                ratio = rows[i][k] / pivot
                if ratio:
                    for j in range(k, size + 1):
                        rows[i][j] -= ratio * rows[k][j]
        solution = [0.0] * size
        for k in range(size - 1, -1, -1):
            known = sum(rows[k][j] * solution[j] for j in range(k + 1, size))
            solution[k] = (rows[k][size] - known) / rows[k][k]
        return solution


class Pace:
    """How long steps took beside how long they were expected to take; what is long ago counts little."""

    __slots__ = ("_at", "_expected", "_took")

    def __init__(self) -> None:
        self._took = self._expected = self._at = 0.0

    def stepped(self, now: float, took_ms: float, expected_ms: float) -> None:
        left = self._left(now)
        self._took = self._took * left + took_ms
        self._expected = self._expected * left + expected_ms
        self._at = now

    def factor(self, now: float, otherwise: float) -> float:
        """The one over the other; near to `otherwise` where little is known."""
        left = self._left(now)
        factor = (self._took * left + _PRIOR_MS * otherwise) / (self._expected * left + _PRIOR_MS)
        return min(max(factor, _FACTOR_RANGE[0]), _FACTOR_RANGE[1])

    def _left(self, now: float) -> float:
        passed = now - self._at
        return 0.5 ** (passed / _HALF_LIFE_S) if passed > 0.0 else 1.0


def new_fleet() -> FleetModel:
    """What is to be learned of one model's replicas, compiled where that is there."""
    compiled = part("router.load._outlooks")
    return cast(FleetModel, compiled.FleetModel()) if compiled is not None else FleetModel()


class FleetModel:
    """What all replicas of one model have in common."""

    def __init__(self) -> None:
        self.prefill = StepFit((0.0, _GUESS_TOKEN_MS, 0.0, 0.0))
        self.decode = StepFit((0.0, _GUESS_TOKEN_MS, 0.0, 0.0))
        self.budget = _GUESS_BUDGET
        """Most prompt tokens in one step that were seen: how many steps a long prompt takes."""
        self.version = 0
        """Rises with new fits, once they are good at most every `_FRESH_S`."""
        self._stale_at = 0.0
        self.now = 0.0
        """When the last step was reported."""
        self.pace = Pace()
        """Of all replicas."""

    def foresight(self) -> ReplicaModel:
        """For one replica's account."""
        return ReplicaModel(self)

    def fitted(self, early: bool) -> None:
        """A fit came out anew. Replicas that step look at it by themselves, so that it is news for idle ones only."""
        if early or self.now >= self._stale_at:
            self.version += 1
            self._stale_at = self.now + _FRESH_S


class ReplicaModel:
    """One replica: the fleet's model times its own factor (`router.load.account.Foresight`)."""

    def __init__(self, fleet: FleetModel) -> None:
        self._fleet = fleet
        self._pace = Pace()
        self._as_of = 0.0
        self._factor = 1.0
        self._factor_until = -math.inf
        self._steps = 0
        self._last: tuple[float, int, int, int] | None = None
        self._busy = False

    @property
    def news(self) -> FleetModel:
        return self._fleet

    def observe(self, load: Load, now: float) -> None:
        self._fleet.now = now
        prompt, decodes = load.step_prefill_tokens, load.step_decodes
        step = (load.step_ms, prompt, decodes, load.step_context_tokens)
        again, self._last = step == self._last, step
        silent = load.step_ms <= 0.0 or not (prompt or decodes)  # An engine that does not say what its steps do.
        # News in the middle of a step repeat what the last one did; an engine that does not count context may just have
        # done the same again.
        if silent or not again or not self._busy or (decodes and not load.step_context_tokens):
            self._as_of = now
        self._busy = load.queued_prefill_tokens > 0 or load.running > 0
        if silent or again:
            return
        if not (abs(load.step_ms) < _MOST and abs(load.step_prefill_pairs) < _MOST):
            return  # Sums would never be rid of it.
        fleet = self._fleet
        if prompt > fleet.budget:
            fleet.budget = float(prompt)
        fit = fleet.prefill if prompt else fleet.decode
        self._steps += 1
        if self._steps % _LEARN_EVERY and fit.steps >= _LEARNED_STEPS:
            return  # every step would tell hardly more, at the cost of a routing decision each
        self._learn(fit, prompt + decodes, load)

    def _learn(self, fit: StepFit, tokens: int, load: Load) -> None:
        fleet, ms = self._fleet, load.step_ms
        expected = fit.expect_ms(tokens, load.step_prefill_pairs, load.step_context_tokens)
        if fit.steps >= _REFIT_STEPS and expected > 0.0:
            common = fleet.pace.factor(fleet.now, 1.0)
            factor = self._pace.factor(fleet.now, common)
            ms = min(ms, _OUTLIER * expected * factor)
            self._pace.stepped(fleet.now, ms, expected)
            fleet.pace.stepped(fleet.now, ms, expected)
            self._factor_until = -math.inf
            ms *= common / factor
        if fit.learn(tokens, load.step_prefill_pairs, load.step_context_tokens, ms):
            fleet.fitted(early=fit.steps <= _LEARNED_STEPS)

    def outlook(self, load: Load, unacked_tokens: int, unacked_pairs: float, unacked: int) -> Outlook:
        fleet = self._fleet
        if fleet.now >= self._factor_until:
            self._compare()
        scale = self._factor * 1e-3
        batch, token, pair, read = fleet.prefill.coefficients
        step, one, _, each = fleet.decode.coefficients
        decodes, context = load.step_decodes, load.step_context_tokens
        running = max(load.running, 0)
        if decodes > running:  # What has ended since, and will not be in the next step.
            decodes, context = running, context * running // decodes
        beside = batch + token * decodes + read * context
        per_token = token + beside / fleet.budget
        wait = per_token * load.queued_prefill_tokens + pair * load.queued_prefill_pairs
        if running:  # Who comes now is in none before the next step.
            wait = max(wait, step + one * decodes + each * context)
        return Outlook(
            wait * scale,
            (step + one * (decodes + unacked) + each * context) * scale,
            per_token * scale,
            pair * scale,
            beside * scale,
            self._as_of,
            (per_token * unacked_tokens + pair * unacked_pairs) * scale,
        )

    def _compare(self) -> None:
        """How much longer its steps take than the fit says; the same as for all others where that may be chance."""
        now = self._fleet.now
        common = self._fleet.pace.factor(now, 1.0)
        factor = self._pace.factor(now, common)
        self._factor = common if common / _CHANCE < factor < common * _CHANCE else factor
        self._factor_until = now + _FACTOR_S
