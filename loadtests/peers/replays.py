"""Replays of recorded traces as an open loop: their arrivals, prompts that share what theirs share, their lengths.

Time is compressed by a factor, for the arrivals and for the engines alike. A trace knows only hashes of its prompts'
blocks; the text made of them is the same wherever the hashes are, so that routers find the same prefixes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Final

from loadtests.peers.load import Due
from loadtests.peers.replicas import EngineOrder
from loadtests.simulate import traces
from loadtests.simulate.perf import KV_BLOCK_TOKENS
from loadtests.simulate.traces import TOKEN_BYTES, Trace, TraceRequest

TRACES: Final = tuple(traces.FILES)
_BLOCK_BYTES: Final = KV_BLOCK_TOKENS * TOKEN_BYTES


def due(trace: Trace, factor: float, requests: int) -> list[Due]:
    """The first of a trace's requests, `factor` times as fast as they came."""
    chosen = trace.requests[:requests]
    began = chosen[0].at_s
    return [Due((each.at_s - began) / factor, each.answer_tokens, partial(prompt, each)) for each in chosen]


def prompt(request: TraceRequest) -> str:
    """Text as long as the request's prompt, four bytes a token."""
    length = request.prompt.tokens * TOKEN_BYTES
    blocks = request.prompt.hashes[: request.prompt.tokens // KV_BLOCK_TOKENS]
    text = "".join(_text(block) for block in blocks)
    rest = length - len(text)
    return text + (f"{request.index:07d} " * (rest // 8 + 1))[:rest]


def _text(block: int) -> str:
    return (f"{block:015x} " * (_BLOCK_BYTES // 16))[:_BLOCK_BYTES]


def engine(factor: float, requests: Sequence[TraceRequest]) -> EngineOrder:
    """A simulated engine with a scheduler and a KV cache, `factor` times as fast as an 8B model on one H100."""
    longest = max(request.prompt.tokens + request.answer_tokens for request in requests)
    options: dict[str, Any] = {
        "time_scale": 1 / factor,
        "max_model_len": longest + 1,
        "kv_blocks": max(25_000, -(-longest // 16) + 1),
    }
    return EngineOrder("simulated", options)
