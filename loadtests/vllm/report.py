"""Rows out of repetitions: medians with their spread, and kvlane over the bare server, as JSON and as a table."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any, Final

import msgspec

from loadtests.vllm.load import Sample, Shape

COLUMNS: Final = {
    "tokens_per_s": "tokens/s",
    "ttft_p50_ms": "TTFT p50, ms",
    "ttft_p99_ms": "p99, ms",
    "itl_p50_ms": "ITL p50, ms",
    "itl_p99_ms": "p99, ms",
    "tokens_per_event": "tokens per event",
    "front_us_per_token": "front end CPU per token, µs",
    "engine_us_per_token": "engine, µs",
    "client_us_per_token": "client, µs",
}


def row(stack: str, shape: Shape, samples: Sequence[Sample]) -> dict[str, Any]:
    """Medians under the figures' names, the spread under those with `_least` and `_greatest`."""
    made: dict[str, Any] = {"stack": stack, **msgspec.to_builtins(shape)}
    for name in Sample.__struct_fields__:
        if name != "errors":
            values = [getattr(sample, name) for sample in samples]
            made[name] = round(statistics.median(values), 2)
            made[f"{name}_least"], made[f"{name}_greatest"] = round(min(values), 2), round(max(values), 2)
    made["errors"] = sum(sample.errors for sample in samples)
    made["reps"] = len(samples)
    return made


def compare(row: dict[str, Any], bare: dict[str, Any]) -> None:
    """Adds how a row stands beside the bare server's under the same load."""
    row["times_bare"] = round(row["tokens_per_s"] / bare["tokens_per_s"], 2)
    row["ttft_p50_over_bare_ms"] = round(row["ttft_p50_ms"] - bare["ttft_p50_ms"], 2)


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """A table: median (least to greatest)."""
    titles = ["stack", "streams", "prompt / answer tokens", *COLUMNS.values(), "tokens/s over bare", "errors"]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for each in rows:
        cells = [each["stack"], str(each["streams"]), f"{each['prompt_tokens']} / {each['tokens']}"]
        for name in COLUMNS:
            median, least, greatest = (_short(each[name + part]) for part in ("", "_least", "_greatest"))
            cells.append(f"**{median}** ({least} to {greatest})")
        cells += [str(each.get("times_bare", "")), str(each["errors"])]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"
