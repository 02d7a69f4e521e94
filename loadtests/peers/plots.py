"""Pictures of a comparison, as SVG: a bar for each system and policy, a panel for each number of streams.

kvlane's bars are blue, the floor's white, all others' grey; a line shows the spread from the least to the greatest
repetition. The same rows make the same file.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from loadtests.results import Row

_BLUE, _BLACK, _GREY, _OTHER = "#0072B2", "#111111", "#8A8A8A", "#B9B9B9"
_STYLE: Final[dict[Any, Any]] = {
    "font.family": "DejaVu Sans",
    "font.size": 8.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.bottom": False,
    "axes.spines.left": False,
    "axes.titlesize": 9.0,
    "axes.titlelocation": "left",
    "svg.hashsalt": "kvlane",
}


class Picture(msgspec.Struct, frozen=True):
    """A figure's picture."""

    name: str
    """Of the file."""
    field: str
    title: str
    note: str


PICTURES: Final = (
    Picture(
        "cpu-per-chunk",
        "cpu_us_per_chunk",
        "Router CPU per relayed chunk, µs",
        "Engines set the pace. Less is better.",
    ),
    Picture(
        "cpu-per-request",
        "cpu_us_per_request",
        "Router CPU per request of one token, µs",
        "Less is better.",
    ),
    Picture(
        "engine-cpu",
        "frontend_cpu_us_per_chunk",
        "Engine-side CPU per chunk, µs",
        "The engine itself takes next to nothing. Less is better.",
    ),
    Picture(
        "ttft",
        "ttft_added_p50_ms",
        "Median time to first token added to the engine's own, ms",
        "Less is better.",
    ),
    Picture(
        "chunks",
        "chunks_per_s",
        "Saturated: chunks per second",
        "Closed loop; router, engines and load share the machine. More is better.",
    ),
    Picture(
        "requests",
        "requests_per_s",
        "Saturated: requests of one token per second",
        "More is better.",
    ),
)


def figures(rows: Sequence[Row]) -> Iterator[tuple[Picture, Figure]]:
    """All pictures of these rows."""
    for picture in PICTURES:
        yield picture, bars(rows, picture)


def bars(rows: Sequence[Row], picture: Picture) -> Figure:
    """One panel for each number of streams, the same order of systems in each."""
    streams = list(dict.fromkeys(row["streams"] for row in rows))
    names = list(dict.fromkeys(_name(row) for row in rows))[::-1]
    with rc_context(_STYLE):
        figure = Figure(figsize=(1.8 + 2.6 * len(streams), 1.1 + 0.29 * len(names)), layout="constrained")
        figure.suptitle(picture.title, x=0.01, ha="left", fontsize=11, fontweight="bold")
        figure.supxlabel(picture.note, fontsize=7.5, color=_GREY, x=0.01, ha="left")
        first: Axes | None = None
        for place, number in enumerate(streams):
            axes = figure.add_subplot(1, len(streams), place + 1, sharey=first)
            axes.set_title(f"{number} stream{'s' * (number != 1)}")
            _draw(axes, names, [row for row in rows if row["streams"] == number], picture.field)
            axes.tick_params(labelleft=first is None, bottom=False, left=False, labelbottom=False)
            first = first or axes
        if first is not None:
            first.set_yticks(range(len(names)), names)
            for name, text in zip(names, first.get_yticklabels(), strict=True):
                text.set_fontweight("bold" if name.startswith("kvlane") else "normal")
        return figure


def write(rows: Sequence[Row], directory: Path) -> list[Path]:
    """The pictures as files `peers-NAME.svg`; with gRPC's among the rows, `peers-grpc-NAME.svg`."""
    directory.mkdir(parents=True, exist_ok=True)
    prefix = "peers-grpc" if any(row["protocol"] == "grpc" for row in rows) else "peers"
    made = []
    for picture, figure in figures(rows):
        path = directory / f"{prefix}-{picture.name}.svg"
        with rc_context(_STYLE):
            metadata = {"Date": None, "Title": picture.title, "Creator": "kvlane"}
            figure.savefig(path, format="svg", metadata=metadata)
        made.append(path)
    return made


def _name(row: Row) -> str:
    return row["system"] if row["policy"] == "none" else f"{row['system']} {row['policy']}"


def _draw(axes: Axes, names: Sequence[str], rows: Sequence[Row], field: str) -> None:
    most = max([row[f"{field}_greatest"] for row in rows] + [0.0]) or 1.0
    least = min([row[f"{field}_least"] for row in rows] + [0.0])
    axes.set_xlim(1.05 * least, most * 1.35)
    axes.set_ylim(-0.6, len(names) - 0.4)
    for row in rows:
        place, value = names.index(_name(row)), row[field]
        ours, floor = row["system"] == "kvlane", row["system"] == "direct"
        color = _BLUE if ours else "white" if floor else _OTHER
        axes.barh(place, value, height=0.62, color=color, edgecolor=_GREY if floor else color, linewidth=0.8)
        axes.plot([row[f"{field}_least"], row[f"{field}_greatest"]], [place, place], color=_BLACK, linewidth=1.0)
        at = max(row[f"{field}_greatest"], 0.0) + 0.02 * most
        text = f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
        axes.text(at, place, text, va="center", fontsize=7.5, fontweight="bold" if ours else "normal", color=_BLACK)
