"""Cache reports, applied by a router as plain as can be."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.cache_ledger import CacheLedger
from engine.cache_report import CacheFeed, Cursor
from router.lane.frames import CacheReport
from router.types import CacheMode, Chain


class PlainRouter:
    """Applies reports as the frame's docstring says; None while it knows that it does not know."""

    def __init__(self, cursor: Cursor) -> None:
        self.cursor = cursor
        self.held: dict[int, int] | None = None
        self.mode = ""
        self.seq = 0
        self.figures = [0, 0, 0, 0]

    def apply(self, report: CacheReport) -> None:
        if report.seq != self.seq + 1 and not report.snapshot:
            self.held = None
        self.seq = report.seq
        self.mode = report.mode
        if report.snapshot:
            self.held = {}
        stored = struct.unpack(f"<{len(report.stored) // 8}Q", report.stored)
        depths = struct.unpack(f"<{len(report.depths) // 4}I", report.depths)
        evicted = struct.unpack(f"<{len(report.evicted) // 8}Q", report.evicted)
        if self.held is None:
            self.cursor.resync()
            return
        for block in evicted:
            self.held.pop(block, None)
        self.held.update(zip(stored, depths, strict=True))
        news = (report.prompt_bytes, report.prompt_tokens, report.compared, report.off)
        self.figures = [figure + new for figure, new in zip(self.figures, news, strict=True)]

    def drain(self) -> int:
        """Takes until nothing is left; the number of reports."""
        reports = 0
        while (report := self.cursor.take()) is not None:
            self.apply(report)
            reports += 1
            assert reports < 1000
        return reports


def held(ledger: CacheLedger) -> dict[int, int | None]:
    return {block: ledger.depth(block) for block in ledger.blocks()}


def tie(ledger: CacheLedger, first: int, count: int) -> None:
    """Ties block i to the KV block i, one token each; stores none."""
    ledger.prompt(
        Chain(16, 0, tuple(range(first, first + count)), 16 * count),
        list(range(first, first + count)),
        list(range(1, count + 1)),
    )


@pytest.fixture
def ledger() -> CacheLedger:
    ledger = CacheLedger(1)
    tie(ledger, 0, 100)
    return ledger


@pytest.fixture
def feed(ledger: CacheLedger) -> CacheFeed:
    return CacheFeed(ledger, CacheMode.EXACT)


def test_the_first_report_is_a_snapshot_even_of_nothing(feed: CacheFeed) -> None:
    report = feed.cursor().take()
    assert report == CacheReport(1, snapshot=True)


def test_after_the_snapshot_only_net_changes_are_sent(feed: CacheFeed, ledger: CacheLedger) -> None:
    ledger.stored(1)
    router = PlainRouter(feed.cursor())
    assert router.drain() == 1
    assert router.drain() == 0
    ledger.stored(2)
    ledger.evicted(1)
    ledger.stored(3)
    ledger.evicted(3)
    report = router.cursor.take()
    assert report is not None
    assert not report.snapshot
    assert report.stored == struct.pack("<Q", 2)
    assert report.depths == struct.pack("<I", 3)
    router.apply(report)
    assert router.held == held(ledger)


def test_each_cursor_has_its_own_place(feed: CacheFeed, ledger: CacheLedger) -> None:
    early = PlainRouter(feed.cursor())
    early.drain()
    ledger.stored(5)
    late = PlainRouter(feed.cursor())
    late.drain()
    assert early.held == {}
    early.drain()
    assert early.held == late.held == {5: 6}


def test_long_snapshots_come_in_parts_and_changes_between_them_are_right(ledger: CacheLedger) -> None:
    feed = CacheFeed(ledger, CacheMode.EXACT, part_blocks=10)
    for key in range(95):
        ledger.stored(key)
    router = PlainRouter(feed.cursor())
    for key in range(0, 40, 2):
        report = router.cursor.take()
        assert report is not None
        assert len(report.stored) + len(report.evicted) <= 80
        router.apply(report)
        ledger.evicted(key)
        ledger.evicted(94 - key)
        ledger.stored(99)
    assert router.drain() > 0
    assert router.held == held(ledger)
    assert not router.cursor.pending


def test_a_slow_cursor_gets_a_snapshot_instead_of_an_endless_list(ledger: CacheLedger) -> None:
    feed = CacheFeed(ledger, CacheMode.EXACT, max_changes=8)
    router = PlainRouter(feed.cursor())
    router.drain()
    for key in range(20):
        ledger.stored(key)
    report = router.cursor.take()
    assert report is not None
    assert report.snapshot
    router.apply(report)
    assert router.held == held(ledger)


def test_a_dropped_report_is_seen_and_healed_by_a_snapshot(feed: CacheFeed, ledger: CacheLedger) -> None:
    router = PlainRouter(feed.cursor())
    router.drain()
    ledger.stored(1)
    assert router.cursor.take() is not None  # Lost on its way.
    ledger.stored(2)
    router.drain()
    assert router.held == held(ledger) == {1: 2, 2: 3}


def test_clearing_the_cache_is_a_snapshot_of_nothing(feed: CacheFeed, ledger: CacheLedger) -> None:
    ledger.stored(1)
    router = PlainRouter(feed.cursor())
    router.drain()
    ledger.cleared()
    report = router.cursor.take()
    assert report is not None
    assert report.snapshot
    assert report.stored == b""


