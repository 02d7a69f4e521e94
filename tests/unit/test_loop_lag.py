"""How late the event loop is, and the cheap histograms that tell it."""

from __future__ import annotations

from prometheus_client.core import HistogramMetricFamily

from router.lane.frames import MAX_FRAME_BYTES
from router.lane.meter import FrameMeter
from router.observe.histograms import Counts, powers_of_two
from router.observe.loop_lag import WINDOW_S, LoopLag


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def shown(lag: LoopLag) -> dict[str, float]:
    return {
        f"{sample.name}{sorted(sample.labels.values())}": sample.value
        for metric in lag.collect()
        for sample in metric.samples
    }


def greatest(lag: LoopLag) -> float:
    return shown(lag)["kvlane_worker_loop_lag_seconds['3']"]


def test_late_timers_are_counted_by_how_late_they_ran() -> None:
    lag = LoopLag(3, Clock())
    for due, ran in ((1.0, 0.9995), (1.0, 1.0), (2.0, 2.004), (3.0, 3.3)):
        lag.seen(due, ran)
    found = shown(lag)
    assert found["kvlane_loop_lag_seconds_bucket['0.001']"] == 2
    assert found["kvlane_loop_lag_seconds_bucket['0.005']"] == 3
    assert found["kvlane_loop_lag_seconds_count[]"] == 4
    assert 0.3 < found["kvlane_loop_lag_seconds_sum[]"] < 0.31
    assert 0.29 < greatest(lag) < 0.31


def test_the_greatest_lag_is_shown_for_one_to_two_windows() -> None:
    lag = LoopLag(3, Clock())
    lag.seen(1.0, 1.5)
    lag.seen(WINDOW_S, WINDOW_S + 0.01)
    assert greatest(lag) == 0.5
    lag.seen(2.1 * WINDOW_S, 2.1 * WINDOW_S + 0.02)
    assert 0.005 < greatest(lag) < 0.05


def test_a_worker_that_stood_still_for_long_forgets_what_was_before() -> None:
    lag = LoopLag(3, Clock())
    lag.seen(1.0, 1.5)
    lag.seen(10 * WINDOW_S, 10 * WINDOW_S)
    assert greatest(lag) == 0.0


def test_values_on_a_bound_count_as_within_it() -> None:
    counts = Counts((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 7.0):
        counts.add(value)
    family = HistogramMetricFamily("x", "X.")
    counts.show(family)
    assert [sample.value for sample in family.samples] == [2, 3, 4, 4, 10.0]


def test_counts_by_bits_become_a_histogram() -> None:
    meter = FrameMeter()
    for count in (0, 1, 3, 4, 1000):
        meter.step(count)
    family = HistogramMetricFamily("x", "X.")
    powers_of_two(meter.batches, range(4), family, meter.outputs)
    assert {sample.labels.get("le", sample.name): sample.value for sample in family.samples} == {
        "0.0": 1,
        "1.0": 2,
        "3.0": 3,
        "7.0": 4,
        "+Inf": 5,
        "x_count": 5,
        "x_sum": 1008,
    }


def test_a_frame_of_any_size_is_counted() -> None:
    meter = FrameMeter()
    for size in (0, 1, 255, 256, MAX_FRAME_BYTES):
        meter.frame(size)
    assert sum(meter.sizes) == 5
    assert meter.bytes == 512 + MAX_FRAME_BYTES
    assert (meter.sizes[8], meter.sizes[9]) == (1, 1)
