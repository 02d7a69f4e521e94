"""The load tests with a command line of their own: fleets, stalls, slow streams, and long runs."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from loadtests import fleet, loop_lag, slow, soak, stalls, watched
from loadtests.__main__ import COMMANDS
from loadtests.__main__ import main as loadtests
from loadtests.loop_lag import Lag
from loadtests.peers.measure import Paced
from loadtests.results import Row, spread, table
from loadtests.soak import Sample
from loadtests.watched import Told


@pytest.mark.parametrize("arguments", [[], ["nothing"]])
def test_a_command_that_is_not_there_is_told(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert loadtests(arguments) == 2
    said = capsys.readouterr().err
    assert all(name in said for name in COMMANDS)


@pytest.mark.parametrize(
    "arguments",
    [
        ["fleet", "--replicas", "0"],
        ["fleet", "--reps", "none"],
        ["stalls", "--kinds", "nothing"],
        ["stalls", "--seconds", "0"],
        ["stalls-answers", "--kinds", "large,nothing"],
        ["stalls-answers", "--reps", "0"],
        ["slow", "--streams", "0"],
        ["slow", "--streams", "100000000"],
        ["soak", "--requests", "0"],
        ["soak", "--unknown"],
    ],
)
def test_arguments_that_make_no_sense_are_told_in_one_line(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert loadtests(arguments) == 2
    said = capsys.readouterr()
    assert not said.out
    assert said.err.startswith(f"{arguments[0]}: ")
    assert said.err.count("\n") == 1


def test_a_table_has_the_spread_where_there_is_one() -> None:
    row = {"what": "it", **spread("cost", [3.0, 1.0, 200.0]), "plain": 0.5, "count": 7}
    columns = {"what": "what", "cost": "cost, µs", "plain": "plain", "count": "count"}
    assert table([row], columns).splitlines() == [
        "| what | cost, µs | plain | count |",
        "|---|---|---|---|",
        "| it | **3.00** (1.00 to 200) | 0.5 | 7 |",
    ]


def paced(chunk: float, request: float, errors: int = 0) -> Paced:
    return Paced(chunk, chunk, request, 5.0, 10.0, 20.0, 20.0, 21.0, 1.0, 0.5, errors, Counter())


def test_a_fleets_ratios_are_those_of_repetitions_next_to_each_other() -> None:
    small = [paced(1.0, 10.0), paced(2.0, 20.0), paced(4.0, 40.0)]
    large = [paced(1.5, 10.0), paced(2.0, 22.0), paced(8.0, 44.0, errors=1)]
    made = fleet.row("8 streams each", 64, 512, large, small)
    assert (made["chunk_ratio"], made["chunk_ratio_least"], made["chunk_ratio_greatest"]) == (1.5, 1.0, 2.0)
    assert (made["request_ratio"], made["errors"], made["reps"]) == (1.1, 1, 3)


EXPOSITION = """
# TYPE kvlane_loop_lag_seconds histogram
kvlane_loop_lag_seconds_bucket{le="0.001"} {a}
kvlane_loop_lag_seconds_bucket{le="0.005"} {b}
kvlane_loop_lag_seconds_bucket{le="0.02"} {c}
kvlane_loop_lag_seconds_bucket{le="+Inf"} {c}
kvlane_loop_lag_seconds_count {c}
kvlane_loop_lag_seconds_sum 1.0
"""


def exposed(a: int, b: int, c: int) -> str:
    return EXPOSITION.replace("{a}", str(a)).replace("{b}", str(b)).replace("{c}", str(c))


def test_loop_lag_is_what_came_between_two_scrapes() -> None:
    before, after = loop_lag.counts(exposed(1000, 1000, 1001)), loop_lag.counts(exposed(1090, 1099, 1101))
    lag = loop_lag.between(before, after)
    assert (lag.timers, lag.p99_ms, lag.over_5_ms) == (100, 5.0, 1)
    with pytest.raises(ValueError, match="kvlane_loop_lag_seconds"):
        loop_lag.counts("")


def test_stretches_have_percentiles_and_a_longest() -> None:
    told = Told(1, 1, {1: 90, 20: 9, 200: 1})
    assert [told.stretch_ms(share) for share in (0.5, 0.99, 1.0)] == [0.05, 1.0, 10.0]
    assert (told.longer(5.0), told.longer(10.0)) == (1, 0)
    assert Told(1, 1).stretch_ms(0.99) == 0.0


MODULE = """
import asyncio, sys, time, uvloop
async def main():
    others = [asyncio.create_task(asyncio.sleep(60)) for _ in range(3)]
    print("ready", flush=True)
    while True:
        await asyncio.sleep(0.02)
        end = time.thread_time() + 0.01
        while time.thread_time() < end:
            pass
