"""Sampled stacks as a flame graph and as a table. Pure functions.

A line of collapsed stacks is what py-spy's `raw` format and others write: frames from the outermost, by semicolons, and
how often they were seen.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from html import escape
from typing import Final, NamedTuple

Stacks = Counter[tuple[str, ...]]

WIDTH: Final = 1200.0
ROW: Final = 17
LEAST_SHARE: Final = 0.003
"""Frames narrower than this are left out of the picture."""
_CHAR: Final = 6.6
_PLACE: Final = re.compile(r".*/(?:site-packages/|lib/python3\.\d+/|(?=(?:router|engine|loadtests|kvlane)/))(.+)$")


class Line(NamedTuple):
    """A function's share of all samples, in percent."""

    function: str
    itself: float
    total: float
    """With all that it called."""


def parse(text: str) -> Stacks:
    """Raises `ValueError` for text that is none."""
    stacks: Stacks = Counter()
    for line in text.splitlines():
        frames, _, count = line.rpartition(" ")
        stacks[tuple(frames.split(";"))] += int(count)
    return stacks


def collapsed(stacks: Stacks) -> str:
    """The text that `parse` reads."""
    return "".join(f"{';'.join(frames)} {count}\n" for frames, count in sorted(stacks.items()))


def top(stacks: Stacks, rows: int) -> list[Line]:
    """The functions that most samples were in themselves."""
    everything = stacks.total()
    itself: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for frames, count in stacks.items():
        itself[frames[-1]] += count
        for frame in set(frames):
            total[frame] += count
    return [
        Line(function, 100 * count / everything, 100 * total[function] / everything)
        for function, count in itself.most_common(rows)
    ]


def markdown(lines: Iterable[Line]) -> str:
    """The functions as a table."""
    rows = [f"| `{line.function}` | {line.itself:.1f} | {line.total:.1f} |" for line in lines]
    return "\n".join(["| function | itself, % | with what it calls, % |", "|---|---|---|", *rows])


class _Box(NamedTuple):
    name: str
    depth: int
    start: int
    count: int


def _boxes(stacks: Stacks) -> list[_Box]:
    """Equal frames beside each other become one."""
    found: list[_Box] = []
    levels: list[tuple[str, int]] = []
    position = 0

    def close(depth: int) -> None:
        while len(levels) > depth:
            name, start = levels.pop()
            found.append(_Box(name, len(levels), start, position - start))

    for frames, count in sorted(stacks.items()):
        same = 0
        while same < min(len(levels), len(frames)) and levels[same][0] == frames[same]:
            same += 1
        close(same)
        levels += [(frame, position) for frame in frames[same:]]
        position += count
    close(0)
    return found


def svg(stacks: Stacks, title: str) -> str:
    """A flame graph: as wide as often, callers below; a tooltip says the rest."""
    everything = stacks.total()
    boxes = [box for box in _boxes(stacks) if box.count >= LEAST_SHARE * everything]
    height = (max((box.depth for box in boxes), default=0) + 3) * ROW
    scale = WIDTH / max(1, everything)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH:.0f} {height}" font-family="monospace" '
        f'font-size="11"><rect width="100%" height="100%" fill="#fff"/>'
        f'<text x="4" y="13">{escape(title)}: {everything} samples</text>'
    ]
    for box in boxes:
        x, width = box.start * scale, box.count * scale
        y = height - (box.depth + 1) * ROW
        fits = int(width / _CHAR) - 1
        label = box.name if len(box.name) <= fits else f"{box.name[: fits - 1]}…" if fits > 3 else ""
        text = f'<text x="{x + 2:.1f}" y="{y + 12}">{escape(label)}</text>' if label else ""
        parts.append(
            f"<g><title>{escape(box.name)}: {box.count} samples, {100 * box.count / everything:.1f}%</title>"
            f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{ROW - 1}" fill="{_colour(box.name)}"/>{text}</g>'
        )
    return "\n".join([*parts, "</svg>", ""])


def _colour(name: str) -> str:
    """Ours warm, others' cool, always the same for one function."""
    shade = sum(name.encode()) % 40
    if "(router/" in name or "(engine/" in name:
        return f"hsl({10 + shade},80%,{68 + shade % 7}%)"
    return f"hsl({190 + shade},35%,{78 + shade % 7}%)"


def short(stacks: Stacks) -> Stacks:
    """The same with files named from their package on, those of the system by their own name, without line numbers."""
    found: Stacks = Counter()
    for frames, count in stacks.items():
        found[tuple(map(_short, frames))] += count
    return found


def _short(frame: str) -> str:
    name, bracket, place = frame.partition(" (")
    if not bracket:
        return frame
    place = place.rstrip(")").partition(":")[0]
    match = _PLACE.match(place)
    if match is None and place.startswith("/"):
        place = place.rpartition("/")[2]
    return f"{name} ({match[1] if match else place})"
