"""Request traces: the Mooncake format, Azure's, and generated ones, as requests with chained block hashes.

A Mooncake row has `timestamp` (ms), `input_length`, `output_length` (tokens) and `hash_ids`, one id per 512 tokens of
the prompt. Ids may go on past the prompt: those are the blocks that the answer fills, so that a next turn finds them.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import random
from collections.abc import Iterable, Iterator
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import msgspec
import xxhash

from engine.simulated_text import Prompt
from loadtests.simulate.perf import KV_BLOCK_TOKENS
from router.types import Chain

TRACES: Final = Path(__file__).resolve().parent.parent / "traces"
FILES: Final = {
    "conversation": "mooncake_conversation.jsonl.gz",
    "synthetic": "mooncake_synthetic.jsonl.gz",
    "azure-conv": "azure2023_conv.csv.gz",
    "azure-code": "azure2023_code.csv.gz",
}
GENERATED: Final = ("multi-turn", "shared-prefix", "agentic")
TOKEN_BYTES: Final = 4
"""Canonical prompt bytes per token, on average."""
BLOCK_BYTES: Final = KV_BLOCK_TOKENS * TOKEN_BYTES
BUCKET_S: Final = 1.0
"""Timestamps are taken to be exact to this: within it arrivals are scattered anew for each seed."""


class TraceRow(msgspec.Struct):
    """One line of a file in the Mooncake format."""

    timestamp: float
    """Milliseconds."""
    input_length: int
    output_length: int
    hash_ids: list[int] = []
    session_id: str = ""


class TraceRequest(msgspec.Struct, frozen=True, gc=False):
    """A request to be replayed."""

    index: int
    at_s: float
    """By the trace's own clock, from its beginning."""
    prompt: Prompt
    """Its hashes may go on into the answer."""
    answer_tokens: int
    chain: Chain
    session: str = ""


class Trace(msgspec.Struct, frozen=True):
    """A named list of requests in order of arrival."""

    name: str
    requests: tuple[TraceRequest, ...]

    @property
    def span_s(self) -> float:
        return max(self.requests[-1].at_s - self.requests[0].at_s, 1e-9)

    @property
    def rate_rps(self) -> float:
        """By its own clock."""
        return len(self.requests) / self.span_s


def arrivals(trace: Trace, rate_rps: float, seed: int) -> list[tuple[float, TraceRequest]]:
    """When each request comes, in seconds and in order: the trace's clock, stretched to the rate."""
    scatter = random.Random(f"arrivals/{seed}").random
    stretch = trace.rate_rps / rate_rps
    start = trace.requests[0].at_s
    times = [
        ((request.at_s - start) // BUCKET_S * BUCKET_S + scatter() * BUCKET_S) * stretch for request in trace.requests
    ]
    return sorted(zip(times, trace.requests, strict=True), key=lambda pair: pair[0])


def prefix_hits(trace: Trace) -> float:
    """Share of the prompts' tokens that one cache without end would hold."""
    seen: set[int] = set()
    hits = tokens = 0
    for request in trace.requests:
        limit = (request.prompt.tokens - 1) // KV_BLOCK_TOKENS
        known = 0
        for block in request.prompt.hashes[:limit]:
            if block not in seen:
                break
            known += 1
        hits += known * KV_BLOCK_TOKENS
        tokens += request.prompt.tokens
        seen.update(request.prompt.hashes)
    return hits / tokens


@lru_cache(maxsize=8)
def load(name: str, seed: int = 0) -> Trace:
    """A trace by name or file. `seed` is what generated ones are made from. Raises `ValueError`, `OSError`."""
    if name in GENERATED:
        from loadtests.simulate import generated  # Made only where asked for.

        return build(name, generated.GENERATORS[name](seed))
    path = TRACES / FILES[name] if name in FILES else Path(name)
    if name not in FILES and not path.exists():
        known = ", ".join((*FILES, *GENERATED))
        raise ValueError(f"no trace {name!r}: neither a file nor one of {known}")
    text = _text(path)
    rows = _azure(text) if ".csv" in path.name else _mooncake(text)
    return build(name if name in FILES else path.name.split(".")[0], rows)


def build(name: str, rows: Iterable[TraceRow]) -> Trace:
    """A trace of these rows. Raises `ValueError` where there are none."""
    chained: dict[tuple[int, int], int] = {}
    requests = []
    ordered = sorted(rows, key=lambda row: row.timestamp)
    if not ordered:
        raise ValueError(f"the trace {name!r} is empty")
    for index, row in enumerate(ordered):
        hashes, parent = [], 0
        for id in row.hash_ids[: (row.input_length + row.output_length) // KV_BLOCK_TOKENS]:
            block = chained.get((parent, id))
            if block is None:
                block = xxhash.xxh3_64_intdigest(id.to_bytes(8, "little"), parent)
                chained[parent, id] = block
            hashes.append(block)
            parent = block
        blocks = tuple(hashes)
        # The answer's own words tell unhashed answers apart, as a real model's do.
        prompt = Prompt(row.input_length, blocks, index.to_bytes(8, "little"), 0)
        chain = Chain(BLOCK_BYTES, 0, blocks[: row.input_length // KV_BLOCK_TOKENS], row.input_length * TOKEN_BYTES)
        requests.append(
            TraceRequest(index, row.timestamp / 1000, prompt, max(row.output_length, 1), chain, row.session_id)
        )
    return Trace(name, tuple(requests))


def _text(path: Path) -> str:
    data = path.read_bytes()
    return (gzip.decompress(data) if path.suffix == ".gz" else data).decode()


def _mooncake(text: str) -> Iterator[TraceRow]:
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row: dict[str, Any] = json.loads(line)
            yield msgspec.convert(row, TraceRow)
        except (ValueError, msgspec.ValidationError) as error:
            raise ValueError(f"line {number} is not in the Mooncake format: {error}") from error


def _azure(text: str) -> Iterator[TraceRow]:
    """No hashes: no prompt shares anything with another."""
    origin: datetime | None = None
    for index, row in enumerate(csv.DictReader(io.StringIO(text))):
        at = datetime.fromisoformat(row["TIMESTAMP"][:26])
        origin = origin or at
        tokens, answer = int(row["ContextTokens"]), int(row["GeneratedTokens"])
        ids = [(index << 20) + block for block in range(tokens // KV_BLOCK_TOKENS)]
        yield TraceRow((at - origin).total_seconds() * 1000, max(tokens, 1), answer, ids)
