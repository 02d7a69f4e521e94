"""The load test of the two gRPC edges: its arguments and its table. The load itself is not run here."""

from __future__ import annotations

import pytest

from loadtests.grpc_edges import Row, main, markdown


def test_the_table_has_a_row_per_edge_and_load() -> None:
    rows = [
        Row("h2", 128, (6.3, 6.0, 7.1), (150.0, 140.0, 160.0), 6100, 0),
        Row("aio", 128, (23.0, 22.0, 25.0), (300.0, 290.0, 310.0), 6000, 0),
    ]
    table = markdown(rows).splitlines()
    assert table[2] == "| h2 | 128 | **6.3** (6.0 to 7.1) | **150.0** (140.0 to 160.0) | 6,100 |"
    assert len(table) == 4


@pytest.mark.parametrize("arguments", [["--streams", "0"], ["--streams", ""], ["--reps", "none"], ["--nope"]])
def test_arguments_that_make_no_sense_are_told_in_a_line(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert capsys.readouterr().err.startswith("python -m loadtests grpc-edges: ")
