"""Pictures of the simulator's results, as SVG.

One look for all: kvlane's line is thick and blue, bounds are black and broken, rules that look at load alone are grey,
those that only remember what they sent where are orange, those that know the caches have a colour each. Lines carry
their names at their ends, so that no legend has to be deciphered; colours are those of Okabe and Ito, which people with
any kind of colour vision can tell apart.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, PercentFormatter

from loadtests.simulate.measure import GOOD_SHARE, TPOT_LIMIT_S, TTFT_BASE_S, TTFT_PREFILLS, Result
from loadtests.simulate.report import (
    BASE,
    BOUNDS,
    OURS,
    Spread,
    by_conditions,
    label,
    policies,
    significant,
    spread,
    unlimited,
)

_SOLID, _DASHED, _DOTTED, _MIXED = "solid", (0, (5, 2)), (0, (1.2, 1.6)), (0, (5, 1.5, 1.2, 1.5))
_BLUE, _GREEN, _PURPLE, _RED, _ORANGE = "#0072B2", "#009E73", "#CC79A7", "#D55E00", "#E69F00"
_BLACK, _GREY, _FAINT = "#111111", "#8A8A8A", "#D9D9D9"


class Line(msgspec.Struct, frozen=True):
    """How a policy is drawn."""

    color: str
    dashes: str | tuple[int, tuple[float, ...]] = _SOLID
    width: float = 1.3


LINES: Final = {
    "cost": Line(_BLUE, _SOLID, 3.0),
    "greedy": Line(_BLACK, _DASHED),
    "ideal": Line(_BLACK, _DOTTED),
    "lmetric": Line(_RED),
    "dynamo": Line(_PURPLE),
    "llm-d": Line(_GREEN),
    "aibrix": Line(_ORANGE, _MIXED),
    "cache-aware": Line(_ORANGE),
    "ray-prefix": Line(_ORANGE, _DASHED),
    "chwbl": Line(_ORANGE, _DOTTED),
    "least-queue": Line(_GREY),
    "power-of-two": Line(_GREY, _DASHED),
    "round-robin": Line(_GREY, _DOTTED),
}
_OTHER: Final = Line(_BLACK, _MIXED, 0.9)

_STYLE: Final[dict[Any, Any]] = {
    "font.family": "DejaVu Sans",
    "font.size": 8.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _GREY,
    "axes.linewidth": 0.7,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": _FAINT,
    "grid.linewidth": 0.6,
    "xtick.color": _GREY,
    "ytick.color": _GREY,
    "xtick.labelcolor": _BLACK,
    "ytick.labelcolor": _BLACK,
    "xtick.major.size": 3.0,
    "ytick.major.size": 0.0,
    "ytick.minor.size": 0.0,
    "svg.hashsalt": "kvlane",  # The same results make the same file.
}
_NAME_SIZE: Final = 7.0
_NAME_GAP: Final = 9.4
"""Points from one name to the next."""


class Panel(msgspec.Struct, frozen=True):
    """One figure by load."""

    field: str
    title: str
    unit: str = ""
    """`log`, `share` or nothing."""
    factor: float = 1.0


LATENCY: Final = (
    Panel("ttft_mean_s", "Mean (s)", "log"),
    Panel("ttft_p50_s", "Median (s)", "log"),
    Panel("ttft_p90_s", "90th percentile (s)", "log"),
    Panel("ttft_p99_s", "99th percentile (s)", "log"),
)
SERVICE: Final = (
    Panel("hit_ratio", "Prompt tokens found in the cache", "share"),
    Panel("tpot_p50_s", "Time per output token, median (ms)", "log", 1000),
    Panel("tpot_p99_s", "Time per output token, 99th percentile (ms)", "log", 1000),
    Panel("good_share", "Requests within both limits", "share"),
    Panel("imbalance", "Most work on one replica / mean", "log"),
    Panel("inflight_imbalance", "Most requests in flight on one replica / mean", "log"),
)


def figures(curves: Sequence[Result], searches: Sequence[Result]) -> Iterator[tuple[str, str, Figure]]:
    """All pictures of these results: a name for the file, a title, and the picture."""
    if searches:
        yield "goodput", "Goodput", goodput(searches)
    for conditions, group in by_conditions(curves).items():
        told = conditions.told()
        name = re.sub(r"[^a-z0-9]+", "-", told.lower()).strip("-")
        for kind, title, panels in (
            ("latency", f"Time to first token: {told}", LATENCY),
            ("service", f"Cache, output and balance: {told}", SERVICE),
        ):
            yield f"{kind}-{name}", title, by_load(group, panels, title)


def by_load(results: Sequence[Result], panels: Sequence[Panel], title: str) -> Figure:
    """Figures against load, a panel each: medians over seeds, and behind kvlane's line their range."""
    columns = 2 if len(panels) <= 4 else 3
    rows = math.ceil(len(panels) / columns)
    with rc_context(_STYLE):
        layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1)
        figure = Figure(figsize=(5.4 * columns, 3.5 * rows + 0.6), layout=layout)
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
        drawn = []
        for place, panel in enumerate(panels):
            axes = figure.add_subplot(rows, columns, place + 1)
            drawn.append((axes, _lines(axes, results, panel)))
            axes.set_title(panel.title)
            _axis(axes, results, panel)
            if place >= len(panels) - columns:
                axes.set_xlabel("load, by least queue's saturation rate", color=_GREY)
        figure.draw_without_rendering()  # Only now the panels have their sizes, which decide where names fit.
        for axes, ends in drawn:
            _names(figure, axes, ends)
        return figure


