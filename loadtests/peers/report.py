"""Rows out of repetitions: medians with their spread, as JSON fields and as a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Protocol

from loadtests.peers.measure import Open, Paced, Saturated
from loadtests.results import Row, cell, spread

COLUMNS: Final = {
    "cpu_us_per_chunk": "router CPU per chunk, µs",
    "cpu_us_per_token": "per token, µs",
    "cpu_us_per_request": "per request, µs",
    "frontend_cpu_us_per_chunk": "engine-side front end, CPU per chunk, µs",
    "ttft_added_p50_ms": "added TTFT p50, ms",
    "ttft_added_p99_ms": "p99, ms",
    "itl_added_p99_ms": "added ITL p99, ms",
    "paced_cores": "router's cores meanwhile",
    "chunks_per_s": "saturated chunks/s",
    "requests_per_s": "requests/s",
    "router_cores": "cores: router",
    "engine_cores": "engines",
    "load_cores": "load",
}
_OPEN: Final = {
    "requests_per_s": "requests/s",
    "chunks_per_s": "chunks/s",
    "cpu_us_per_chunk": "router CPU per chunk, µs",
    "cpu_us_per_request": "per request, µs",
    "ttft_p50_ms": "TTFT p50, ms",
    "ttft_p99_ms": "p99, ms",
    "ttft_added_p50_ms": "added TTFT p50, ms",
    "ttft_added_p99_ms": "p99, ms",
    "itl_added_p99_ms": "added ITL p99, ms",
}


class Tables(Protocol):
    """What `tables` shows."""

    rows: list[Row]
    open: list[Row]
    replays: list[Row]


def row(
    key: tuple[str, str, str, int],
    paced: Sequence[Paced],
    floor: Sequence[Paced],
    saturated: Sequence[Saturated],
    alone: Sequence[float],
    rss_mb: float,
) -> Row:
    """`key` is system, policy, protocol and streams; `floor` the repetitions of `direct` beside those of `paced`.

    `alone` is what the engines take per token with nobody to write to.
    """
    made: Row = dict(zip(("system", "policy", "protocol", "streams"), key, strict=True))
    pairs = list(zip(paced, floor, strict=True))
    figures = {
        "cpu_us_per_chunk": [each.cpu_us_per_chunk for each in paced],
        "cpu_us_per_token": [each.cpu_us_per_token for each in paced],
        "cpu_us_per_request": [each.cpu_us_per_request for each in paced],
        "engine_cpu_us_per_chunk": [each.engine_cpu_us_per_chunk for each in paced],
        "frontend_cpu_us_per_chunk": [
            each.engine_cpu_us_per_chunk - bare for each, bare in zip(paced, alone, strict=True)
        ],
        "ttft_added_p50_ms": [each.ttft_p50_ms - under.ttft_p50_ms for each, under in pairs],
        "ttft_added_p99_ms": [each.ttft_p99_ms - under.ttft_p99_ms for each, under in pairs],
        "itl_added_p99_ms": [each.itl_p99_ms - under.itl_p99_ms for each, under in pairs],
        "ttft_p50_ms": [each.ttft_p50_ms for each in paced],
        "ttft_p99_ms": [each.ttft_p99_ms for each in paced],
        "itl_p50_ms": [each.itl_p50_ms for each in paced],
        "itl_p99_ms": [each.itl_p99_ms for each in paced],
        "paced_cores": [each.cores for each in paced],
        "tokens_per_chunk": [each.tokens_per_chunk for each in paced],
        "chunks_per_s": [each.chunks_per_s for each in saturated],
        "tokens_per_s": [each.tokens_per_s for each in saturated],
        "requests_per_s": [each.requests_per_s for each in saturated],
        "router_cores": [each.router_cores for each in saturated],
        "engine_cores": [each.engine_cores for each in saturated],
        "load_cores": [each.load_cores for each in saturated],
    }
    for name, values in figures.items():
        made |= spread(name, values)
    made["rss_mb"] = round(rss_mb, 1)
    made["errors"] = sum(each.errors for each in paced) + sum(each.errors for each in saturated)
    made["reps"] = len(paced)
    return made


def open_row(key: tuple[str, str, str], samples: Sequence[Open], floor: Sequence[Open]) -> Row:
    """An open loop; `floor` has the repetitions of `direct` under the same load."""
    made: Row = dict(zip(("system", "policy", "protocol"), key, strict=True))
    pairs = list(zip(samples, floor, strict=True))
    figures: dict[str, list[float]] = {
        name: [getattr(each, name) for each in samples]
        for name in Open.__struct_fields__
        if name not in ("errors", "causes")
    }
    for name in ("ttft_mean_ms", "ttft_p50_ms", "ttft_p99_ms", "itl_p50_ms", "itl_p99_ms"):
        added = f"{name.partition('_')[0]}_added_{name.partition('_')[2]}"
        figures[added] = [getattr(each, name) - getattr(under, name) for each, under in pairs]
    for name, values in figures.items():
        made |= spread(name, values)
    made["errors"] = sum(each.errors for each in samples)
    made["reps"] = len(samples)
    return made


def tables(outcome: Tables) -> str:
    """All of a comparison as Markdown."""
    parts = [markdown(outcome.rows)] if outcome.rows else []
    if outcome.open:
        parts.append(_table(outcome.open, {"load": "load by capacity", **_OPEN}))
    if outcome.replays:
        parts.append(_table(outcome.replays, {"trace": "trace", **_OPEN}))
    return "\n\n".join(parts)


def _table(rows: Sequence[Row], columns: dict[str, str]) -> str:
    titles = ["system", "policy", "protocol", *columns.values(), "errors"]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for each in rows:
        cells = [str(each[name]) for name in ("system", "policy", "protocol")]
        cells += [cell(each, name) for name in columns]
        lines.append(f"| {' | '.join(cells)} | {each['errors']} |")
    return "\n".join(lines)


def markdown(rows: Sequence[Row]) -> str:
    """A table: median (least to greatest)."""
    titles = ["system", "policy", "protocol", "streams", *COLUMNS.values(), "RSS, MiB", "errors"]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for each in rows:
        cells = [str(each[name]) for name in ("system", "policy", "protocol", "streams")]
        cells += [cell(each, name) for name in COLUMNS]
        lines.append(f"| {' | '.join(cells)} | {each['rss_mb']:.0f} | {each['errors']} |")
    return "\n".join(lines)
