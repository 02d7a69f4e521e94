"""Generated loads: what prompts share is what their block ids say, and a seed decides everything."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from statistics import fmean

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadtests.simulate import traces
from loadtests.simulate.generated import (
    GENERATORS,
    Agentic,
    Blocks,
    Lengths,
    MultiTurn,
    SharedPrefix,
    Text,
    agentic,
    lines,
    multi_turn,
    shared_prefix,
)
from loadtests.simulate.traces import TraceRow

SIZE = 512
SMALL = {
    "multi-turn": lambda seed: multi_turn(seed, MultiTurn(span_s=120, lead_s=300)),
    "shared-prefix": lambda seed: shared_prefix(seed, SharedPrefix(span_s=60)),
    "agentic": lambda seed: agentic(seed, Agentic(span_s=60)),
}


@cache
def small(name: str) -> list[TraceRow]:
    return SMALL[name](0)


def shared(one: Sequence[int], other: Sequence[int]) -> int:
    """Ids that both begin with."""
    return next(
        (place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )


def sessions(rows: Sequence[TraceRow]) -> dict[str, list[TraceRow]]:
    found: dict[str, list[TraceRow]] = defaultdict(list)
    for row in rows:
        found[row.session_id].append(row)
    return found


def test_every_trace_name_of_a_generated_load_has_a_generator() -> None:
    assert set(GENERATORS) == set(traces.GENERATED) == set(SMALL)


@pytest.mark.parametrize("name", SMALL)
def test_a_seed_decides_everything(name: str) -> None:
    assert SMALL[name](1) == SMALL[name](1)
    assert SMALL[name](1) != SMALL[name](2)


@pytest.mark.parametrize("name", SMALL)
def test_rows_are_in_order_and_have_an_id_for_every_block_up_to_the_answers_end(name: str) -> None:
    rows = small(name)
    assert len(rows) > 100
    assert [row.timestamp for row in rows] == sorted(row.timestamp for row in rows)
    for row in rows:
        assert row.input_length > 0
        assert row.output_length > 0
        whole = (row.input_length + row.output_length) // SIZE
        assert len(row.hash_ids) == max(whole, math.ceil(row.input_length / SIZE))


@pytest.mark.parametrize("name", SMALL)
def test_an_id_stands_for_all_that_comes_before_it(name: str) -> None:
    before: dict[int, int] = {}
    for row in small(name):
        assert len(set(row.hash_ids)) == len(row.hash_ids)
        for parent, id in zip([-1, *row.hash_ids], row.hash_ids, strict=False):
            assert before.setdefault(id, parent) == parent


@pytest.mark.parametrize("name", SMALL)
def test_a_generated_load_is_a_file_in_the_mooncake_format(name: str, tmp_path: Path) -> None:
    rows = small(name)
    file = tmp_path / "made.jsonl"
    file.write_bytes(lines(rows))
    read = traces.load(str(file))
    assert read.requests == traces.build("made", rows).requests


def test_a_later_turn_repeats_the_earlier_prompt_and_its_answer() -> None:
    turns = 0
    for session in sessions(small("multi-turn")).values():
        for earlier, later in pairwise(session):
            whole = (earlier.input_length + earlier.output_length) // SIZE
            assert later.input_length > earlier.input_length + earlier.output_length
            assert shared(earlier.hash_ids, later.hash_ids) >= whole
            assert later.timestamp >= earlier.timestamp + 2000
            turns += 1
    assert turns > 100


def test_conversations_of_one_application_share_its_system_prompt_and_nothing_else() -> None:
    options = MultiTurn(span_s=200, applications=1, system=Lengths(1300, 0.0), document_share=0.0)
    rows = multi_turn(0, options)
    firsts = [session[0] for session in sessions(rows).values()]
    for one, other in pairwise(firsts):
        assert shared(one.hash_ids, other.hash_ids) == 1300 // SIZE


def test_the_rate_neither_grows_nor_fades() -> None:
    rows = multi_turn(0)
    thirds = Counter(int(row.timestamp // 600_000) for row in rows)
    assert set(thirds) == {0, 1, 2}
    assert max(thirds.values()) < 1.2 * min(thirds.values())


def test_a_conversation_has_as_many_turns_as_asked_for_on_average() -> None:
    options = MultiTurn(
        span_s=20_000, lead_s=0, conversations_per_s=0.1, turns=3.5, document_share=0, gap_s=Lengths(2, 0)
    )
    assert fmean(len(session) for session in sessions(multi_turn(0, options)).values()) == pytest.approx(3.5, rel=0.05)


def test_popular_prefixes_are_asked_more_often_and_arrivals_come_in_bursts() -> None:
    rows = shared_prefix(0)
    counts = sorted(Counter(row.hash_ids[0] for row in rows).values(), reverse=True)
    assert counts[0] > 5 * counts[20]
    gaps = [(later.timestamp - row.timestamp) / 1000 for row, later in pairwise(rows)]
    mean = fmean(gaps)
    assert fmean((gap - mean) ** 2 for gap in gaps) ** 0.5 / mean == pytest.approx(2.0, rel=0.15)


def test_agents_share_their_tools_and_forked_sub_agents_their_parents_context() -> None:
    rows = agentic(0, Agentic(span_s=150, agents=1, branch_share=0.2, fork_share=1.0, tools=Lengths(8000, 0.0)))
    found = sessions(rows)
    helpers = [name for name in found if "/" in name]
    parents = [name for name in found if "/" not in name]
    assert len(helpers) > 10
    for name in parents:
        assert shared(found[name][0].hash_ids, rows[0].hash_ids) >= 8000 // SIZE
    forked = 0
    for name in helpers:
        parent = found.get(name.split("/")[0])
        if parent:
            forked += max(shared(found[name][0].hash_ids, row.hash_ids) for row in parent) > 8000 // SIZE
    assert forked > len(helpers) // 2


def test_a_context_that_grows_too_long_is_compacted_to_its_tools_and_a_summary() -> None:
    options = Agentic(span_s=100, most_tokens=20_000, tools=Lengths(8000, 0.0), branch_share=0, steps=Lengths(40, 0))
    shrunk = 0
    for session in sessions(agentic(0, options)).values():
        for earlier, later in pairwise(session):
            assert later.input_length <= 20_000
            if later.input_length < earlier.input_length:
                shrunk += 1
                assert shared(earlier.hash_ids, later.hash_ids) == 8000 // SIZE
    assert shrunk > 10


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 1500)), max_size=6),
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 1500)), max_size=6),
)
@settings(derandomize=True, deadline=None)
def test_texts_share_exactly_the_blocks_in_which_they_agree(
    one: list[tuple[int, int]], other: list[tuple[int, int]]
) -> None:
    blocks = Blocks()
    texts = [Text(blocks), Text(blocks)]
    tokens: list[list[tuple[int, int]]] = [[], []]
    for text, written, pieces in zip(texts, tokens, (one, other), strict=True):
        for source, length in pieces:
            text.append(source, length)
            written += [(source, place) for place in range(length)]
        assert text.tokens == len(written)
    agree = shared_tokens(*tokens)
    # Pieces that are cut elsewhere may hide an equal block, but never make unequal ones equal.
    assert shared(texts[0].full, texts[1].full) <= agree // SIZE
    if one == other:
        assert texts[0].ids() == texts[1].ids()


def shared_tokens(one: list[tuple[int, int]], other: list[tuple[int, int]]) -> int:
    return next(
        (place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )


def test_a_fork_goes_its_own_way() -> None:
    text = Text(Blocks())
    text.append(1, 1000)
    fork = text.fork()
    fork.append(2, 600)
    text.append(3, 600)
    assert shared(text.full, fork.full) == 1
    assert text.tokens == fork.tokens == 1600
