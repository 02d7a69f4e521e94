"""The bench of routers side by side: recorded traces as an open loop."""

from __future__ import annotations

from itertools import takewhile

import pytest

from loadtests.peers import replays
from loadtests.simulate import traces
from loadtests.simulate.perf import KV_BLOCK_TOKENS
from loadtests.simulate.traces import TOKEN_BYTES, Trace, TraceRow


def trace() -> Trace:
    rows = [
        TraceRow(1000.0, 1100, 7, [1, 2, 3]),
        TraceRow(3000.0, 1700, 9, [1, 2, 4, 5]),
        TraceRow(5000.0, 40, 1, []),
    ]
    return traces.build("small", rows)


def test_requests_come_faster_by_the_factor_and_have_the_traces_lengths() -> None:
    due = replays.due(trace(), 4.0, 2)
    assert [(each.at_s, each.tokens, len(each.prompt())) for each in due] == [
        *((0.0, 7, 1100 * TOKEN_BYTES), (0.5, 9, 1700 * TOKEN_BYTES)),
    ]


def test_prompts_share_exactly_the_blocks_that_the_traces_share() -> None:
    first, second, third = (replays.prompt(request) for request in trace().requests)
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))
    assert 0 <= shared - 2 * KV_BLOCK_TOKENS * TOKEN_BYTES < 16
    assert len(third) == 160
    assert first == replays.prompt(trace().requests[0])


@pytest.mark.parametrize("name", replays.TRACES)
def test_every_trace_fits_into_its_engine(name: str) -> None:
    requests = traces.load(name).requests[:200]
    order = replays.engine(5.0, requests)
    order.make("sim")
    longest = max(request.prompt.tokens + request.answer_tokens for request in requests)
    assert order.options["max_model_len"] > longest
    assert len(replays.due(traces.load(name), 5.0, 200)) == 200
