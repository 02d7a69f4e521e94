"""The prefix stage: what the router knows of the replicas' KV caches.

Job: make a prompt's chain, say who holds how much of it, and keep that knowledge true to the replicas' reports. Rule:
knowledge that cannot be trusted is never passed off as exact: a replica's mode and its cause say what stands behind it.
Everything is synchronous and runs on the event loop; `Prefixes` owns the index and the mirrors.
"""

from __future__ import annotations

import sys
from array import array
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Final

import msgspec

from router.lane.frames import CacheReport
from router.options import PrefixOptions
from router.prefix.hashing import Hasher
from router.prefix.index import Hold, PrefixIndex
from router.prefix.mirror import LruMirror
from router.prefix.ratio import Ratio
from router.types import NO_PREFIX, CacheMode, Chain, Charge, EngineInfo, PrefixView, Request

UNTOLD_KV_TOKENS: Final = 65_536
"""Taken for the KV cache of a replica that does not tell its size: a small GPU's, so that the mirror rather forgets."""
SLICE_BLOCKS: Final = 1024
"""Work of one sweep, and the longest report that is taken at once: about a millisecond."""

Change = tuple[list[int], list[int], list[int]]
"""Evicted blocks, stored blocks and their depths; the evicted ones go first."""


class CacheStatus(msgspec.Struct, frozen=True):
    """What is known of one replica's KV cache."""

    mode: CacheMode
    cause: str
    """Why the mode is not exact; empty where it is."""


class PrefixStatus(msgspec.Struct, frozen=True):
    """The stage's figures; counts are since the start."""

    replicas: Mapping[str, CacheStatus]
    blocks: int
    """Prefix blocks in the index."""
    max_blocks: int
    refused: int
    """Blocks that did not fit into the index."""
    late: int
    """Replicas with reports that wait for the next sweeps to be taken in."""
    holds: int
    """Requests in flight whose blocks count as soon cached."""
    expired: int
    """Holds that outlived their time."""
    gaps: int
    """Times that reports were missed."""
    healed: int
    """Times that a snapshot made good for it."""
    compared: int
    """Requests whose prediction the engine could check."""
    off: int
    """Those that differed by more than one KV block."""
    tokens_per_byte: Mapping[str, float]
    """As learned, by base model."""


class _Replica:
    """One replica with an open lane."""

    __slots__ = ("base", "cause", "info", "late", "mirror", "missed", "mode", "seq")

    def __init__(self, info: EngineInfo, base: str) -> None:
        self.info = info
        self.base = base
        self.mode = CacheMode.APPROXIMATE
        self.cause = "no cache report yet"
        self.seq: int | None = None
        """Of the last report; None before the first."""
        self.missed = False
        """A snapshot was asked for and has not come."""
        self.mirror: LruMirror | None = None
        self.late: deque[Change] = deque()
        """Of long reports, and of those after them: what is still to be taken in."""


class _Holding:
    """A hold for the time of a `with` block."""

    __slots__ = ("_hold", "_prefixes")

    def __init__(self, prefixes: Prefixes, hold: Hold | None) -> None:
        self._prefixes = prefixes
        self._hold = hold

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._hold is not None:
            self._prefixes.release(self._hold)


