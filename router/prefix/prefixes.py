"""The prefix stage: what the router knows of the replicas' KV caches.

Job: make a prompt's chain, say who holds how much of it, and keep that knowledge true to the replicas' reports. Rule:
knowledge that cannot be trusted is never passed off as exact: a replica's mode and its cause say what stands behind it.
Everything is synchronous and runs on the event loop; `Prefixes` owns the index and the mirrors.
"""

from __future__ import annotations

import sys
from array import array
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping
from types import TracebackType
from typing import Final

import msgspec

from router.compiled import part
from router.lane.frames import CacheReport
from router.options import PrefixOptions
from router.prefix.blocks import Blocks
from router.prefix.hashing import Hasher
from router.prefix.index import Hold, PrefixIndex
from router.prefix.mirror import LruMirror
from router.prefix.ratio import Ratio
from router.prefix.size import is_form, prompt_size
from router.types import NO_HOLDERS, NO_PREFIX, CacheMode, Chain, Charge, EngineInfo, Held, Holders, PrefixView, Request

UNTOLD_KV_TOKENS: Final = 65_536
"""Taken for the KV cache of a replica that does not tell its size: a small GPU's, so that the mirror rather forgets."""
SLICE_BLOCKS: Final = 1024
"""Work of one sweep, and the longest report that is taken at once: about a millisecond."""
ASK_INTERVAL_S: Final = 30.0
"""A snapshot that does not come, or cannot be read, is asked for again after that time."""
PROMPT_TOKENS_UNREAD: Final = 4096
"""Most tokens that a form with files is taken for: hardly any of its bytes are text."""
_NONE: Final = array("Q")
_TAKING_IN: Final = "what it reported is being taken in"

Change = tuple["array[int]", "array[int]", "array[int]"]
"""Evicted blocks, stored blocks and their depths; the evicted ones go first."""


class CacheStatus(msgspec.Struct, frozen=True):
    """What is known of one replica's KV cache."""

    mode: CacheMode
    cause: str
    """Why the mode is not exact; where it is, what else there is to know, mostly nothing."""

    @property
    def passing(self) -> bool:
        """A long report is on its way into the index: each turn of the loop takes in more of it."""
        return self.cause == _TAKING_IN


class PrefixStatus(msgspec.Struct, frozen=True):
    """The stage's figures; counts are since the start."""

    replicas: Mapping[str, CacheStatus]
    blocks: int
    """Prefix blocks in the index."""
    bytes: int
    """Of memory that they take, roughly."""
    max_blocks: int
    refused: int
    """Blocks that did not fit into the index."""
    late: int
    """Replicas of which something is still to be taken in, or to be given up, by the next sweeps."""
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

    __slots__ = ("ask_at", "base", "cause", "info", "known", "late", "mirror", "missed", "mode", "note", "seq")

    def __init__(self, info: EngineInfo, base: str) -> None:
        self.info = info
        self.base = base
        self.mode = CacheMode.APPROXIMATE
        self.cause = "no cache report yet"
        self.seq: int | None = None
        """Of the last report; None before the first."""
        self.missed = False
        """A snapshot was asked for and has not come."""
        self.ask_at = 0.0
        """Not before that is one asked for again."""
        self.note = ""
        """The cause that its exact reports name."""
        self.mirror: LruMirror | None = None
        self.late: deque[Change] = deque()
        """Of long reports, and of those after them: what is still to be taken in."""
        self.known: Iterator[list[int]] = iter(())
        """What was known before there was a mirror: the blocks that are still to go in there."""

    @property
    def follows(self) -> bool:
        """Whether its reports follow one on the other from a snapshot on."""
        return not self.missed and self.mirror is None and self.mode is not CacheMode.OFF


class _Holding(Hold):
    """A hold for the time of a `with` block."""

    __slots__ = ("_prefixes",)

    def __init__(self, prefixes: Prefixes) -> None:
        self._prefixes = prefixes
        self.member = None
        self.blocks = ()

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        prefixes = self._prefixes  # As `release` does; a request in flight calls it once, and calls cost.
        prefixes._holds.pop(self, None)
        prefixes._index.release(self)


