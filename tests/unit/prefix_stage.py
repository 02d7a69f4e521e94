"""The prefix stage under an injected clock, and what replicas report to it."""

from __future__ import annotations

import struct
from collections.abc import Sequence

from router.lane.frames import CacheReport
from router.options import PrefixOptions
from router.prefix.prefixes import Prefixes
from router.types import CacheMode, Chain, EngineInfo, Held, ModelCard

INFO = EngineInfo("sim", (ModelCard("llama"), ModelCard("adapter", parent="llama")), kv_blocks=1000, kv_block_tokens=16)
TOKENS = 60


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Stage:
    """A `Prefixes` with what it tells others."""

    def __init__(self, **options: object) -> None:
        self.clock = Clock()
        self.prefixes = Prefixes(PrefixOptions(**options), self.clock)  # type: ignore[arg-type]
        self.modes: list[tuple[str, CacheMode]] = []
        self.prefixes.on_mode = lambda replica, mode: self.modes.append((replica, mode))

    def cause(self, replica: str) -> str:
        return self.prefixes.status().replicas[replica].cause

    def held(self, chain: Chain) -> dict[str, Held]:
        return dict(self.prefixes.view("llama", chain).held)


def chain(*blocks: int, rest: int = 0) -> Chain:
    return Chain(256, 0, blocks, len(blocks) * 256 + rest)


def report(
    seq: int, stored: Sequence[int] = (), evicted: Sequence[int] = (), depths: Sequence[int] = (), **more: object
) -> CacheReport:
    """Block n lies n * 60 tokens deep unless `depths` says otherwise."""
    depths = depths or [block % 1000 * TOKENS for block in stored]
    return CacheReport(
        seq,
        stored=struct.pack(f"<{len(stored)}Q", *stored),
        depths=struct.pack(f"<{len(depths)}I", *depths),
        evicted=struct.pack(f"<{len(evicted)}Q", *evicted),
        **more,  # type: ignore[arg-type]
    )


def exact(*blocks: int, **options: object) -> Stage:
    """A stage with one replica, `a`, that reported these blocks."""
    stage = Stage(**options)
    stage.prefixes.opened("a", INFO)
    assert stage.prefixes.reported("a", report(0, blocks, snapshot=True))
    return stage
