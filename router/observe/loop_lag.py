"""How late the event loop is: a timer that looks at the clock when it runs.

Rule: it costs a few microseconds, ten times a second. All streams of a process wait whenever its loop is late, so
this is the first thing to look at when tokens come unevenly.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from typing import Final

from prometheus_client.core import GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from router.observe.histograms import Counts

INTERVAL_S: Final = 0.1
WINDOW_S: Final = 15.0
"""The greatest lag is that of the last one to two windows, so that each of several scrapers sees it."""
BOUNDS_S: Final = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0)


class LoopLag(Collector):
    """Watches the loop that `watch` runs on. Timers count in milliseconds, and so does this."""

    def __init__(self, worker: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self._worker = str(worker)
        self._clock = clock
        self._counts = Counts(BOUNDS_S)
        self._greatest = self._greatest_before = 0.0
        self._window_ends = clock() + WINDOW_S

    async def watch(self) -> None:
        """Runs until cancelled."""
        while True:
            due = self._clock() + INTERVAL_S
            await asyncio.sleep(INTERVAL_S)
            self.seen(due, self._clock())

    def seen(self, due: float, now: float) -> None:
        """A timer that was due ran now."""
        if now >= self._window_ends:
            self._greatest_before = self._greatest if now < self._window_ends + WINDOW_S else 0.0
            self._greatest, self._window_ends = 0.0, now + WINDOW_S
        lag = max(0.0, now - due)  # Timers of whole milliseconds may run a little early.
        self._counts.add(lag)
        self._greatest = max(self._greatest, lag)

    def collect(self) -> Iterator[Metric]:
        lags = HistogramMetricFamily("kvlane_loop_lag_seconds", "How late timers of the event loop ran.")
        self._counts.show(lags)
        yield lags
        greatest = GaugeMetricFamily(
            "kvlane_worker_loop_lag_seconds", "The greatest of these in the last 15 to 30 s.", labels=["worker"]
        )
        greatest.add_metric([self._worker], max(self._greatest, self._greatest_before))
        yield greatest
