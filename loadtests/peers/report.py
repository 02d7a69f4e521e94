"""Rows out of repetitions: medians with their spread, as JSON fields and as a table."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any, Final

from loadtests.peers.measure import Paced, Saturated

Row = dict[str, Any]
"""A system under one load: medians under the figures' names, the spread under those with `_least` and `_greatest`."""

COLUMNS: Final = {
    "cpu_us_per_chunk": "router CPU per chunk, µs",
    "cpu_us_per_token": "per token, µs",
    "cpu_us_per_request": "per request, µs",
    "engine_cpu_us_per_chunk": "engine CPU per chunk, µs",
    "ttft_added_p50_ms": "added TTFT p50, ms",
    "ttft_added_p99_ms": "p99, ms",
    "itl_added_p99_ms": "added ITL p99, ms",
    "chunks_per_s": "chunks/s",
    "requests_per_s": "requests/s",
}


def row(
    key: tuple[str, str, str, int],
    paced: Sequence[Paced],
    floor: Sequence[Paced],
    saturated: Sequence[Saturated],
    rss_mb: float,
) -> Row:
    """`key` is system, policy, protocol and streams; `floor` the repetitions of `direct` beside those of `paced`."""
    made: Row = dict(zip(("system", "policy", "protocol", "streams"), key, strict=True))
    pairs = list(zip(paced, floor, strict=True))
    figures = {
        "cpu_us_per_chunk": [each.cpu_us_per_chunk for each in paced],
        "cpu_us_per_token": [each.cpu_us_per_token for each in paced],
        "cpu_us_per_request": [each.cpu_us_per_request for each in paced],
        "engine_cpu_us_per_chunk": [each.engine_cpu_us_per_chunk for each in paced],
        "ttft_added_p50_ms": [each.ttft_p50_ms - under.ttft_p50_ms for each, under in pairs],
        "ttft_added_p99_ms": [each.ttft_p99_ms - under.ttft_p99_ms for each, under in pairs],
        "itl_added_p99_ms": [each.itl_p99_ms - under.itl_p99_ms for each, under in pairs],
        "ttft_p50_ms": [each.ttft_p50_ms for each in paced],
        "ttft_p99_ms": [each.ttft_p99_ms for each in paced],
        "itl_p50_ms": [each.itl_p50_ms for each in paced],
        "itl_p99_ms": [each.itl_p99_ms for each in paced],
        "tokens_per_chunk": [each.tokens_per_chunk for each in paced],
        "chunks_per_s": [each.chunks_per_s for each in saturated],
        "tokens_per_s": [each.tokens_per_s for each in saturated],
        "requests_per_s": [each.requests_per_s for each in saturated],
    }
    for name, values in figures.items():
        made[name] = round(statistics.median(values), 3)
        made[f"{name}_least"] = round(min(values), 3)
        made[f"{name}_greatest"] = round(max(values), 3)
    made["rss_mb"] = round(rss_mb, 1)
    made["errors"] = sum(each.errors for each in paced) + sum(each.errors for each in saturated)
    made["reps"] = len(paced)
    return made


def markdown(rows: Sequence[Row]) -> str:
    """A table: median (least to greatest)."""
    titles = ["system", "policy", "protocol", "streams", *COLUMNS.values(), "RSS, MiB", "errors"]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for each in rows:
        cells = [str(each[name]) for name in ("system", "policy", "protocol", "streams")]
        for name in COLUMNS:
            median, least, greatest = (_short(each[name + part]) for part in ("", "_least", "_greatest"))
            cells.append(f"**{median}** ({least} to {greatest})")
        lines.append(f"| {' | '.join(cells)} | {each['rss_mb']:.0f} | {each['errors']} |")
    return "\n".join(lines)


def _short(value: float) -> str:
    """Three digits that matter, and whole numbers from a hundred on."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"
