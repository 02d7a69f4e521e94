"""The bench of routers side by side: its command, its turns and its rows."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest

from loadtests.__main__ import main as loadtests
from loadtests.peers import alone, command, plots, runs
from loadtests.peers.base import Running, Setup, System
from loadtests.peers.clients import HttpClient
from loadtests.peers.errors import PeerError
from loadtests.peers.measure import Bench, Open, Paced, Saturated, Shape, percentile
from loadtests.peers.report import markdown, open_row, row, tables
from loadtests.peers.runs import Contender, Plan, contenders
from loadtests.peers.systems import SYSTEMS

FIELDS = (
    *("system", "policy", "protocol", "streams", "cpu_us_per_chunk", "cpu_us_per_token", "cpu_us_per_request"),
    *("ttft_added_p50_ms", "ttft_added_p99_ms", "itl_added_p99_ms", "chunks_per_s", "requests_per_s"),
    *("rss_mb", "errors"),
)
SHAPE = Shape(tokens=5, prompt_kb=1.0, repeated=False, step_ms=5.0, seconds=0.2)


def paced(cost: float = 1.0, ttft: float = 10.0, errors: int = 0) -> Paced:
    return Paced(cost, cost, 10 * cost, 5.0, ttft, 2 * ttft, 20.0, 21.0, 1.0, 0.5, errors, Counter())


def saturated(rate: float = 1000.0) -> Saturated:
    return Saturated(rate, rate, rate / 10, 0.9, 0.5, 0.3, 0, Counter())


def opened(ttft: float = 30.0, errors: int = 0) -> Open:
    return Open(10.0, 100.0, 1.0, 1.0, 10.0, 2.0, ttft, ttft, 2 * ttft, 20.0, 21.0, errors, Counter())


@contextmanager
def broken(setup: Setup) -> Iterator[Running]:
    raise PeerError("broken", "was made so", setup.log)
    yield Running(HttpClient([0]))


def names(chosen: list[Contender]) -> list[tuple[str, str]]:
    return [(each.system, each.policy) for each in chosen]


def test_the_floor_always_runs_and_runs_first() -> None:
    assert names(contenders(["kvlane", "direct"], ["cost"], "http")) == [("direct", "none"), ("kvlane", "cost")]


def test_policies_have_one_name_for_all_and_each_systems_own() -> None:
    both = names(contenders(["kvlane", "smg"], ["cache_aware"], "http"))
    assert both == [("direct", "none"), ("kvlane", "cost"), ("smg", "cache_aware")]
    every = names(contenders(["kvlane", "vllm-router"], [], "http"))
    assert every[1:] == [
        *(("kvlane", "cost"), ("kvlane", "round-robin")),
        *(("vllm-router", "cache_aware"), ("vllm-router", "round_robin")),
    ]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--systems", "nobody"],
        ["--systems", "kvlane", "--policy", "nothing"],
        ["--systems", "smg", "--policy", "cost"],
        ["--systems", "smg", "--protocol", "grpc"],
        ["--streams", "1001"],
        ["--streams", "0"],
        ["--streams", ","],
        ["--reps", "none"],
        ["--json", "/nonexistent/out.json"],
        ["--json", "/"],
        ["--markdown", "/nonexistent/out.md"],
        ["--load", "0"],
        ["--replay", "nothing"],
        ["--time-factor", "0"],
        ["--unknown"],
    ],
)
def test_arguments_that_make_no_sense_are_told_in_one_line(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert loadtests(["peers", *arguments]) == 2
    said = capsys.readouterr()
    assert not said.out
    assert said.err.startswith("peers: ")
    assert said.err.count("\n") == 1


def test_a_row_holds_medians_with_their_spread_and_what_is_added_to_the_floor_beside_it() -> None:
    mine = [paced(1.0, 11.0), paced(5.0, 13.0, errors=2), paced(2.0, 30.0)]
    floor = [paced(0.0, 10.0), paced(0.0, 10.0), paced(0.0, 28.0)]
    made = row(
        ("kvlane", "cost", "http", 32),
        mine,
        floor,
        [saturated(100.0), saturated(300.0), saturated(200.0)],
        [1.0, 2.0, 4.0],
        50.0,
    )
    assert set(FIELDS) <= made.keys()
    assert [made[f"cpu_us_per_chunk{part}"] for part in ("", "_least", "_greatest")] == [2.0, 1.0, 5.0]
    assert [made[f"ttft_added_p50_ms{part}"] for part in ("", "_least", "_greatest")] == [2.0, 1.0, 3.0]
    assert made["ttft_added_p99_ms"] == 4.0
    assert (made["engine_cpu_us_per_chunk"], made["frontend_cpu_us_per_chunk"]) == (5.0, 3.0)
    assert (made["chunks_per_s"], made["requests_per_s"], made["rss_mb"], made["errors"]) == (200.0, 20.0, 50.0, 2)
    assert all(isinstance(made[name], int | float) for name in FIELDS[3:])
    table = markdown([made])
    assert "| kvlane | cost | http | 32 | **2.00** (1.00 to 5.00) |" in table
    assert len({line.count("|") for line in table.splitlines()}) == 1


def test_an_open_loops_row_tells_what_is_added_to_the_floor_under_the_same_load() -> None:
    made = open_row(
        ("smg", "cache_aware", "http"), [opened(30.0), opened(50.0, errors=1)], [opened(10.0), opened(20.0)]
    )
    assert (made["ttft_added_p50_ms"], made["ttft_added_p99_ms"], made["ttft_added_mean_ms"]) == (25.0, 50.0, 25.0)
    assert (made["itl_added_p99_ms"], made["requests_per_s"], made["errors"], made["reps"]) == (0.0, 10.0, 1, 2)


def test_the_tables_hold_all_rows() -> None:
    made = row(("kvlane", "cost", "http", 32), [paced()], [paced()], [saturated()], [1.0], 50.0)
    at_half = open_row(("kvlane", "cost", "http"), [opened()], [opened()]) | {"load": 0.5}
    replayed = open_row(("kvlane", "cost", "http"), [opened()], [opened()]) | {"trace": "conversation"}
    text = tables(runs.Outcome([made], False, [at_half], [replayed]))
    assert text.count("| kvlane | cost | http |") == 3
    assert "| kvlane | cost | http | 0.5 |" in text
    assert "| kvlane | cost | http | conversation |" in text


@pytest.mark.slow
def test_pictures_are_the_same_for_the_same_rows(tmp_path: Path) -> None:
    rows = [
        row((system, policy, "http", streams), [paced(cost)], [paced()], [saturated()], [1.0], 50.0)
        for system, policy, cost in (("direct", "none", 0.0), ("kvlane", "cost", 1.0), ("smg", "round_robin", 5.0))
        for streams in (1, 32)
    ]
    first, again = plots.write(rows, tmp_path / "a"), plots.write(rows, tmp_path / "b")
    assert [path.name for path in first] == [f"peers-{picture.name}.svg" for picture in plots.PICTURES]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in again]
    assert "smg round_robin" in first[0].read_text()


def test_more_streams_than_two_cores_can_serve_have_longer_steps() -> None:
    shape = msgspec.structs.replace(SHAPE, step_ms=20.0, tokens=200)
    assert [shape.paced_step_ms(streams) for streams in (1, 256, 1000)] == [20.0, 20.0, 62.5]
    assert msgspec.structs.replace(shape, paced_rate=50e3).paced_step_ms(1000) == 20.0
    assert shape.open_step_ms() == 5.0


def test_percentiles_of_few_values_are_values_between_them() -> None:
    assert percentile([], 99) == 0.0
    assert percentile([3.0], 99) == 3.0
    assert percentile([1.0, 2.0], 50) == 1.5
    assert 1.9 < percentile([1.0, 2.0], 99) <= 2.0


def plan(tmp_path: Path, **changes: object) -> Plan:
    fields: dict[str, object] = {
        "shape": SHAPE,
        "streams": [2],
        "reps": 2,
        "replicas": 2,
        "protocol": "http",
        "limit_s": 60.0,
        "logs": tmp_path,
    }
    return Plan(**(fields | changes))  # type: ignore[arg-type]


class Ledger:
    """Measures nothing and remembers whose turn it was."""

    def __init__(self) -> None:
        self.turns: list[str] = []

    def paced(self, bench: Bench, system: str, running: Running, streams: int) -> Paced:
        self.turns.append(system)
        if system == "late" and streams == 3:
            raise PeerError("late", "answered nothing")
        return paced()

    def saturated(self, bench: Bench, system: str, running: Running, streams: int) -> Saturated:
        return saturated()


@contextmanager
def idle(setup: Setup) -> Iterator[Running]:
    yield Running(HttpClient([0]))


def test_the_order_is_turned_each_time_and_who_fails_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger, said = Ledger(), list[str]()
    monkeypatch.setattr(Bench, "paced", lambda *arguments: ledger.paced(*arguments))
    monkeypatch.setattr(Bench, "saturated", lambda *arguments: ledger.saturated(*arguments))
    monkeypatch.setattr(Bench, "warm_up", lambda *arguments: None)
    monkeypatch.setattr(alone, "measure", lambda *arguments: 0.5)
    known = {name: System(idle) for name in ("direct", "a", "b", "late")} | {"broken": System(broken)}
    chosen = contenders(["a", "broken", "late", "b"], [], "http", known)
    outcome = runs.run(plan(tmp_path, streams=[3], reps=3), chosen, said.append)
    assert ledger.turns == [*("direct", "a", "late", "b"), *("b", "a", "direct"), *("direct", "a", "b")]
    assert [each["system"] for each in outcome.rows] == ["direct", "a", "b"]
    assert outcome.failed
    assert f"broken: was made so (log: {tmp_path / 'broken.log'})" in said
    assert "late: answered nothing" in said


def test_who_is_never_idle_is_up_with_the_floor_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    up, together = set[str](), set[tuple[str, ...]]()

    def system(name: str, *, quiet: bool) -> System:
        @contextmanager
        def start(setup: Setup) -> Iterator[Running]:
            up.add(name)
            yield Running(HttpClient([0]))
            up.remove(name)

        return System(start, quiet=quiet)

    def measured(*arguments: object) -> Paced:
        together.add(tuple(sorted(up)))
        return paced()

    monkeypatch.setattr(Bench, "paced", measured)
    monkeypatch.setattr(Bench, "saturated", lambda *arguments: saturated())
    monkeypatch.setattr(Bench, "warm_up", lambda *arguments: None)
    monkeypatch.setattr(alone, "measure", lambda *arguments: 0.5)
    known = {name: system(name, quiet=name != "busy") for name in ("direct", "busy", "a", "b")}
    chosen = contenders(["busy", "a", "b"], [], "http", known)
    outcome = runs.run(plan(tmp_path), chosen, lambda line: None)
    assert together == {("a", "b", "direct"), ("busy", "direct")}
    assert [each["system"] for each in outcome.rows] == ["direct", "busy", "a", "b"]
    assert not outcome.failed


def test_open_loops_are_at_a_share_of_what_each_system_relayed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, float]] = []

    def open_loop(bench: Bench, system: str, running: Running, rate: float) -> Open:
        asked.append((system, rate))
        return opened()

    rates = {"direct": 9000.0, "a": 1000.0, "b": 3000.0}
    monkeypatch.setattr(Bench, "paced", lambda *arguments: paced())
    monkeypatch.setattr(Bench, "saturated", lambda bench, system, *more: saturated(rates[system]))
    monkeypatch.setattr(Bench, "open_loop", open_loop)
    monkeypatch.setattr(Bench, "warm_up", lambda *arguments: None)
    monkeypatch.setattr(alone, "measure", lambda *arguments: 0.5)
    chosen = contenders(["a", "b"], [], "http", {name: System(idle) for name in rates})
    outcome = runs.run(plan(tmp_path, loads=[0.5]), chosen, lambda line: None)
    assert asked == [
        *(("direct", 100.0), ("a", 100.0), ("direct", 300.0), ("b", 300.0)),
        *(("b", 300.0), ("direct", 300.0), ("a", 100.0), ("direct", 100.0)),
    ]
    assert [(each["system"], each["load"], each["offered_chunks_per_s"]) for each in outcome.open] == [
        *(("a", 0.5, 500.0), ("b", 0.5, 1500.0)),
    ]
    assert not outcome.failed


def test_a_replay_is_missed_where_it_did_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def replayed(trace: object, replay: runs.Replay, system: str, running: Running) -> Open:
        if system == "a":
            raise PeerError("a", "answered nothing")
        return opened()

    monkeypatch.setattr(Bench, "paced", lambda *arguments: paced())
    monkeypatch.setattr(Bench, "saturated", lambda *arguments: saturated())
    monkeypatch.setattr(Bench, "warm_up", lambda *arguments: None)
    monkeypatch.setattr(alone, "measure", lambda *arguments: 0.5)
    monkeypatch.setattr(runs, "_replayed", replayed)
    chosen = contenders(["a", "b"], [], "http", {name: System(idle) for name in ("direct", "a", "b")})
    made = plan(tmp_path, replays=[runs.Replay("azure-code", 10.0, 5)])
    outcome = runs.run(made, chosen, lambda line: None)
    assert [(each["system"], each["trace"], each["time_factor"]) for each in outcome.replays] == [
        *(("direct", "azure-code", 10.0), ("b", "azure-code", 10.0)),
    ]
    assert outcome.failed


def test_who_fails_under_one_load_is_still_told_of_under_those_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rate(bench: Bench, system: str, running: Running, streams: int) -> Saturated:
        if system == "a" and streams == 3:
            raise PeerError("a", "answered nothing")
        return saturated()

    monkeypatch.setattr(Bench, "paced", lambda *arguments: paced())
    monkeypatch.setattr(Bench, "saturated", rate)
    monkeypatch.setattr(Bench, "warm_up", lambda *arguments: None)
    monkeypatch.setattr(alone, "measure", lambda *arguments: 0.5)
    chosen = contenders(["a"], [], "http", {"direct": System(idle), "a": System(idle)})
    outcome = runs.run(plan(tmp_path, streams=[2, 3]), chosen, lambda line: None)
    assert [(each["system"], each["streams"]) for each in outcome.rows] == [("direct", 2), ("a", 2), ("direct", 3)]
    assert outcome.failed


def test_without_the_floor_there_is_nothing_to_compare_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alone, "measure", lambda *arguments: 0.5)
    chosen = contenders([], [], "http", {"direct": System(broken)})
    with pytest.raises(PeerError, match="was made so"):
        runs.run(plan(tmp_path), chosen, lambda line: None)


def test_past_its_time_a_comparison_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alone, "measure", lambda *arguments: 0.5)
    chosen = contenders(["a"], [], "http", {"direct": System(idle), "a": System(idle)})
    said: list[str] = []
    outcome = runs.run(plan(tmp_path, limit_s=0.0), chosen, said.append)
    assert outcome.failed
    assert not outcome.rows
    assert any("took longer" in line for line in said)


@pytest.mark.slow
@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_kvlane_is_compared_with_the_floor(
    protocol: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(SYSTEMS, "broken", System(broken, protocols=("http", "grpc")))
    monkeypatch.setattr(command, "BENCH", tmp_path)
    out = tmp_path / "out.json"
    arguments = ["--systems", "kvlane,broken", "--policy", "round_robin", "--streams", "2", "--tokens", "5"]
    arguments += ["--prompt-kb", "1", "--reps", "2", "--step-ms", "5", "--seconds", "0.5", "--protocol", protocol]
    assert loadtests(["peers", *arguments, "--json", str(out)]) == 1  # One of them is broken.
    written = json.loads(out.read_text())
    assert written["generator"][0]["protocol"] == "http"
    assert written["generator"][0]["chunks_per_s"] > 0
    floor, ours = written["results"]
    assert (floor["system"], ours["system"], ours["policy"], ours["protocol"]) == (
        *("direct", "kvlane", "round-robin"),
        protocol,
    )
    assert floor["cpu_us_per_chunk"] == floor["ttft_added_p50_ms"] == 0
    assert ours["cpu_us_per_chunk"] > 0
    assert ours["cpu_us_per_token"] <= ours["cpu_us_per_chunk"]
    assert ours["engine_cpu_us_per_chunk"] > 0
    assert ours["chunks_per_s"] >= 0 <= ours["requests_per_s"]  # On a busy machine nothing may come in half a second.
    assert ours["rss_mb"] > 10
    assert ours["errors"] == floor["errors"] == 0
    said = capsys.readouterr()
    assert "| kvlane | round-robin |" in said.out
    assert "load generator, 2 streams" in said.out
    assert "broken: was made so" in said.err
