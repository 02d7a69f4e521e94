"""The account of one replica: what it last said of its load, and what this router sent it since.

Sans-IO. The rule: a submit is charged from the moment it is written until a step acknowledges it, so that the load
between steps is exact without a counter that could drift. The view is made when a decision asks for it and kept until
something changes: most steps come without one in between. The lane owns it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Protocol, cast

from router.compiled import part
from router.types import NO_CHARGE, CacheMode, Charge, EngineInfo, Load, Outlook, ReplicaView


class News(Protocol):
    """What foresights that learn together have in common."""

    @property
    def version(self) -> int:
        """Rises when outlooks made before are out of date, whatever the replica itself said since."""


class Foresight(Protocol):
    """What the load model has learned of one replica (`router.load.model`)."""

    @property
    def news(self) -> News:
        """Always the same object: accounts and pools keep it, since its version is read at each decision."""

    def observe(self, load: Load, now: float) -> None:
        """Learns from a step whose report came at `now`."""

    def outlook(self, load: Load, unacked_tokens: int, unacked_pairs: float, unacked: int) -> Outlook:
        """What to expect of the replica with this load and these requests on their way to it."""


class Blind:
    """Learns and expects nothing, so its news are that there are none."""

    version = 0

    @property
    def news(self) -> News:
        return self

    def observe(self, load: Load, now: float) -> None: ...

    def outlook(self, load: Load, unacked_tokens: int, unacked_pairs: float, unacked: int) -> Outlook:
        return _NOTHING


_NOTHING = Outlook()


def new_account(replica: str, info: EngineInfo, load: Load, foresight: Foresight | None = None) -> Account:
    """A replica's account, compiled where that is there."""
    compiled = part("router.load._outlooks")
    kind = compiled.Account if compiled is not None else Account
    return cast(Account, kind(replica, info, load, foresight))


class Account:
    """One replica's load as this router knows it."""

    def __init__(self, replica: str, info: EngineInfo, load: Load, foresight: Foresight | None = None) -> None:
        self.replica = replica
        self.load = load
        self.leases = 0
        """Requests of this router that hold a lease there."""
        self.cache = CacheMode.APPROXIMATE if info.prefix_caching else CacheMode.OFF
        self._foresight = foresight or Blind()
        self.news = self._foresight.news
        self.max_num_seqs = info.max_num_seqs
        """Most requests in its batch; 0 where it does not say."""
        self._kv_tokens = info.kv_blocks * info.kv_block_tokens
        self._charges: deque[tuple[int, Charge]] = deque()
        """Streams that no step has acknowledged, with what they cost."""
        self._tokens = 0
        self._pairs = 0.0
        self._version = 0
        self._outlook: Outlook | None = None
        """As of `_version`; None where something has changed since."""
        self._current: ReplicaView | None = None
        """What `view` gives, unless there are news; None where something has changed since."""
        self._watchers: list[tuple[set[int], int]] = []
        self.on_sleep: Callable[[], None] = _nothing
        """Called when the replica, by its load, falls asleep or is awake again."""

    def watch(self, stale: set[int], number: int) -> None:
        """Adds `number` to `stale` whenever another view than the last one is to be had; `unwatch` ends it."""
        self._watchers.append((stale, number))

    def unwatch(self, stale: set[int] | None = None) -> None:
        """Nobody watches it any more, or only the one with that set does not."""
        self._watchers[:] = [one for one in self._watchers if stale is not None and one[0] is not stale]

    @property
    def unacked(self) -> int:
        """Requests submitted that `load` does not count."""
        return len(self._charges)

    def submitted(self, stream: int, charge: Charge = NO_CHARGE) -> None:
        """A stream was written to the lane; stream ids rise by one."""
        self._charges.append((stream, charge))
        self._tokens += charge.tokens
        self._pairs += charge.pairs
        self._outlook = None
        self._changed()

    def stepped(self, load: Load, acked: int, now: float) -> None:
        """A step came at `now` in loop time: `load` counts all streams up to `acked`."""
        before, self.load = self.load, load
        charges = self._charges
        if charges:
            while charges and charges[0][0] <= acked:
                charge = charges.popleft()[1]
                self._tokens -= charge.tokens
                self._pairs -= charge.pairs
            if not charges:
                self._pairs = 0.0  # what rounding left
        self._foresight.observe(load, now)
        self._outlook = None
        self._changed()
        if load.asleep is not before.asleep:
            self.on_sleep()

    def leased(self, change: int) -> None:
        """One lease more or less."""
        self.leases += change
        self._changed()

    def caches(self, mode: CacheMode) -> None:
        """What is known of its KV cache changed."""
        self.cache = mode
        self._changed()

    def _changed(self) -> None:
        if self._current is not None:
            self._current = None
            for stale, number in self._watchers:
                stale.add(number)

    def view(self) -> ReplicaView:
        """The replica as policies see it; the same object until something changes."""
        version, outlook, current = self.news.version, self._outlook, self._current
        if outlook is None or version != self._version:
            current, self._version = None, version
            outlook = self._foresight.outlook(self.load, self._tokens, self._pairs, len(self._charges))
            self._outlook = outlook
        if current is None:
            self._current = current = ReplicaView(
                self.replica,
                self.load,
                len(self._charges),
                self.leases,
                self.max_num_seqs,
                outlook,
                self._tokens,
                self._pairs,
                self._kv_tokens,
                self.cache,
            )
        return current


def _nothing() -> None:
    """Nobody asks whether it sleeps."""
