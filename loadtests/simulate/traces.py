"""Request traces: the Mooncake format, Azure's, and generated ones, as requests with chained block hashes.

A Mooncake row has `timestamp` (ms), `input_length`, `output_length` (tokens) and `hash_ids`, one id per 512 tokens of
the prompt. Ids may go on past the prompt: those are the blocks that the answer fills, so that a next turn finds them.
"""

from __future__ import annotations

import csv
import gzip
import io
import random
import zlib
from collections.abc import Iterable, Iterator
from datetime import datetime
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Annotated, Final

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
GRANULARITY_S: Final = 1.0
"""Timestamps are taken to be exact to this where requests have their own; see `granularity_s`."""


class TraceRow(msgspec.Struct):
    """One line of a file in the Mooncake format."""

    timestamp: Annotated[float, msgspec.Meta(ge=0)]
    """Milliseconds."""
    input_length: Annotated[int, msgspec.Meta(ge=1)]
    output_length: Annotated[int, msgspec.Meta(ge=0)]
    hash_ids: list[Annotated[int, msgspec.Meta(ge=0)]] = []
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
    """When each request comes, in seconds from the first one and in order.

    The trace's clock, scattered within its granularity and then stretched, so that the rate is exactly the one asked
    for. Requests that all bear the same time come evenly.
    """
    requests = trace.requests
    if requests[0].at_s == requests[-1].at_s:
        times = [float(place) for place in range(len(requests))]
    else:
        scatter = random.Random(f"arrivals/{seed}").random
        within = granularity_s(trace)
        times = [request.at_s + scatter() * within for request in requests]
    ordered = sorted(zip(times, requests, strict=True), key=lambda pair: pair[0])
    first, last = ordered[0][0], ordered[-1][0]
    stretch = len(requests) / rate_rps / (last - first) if last > first else 0.0
    return [((at - first) * stretch, request) for at, request in ordered]


def granularity_s(trace: Trace) -> float:
    """What the trace's timestamps are exact to, in seconds: within it arrivals are scattered anew for each seed.

    Where requests come in batches of one time each, as every three seconds in Mooncake's conversations, the usual gap
    between batches; a second at most elsewhere.
    """
    times = sorted({request.at_s for request in trace.requests})
    if len(times) < 2:
        return 0.0
    gap = median(later - time for time, later in pairwise(times))
    batched = len(trace.requests) >= 2 * len(times)
    return max(round(gap, 2), 0.01) if batched else GRANULARITY_S


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


def load(name: str, seed: int = 0) -> Trace:
    """A trace by name or file. `seed` is what generated ones are made from. Raises `ValueError`, `OSError`."""
    return _load(name, seed if name in GENERATED else 0)


@lru_cache(maxsize=8)
def _load(name: str, seed: int) -> Trace:
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
    """Raises `OSError`, and `ValueError` for what is no text."""
    data = path.read_bytes()
    try:
        return (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
    except (EOFError, zlib.error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no text, or not whole: {error}") from error


def _mooncake(text: str) -> Iterator[TraceRow]:
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = msgspec.json.decode(line, type=TraceRow)
            if max(row.hash_ids, default=0) >> 64:
                raise ValueError("a hash id is longer than 64 bits")
            yield row
        except (ValueError, msgspec.MsgspecError) as error:
            raise ValueError(f"line {number} is not in the Mooncake format: {error}") from error


def _azure(text: str) -> Iterator[TraceRow]:
    """No hashes: no prompt shares anything with another."""
    origin: datetime | None = None
    for index, row in enumerate(csv.DictReader(io.StringIO(text))):
        try:
            at = datetime.fromisoformat(row["TIMESTAMP"][:26])
            tokens, answer = int(row["ContextTokens"]), int(row["GeneratedTokens"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"line {index + 2} is not in the format of the Azure traces: {error}") from error
        origin = origin or at
        ids = [(index << 20) + block for block in range(tokens // KV_BLOCK_TOKENS)]
        yield TraceRow((at - origin).total_seconds() * 1000, max(tokens, 1), answer, ids)