def goodput(results: Sequence[Result]) -> Figure:
    """The highest rates that policies cope with: a panel per conditions, the same order of policies in each."""
    groups = by_conditions(results)
    names = policies(results)
    names.sort(key=lambda policy: _mean_ratio(policy, list(groups.values())))
    with rc_context({**_STYLE, "axes.grid": False, "axes.spines.left": False, "axes.spines.bottom": False}):
        figure = Figure(figsize=(2.2 + 3.2 * len(groups), 1.2 + 0.29 * len(names)), layout="constrained")
        title = "Goodput: the highest rate that the fleet copes with"
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
        figure.supxlabel(
            f"{GOOD_SHARE:.0%} of requests have their first token within {TTFT_BASE_S:g} s + {TTFT_PREFILLS:g} × their "
            f"prefill without a cache,\nand {TPOT_LIMIT_S * 1000:g} ms or less per output token. × is by least queue.",
            fontsize=7.5,
            color=_GREY,
            x=0.01,
            ha="left",
        )
        first: Axes | None = None
        for place, (conditions, group) in enumerate(groups.items()):
            axes = figure.add_subplot(1, len(groups), place + 1, sharey=first)
            axes.set_title(f"{conditions.told()} (requests/s)", fontsize=8.5)
            _bars(axes, names, group)
            axes.tick_params(labelleft=first is None, bottom=False, labelbottom=False)
            first = first or axes
        if first is not None:
            first.set_yticks(range(len(names)), [label(name) for name in names])
            for name, text in zip(names, first.get_yticklabels(), strict=True):
                text.set_color(_of(name).color if name == OURS else _BLACK)
                text.set_fontweight("bold" if name == OURS else "normal")
        return figure


def save(figure: Figure, path: Path, title: str) -> None:
    """As an SVG that depends on the results alone."""
    with rc_context(_STYLE):
        figure.savefig(path, format="svg", metadata={"Date": None, "Title": title, "Creator": "kvlane"})


def _lines(axes: Axes, results: Sequence[Result], panel: Panel) -> list[tuple[str, float, float]]:
    """Draws them, kvlane's last. Returns where each ends: policy and point."""
    ends = []
    loads = sorted({result.load for result in results})
    for policy in sorted(policies(results), key=lambda name: (name == OURS, name in BOUNDS)):
        found = [(load, spread(results, policy, panel.field, load)) for load in loads]
        points = [(load, _scaled(figure, panel.factor)) for load, figure in found if figure is not None]
        line = _of(policy)
        x = [load for load, _ in points]
        y = [figure.middle for _, figure in points]
        axes.plot(x, y, color=line.color, linestyle=line.dashes, linewidth=line.width, solid_capstyle="round")
        low, high = [figure.low for _, figure in points], [figure.high for _, figure in points]
        if policy == OURS and low != high:  # The others' would only blur.
            axes.fill_between(x, low, high, color=line.color, alpha=0.12, linewidth=0)
        ends.append((policy, x[-1], y[-1]))
    return ends


def _scaled(figure: Spread, factor: float) -> Spread:
    return Spread(figure.middle * factor, figure.low * factor, figure.high * factor)


def _axis(axes: Axes, results: Sequence[Result], panel: Panel) -> None:
    loads = [result.load for result in results]
    width = max(loads) - min(loads) or 1.0
    axes.set_xlim(min(loads) - 0.02 * width, max(loads) + 0.42 * width)  # Room for the names.
    axes.set_xticks(sorted(set(loads)), [f"{load:g}" for load in sorted(set(loads))])
    axes.spines["bottom"].set_bounds(min(loads), max(loads))
    axes.spines["left"].set_visible(False)
    if min(loads) < 1 < max(loads):
        axes.axvline(1, color=_GREY, linewidth=0.6, linestyle=_DOTTED, zorder=0)
    if panel.unit == "share":
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.set_ylim(bottom=0)
    elif panel.unit == "log":
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        # The wider the range, the fewer marks in a decade.
        marks = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0) if high / low < 8 else (1.0, 2.0, 5.0) if high / low < 400 else (1.0,)
        axes.yaxis.set_major_locator(LogLocator(subs=marks, numticks=20))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())


