"""Cache reports: what each router is told of this replica's KV cache.

Sans-IO. A `CacheFeed` belongs to the engine, each lane has a `Cursor` on it. Rule: a router that applies a cursor's
reports in order knows exactly the prefix blocks that the ledger held when the last one was taken, or knows that it does
not know: in every mode but `EXACT` reports carry no blocks.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from itertools import islice
from typing import Final

from engine.cache_ledger import CacheLedger
from router.lane.frames import CacheReport
from router.types import CacheMode

PART_BLOCKS: Final = 65_536
"""Most prefix blocks in one report, stored and evicted together: 800 kB."""
MAX_CHANGES: Final = 262_144
"""Changes that a cursor remembers before it sends a snapshot instead."""

Listener = Callable[[], None]


class CacheFeed:
    """What is known of one replica's KV cache, for any number of routers.

    Begins in the mode `APPROXIMATE` unless told otherwise: exactness is claimed by whoever follows the engine's events.
    """

    def __init__(
        self,
        ledger: CacheLedger,
        mode: CacheMode = CacheMode.APPROXIMATE,
        cause: str = "not started",
        *,
        part_blocks: int = PART_BLOCKS,
        max_changes: int = MAX_CHANGES,
    ) -> None:
        self.ledger = ledger
        self.part_blocks = part_blocks
        self.max_changes = max_changes
        self._mode = mode
        self._cause = "" if mode is CacheMode.EXACT else cause
        self._cursors: list[Cursor] = []
        self._totals = [0, 0, 0, 0]
        ledger.watch(self)

    @property
    def mode(self) -> CacheMode:
        """What routers may believe."""
        return self._mode

    @property
    def cause(self) -> str:
        """Why the mode is not exact. Where it is: what else routers should know, such as that places are estimates."""
        return self._cause

    def set_mode(self, mode: CacheMode, cause: str = "") -> None:
        """Changes the mode; every cursor starts with a snapshot. `cause` is for people to read."""
        if (mode, cause) == (self._mode, self._cause):
            return
        self._mode, self._cause = mode, cause
        for cursor in self._cursors:
            cursor._restart()

    def seen(self, prompt_bytes: int, prompt_tokens: int) -> None:
        """A prompt's tokens became known: routers learn from it how many bytes a token takes."""
        self._totals[0] += prompt_bytes
        self._totals[1] += prompt_tokens

    def compared(self, off: bool) -> None:
        """A request's `Submit.matched` was held against the engine's own count; `off`: they differ by more than one KV
        block. Every cursor reports every comparison, whichever router sent the request."""
        self._totals[2] += 1
        self._totals[3] += off

    def cursor(self, on_change: Listener | None = None) -> Cursor:
        """A new reader; its first report is a snapshot.

        `on_change` is called when there is something to take after there was nothing, within the call that caused it:
        it may only make a note or schedule. Close the cursor when its lane ends.
        """
        cursor = Cursor(self, on_change, self._totals)
        self._cursors.append(cursor)
        return cursor

    def changed(self, block: int) -> None:
        """The ledger's call, as is `voided`."""
        if self._mode is CacheMode.EXACT:
            for cursor in self._cursors:
                cursor._changed(block)

    def voided(self) -> None:
        if self._mode is CacheMode.EXACT:
            for cursor in self._cursors:
                cursor._restart()

    def _leave(self, cursor: Cursor) -> None:
        if cursor in self._cursors:
            self._cursors.remove(cursor)


class Cursor:
    """One router's place in the feed."""

    def __init__(self, feed: CacheFeed, on_change: Listener | None, told: list[int]) -> None:
        self._feed = feed
        self._on_change = on_change or _nothing
        self._seq = 0
        self._fresh = True
        """The next report is a snapshot."""
        self._todo: list[int] = []
        """Blocks of a snapshot that are still to be sent, last first."""
        self._dirty: dict[int, None] = {}
        """Blocks that changed since they were last sent."""
        self._told = told.copy()
        self._closed = False

    @property
    def seq(self) -> int:
        """The last report's number; 0 before the first."""
        return self._seq

    @property
    def pending(self) -> bool:
        """Whether `take` has blocks or a mode to tell now."""
        return bool(self._fresh or self._dirty or self._todo) and not self._closed

    def take(self) -> CacheReport | None:
        """The next report; None where nothing changed. Take again while `pending`: long news come in parts."""
        if self._closed:
            return None
        snapshot = self._fresh
        if snapshot:
            self._begin()
        stored, depths, evicted = self._part()
        news = self._figures()
        if not (snapshot or stored or evicted or any(news)):
            return None
        self._seq += 1
        return CacheReport(
            self._seq,
            snapshot,
            struct.pack(f"<{len(stored)}Q", *stored),
            struct.pack(f"<{len(depths)}I", *depths),
            struct.pack(f"<{len(evicted)}Q", *evicted),
            self._feed.mode,
            self._feed.cause,
            *news,
        )

    def resync(self) -> None:
        """The router missed a report: the next one is a snapshot."""
        self._restart()

    def close(self) -> None:
        """No more reports; harmless when repeated."""
        self._closed = True
        self._feed._leave(self)
        self._dirty.clear()
        self._todo.clear()

    def _begin(self) -> None:
        self._fresh = False
        self._dirty.clear()
        self._todo = self._feed.ledger.blocks() if self._feed.mode is CacheMode.EXACT else []

    def _part(self) -> tuple[list[int], list[int], list[int]]:
        """Stored blocks, their depths and evicted blocks for one report, as they are now."""
        stored, depths, evicted = list[int](), list[int](), list[int]()
        depth_of = self._feed.ledger.depth
        for block in self._next():
            depth = depth_of(block)
            if depth is None:
                evicted.append(block)
            else:
                stored.append(block)
                depths.append(depth)
        return stored, depths, evicted

    def _next(self) -> list[int]:
        """The blocks of the next report: what changed, then as much of an unfinished snapshot as there is room for."""
        dirty, todo, most = self._dirty, self._todo, self._feed.part_blocks
        if len(dirty) <= most:
            blocks = list(dirty)
            dirty.clear()
        else:
            blocks = list(islice(dirty, most))
            for block in blocks:
                del dirty[block]
        room = most - len(blocks)
        if room and todo:
            blocks += todo[-room:]
            del todo[-room:]
        return blocks

    def _figures(self) -> list[int]:
        totals = self._feed._totals
        news = [total - told for total, told in zip(totals, self._told, strict=True)]
        self._told = totals.copy()
        return news

    def _changed(self, block: int) -> None:
        if self._fresh:
            return
        dirty = self._dirty
        if len(dirty) >= self._feed.max_changes and block not in dirty:
            self._restart()
            return
        quiet = not dirty and not self._todo
        dirty[block] = None
        if quiet:
            self._on_change()

    def _restart(self) -> None:
        quiet = not self.pending and not self._closed
        self._fresh = True
        self._dirty.clear()
        self._todo = []
        if quiet:
            self._on_change()


def _nothing() -> None:
    return
