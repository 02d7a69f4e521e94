"""What the bench of workers makes of its repetitions, and what it refuses."""

from __future__ import annotations

import pytest

from loadtests import profiles, workers
from loadtests.workers import Sample


def test_a_row_compares_each_repetition_with_that_of_one_worker() -> None:
    values = [Sample(10.0, 300.0, 0), Sample(12.0, 330.0, 1), Sample(9.0, 270.0, 0)]
    base = [Sample(10.0, 300.0, 0), Sample(10.0, 300.0, 0), Sample(10.0, 300.0, 0)]
    row = workers._row(("http", "64 streams each", 2, 128), values, base, 2.5, 100.0)
    assert (row["protocol"], row["workers"], row["streams"], row["errors"]) == ("http", 2, 128, 1)
    assert (row["cpu_us_per_chunk"], row["cpu_us_per_chunk_least"], row["cpu_us_per_chunk_greatest"]) == (10, 9, 12)
    assert (row["chunk_ratio"], row["request_ratio"]) == (1.0, 1.0)
    assert set(workers.COLUMNS) <= set(row)


@pytest.mark.parametrize("arguments", [["--workers", "0"], ["--streams", "many"], ["--nothing"]])
def test_arguments_that_make_no_sense_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert workers.main(arguments) == 2
    assert capsys.readouterr().err.startswith("workers: ")


@pytest.mark.parametrize("arguments", [["--seconds", "0"], ["--pid", "-1"]])
def test_a_profile_of_nothing_is_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert profiles.main(arguments) == 2
    assert capsys.readouterr().err.startswith("profile: ")
