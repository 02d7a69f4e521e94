"""The simulator's results for people: Markdown tables here, pictures by `plots`.

Every figure is the median over seeds; where seeds differ, half of their range follows it.

    python -m loadtests.simulate.report --curves RUNS.json … --goodput SEARCHES.json … --out DIRECTORY

`--curves` takes what `python -m loadtests simulate --load …` wrote, `--goodput` what it wrote with `--goodput`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Final

import msgspec

from loadtests.simulate.measure import LONG_TOKENS, SHORT_TOKENS, Result

OURS: Final = "cost"
BASE: Final = "least-queue"
LABELS: Final = {
    "cost": "kvlane cost",
    "ideal": "pooled cache (bound)",
    "greedy": "perfect greedy (bound)",
    "lmetric": "LMETRIC",
    "dynamo": "Dynamo",
    "llm-d": "llm-d 3:2:2",
    "aibrix": "AIBrix",
    "cache-aware": "SGLang cache-aware",
    "ray-prefix": "Ray prefix affinity",
    "chwbl": "CHWBL",
    "power-of-two": "power of two",
    "least-queue": "least queue",
    "round-robin": "round robin",
}
"""Policies in the order of tables, and what people call them; others follow under their own names."""
BOUNDS: Final = ("greedy", "ideal")
USUAL_TOKEN_ERROR: Final = 0.05
NOTE: Final = (
    "kvlane's own policies (cost, round robin, least queue, power of two) run as they are. All others are "
    "re-implementations of those projects' rules (`loadtests/simulate/baselines.py`), and the bounds know what no "
    "router can."
)


class Spread(msgspec.Struct, frozen=True):
    """One figure over the seeds."""

    middle: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(median(values), min(values), max(values))


class Conditions(msgspec.Struct, frozen=True, order=True):
    """What must be equal for policies to be compared."""

    trace: str
    replicas: int
    profile: str
    staleness_ms: float
    routers: int
    model_error: float
    replica_error: float
    token_error: float
    slow_factor: float
    joins: tuple[float, ...]
    leaves: tuple[float, ...]
    options: str
    """As JSON; empty where the policy runs with its defaults."""

    @classmethod
    def of(cls, result: Result) -> Conditions:
        fields = {name: getattr(result, name) for name in cls.__struct_fields__}
        options = json.dumps(result.options, sort_keys=True) if result.options else ""
        return cls(**{**fields, "options": options})

    def told(self) -> str:
        parts = [f"{self.trace}, {self.replicas} replicas"]
        if self.profile != "h200-8b":
            parts.append(self.profile)
        if self.staleness_ms:
            parts.append(f"{self.staleness_ms:g} ms stale")
        if self.routers > 1:
            parts.append(f"{self.routers} routers")
        if self.model_error:
            parts.append(f"±{self.model_error:.0%} model error")
        if self.replica_error:
            parts.append(f"±{self.replica_error:.0%} replica error")
        if self.token_error not in (0.0, USUAL_TOKEN_ERROR):
            parts.append(f"±{self.token_error:.0%} token error")
        if self.slow_factor != 1:
            parts.append(f"one replica {self.slow_factor:g} × slower")
        parts += [f"a replica joins at {share:.0%}" for share in self.joins]
        parts += [f"a replica is lost at {share:.0%}" for share in self.leaves]
        if self.options:
            parts.append(f"options {self.options}")
        return ", ".join(parts)


class Column(msgspec.Struct, frozen=True):
    """A figure of a result, and how it is told."""

    field: str
    title: str
    factor: float = 1.0
    digits: int | None = None
    """After the point; None for three significant ones in all."""
    absent: bool = False
    """Whether 0 says that there is no such figure."""


def significant(value: float) -> str:
    """With three significant digits, without exponents."""
    return f"{value:.{_digits(value)}f}" if value else "0"


def _digits(value: float) -> int:
    """After the point, so that there are three significant ones."""
    first = int(f"{value:.2e}".split("e")[1])  # Place of the first digit once rounded: 0 for 1 to 9.99.
    return max(0, 2 - first)


GOODPUT: Final = Column("goodput_rps", "good (req/s)")
COLUMNS: Final = (
    Column("hit_ratio", "cached (%)", 100, 1),
    Column("ttft_mean_s", "TTFT mean (s)"),
    Column("ttft_p50_s", "p50 (s)"),
    Column("ttft_p90_s", "p90 (s)"),
    Column("ttft_p99_s", "p99 (s)"),
    Column("ttft_short_mean_s", f"TTFT mean, prompts < {SHORT_TOKENS:,} (s)", absent=True),
    Column("ttft_middle_mean_s", "between (s)", absent=True),
    Column("ttft_long_mean_s", f"≥ {LONG_TOKENS:,} tokens (s)", absent=True),
    Column("tpot_p50_s", "TPOT p50 (ms)", 1000),
    Column("tpot_p99_s", "p99 (ms)", 1000),
    GOODPUT,
    Column("imbalance", "most work / mean", 1, 2),
    Column("inflight_imbalance", "most in flight / mean", 1, 2),
)


def read(paths: Iterable[str | Path]) -> list[Result]:
    """The results in these files. Raises `OSError`, and `ValueError` for files of another kind."""
    results: list[Result] = []
    for path in paths:
        try:
            results += msgspec.json.decode(Path(path).read_bytes(), type=_File).results
        except (msgspec.DecodeError, msgspec.ValidationError) as error:
            raise ValueError(f"{path} holds no results of the simulator: {error}") from error
    return results


class _File(msgspec.Struct):
    results: list[Result]


def by_conditions(results: Iterable[Result]) -> dict[Conditions, list[Result]]:
    """Results that may be compared, each group in its own list; groups in order.

    The bounds, which have no use for estimates of prompt lengths, are compared with all that differ only in those.
    """
    groups: dict[Conditions, list[Result]] = {}
    bounds: list[Result] = []
    for result in results:
        if result.policy in BOUNDS:
            bounds.append(result)
        else:
            groups.setdefault(Conditions.of(result), []).append(result)
    for result in bounds:
        mine = Conditions.of(result)
        alike = [group for group in groups if msgspec.structs.replace(group, token_error=mine.token_error) == mine]
        for group in alike or [mine]:
            groups.setdefault(group, []).append(result)
    return dict(sorted(groups.items()))


def policies(results: Iterable[Result]) -> list[str]:
    """The policies that are there, in the order of `LABELS`."""
    there = {result.policy for result in results}
    return [name for name in LABELS if name in there] + sorted(there - LABELS.keys())


def label(policy: str) -> str:
    return LABELS.get(policy, policy)


def spread(results: Iterable[Result], policy: str, field: str, load: float | None = None) -> Spread | None:
    """A figure of one policy over the seeds, at one load or at all; None where there is no result."""
    values = [getattr(result, field) for result in results if result.policy == policy and load in (None, result.load)]
    return Spread.of(values) if values else None


def unlimited(results: Iterable[Result]) -> set[str]:
    """The policies for which, at some seed, no rate was too much."""
    return {result.policy for result in results if result.unlimited}


def markdown(curves: Sequence[Result], searches: Sequence[Result], pictures: Sequence[tuple[str, str]] = ()) -> str:
    """The whole report. `pictures`: title and path of each."""
    parts = ["# Routing in simulation", NOTE, _seeds([*curves, *searches])]
    parts += [f"![{title}]({path})" for title, path in pictures]
    if searches:
        parts += ["## Goodput", goodput_table(searches)]
    for conditions, group in by_conditions(curves).items():
        parts.append(f"## {conditions.told()}")
        for load in sorted({result.load for result in group}):
            parts += [f"### {load:g} × least queue's saturation rate", load_table(group, load)]
    return "\n\n".join(part for part in parts if part) + "\n"


def load_table(results: Sequence[Result], load: float) -> str:
    """All figures at one load: a row per policy."""
    rows = []
    for policy in policies(results):
        figures = [spread(results, policy, column.field, load) for column in COLUMNS]
        if figures[0] is not None:
            told = [_told(figure, column) for figure, column in zip(figures, COLUMNS, strict=True)]
            rows.append([label(policy), *told] if policy != OURS else [_bold(cell) for cell in (label(policy), *told)])
    return _table(["policy", *(column.title for column in COLUMNS)], rows)


def goodput_table(results: Sequence[Result]) -> str:
    """Highest rates at which 90% of the requests met both limits: a row per policy, a column per conditions."""
    groups = by_conditions(results)
    rows = []
    for policy in policies(results):
        cells = [label(policy)]
        for group in groups.values():
            if policy in unlimited(group):
                cells.append("no limit")
                continue
            found = spread(group, policy, "goodput_rps")
            base = None if BASE in unlimited(group) else spread(group, BASE, "goodput_rps")
            ratio = f" = {found.middle / base.middle:.2f} ×" if found and base and base.middle else ""
            cells.append(f"{_told(found, GOODPUT)}{ratio}")
        rows.append([_bold(cell) for cell in cells] if policy == OURS else cells)
    table = _table(["policy", *(f"{conditions.told()} (req/s)" for conditions in groups)], rows)
    return f"{table}\n\n× is by least queue's." if any(" ×" in cell for row in rows for cell in row) else table


def _told(figure: Spread | None, column: Column) -> str:
    if figure is None or (column.absent and not figure.high):
        return "–"
    middle = figure.middle * column.factor
    digits = _digits(middle) if column.digits is None else column.digits
    half = f"{(figure.high - figure.low) / 2 * column.factor:.{digits}f}"
    # What rounds to nothing is no spread worth a place.
    return f"{middle:.{digits}f} ±{half}" if half.strip("0.") else f"{middle:.{digits}f}"


def _bold(cell: str) -> str:
    return f"**{cell}**"


def _seeds(results: Sequence[Result]) -> str:
    seeds = sorted({result.seed for result in results})
    if len(seeds) < 2:
        return f"Seed {seeds[0]}." if seeds else ""
    return f"Medians over {len(seeds)} seeds ({', '.join(map(str, seeds))}); ± is half of the range."


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    rule = ["---", *("---:" for _ in head[1:])]
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, rule, *rows))


def main(argv: Sequence[str]) -> int:
    """Exit status 0; 2 where the files make no sense."""
    parser = argparse.ArgumentParser("python -m loadtests.simulate.report", description=__doc__)
    parser.add_argument("--curves", nargs="*", default=[], metavar="FILE", help="results at given loads")
    parser.add_argument("--goodput", nargs="*", default=[], metavar="FILE", help="results of searches for goodput")
    parser.add_argument("--out", required=True, type=Path, metavar="DIRECTORY")
    args = parser.parse_args(argv)
    try:
        curves, searches = read(args.curves), read(args.goodput)
    except (OSError, ValueError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    if not curves and not searches:
        print("report: there are no results", file=sys.stderr)
        return 2
    from loadtests.simulate import plots  # Needs matplotlib, which the tables do not.

    args.out.mkdir(parents=True, exist_ok=True)
    pictures = []
    for name, title, figure in plots.figures(curves, searches):
        plots.save(figure, args.out / f"{name}.svg", title)
        pictures.append((title, f"{name}.svg"))
    (args.out / "report.md").write_text(markdown(curves, searches, pictures))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
