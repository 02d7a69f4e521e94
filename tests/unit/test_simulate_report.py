"""The simulator's results told to people: tables whose figures are right, pictures that name every line."""

from __future__ import annotations

import itertools
import json
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadtests.simulate import plots, report
from loadtests.simulate.measure import Result

POLICIES = tuple(report.LABELS)


def result(policy: str = "cost", load: float = 0.8, seed: int = 0, **fields: Any) -> Result:
    place = POLICIES.index(policy) if policy in POLICIES else 0
    given = {
        "trace": "synthetic",
        "replicas": 8,
        "hit_ratio": 0.5,
        "ttft_mean_s": 0.4 * load * (1 + place),
        "ttft_p50_s": 0.03,
        "ttft_p90_s": 1.2,
        "ttft_p99_s": 3.0,
        "tpot_p50_s": 0.009,
        "tpot_p99_s": 0.08,
        "goodput_rps": 12.0 - 0.5 * place,
        "imbalance": 1.1,
        "inflight_imbalance": 1.6,
        "good_share": 0.95,
        "rate_rps": 10.0,
        "requests": 3000,
        "errors": 0,
        "profile": "h200-8b",
        "staleness_ms": 0.0,
        "routers": 1,
        "model_error": 0.0,
    }
    return Result(policy=policy, load=load, seed=seed, **{**given, **fields})