class Prefixes:
    """Who holds which prompts."""

    def __init__(self, options: PrefixOptions, clock: Callable[[], float]) -> None:
        self.on_mode: Callable[[str, CacheMode], None] = lambda replica, mode: None
        """Called whenever a replica's mode changes, and when its lane opens."""
        self._options = options
        self._hold_timeout_s = options.hold_timeout_s
        self._clock = clock
        self._hasher = Hasher(options.block_bytes, options.max_prompt_bytes)
        self._index = new_index(options.max_blocks)
        self._replicas: dict[str, _Replica] = {}
        self._ratios: dict[str, Ratio] = {}
        self._bases: dict[str, str] = {}
        """Base model of every name that a model answers to."""
        self._uncached: tuple[str, ...] = ()
        """Replicas that reuse nothing; the index does not know them."""
        self._late: dict[str, _Replica] = {}
        """Those with work for the next sweeps."""
        self._holds: dict[Hold, float] = {}
        """With the time at which each expires; in that order."""
        self._nothing = _Holding(self)
        self._gaps = self._healed = self._compared = self._off = self._expired = 0

    # -- for dispatch

    def chain(self, request: Request) -> Chain | None:
        """The prompt's chain; None where it has none, or where prefixes are off."""
        return self._hasher.chain(request) if self._options.enabled else None

    def chain_in_slices(self, request: Request) -> Generator[None, None, Chain | None]:
        """The same of a large request, whose prompt takes milliseconds: yields where others may run."""
        return (yield from self._hasher.chain_in_slices(request)) if self._options.enabled else None

    def view(self, model: str, chain: Chain | None) -> PrefixView:
        """Who holds how much of the prompt, in blocks and in tokens."""
        if chain is None:
            return NO_PREFIX
        per_byte = self._ratio(model)
        held = self._index.match(chain.blocks, per_byte * chain.block_bytes)
        if held is NO_HOLDERS:
            return PrefixView(chain, round(chain.prompt_bytes * per_byte), held)
        if self._uncached and held.most is not None:
            held = Holders([*held.groups, (None, self._uncached)], held.most, held.names)
        blocks, tokens = (held.most.blocks, held.most.tokens) if held.most is not None else (0, 0)
        for one, _ in held.groups:
            if one is not None and one.blocks > blocks:
                blocks, tokens = one.blocks, one.tokens
        rest = chain.prompt_bytes - blocks * chain.block_bytes
        return PrefixView(chain, tokens + round(rest * per_byte), held)

    def unhashed(self, request: Request) -> PrefixView:
        """Of a request without a chain, only about how long its prompt is, judged by its body."""
        size = prompt_size(request, self._options.max_prompt_bytes)
        if not size:
            return NO_PREFIX
        tokens = round(size * self._ratio(request.model))
        return PrefixView(None, min(tokens, PROMPT_TOKENS_UNREAD) if is_form(request.body) else tokens)

    def charge(self, prefix: PrefixView, held: Held | None) -> Charge:
        """What the prompt will cost a replica that holds so much of it. The last token of a prompt is computed in any
        case."""
        cached, matched = (held.tokens, held.blocks) if held is not None else (0, 0)
        new = max(prefix.tokens - cached, 1) if prefix.tokens else 0
        return Charge(new, new * (cached + new * 0.5), prefix.chain, matched)

    def hold(self, replica: str, chain: Chain | None, held: Held | None = None) -> _Holding:
        """For the time of the `with` block, that is of the request, the replica counts as soon holding its blocks.
        `held` spares a look-up: what it was just found to hold.

        Where only a mirror tells what the replica holds, they go in there instead and stay.
        """
        state = self._replicas.get(replica)
        if chain is None or state is None or state.mode is CacheMode.OFF:
            return self._nothing
        if state.mirror is not None:
            self._mirror(replica, state, state.mirror, chain)
            return self._nothing
        stored = held.blocks if held is not None and not held.soon else None
        hold = _Holding(self)
        self._index.hold(replica, chain.blocks, stored, hold)
        self._holds[hold] = self._clock() + self._hold_timeout_s
        return hold

    def release(self, hold: Hold) -> None:
        """Ends a hold; one that has ended already stays so."""
        self._holds.pop(hold, None)
        self._index.release(hold)

    def _mirror(self, replica: str, state: _Replica, mirror: LruMirror, chain: Chain) -> None:
        per_block = self._ratio(state.base) * chain.block_bytes
        mirror.capacity = self._capacity(state)
        blocks, evicted = mirror.sent(chain.blocks)
        self._index.evict(replica, evicted)
        self._index.store(replica, blocks, [round(i * per_block) for i in range(1, len(blocks) + 1)])
        if mirror.surplus:
            self._late[replica] = state

    def _capacity(self, state: _Replica) -> int:
        """Blocks that fit into its KV cache."""
        tokens = state.info.kv_blocks * state.info.kv_block_tokens or UNTOLD_KV_TOKENS
        return max(1, int(tokens / (self._ratio(state.base) * self._options.block_bytes)))

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
        self._uncached = self._without(replica)
        self._index.leave(replica)

    def slept(self, replica: str) -> None:
        """The replica's engine fell asleep, and its cache is empty. Its own reports say so too, where it reports."""
        state = self._replicas.get(replica)
        if state is not None and state.mirror is not None:
            self._void(replica, state)
            self._index.clear(replica)
            state.mirror = LruMirror(0)

    def reported(self, replica: str, report: CacheReport) -> bool:
        """Takes a replica's report. False where reports before it were missed: the caller then sends `Resync`."""
        state = self._replicas.get(replica)
        if state is None or not self._options.enabled or not state.info.prefix_caching:
            return True
        if not report.snapshot and state.seq is not None and report.seq <= state.seq:
            return True  # said already
        if report.compared or report.off or report.prompt_tokens:
            self._learn(state, report)
        if state.mode is CacheMode.EXACT and report.seq - 1 == state.seq and _plain(report):  # As nearly all are.
            state.seq = report.seq
            if report.evicted:
                self._index.evict(replica, unpack(report.evicted))
            if report.stored:
                self._index.store(replica, unpack(report.stored), unpack(report.depths, "I"))
            return True
        if report.mode == CacheMode.EXACT and _readable(report):
            return self._exact(replica, state, report)
        state.seq = report.seq
        if report.mode == CacheMode.EXACT:
            self._inexact(replica, state, CacheMode.APPROXIMATE, "a cache report that cannot be read")
            return self._asked(state)
        mode = CacheMode.OFF if report.mode == CacheMode.OFF else CacheMode.APPROXIMATE
        state.missed = False  # When it can say again, it begins with a snapshot.
        self._inexact(replica, state, mode, report.cause)
        return True

    def _exact(self, replica: str, state: _Replica, report: CacheReport) -> bool:
        if report.snapshot:
            self._healed += state.missed
            state.missed, state.mirror = False, None
            state.note = report.cause
            self._void(replica, state)
            self._index.join(replica)
            self._index.clear(replica)
        elif not state.follows or state.seq is None or report.seq != state.seq + 1:
            since = "before" if state.seq is None else f"between {state.seq} and"
            if not state.missed:
                self._set(replica, state, CacheMode.APPROXIMATE, f"cache reports {since} {report.seq} missed")
            state.seq = report.seq
            return self._asked(state, at_once=not state.missed)
        state.seq = report.seq
        if state.late or len(report.evicted) + len(report.stored) > 8 * SLICE_BLOCKS:
            state.late.extend(_slices(_change(report)))
        else:
            self._take(replica, _change(report))
        if state.late:
            self._late[replica] = state
            self._set(replica, state, CacheMode.APPROXIMATE, _TAKING_IN)
        else:
            self._set(replica, state, CacheMode.EXACT, state.note)
        return True

    def _asked(self, state: _Replica, *, at_once: bool = False) -> bool:
        """A report was missed. False where a snapshot is to be asked for now; seldom, unless `at_once`."""
        self._gaps += not state.missed
        state.missed = True
        now = self._clock()
        if now < state.ask_at and not at_once:
            return True
        state.ask_at = now + ASK_INTERVAL_S
        return False

    def _take(self, replica: str, change: Change) -> None:
        evicted, stored, depths = change
        if evicted:
            self._index.evict(replica, evicted)
        if stored:
            self._index.store(replica, stored, depths)

    def _void(self, replica: str, state: _Replica) -> None:
        """What the replica said before is of no use any more."""
        state.late.clear()
        state.known = iter(())
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
            state.mirror = LruMirror(self._capacity(state))
            state.known = self._index.runs(replica)
            self._late[replica] = state
        self._set(replica, state, mode, cause)

    def _learn(self, state: _Replica, report: CacheReport) -> None:
        self._compared += report.compared
        self._off += report.off
        if report.prompt_tokens:
            ratio = self._ratios.get(state.base)
            if ratio is None:
                ratio = self._ratios[state.base] = Ratio()
            ratio.learn(report.prompt_bytes, report.prompt_tokens)

    def _set(self, replica: str, state: _Replica, mode: CacheMode, cause: str) -> None:
        changed = state.mode is not mode or state.seq is None
        state.mode, state.cause = mode, cause
        if mode is CacheMode.OFF:
            self._uncached = (*self._without(replica), replica)
        else:
            self._uncached = self._without(replica)
            self._index.join(replica)
        if changed:
            self.on_mode(replica, mode)

    def _without(self, replica: str) -> tuple[str, ...]:
        return tuple(one for one in self._uncached if one != replica) if self._uncached else ()

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
            if not self._go_on(replica, state):
                del self._late[replica]
            return True
        return self._index.sweep(SLICE_BLOCKS)

    def _go_on(self, replica: str, state: _Replica) -> bool:
        """A slice of what is late of a replica; whether there is more."""
        if state.mirror is not None:
            return self._remember(replica, state, state.mirror)
        if state.late:
            self._take(replica, state.late.popleft())
        if not state.late and state.follows:
            self._set(replica, state, CacheMode.EXACT, state.note)
        return bool(state.late)

    def _remember(self, replica: str, state: _Replica, mirror: LruMirror) -> bool:
        done = 0
        for blocks in state.known:
            self._index.evict(replica, mirror.known(blocks))
            done += len(blocks) + 16  # To look for them is work too.
            if done >= SLICE_BLOCKS:
                return True
        self._index.evict(replica, mirror.trim(SLICE_BLOCKS - done))
        return mirror.surplus > 0

    def status(self) -> PrefixStatus:
        """For readiness and metrics."""
        return PrefixStatus(
            replicas={name: CacheStatus(state.mode, state.cause) for name, state in self._replicas.items()},
            blocks=len(self._index),
            bytes=self._index.roughly_bytes(),
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


def new_index(max_blocks: int = 2_000_000) -> PrefixIndex:
    """With the compiled store, where there is one."""
    compiled = part("router.prefix._blocks")
    return PrefixIndex(max_blocks, compiled.Blocks if compiled is not None else Blocks)


def _slices(change: Change) -> Iterator[Change]:
    evicted, stored, depths = change
    for at in range(0, len(evicted), SLICE_BLOCKS):
        yield evicted[at : at + SLICE_BLOCKS], _NONE, _NONE
    for at in range(0, len(stored), SLICE_BLOCKS):
        yield _NONE, stored[at : at + SLICE_BLOCKS], depths[at : at + SLICE_BLOCKS]


def _plain(report: CacheReport) -> bool:
    """Whether it says what changed since the last one, and is short enough to be taken at once."""
    stored, evicted = len(report.stored), len(report.evicted)
    if stored + evicted > 8 * SLICE_BLOCKS or stored % 8 or evicted % 8 or 2 * len(report.depths) != stored:
        return False
    return report.mode == CacheMode.EXACT and not report.snapshot


def _change(report: CacheReport) -> Change:
    return unpack(report.evicted), unpack(report.stored), unpack(report.depths, "I")


def _readable(report: CacheReport) -> bool:
    whole = len(report.stored) % 8 == len(report.evicted) % 8 == 0
    return whole and 2 * len(report.depths) == len(report.stored)


def unpack(packed: bytes, kind: str = "Q") -> array[int]:
    """Little-endian unsigned integers: ``Q`` of 64 bits, ``I`` of 32."""
    numbers = array(kind, packed)
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers
