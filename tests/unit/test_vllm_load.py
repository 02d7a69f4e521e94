"""The load test beside a bare vLLM server: how answers are read, rows are made and arguments are refused."""

from __future__ import annotations

import pytest

from loadtests.vllm import command, load, report
from loadtests.vllm.load import Sample, Shape

EVENT = b'data: {"choices":[{"index":0,"text":"x"}]}\n\n'
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":7,"total_tokens":9,"completion_tokens":2},"f":1}\n\n'
DONE = b"data: [DONE]\n\n"


def answer(*pieces: bytes) -> load._Answer:
    """Pieces that came a second apart."""
    made = load._Answer()
    made.pieces = list(pieces)
    made.times = [float(second) for second in range(1, len(pieces) + 1)]
    return made


def test_events_are_timed_by_the_piece_that_holds_them_wherever_pieces_are_cut() -> None:
    assert load._event_times(answer(b"HTTP/1.1 200 OK\r\n\r\n", EVENT, EVENT + USAGE, DONE)) == [2.0, 3.0]
    assert load._event_times(answer(b"head" + EVENT[:5], EVENT[5:] + EVENT, USAGE + DONE)) == [2.0, 2.0]


def test_an_answer_is_whole_with_all_its_tokens_and_its_end() -> None:
    assert load._is_whole(answer(EVENT, EVENT, USAGE + DONE), 2)
    assert not load._is_whole(answer(EVENT, EVENT, USAGE + DONE), 3)
    assert not load._is_whole(answer(EVENT, EVENT, USAGE), 2)
    assert not load._is_whole(answer(EVENT, DONE), 2)
    assert load._usage(answer(EVENT, USAGE, DONE)) == (7, 2)


def test_prompts_differ_from_their_first_word_on() -> None:
    first, second = load._body(5, 3), load._body(5, 3)
    assert first.split(b'"prompt":"')[1][:4] != second.split(b'"prompt":"')[1][:4]
    assert b'"max_tokens":3' in first


def sample(tokens_per_s: float, errors: int = 0) -> Sample:
    return Sample(tokens_per_s, 1.0, tokens_per_s / 10, 2.0, 3.0, 4.0, 1.0, 5.0, 6.0, 7.0, errors)


def test_rows_hold_medians_with_their_spread_beside_the_bare_server() -> None:
    shape = Shape(32, 50, 200, 2)
    bare = report.row("vllm serve", shape, [sample(100), sample(90), sample(200)])
    ours = report.row("kvlane", shape, [sample(150, errors=1), sample(130), sample(140)])
    report.compare(ours, bare)
    assert (bare["tokens_per_s"], bare["tokens_per_s_least"], bare["tokens_per_s_greatest"]) == (100, 90, 200)
    assert (ours["times_bare"], ours["ttft_p50_over_bare_ms"], ours["errors"], ours["reps"]) == (1.4, 4.0, 1, 3)
    lines = report.markdown([bare, ours]).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert "| kvlane | 32 | 50 / 200 | **140** (130 to 150) |" in lines[3]


@pytest.mark.parametrize(
    "words",
    [
        ["--streams", "0"],
        ["--streams", "many"],
        ["--shapes", "50"],
        ["--shapes", "50/0"],
        ["--shapes", "50/x"],
        ["--engine-args", "[1]"],
        ["--engine-args", "{"],
        ["--reps", "0"],
        ["--no-such-option"],
    ],
)
def test_arguments_that_make_no_sense_are_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(words) == 2
    assert capsys.readouterr().err.startswith("vllm: ")