def rows(table: str) -> list[list[str]]:
    lines = [line for line in table.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def write(path: Path, results: Sequence[Result]) -> str:
    path.write_text(json.dumps({"results": msgspec.to_builtins(results)}))
    return str(path)


def test_figures_are_medians_over_seeds_with_half_of_their_range() -> None:
    values = (0.41, 0.5, 0.43)
    results = [result(seed=seed, ttft_mean_s=value) for seed, value in enumerate(values)]
    head, _, row = rows(report.load_table(results, 0.8))
    assert row[head.index("TTFT mean (s)")] == "**0.430 ±0.045**"
    assert row[head.index("cached (%)")] == "**50.0**"
    assert row[head.index("TPOT p50 (ms)")] == "**9.00**"


def test_a_table_has_only_its_own_load_and_the_policies_that_ran_at_it() -> None:
    results = [result("cost", 0.8), result("dynamo", 0.8), result("dynamo", 1.4), result("chwbl", 1.4)]
    assert [row[0] for row in rows(report.load_table(results, 0.8))[2:]] == ["**kvlane cost**", "Dynamo"]
    assert [row[0] for row in rows(report.load_table(results, 1.4))[2:]] == ["Dynamo", "CHWBL"]


def test_goodput_is_compared_with_least_queues_under_the_same_conditions() -> None:
    results = [
        result("cost", goodput_rps=15.0),
        result("least-queue", goodput_rps=10.0),
        result("cost", goodput_rps=30.0, replicas=16),
        result("least-queue", goodput_rps=25.0, replicas=16),
        result("lmetric", goodput_rps=9.0, staleness_ms=200.0, routers=4, model_error=0.3),
    ]
    head, _, *cells = rows(report.goodput_table(results))
    late = "synthetic, 8 replicas, 200 ms stale, 4 routers, ±30% model error (req/s)"
    assert head == ["policy", "synthetic, 8 replicas (req/s)", late, "synthetic, 16 replicas (req/s)"]
    assert cells == [
        ["**kvlane cost**", "**15.0 = 1.50 ×**", "**–**", "**30.0 = 1.20 ×**"],
        ["LMETRIC", "–", "9.00", "–"],
        ["least queue", "10.0 = 1.00 ×", "–", "25.0 = 1.00 ×"],
    ]


def test_results_that_ran_under_something_else_are_told_apart() -> None:
    odd: list[dict[str, Any]] = [
        {"replica_error": 0.2},
        {"token_error": 0.2},
        {"slow_factor": 2.0},
        {"joins": (0.5,)},
        {"leaves": (0.5,)},
        {"options": {"price": 2}},
    ]
    groups = report.by_conditions([result(), *(result(**fields) for fields in odd)])
    assert len(groups) == len({conditions.told() for conditions in groups}) == 7


def test_bounds_are_compared_where_only_the_estimate_of_lengths_differs() -> None:
    bound = result("greedy", token_error=0.0)
    clean, late = report.by_conditions([bound, result("cost"), result("cost", staleness_ms=200.0)]).values()
    assert {each.policy for each in clean} == {"greedy", "cost"}
    assert {each.policy for each in late} == {"cost"}
    assert list(report.by_conditions([bound]).values()) == [[bound]]


def test_a_search_without_end_is_no_figure() -> None:
    results = [result("cost", goodput_rps=9e9, unlimited=True), result("least-queue", goodput_rps=10.0)]
    assert "| **no limit** |" in report.goodput_table(results)
    texts = [text.get_text() for text in plots.goodput(results).axes[0].texts]
    assert sorted(texts) == ["10.0  1.00 ×", "no limit"]


def test_times_by_prompt_length_are_told_where_there_are_such_prompts() -> None:
    head, _, row = rows(report.load_table([result("dynamo", ttft_short_mean_s=0.25, ttft_long_mean_s=2.5)], 0.8))
    place = head.index("TTFT mean, prompts < 4,000 (s)")
    assert row[place : place + 3] == ["0.250", "–", "2.50"]


def test_a_policy_that_the_report_does_not_know_is_told_under_its_own_name() -> None:
    assert report.policies([result("mine:Policy"), result("cost")]) == ["cost", "mine:Policy"]
    assert "mine:Policy" in report.load_table([result("mine:Policy")], 0.8)


@pytest.mark.parametrize(
    ("value", "told"), [(0, "0"), (0.01234, "0.0123"), (0.9996, "1.00"), (1, "1.00"), (12.345, "12.3"), (9996, "9996")]
)
def test_figures_have_three_significant_digits(value: float, told: str) -> None:
    assert report.significant(value) == told


def test_a_file_of_another_kind_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "other.json"
    file.write_text('{"results": [{"policy": "cost"}]}')
    assert report.main(["--curves", str(file), "--out", str(tmp_path)]) == 2
    assert "holds no results of the simulator" in capsys.readouterr().err


def test_nothing_to_report_is_an_error(tmp_path: Path) -> None:
    assert report.main(["--out", str(tmp_path)]) == 2


@pytest.mark.slow
def test_a_report_has_a_picture_for_each_conditions_and_a_table_for_each_load(tmp_path: Path) -> None:
    curves = [result(policy, load) for policy in ("cost", "lmetric") for load in (0.8, 1.2)]
    curves += [result("cost", 0.8, replicas=16)]
    first, second = write(tmp_path / "a.json", curves[:3]), write(tmp_path / "b.json", curves[3:])
    searches = write(tmp_path / "c.json", [result("cost")])
    out = tmp_path / "report"
    assert report.main(["--curves", first, second, "--goodput", searches, "--out", str(out)]) == 0
    names = {path.name for path in out.iterdir()}
    assert names == {
        "report.md",
        "goodput.svg",
        "latency-synthetic-8-replicas.svg",
        "service-synthetic-8-replicas.svg",
        "latency-synthetic-16-replicas.svg",
        "service-synthetic-16-replicas.svg",
    }
    text = (out / "report.md").read_text()
    assert text.count("### ") == 3
    for name in names - {"report.md"}:
        assert f"({name})" in text


def names_of(figure: Any) -> list[set[str]]:
    return [{text.get_text() for text in axes.texts} for axes in figure.axes]


@pytest.mark.slow
def test_every_line_of_every_panel_bears_its_name() -> None:
    results = [result(policy, load) for policy in POLICIES for load in (0.5, 1.0, 1.6)]
    for panels in (plots.LATENCY, plots.SERVICE):
        figure = plots.by_load(results, panels, "synthetic")
        assert len(figure.axes) == len(panels)
        for named in names_of(figure):
            assert named >= set(report.LABELS.values())


@pytest.mark.slow
def test_one_load_alone_and_figures_of_zero_can_be_drawn(tmp_path: Path) -> None:
    results = [result("cost", 0.8, imbalance=1.0, ttft_p50_s=0.0, tpot_p50_s=0.0), result("dynamo", 0.8)]
    for place, (_, title, figure) in enumerate(plots.figures(results, [result("cost", goodput_rps=0.0)])):
        plots.save(figure, tmp_path / f"{place}.svg", title)


def test_bars_stand_in_the_order_of_goodput_with_their_figures() -> None:
    results = [
        result("cost", goodput_rps=15.0),
        result("least-queue", goodput_rps=10.0),
        result("lmetric", goodput_rps=14.0),
    ]
    axes = plots.goodput(results).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["least queue", "LMETRIC", "kvlane cost"]
    assert [text.get_text() for text in axes.texts] == ["10.0  1.00 ×", "14.0  1.40 ×", "15.0  1.50 ×"]


@pytest.mark.slow
def test_the_same_results_make_the_same_picture_byte_for_byte(tmp_path: Path) -> None:
    results = [result(policy, load) for policy in ("cost", "lmetric") for load in (0.5, 1.0)]
    for name in "ab":
        plots.save(plots.by_load(results, plots.LATENCY, "synthetic"), tmp_path / name, "title")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert ElementTree.fromstring((tmp_path / "a").read_bytes()).tag.endswith("svg")


@given(st.lists(st.floats(0, 200), min_size=1, max_size=13).map(sorted))
@settings(derandomize=True, deadline=None)
def test_names_never_touch_nor_change_places_nor_leave_the_panel(heights: list[float]) -> None:
    places = plots.apart(heights, 9.0, 200.0)
    assert all(later - place >= 9.0 - 1e-6 for place, later in itertools.pairwise(places))
    assert places[0] >= 0
    assert places[-1] <= 200 + 1e-6
    if all(later - height >= 9.0 for height, later in itertools.pairwise(heights)):
        assert places == pytest.approx(heights)