def test_a_degraded_feed_says_so_at_once_and_carries_no_blocks(feed: CacheFeed, ledger: CacheLedger) -> None:
    ledger.stored(1)
    router = PlainRouter(feed.cursor())
    router.drain()
    feed.set_mode(CacheMode.APPROXIMATE, "event batches 3 to 4 were lost")
    ledger.stored(2)
    report = router.cursor.take()
    assert report == CacheReport(2, snapshot=True, mode=CacheMode.APPROXIMATE, cause="event batches 3 to 4 were lost")
    assert router.cursor.take() is None
    feed.set_mode(CacheMode.EXACT)
    router.drain()
    assert (router.held, router.mode) == ({1: 2, 2: 3}, CacheMode.EXACT)


def test_a_feed_claims_nothing_until_it_is_told_to(ledger: CacheLedger) -> None:
    report = CacheFeed(ledger).cursor().take()
    assert report == CacheReport(1, snapshot=True, mode=CacheMode.APPROXIMATE, cause="not started")


def test_the_listener_is_called_once_for_changes_until_they_are_taken(feed: CacheFeed, ledger: CacheLedger) -> None:
    calls: list[str] = []
    cursor = feed.cursor(lambda: calls.append("!"))
    cursor.take()
    ledger.stored(1)
    ledger.stored(2)
    assert calls == ["!"]
    cursor.take()
    ledger.evicted(1)
    assert calls == ["!", "!"]
    cursor.take()
    feed.set_mode(CacheMode.OFF, "prefix caching is off")
    assert calls == ["!", "!", "!"]


def test_a_closed_cursor_is_neither_told_nor_answered(feed: CacheFeed, ledger: CacheLedger) -> None:
    calls: list[str] = []
    cursor = feed.cursor(lambda: calls.append("!"))
    cursor.take()
    cursor.close()
    cursor.close()
    ledger.stored(1)
    cursor.resync()
    assert cursor.take() is None
    assert not cursor.pending
    assert calls == []


def test_figures_go_to_every_cursor_once(feed: CacheFeed) -> None:
    routers = [PlainRouter(feed.cursor()), PlainRouter(feed.cursor())]
    routers[0].drain()
    feed.seen(400, 100)
    feed.compared(off=False)
    routers[0].drain()
    feed.seen(40, 10)
    feed.compared(off=True)
    for router in routers:
        assert not router.cursor.pending or router is routers[1]
        router.drain()
        assert router.figures == [440, 110, 2, 1]


def test_a_late_cursor_does_not_hear_of_what_was_before_it(feed: CacheFeed) -> None:
    feed.seen(400, 100)
    router = PlainRouter(feed.cursor())
    router.drain()
    assert router.figures == [0, 0, 0, 0]


ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(["stored", "evicted"]), st.integers(0, 29)),
        st.tuples(st.just("storm"), st.integers(0, 29)),
        st.tuples(st.sampled_from(["cleared", "degrade", "recover", "join"]), st.just(0)),
        st.tuples(st.sampled_from(["take", "lose", "leave", "resync"]), st.integers(0, 3)),
    ),
    max_size=40,
)


@settings(derandomize=True, deadline=None, max_examples=200)
@given(ACTIONS, st.integers(1, 8), st.integers(1, 12))
def test_routers_that_apply_reports_know_what_is_held_or_that_they_do_not_know(
    actions: list[tuple[str, int]], part: int, most: int
) -> None:
    ledger = CacheLedger(1)
    tie(ledger, 0, 30)
    feed = CacheFeed(ledger, CacheMode.EXACT, part_blocks=part, max_changes=most)
    routers = [PlainRouter(feed.cursor())]
    for action, argument in actions:
        router = routers[argument % len(routers)]
        match action:
            case "stored":
                ledger.stored(argument)
            case "evicted":
                ledger.evicted(argument)
            case "storm":
                for key in range(30):
                    (ledger.stored if key < argument else ledger.evicted)(key)
            case "cleared":
                ledger.cleared()
            case "degrade":
                feed.set_mode(CacheMode.APPROXIMATE, "a test")
            case "recover":
                feed.set_mode(CacheMode.EXACT)
            case "join":
                routers.append(PlainRouter(feed.cursor()))
            case "leave":
                router.cursor.close()
                routers[routers.index(router)] = PlainRouter(feed.cursor())
            case "resync":
                router.cursor.resync()
            case "lose":
                router.cursor.take()
            case _:
                if (report := router.cursor.take()) is not None:
                    router.apply(report)
                    assert len(report.stored) + len(report.evicted) <= 8 * part
        check(routers, feed)
    # A router that lost the last report cannot know before the next one comes.
    feed.seen(1, 1)
    for router in routers:
        router.drain()
    check(routers, feed, drained=True)


def check(routers: list[PlainRouter], feed: CacheFeed, drained: bool = False) -> None:
    truth = held(feed.ledger) if feed.mode is CacheMode.EXACT else {}
    for router in routers:
        if router.cursor.pending or router.held is None or router.seq != router.cursor.seq:
            assert not drained
            continue
        assert router.held == truth
        assert router.mode == feed.mode


def test_a_reservation_travels_with_an_exact_mode(feed: CacheFeed) -> None:
    cursor = feed.cursor()
    cursor.take()
    feed.set_mode(CacheMode.EXACT, "places are estimates")
    report = cursor.take()
    assert report is not None
    assert (report.snapshot, report.mode, report.cause) == (True, CacheMode.EXACT, "places are estimates")
    feed.set_mode(CacheMode.EXACT, "places are estimates")
    assert cursor.take() is None
