"""What the prefix index costs: time per lookup, bytes per block, time of a report and of a slice of a replica's leave.

`python -m loadtests.index_cost [--replicas 64] [--blocks 1000000] [--stores python,compiled] [--json FILE]`. The blocks
are conversations: each begins with one of a few system prompts that all replicas hold, lives on one replica, and came
there turn by turn, many conversations at the same time: `turns` looks each turn up, stores its prompt as one report and
each block of the answer as one of its own, while the sweeps run; `whole` stores each prompt at once. Lookups take a
random conversation each, with fresh hashes as a request brings them, so that the processor's caches hold as little of
it as they would. Times are of the thread's CPU, per call, with nothing subtracted: other processes on the machine do
not count, the cost of asking for the time does.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import os
import random
import statistics
import sys
import time
from array import array
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import msgspec

from router.compiled import part
from router.prefix.blocks import Blocks
from router.prefix.index import PrefixIndex

BLOCK_BYTES = 256
SIZES_KB = (4, 32, 200)
SYSTEM_BLOCKS = 12
SYSTEMS = 8
TURN_BLOCKS = 14
ANSWER_BLOCKS = 6
TOKENS = 64
_HELD = ("none", "system", "half", "all")


class Row(msgspec.Struct):
    """Lookups of one kind, in microseconds."""

    store: str
    """``python`` or ``compiled``."""
    stored: str
    prompt_kb: int
    held: str
    """``none``: not even the system prompt; ``system``: just that; ``half``, ``all``: of the prompt, by one replica."""
    p50_us: float
    p99_us: float
    hold_us: float
    """Median of holding and releasing the prompt's blocks at the replica that has most of it."""


class Fixed(msgspec.Struct):
    """What does not depend on the prompt."""

    store: str
    stored: str
    blocks: int
    bytes_per_block: float
    """All memory by which the process grew while the index was filled."""
    store_us_per_block: float
    longest_store_ms: float
    """The longest single report; a hash table that grows is in it."""
    leave_slices: int
    leave_slice_p50_ms: float
    leave_slice_max_ms: float


Report = tuple[str, list[int], list[int], list[int]]
"""Replica, blocks, depths, and the chain of the request behind it where a turn begins."""


class Conversation(msgspec.Struct):
    blocks: list[int]
    replica: str
    stored: int = SYSTEM_BLOCKS


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtests.index_cost", description=__doc__)
    parser.add_argument("--replicas", type=int, default=64)
    parser.add_argument("--blocks", type=int, default=1_000_000)
    parser.add_argument("--lookups", type=int, default=2000, help="per row")
    parser.add_argument("--stored", default="whole,turns", help="ways of storing, by commas")
    parser.add_argument("--stores", default="python,compiled", help="block stores to be measured, by commas")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", metavar="FILE", help="write the rows here as well")
    arguments = parser.parse_args()
    rows: list[Row] = []
    fixed: list[Fixed] = []
    for stored in arguments.stored.split(","):
        for store in arguments.stores.split(","):
            # In a process of its own, since the one before it leaves memory behind that would be used again.
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                lookups, one = pool.submit(measure, store, stored, arguments).result()
            rows += lookups
            fixed.append(one)
    print(markdown(rows, fixed))
    if arguments.json:
        results = msgspec.json.encode({"lookups": rows, "index": fixed})
        Path(arguments.json).write_bytes(msgspec.json.format(results))
    return 0


def measure(store: str, stored: str, arguments: argparse.Namespace) -> tuple[list[Row], Fixed]:
    """All figures for one store and one way of storing."""
    bench = Bench(store, stored, arguments.replicas, arguments.blocks, arguments.seed)
    return bench.lookups(arguments.lookups), bench.fixed()


