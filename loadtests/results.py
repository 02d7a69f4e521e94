"""What the load tests write: rows as JSON and as a Markdown table."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

Row = dict[str, Any]
"""Figures by name; a median has its spread beside it under its name with `_least` and `_greatest`."""


def spread(name: str, values: Sequence[float], digits: int = 3) -> Row:
    """A median with the least and the greatest."""
    return {
        name: round(statistics.median(values), digits),
        f"{name}_least": round(min(values), digits),
        f"{name}_greatest": round(max(values), digits),
    }


def write_json(path: str, rows: Sequence[Row]) -> None:
    """As `{"results": rows}`; nothing where the path is empty. Raises `OSError`."""
    if path:
        Path(path).write_bytes(msgspec.json.format(msgspec.json.encode({"results": rows}), indent=1) + b"\n")


def table(rows: Sequence[Row], columns: Mapping[str, str]) -> str:
    """A Markdown table: `columns` maps names of figures to titles."""
    lines = [f"| {' | '.join(columns.values())} |", "|---" * len(columns) + "|"]
    lines += [f"| {' | '.join(cell(row, name) for name in columns)} |" for row in rows]
    return "\n".join(lines)


def cell(row: Row, name: str) -> str:
    """A figure, where it has one with its spread."""
    if f"{name}_least" not in row:
        value = row[name]
        return f"{value:g}" if isinstance(value, float) else str(value)
    median, least, greatest = (short(row[name + part]) for part in ("", "_least", "_greatest"))
    return f"**{median}** ({least} to {greatest})"


def short(value: float) -> str:
    """Three digits that matter, and whole numbers from a hundred on."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"
