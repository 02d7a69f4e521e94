"""Histograms that cost next to nothing where they are fed: the library's own takes microseconds per value.

Rule: feeding is adding to plain numbers; they become metrics when somebody scrapes.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate

from prometheus_client.core import HistogramMetricFamily
from prometheus_client.utils import floatToGoString


class Counts:
    """How often values fell between bounds, and their sum."""

    __slots__ = ("_bounds", "_texts", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._texts = [*map(_text, bounds), "+Inf"]
        self.counts = [0] * (len(bounds) + 1)
        """By bucket, each value in one; the last has those above all bounds."""
        self.total = 0.0

    def add(self, value: float) -> None:
        """One more value."""
        self.counts[bisect_left(self._bounds, value)] += 1
        self.total += value

    def show(self, family: HistogramMetricFamily, labels: Sequence[str] = ()) -> None:
        """Adds these to a metric."""
        family.add_metric(labels, list(zip(self._texts, accumulate(self.counts), strict=True)), self.total)


def powers_of_two(counts: Sequence[int], bits: range, family: HistogramMetricFamily, total: float) -> None:
    """Adds to a metric what was counted by the values' `int.bit_length`, with bounds at those numbers of bits.

    The bounds are the greatest numbers of so many bits: 0, 1, 3, 7 and so on.
    """
    upto = list(accumulate(counts))
    buckets = [(_text((1 << each) - 1), float(upto[each])) for each in bits]
    family.add_metric([], [*buckets, ("+Inf", float(upto[-1]))], total)


def _text(bound: float) -> str:
    text: str = floatToGoString(float(bound))  # type: ignore[no-untyped-call]
    return text