uvloop.run(main())
"""


def test_a_watched_process_tells_its_tasks_and_how_long_its_loop_was_busy(tmp_path: Path) -> None:
    (tmp_path / "busy.py").write_text(MODULE)
    file = tmp_path / "told"
    command = [sys.executable, "-m", "loadtests.watched", str(file), "busy"]
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{os.getcwd()}"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            deadline = time.monotonic() + 30
            while True:
                told = watched.ask(process.pid, file, collect=True)
                if told.longer(9.0) >= 1:
                    break
                assert time.monotonic() < deadline
                time.sleep(0.1)
        finally:
            process.send_signal(signal.SIGKILL)
    assert told.tasks >= 5
    assert told.objects > 100
    assert told.stretch_ms(1.0) < 1000


def test_a_watched_routers_command_line_is_the_routers_own_behind_it(tmp_path: Path) -> None:
    made = watched.command(tmp_path / "told")
    assert made[:4] == [sys.executable, "-m", "loadtests.watched", str(tmp_path / "told")]
    assert made[4].startswith("router")


def samples(*memory: float, tasks: int = 5) -> list[Sample]:
    made = [Sample(1000 * number, mb, 40, 3, 5, 100, 10.0) for number, mb in enumerate(memory, 1)]
    made[-1].tasks = tasks
    return made


def test_a_process_grows_where_its_memory_leaves_the_band_or_its_tasks_rise() -> None:
    assert not soak.growth(samples(20.0, 50.0, 51.0, 52.4, 47.6), 2000)
    assert "between 51.0 and 53.0" in soak.growth(samples(50.0, 51.0, 53.0), 1000)[0]
    assert "between 47.0" in soak.growth(samples(50.0, 47.0, 50.0), 1000)[0]
    assert soak.growth(samples(50.0, 50.0, tasks=6), 1000) == ["tasks went from 5 to 6"]
    assert soak.growth(samples(50.0, 50.0), 2000) == ["too few samples to tell"]


def test_stalls_rows_tell_what_is_added_to_the_quiet_time_before() -> None:
    def window(late: float, longest: int) -> stalls.Window:
        return stalls.Window([0.0] * 999 + [late], Lag(100, 2.0, 1), Told(1, 1, {1: 100, longest: 1}), 0)

    made = stalls.row("bodies", [(window(9.0, 40), window(4.0, 20)), (window(7.0, 200), window(4.0, 20))])
    assert (made["added_max_ms"], made["late_max_ms"], made["busy_max_ms"]) == (4.0, 8.0, 6.0)
    assert (made["busy_over_5_ms"], made["lag_over_5_ms"], made["errors"]) == (1, 2, 0)


def written(path: Path) -> list[Row]:
    rows: list[Row] = json.loads(path.read_text())["results"]
    return rows


@pytest.mark.slow
def test_slow_streams_are_all_whole(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    arguments = ["--streams", "60", "--replicas", "3", "--step-ms", "50", "--opened-per-s", "200", "--hold-s", "1"]
    assert slow.main([*arguments, "--processes", "2", "--json", str(out)]) == 0
    (row,) = written(out)
    assert (row["streams"], row["whole"], row["lost"]) == (60, 60, 0)
    assert row["kb_per_stream"] < 1000
    assert row["tasks"] >= 60
    assert math.isfinite(row["busy_max_ms"])


@pytest.mark.slow
def test_a_short_soak_tells_what_the_router_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    arguments = ["--requests", "600", "--warm-up", "200", "--sample-every", "200", "--prompt-kb", "0.1"]
    soak.main([*arguments, "--streams", "4", "--json", str(out)])
    rows = written(out)
    assert [row["requests"] for row in rows] == [200, 400, 600]
    assert all(row["rss_mb"] > 10 and row["descriptors"] > 5 and row["tasks"] > 1 for row in rows)
    assert len({row["descriptors"] for row in rows}) == 1
    assert "requests failed" not in capsys.readouterr().out


@pytest.mark.slow
def test_each_kind_of_disturbance_is_measured(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    arguments = ["--seconds", "1", "--reps", "1", "--replicas", "2", "--streams", "4", "--json", str(out)]
    assert stalls.main(arguments) == 0
    rows = written(out)
    assert [row["what"] for row in rows] == [stalls.QUIET, *stalls.KINDS.values()]
    assert all(row["errors"] == 0 and row["tokens"] > 0 and row["busy_max_ms"] > 0 for row in rows)


@pytest.mark.slow
def test_two_sizes_of_fleet_are_compared(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    arguments = ["--replicas", "1,3", "--streams-per-replica", "2", "--streams", "6", "--tokens", "5"]
    arguments += ["--step-ms", "5", "--seconds", "0.3", "--reps", "1", "--json", str(out)]
    assert fleet.main(arguments) == 0
    rows = written(out)
    assert [(row["replicas"], row["streams"]) for row in rows] == [(1, 2), (3, 6), (1, 6), (3, 6)]
    assert [row["chunk_ratio"] for row in rows if row["replicas"] == 1] == [1.0, 1.0]
    assert all(row["cpu_us_per_chunk"] > 0 and not row["errors"] for row in rows)
