"""How late a router's event loop was, from its own metrics: the difference between two scrapes."""

from __future__ import annotations

import math
import urllib.request
from typing import Final

import msgspec
from prometheus_client.parser import text_string_to_metric_families

METRIC: Final = "kvlane_loop_lag_seconds"
TIMEOUT_S: Final = 10.0

Counts = dict[float, float]
"""Timers that ran late by at most so many seconds; `inf` for all."""


class Lag(msgspec.Struct):
    """Between two scrapes."""

    timers: int
    p99_ms: float
    """The bound of the bucket that it is in, so the real figure may be less."""
    over_5_ms: int


def scrape(port: int) -> Counts:
    """The histogram's buckets at this moment."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=TIMEOUT_S) as response:
        return counts(response.read().decode())


def counts(exposition: str) -> Counts:
    """The buckets in a scrape's text. Raises `ValueError` where there are none."""
    found: Counts = {}
    for family in text_string_to_metric_families(exposition):
        for sample in family.samples:
            if sample.name == f"{METRIC}_bucket":
                bound = float(sample.labels["le"])
                found[bound] = found.get(bound, 0.0) + sample.value
    if math.inf not in found:
        raise ValueError(f"the router shows no {METRIC}")
    return found


def between(before: Counts, after: Counts) -> Lag:
    """What happened between two scrapes."""
    seen = {bound: after[bound] - before.get(bound, 0.0) for bound in sorted(after)}
    timers = int(seen[math.inf])
    p99 = next((bound for bound, number in seen.items() if number >= 0.99 * timers), math.inf)
    within = max((number for bound, number in seen.items() if bound <= 0.005), default=0.0)
    return Lag(timers, 1e3 * p99, timers - int(within))