class Bench:
    """An index full of conversations."""

    def __init__(self, store: str, stored: str, replicas: int, blocks: int, seed: int) -> None:
        self.store = store
        self.stored = stored
        self.random = random.Random(seed)
        self.names = [f"SERVE_REPLICA::llm#Llama#{i:08x}" for i in range(replicas)]
        self.systems = [self._fresh(SYSTEM_BLOCKS) for _ in range(SYSTEMS)]
        self.talks = self._conversations(blocks)
        reports = list(self._whole() if stored == "whole" else self._turns())
        gc.freeze()
        before = _resident()
        self.index = _index(store, 2 * blocks)
        self.store_s = self._load(self.index, reports)
        self.bytes = (_resident() - before) / len(self.index)

    def _fresh(self, count: int) -> list[int]:
        return [self.random.getrandbits(64) for _ in range(count)]

    def _conversations(self, blocks: int) -> list[Conversation]:
        talks, total = [], SYSTEMS * SYSTEM_BLOCKS
        sizes = [kb * 1024 // BLOCK_BYTES for kb in SIZES_KB]
        while total < blocks:
            size = self.random.choices(sizes, [1 / size for size in sizes])[0]  # As many blocks of each size.
            own = self._fresh(max(size - SYSTEM_BLOCKS, 1))
            talks.append(Conversation([*self.random.choice(self.systems), *own], self.random.choice(self.names)))
            total += len(own)
        return talks

    def _systems_everywhere(self) -> Iterator[Report]:
        for name in self.names:
            for system in self.systems:
                yield name, system, [TOKENS * (at + 1) for at in range(len(system))], []

    def _whole(self) -> Iterator[Report]:
        yield from self._systems_everywhere()
        for talk in self.talks:
            yield self._part(talk, len(talk.blocks))

    def _turns(self) -> Iterator[Report]:
        yield from self._systems_everywhere()
        open_talks = list(self.talks)
        while open_talks:
            at = self.random.randrange(min(256 * len(self.names), len(open_talks)))
            talk = open_talks[at]
            turn = (talk.stored - SYSTEM_BLOCKS) % (TURN_BLOCKS + ANSWER_BLOCKS)
            yield self._part(talk, 1 if turn >= TURN_BLOCKS else TURN_BLOCKS)
            if talk.stored >= len(talk.blocks):
                open_talks[at] = open_talks[-1]
                open_talks.pop()

    def _part(self, talk: Conversation, size: int) -> Report:
        at = talk.stored
        part = talk.blocks[at : at + size]
        talk.stored += size
        chain = talk.blocks[: at + size] if size == TURN_BLOCKS else []
        return talk.replica, part, [TOKENS * (at + i + 1) + at % 7 for i in range(len(part))], chain

    def _load(self, index: PrefixIndex, reports: list[Report]) -> array[float]:
        for name in self.names:
            index.join(name)
        times = array("d")
        for name, blocks, depths, chain in reports:
            again = list(map(int, map(str, blocks)))  # Hashes of its own, as a frame brings them.
            if chain:
                index.match(chain, TOKENS)
                index.sweep()
            began = time.thread_time()
            index.store(name, again, depths)
            times.append(time.thread_time() - began)
        return times

    def lookups(self, count: int) -> list[Row]:
        rows = []
        for size_kb in SIZES_KB:
            size = size_kb * 1024 // BLOCK_BYTES
            talks = [talk for talk in self.talks if len(talk.blocks) == size]
            cuts: dict[str, Callable[[Conversation], int]] = {
                "none": lambda talk: 0,
                "system": lambda talk: SYSTEM_BLOCKS,
                "half": lambda talk: len(talk.blocks) // 2,
                "all": lambda talk: len(talk.blocks),
            }
            for held, cut in cuts.items():
                times, holds = zip(*[self._ask(self.random.choice(talks), cut) for _ in range(count)], strict=True)
                cuts_us = statistics.quantiles([1e6 * one for one in times], n=100)
                rows.append(
                    Row(
                        self.store, self.stored, size_kb, held, cuts_us[49], cuts_us[98], 1e6 * statistics.median(holds)
                    )
                )
        return rows

    def _ask(self, talk: Conversation, cut: Callable[[Conversation], int]) -> tuple[float, float]:
        keep = cut(talk)
        chain = tuple([int(str(block)) for block in talk.blocks[:keep]] + self._fresh(len(talk.blocks) - keep))
        index = self.index
        began = time.thread_time()
        found = index.match(chain, TOKENS)
        took = time.thread_time() - began
        best = max((held.blocks for held in found.values()), default=0)
        assert best == keep, f"{best} blocks found, {keep} are held"
        assert len(found) == (len(self.names) if keep else 0)
        began = time.thread_time()
        index.release(index.hold(talk.replica, chain))
        return took, time.thread_time() - began

    def fixed(self) -> Fixed:
        blocks = len(self.index)
        self.index.leave(self.names[0])
        slices, more = [], True
        while more:
            began = time.thread_time()
            more = self.index.sweep()
            slices.append(time.thread_time() - began)
        return Fixed(
            self.store,
            self.stored,
            blocks,
            self.bytes,
            1e6 * sum(self.store_s) / blocks,
            1e3 * max(self.store_s),
            len(slices),
            1e3 * statistics.median(slices),
            1e3 * max(slices),
        )


def _index(store: str, max_blocks: int) -> PrefixIndex:
    if store == "python":
        return PrefixIndex(max_blocks, Blocks)
    compiled = part("router.prefix._blocks")
    if store != "compiled" or compiled is None:
        raise SystemExit(f"there is no such store here: {store}")
    return PrefixIndex(max_blocks, compiled.Blocks)


def _resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def markdown(rows: list[Row], fixed: list[Fixed]) -> str:
    """The figures as two tables."""
    lines = ["| stored | prompt | held | store | lookup p50 µs | p99 µs | hold + release µs |"]
    lines.append("|---|---|---|---|---|---|---|")
    for row in sorted(rows, key=lambda row: (row.stored, row.prompt_kb, _HELD.index(row.held))):
        times = f"{row.p50_us:.1f} | {row.p99_us:.1f} | {row.hold_us:.1f}"
        lines.append(f"| {row.stored} | {row.prompt_kb} KB | {row.held} | {row.store} | {times} |")
    lines += [
        "",
        "| stored | store | blocks | bytes/block | store µs/block | longest store ms | leave: slices, p50 ms, max ms |",
    ]
    lines.append("|---|---|---|---|---|---|---|")
    for one in fixed:
        store = f"{one.bytes_per_block:.0f} | {one.store_us_per_block:.2f} | {one.longest_store_ms:.1f}"
        leave = f"{one.leave_slices}, {one.leave_slice_p50_ms:.2f}, {one.leave_slice_max_ms:.2f}"
        lines.append(f"| {one.stored} | {one.store} | {one.blocks} | {store} | {leave} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