def _names(figure: Figure, axes: Axes, ends: Sequence[tuple[str, float, float]]) -> None:
    """Writes each line's name at its end, moved up or down where names would touch."""
    points = float(axes.get_position().height * figure.get_size_inches()[1] * 72)
    low, high = axes.get_ylim()
    is_log = axes.get_yscale() == "log"

    def height(y: float) -> float:
        share = math.log(max(y, low) / low) / math.log(high / low) if is_log else (y - low) / (high - low)
        return share * points

    ordered = sorted(ends, key=lambda end: end[2])
    places = apart([height(y) for _, _, y in ordered], _NAME_GAP, points)
    right = max(x for _, x, _ in ends)
    left, end = axes.get_xlim()
    for (policy, x, y), place in zip(ordered, places, strict=True):
        line = _of(policy)
        name = axes.annotate(
            label(policy),
            xy=((x - left) / (end - left), height(y) / points),
            xytext=((right - left) / (end - left) + 0.055, place / points),
            xycoords="axes fraction",
            textcoords="axes fraction",
            fontsize=_NAME_SIZE + (1 if policy == OURS else 0),
            fontweight="bold" if policy == OURS else "normal",
            color=line.color if line.color != _ORANGE else "#A66F00",  # Text needs more contrast than lines.
            va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": line.color, "linewidth": 0.5, "alpha": 0.6, "relpos": (0, 0.5)},
        )
        name.set_in_layout(False)  # The panels stay as they are.


def apart(heights: Sequence[float], gap: float, room: float) -> list[float]:
    """Places for names at these ascending heights, at least `gap` apart, near where they belong and within `room`.

    Names that would touch form a block that is centred where its names belong; blocks that then touch are joined.
    """
    blocks: list[list[float]] = []
    for height in heights:
        blocks.append([height])
        while len(blocks) > 1 and _bottom(blocks[-1], gap, room) < _top(blocks[-2], gap, room) + gap:
            last = blocks.pop()
            blocks[-1] += last
    return [_bottom(block, gap, room) + gap * place for block in blocks for place in range(len(block))]


def _bottom(block: Sequence[float], gap: float, room: float) -> float:
    """Where the lowest name of a block goes."""
    size = gap * (len(block) - 1)
    return min(max(sum(block) / len(block) - size / 2, 0.0), max(room - size, 0.0))


def _top(block: Sequence[float], gap: float, room: float) -> float:
    return _bottom(block, gap, room) + gap * (len(block) - 1)


def _bars(axes: Axes, names: Sequence[str], results: Sequence[Result]) -> None:
    endless = unlimited(results)
    base = None if BASE in endless else spread(results, BASE, "goodput_rps")
    most = max([result.goodput_rps for result in results if result.policy not in endless], default=0.0) or 1.0
    axes.set_xlim(0, most * 1.42)
    axes.set_ylim(-0.6, len(names) - 0.4)
    for place, policy in enumerate(names):
        found = spread(results, policy, "goodput_rps")
        if found is None:
            continue
        if policy in endless:
            axes.text(0.02 * most, place, "no limit", va="center", fontsize=7.5, color=_BLACK)
            continue
        is_bound, color = policy in BOUNDS, _of(policy).color
        weight = "bold" if policy == OURS else "normal"
        axes.barh(
            place,
            found.middle,
            height=0.62,
            color="white" if is_bound else color,
            edgecolor=color,
            linewidth=0.8,
            linestyle="--" if is_bound else "-",
            alpha=1.0 if policy == OURS or is_bound else 0.55,
        )
        if found.high > found.low:
            axes.plot([found.low, found.high], [place, place], color=_BLACK, linewidth=1.0)
        ratio = f"  {found.middle / base.middle:.2f} ×" if base and base.middle else ""
        text = f"{significant(found.middle)}{ratio}"
        x = max(found.middle, found.high) + 0.02 * most
        axes.text(x, place, text, va="center", fontsize=7.5, fontweight=weight, color=_BLACK)


def _mean_ratio(policy: str, groups: Sequence[Sequence[Result]]) -> float:
    """A policy's goodput by the best of its group, over the groups that have it."""
    ratios = []
    for group in groups:
        found = spread(group, policy, "goodput_rps")
        if found is not None:
            ratios.append(found.middle / (max(result.goodput_rps for result in group) or 1.0))
    return sum(ratios) / len(ratios)


def _of(policy: str) -> Line:
    return LINES.get(policy, _OTHER)