class Prefixes:
    """Who holds which prompts."""

    def __init__(self, options: PrefixOptions, clock: Callable[[], float]) -> None:
        self.on_mode: Callable[[str, CacheMode], None] = lambda replica, mode: None
        """Called whenever a replica's mode changes, and when its lane opens."""
        self._options = options
        self._clock = clock
        self._hasher = Hasher(options.block_bytes, options.max_prompt_bytes)
        self._index = PrefixIndex(options.max_blocks)
        self._replicas: dict[str, _Replica] = {}
        self._ratios: dict[str, Ratio] = {}
        self._bases: dict[str, str] = {}
        """Base model of every name that a model answers to."""
        self._late: dict[str, _Replica] = {}
        """Those that have changes to be taken in."""
        self._holds: dict[Hold, float] = {}
        """With the time at which each expires; in that order."""
        self._nothing = _Holding(self, None)
        self._gaps = self._healed = self._compared = self._off = self._expired = 0

    # -- for dispatch

    def chain(self, request: Request) -> Chain | None:
        """The prompt's chain; None where it has none, or where prefixes are off."""
        return self._hasher.chain(request) if self._options.enabled else None

    def view(self, model: str, chain: Chain | None) -> PrefixView:
        """Who holds how much of the prompt, in blocks and in tokens."""
        if chain is None:
            return NO_PREFIX
        per_byte = self._ratio(model)
        held = self._index.match(chain.blocks, per_byte * chain.block_bytes)
        blocks = tokens = 0
        for one in held.values():
            if one.blocks > blocks:
                blocks, tokens = one.blocks, one.tokens
        rest = chain.prompt_bytes - blocks * chain.block_bytes
        return PrefixView(chain, tokens + round(rest * per_byte), held)

    def charge(self, prefix: PrefixView, replica: str) -> Charge:
        """What the prompt will cost `replica`. The last token of a prompt is computed in any case."""
        held = prefix.held.get(replica)
        cached, matched = (held.tokens, held.blocks) if held is not None else (0, 0)
        new = max(prefix.tokens - cached, 1) if prefix.tokens else 0
        return Charge(new, new * (cached + new * 0.5), prefix.chain, matched)

    def hold(self, replica: str, chain: Chain | None) -> _Holding:
        """For the time of the `with` block, that is of the request, the replica counts as soon holding its blocks.

        Where only a mirror tells what the replica holds, they go in there instead and stay.
        """
        state = self._replicas.get(replica)
        if chain is None or state is None or state.mode is CacheMode.OFF:
            return self._nothing
        if state.mirror is not None:
            self._mirror(replica, state, state.mirror, chain)
            return self._nothing
        hold = self._index.hold(replica, chain.blocks)
        self._holds[hold] = self._clock() + self._options.hold_timeout_s
        return _Holding(self, hold)

    def release(self, hold: Hold) -> None:
        """Ends a hold; one that has ended already stays so."""
        self._holds.pop(hold, None)
        self._index.release(hold)

    def _mirror(self, replica: str, state: _Replica, mirror: LruMirror, chain: Chain) -> None:
        per_block = self._ratio(state.base) * chain.block_bytes
        evicted = mirror.resize(self._capacity(state, per_block))
        blocks, more = mirror.sent(chain.blocks)
        self._index.evict(replica, evicted + more)
        self._index.store(replica, blocks, [round(i * per_block) for i in range(1, len(blocks) + 1)])

    def _capacity(self, state: _Replica, tokens_per_block: float) -> int:
        tokens = state.info.kv_blocks * state.info.kv_block_tokens or UNTOLD_KV_TOKENS
        return max(1, int(tokens / tokens_per_block))

    def _ratio(self, model: str) -> float:
        ratio = self._ratios.get(self._bases.get(model, model))
        return ratio.tokens_per_byte if ratio is not None else Ratio.PRIOR

    # -- for the lanes

    def opened(self, replica: str, info: EngineInfo) -> None:
        """A lane opened: nothing is known of the replica's cache until it reports."""
        base = next((card.name for card in info.models if not card.parent), "")
        for card in info.models:
            self._bases[card.name] = card.parent or base
        self.lost(replica)
        state = self._replicas[replica] = _Replica(info, base)
        if not self._options.enabled:
            self._set(replica, state, CacheMode.OFF, "turned off in the router's configuration")
        elif not info.prefix_caching:
            self._set(replica, state, CacheMode.OFF, "the engine's prefix caching is off")
        else:
            self._index.join(replica)
            state.mirror = LruMirror(0)
            self._set(replica, state, CacheMode.APPROXIMATE, state.cause)

    def lost(self, replica: str) -> None:
        """The replica's lane is gone, and with it what was known of its cache."""
        self._replicas.pop(replica, None)
        self._late.pop(replica, None)
        self._index.leave(replica)

    def reported(self, replica: str, report: CacheReport) -> bool:
        """Takes a replica's report. False where reports before it were missed: the caller then sends `Resync`."""
        state = self._replicas.get(replica)
        if state is None or not self._options.enabled or not state.info.prefix_caching:
            return True
        if not report.snapshot and state.seq is not None and report.seq <= state.seq:
            return True  # said already
        self._learn(state, report)
        if report.mode == CacheMode.EXACT and _readable(report):
            return self._exact(replica, state, report)
        state.seq = report.seq
        state.missed = (
            report.mode == CacheMode.EXACT
        )  # A next one like this would say no more: no snapshot is asked for.
        if state.missed:
            self._inexact(replica, state, CacheMode.APPROXIMATE, "a cache report that cannot be read")
        elif report.mode == CacheMode.OFF:
            self._inexact(replica, state, CacheMode.OFF, report.cause)
        else:
            self._inexact(replica, state, CacheMode.APPROXIMATE, report.cause)
        return True

    def _exact(self, replica: str, state: _Replica, report: CacheReport) -> bool:
        expected, state.seq = state.seq, report.seq
        if report.snapshot:
            self._healed += state.missed
            state.missed, state.mirror = False, None
            self._void(replica, state)
            self._index.join(replica)
            self._index.clear(replica)
            self._set(replica, state, CacheMode.EXACT, "")
        elif state.missed:
            return True  # the snapshot that was asked for is still to come
        elif expected is None or report.seq != expected + 1 or state.mode is not CacheMode.EXACT:
            self._gaps += 1
            state.missed = True
            since = "before" if expected is None else f"between {expected} and"
            self._set(replica, state, CacheMode.APPROXIMATE, f"cache reports {since} {report.seq} missed")
            return False
        change = (unpack(report.evicted), unpack(report.stored), unpack(report.depths, "I"))
        if state.late or len(change[0]) + len(change[1]) > SLICE_BLOCKS:
            state.late.extend(_slices(change))
            self._late[replica] = state
        else:
            self._take(replica, change)
        return True

    def _take(self, replica: str, change: Change) -> None:
        evicted, stored, depths = change
        self._index.evict(replica, evicted)
        self._index.store(replica, stored, depths)

    def _void(self, replica: str, state: _Replica) -> None:
        """What the replica said before is of no use any more."""
        state.late.clear()
        self._late.pop(replica, None)

    def _inexact(self, replica: str, state: _Replica, mode: CacheMode, cause: str) -> None:
        """The replica cannot say what it holds, or holds nothing."""
        self._void(replica, state)
        if mode is CacheMode.OFF:
            self._index.leave(replica)
            state.mirror = None
        elif state.mirror is None:
            # What was known is the best guess there is; it ages from now on.
            self._index.join(replica)
            known = self._index.blocks(replica)
            state.mirror = LruMirror(len(known), known)
        self._set(replica, state, mode, cause)

    def _learn(self, state: _Replica, report: CacheReport) -> None:
        self._compared += report.compared
        self._off += report.off
        if report.prompt_tokens:
            self._ratios.setdefault(state.base, Ratio()).learn(report.prompt_bytes, report.prompt_tokens)

    def _set(self, replica: str, state: _Replica, mode: CacheMode, cause: str) -> None:
        changed = state.mode is not mode or state.seq is None
        state.mode, state.cause = mode, cause
        if changed:
            self.on_mode(replica, mode)

    def mode(self, replica: str) -> CacheMode:
        """What stands behind the knowledge of a replica's cache; off for one without a lane."""
        state = self._replicas.get(replica)
        return state.mode if state is not None else CacheMode.OFF

    # -- for the app

    def sweep(self) -> bool:
        """A slice of the work that is put off; to be called now and then. Returns whether there is more."""
        now = self._clock()
        expired = []
        for hold, until in self._holds.items():
            if until > now:
                break
            expired.append(hold)
        for hold in expired:
            self._expired += 1
            self.release(hold)
        if self._late:
            replica, state = next(iter(self._late.items()))
            self._take(replica, state.late.popleft())
            if not state.late:
                del self._late[replica]
            return True
        return self._index.sweep(SLICE_BLOCKS)

    def status(self) -> PrefixStatus:
        """For readiness and metrics."""
        return PrefixStatus(
            replicas={name: CacheStatus(state.mode, state.cause) for name, state in self._replicas.items()},
            blocks=len(self._index),
            max_blocks=self._index.max_blocks,
            refused=self._index.refused,
            late=len(self._late),
            holds=len(self._holds),
            expired=self._expired,
            gaps=self._gaps,
            healed=self._healed,
            compared=self._compared,
            off=self._off,
            tokens_per_byte={base: ratio.tokens_per_byte for base, ratio in self._ratios.items()},
        )


def _slices(change: Change) -> Iterator[Change]:
    evicted, stored, depths = change
    for at in range(0, len(evicted), SLICE_BLOCKS):
        yield evicted[at : at + SLICE_BLOCKS], [], []
    for at in range(0, len(stored), SLICE_BLOCKS):
        yield [], stored[at : at + SLICE_BLOCKS], depths[at : at + SLICE_BLOCKS]


def _readable(report: CacheReport) -> bool:
    whole = len(report.stored) % 8 == len(report.evicted) % 8 == 0
    return whole and 2 * len(report.depths) == len(report.stored)


def unpack(packed: bytes, kind: str = "Q") -> list[int]:
    """Little-endian unsigned integers: ``Q`` of 64 bits, ``I`` of 32."""
    numbers = array(kind)
    numbers.frombytes(packed)
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers.tolist()
