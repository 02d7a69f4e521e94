"""The pools of `router.replicas`: the ready replicas of one model, and who of them gets requests now.

Rule: a snapshot always shows the replicas as they are, at the cost of those that changed since the last one. Replicas
that sleep get requests only where nobody who is awake has room, and then no more of them than are needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from router import compiled
from router.lane.client import Lane
from router.load.account import Account
from router.types import Columns, Snapshot

if TYPE_CHECKING:
    from router.load._outlooks import Table

WAKE_INTERVAL_S: Final = 5.0
"""How often a sleeper is told that it is soon needed, while it goes on sleeping."""
_LITTLE: Final = 0.2
"""Where even the emptiest batch has no more than this share of its places left, the next sleeper is woken: while it
wakes, for seconds, the others take what comes."""
_PUT_COLUMNS: Final = 5
"""To put one replica's terms into the columns takes as long as to make them anew takes for so many more replicas."""
_BEYOND: Final = 8
"""The place in `Terms` of what tells of room in the batch."""


class Views:
    """What snapshots of some replicas are made of: their views, and these in columns.

    Where it is compiled, a `Table` of `router.load._outlooks` does it with numbers, and makes views of them only for
    those who ask for them.
    """

    __slots__ = ("_accounts", "_columns", "_news", "_seen", "_views", "stale")

    def __init__(self, accounts: Sequence[Account]) -> None:
        self._accounts = accounts
        self._news = list({id(account.news): account.news for account in accounts}.values())
        self._seen = [news.version for news in self._news]
        self._views = [account.view() for account in accounts]
        self._columns = Columns(tuple(self._views))
        self.stale: set[int] = set()
        """Places of those that have changed since."""

    def snapshot(self, model: str, now: float, places: dict[str, int]) -> Snapshot:
        """All of them as they are now."""
        self._refresh()
        columns = self._columns
        return Snapshot(model, columns.views, now=now, places=places, pool=columns)

    def least_beyond(self) -> int:
        """By how much the shortest queue is beyond its batch (`Terms`)."""
        self._refresh()
        least: int = min(self._columns.values[_BEYOND])
        return least

    def _refresh(self) -> None:
        for news, seen in zip(self._news, self._seen, strict=True):
            if news.version != seen:
                self._seen = [news.version for news in self._news]
                self.stale.update(range(len(self._views)))
                break
        if self.stale:
            self._renew()

    def _renew(self) -> None:
        """Takes in what has changed, at a few microseconds for each replica that did."""
        stale, views, accounts, columns = self.stale, self._views, self._accounts, self._columns
        for place in stale:
            views[place] = accounts[place].view()
        if len(stale) * _PUT_COLUMNS < len(views) + 8:
            for place in stale:
                columns.put(place, views[place].terms)
            columns.views = tuple(views)
        else:
            self._columns = Columns(tuple(views))
        stale.clear()


def _kept(accounts: Sequence[Account]) -> Views | Table:
    """Numbers for accounts that are compiled themselves."""
    outlooks = compiled.part("router.load._outlooks")
    if outlooks is not None and all(type(account) is outlooks.Account for account in accounts):
        table: Table = outlooks.Table(accounts)
        return table
    return Views(accounts)


class Pool:
    """The ready replicas of one model, or some of them."""

    __slots__ = (
        "_kept",
        "_little",
        "_parts",
        "_wake_at",
        "_watching",
        "accounts",
        "asleep",
        "lanes",
        "places",
    )

    def __init__(self, lanes: Sequence[Lane]) -> None:
        self.lanes = tuple(lanes)
        self.accounts = [lane.account for lane in lanes]
        self.places = {lane.replica: place for place, lane in enumerate(lanes)}
        self.asleep: tuple[Lane, ...] = ()
        """By name, so that all routers wake the same ones first. While there are any, ask for `on_duty`."""
        self._kept = _kept(self.accounts)
        self._watching = False
        self._little = _LITTLE * max([lane.account.max_num_seqs for lane in lanes], default=0)
        self._parts: dict[int, Pool] = {}
        """Those who are awake, with so many sleepers."""
        self._wake_at = 0.0
        self.regroup()

    def __len__(self) -> int:
        return len(self.lanes)

    def watch(self) -> None:
        """Follows the replicas from now on, until they are unwatched."""
        self._watching = True
        for place, account in enumerate(self.accounts):
            account.watch(self._kept.stale, place)

    def snapshot(self, model: str, now: float) -> Snapshot:
        """All of them as they are now."""
        return self._kept.snapshot(model, now, self.places)

    # -- where some sleep

    def regroup(self) -> None:
        """A replica fell asleep or is awake again."""
        for part in self._parts.values():
            for account in part.accounts:
                account.unwatch(part._kept.stale)
        self._parts = {}
        self.asleep = tuple(
            sorted([lane for lane in self.lanes if lane.account.load.asleep], key=lambda lane: lane.replica)
        )

    def on_duty(self, now: float) -> Pool:
        """Those that a request may go to: who is awake, and of the sleepers as many as are needed so that somebody has
        room in the batch, in doublings; all where nobody has. Where little room is left, the next sleeper is woken.
        """
        count = 0
        part = self._part(count)
        while (room := part.room()) <= 0 and count < len(self.asleep):
            count = min(count * 2 or 1, len(self.asleep))
            part = self._part(count)
        if room <= self._little and count < len(self.asleep) and now >= self._wake_at:
            self._wake_at = now + WAKE_INTERVAL_S
            self.asleep[count].wake()
        return part

    def room(self) -> int:
        """How many more requests the emptiest batch takes without a queue; below 1 where all have one."""
        if not self.lanes:
            return 0
        return -self._kept.least_beyond()

    def _part(self, count: int) -> Pool:
        part = self._parts.get(count)
        if part is None:
            left_out = set(self.asleep[count:])
            part = self._parts[count] = Pool([lane for lane in self.lanes if lane not in left_out])
            if self._watching:
                part.watch()
        return part
