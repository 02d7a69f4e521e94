"""All replicas as this router knows them, and a lane to each.

Job: follow membership, keep one lane per replica (with back-off), give policies the snapshot of a model's pool, and
pass on what replicas say of their KV caches. Rule: only a READY replica gets new requests; a replica leaves the pool in
the very callback that learns of its loss. `Replicas` is the only writer of this state.
"""

from __future__ import annotations

import asyncio
import logging
import random
import re
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Final, Protocol

import msgspec

from router.errors import ModelNotFound, NoReplica, ReplicaLost, cut
from router.ingress.base import CacheStatus, ModelStatus, Readiness
from router.lane.carriers import Carrier, TlsFailed
from router.lane.client import Lane, Lease
from router.lane.frames import CacheReport
from router.lane.meter import FrameMeter
from router.lane.troubles import Troubles
from router.load.account import Blind, Foresight
from router.membership.base import ReplicaRecord
from router.options import LaneOptions
from router.pool import Pool
from router.replica_life import LIFE, Event, State
from router.types import CacheMode, EngineInfo, ModelCard, Snapshot

log = logging.getLogger(__name__)


FORGET_S = 600.0
"""How long a model without any replica is still known: until then requests for it wait, and get 503 instead of 404."""


SWEEP_INTERVAL_S: Final = 0.1
"""How often what the caches' observer put off is done."""
IDLE_SWEEP_INTERVAL_S: Final = 1.0
"""The same where nothing was put off for `IDLE_AFTER_S`: to wake up costs more than to look."""
IDLE_AFTER_S: Final = 5.0
SLICE_PAUSE_S: Final = 0.003
"""Between two slices of it; one takes up to a millisecond, so most of the time stays for the traffic."""
COMPLAIN_INTERVAL_S: Final = 60.0
"""Slices that fail are logged as seldom."""


HELD: Final = "scaled to zero, requests are held"
"""Of a model without any replica that may be held, for `/readyz`."""


class CacheNote(Protocol):
    """What is known of one replica's KV cache."""

    @property
    def mode(self) -> CacheMode: ...
    @property
    def cause(self) -> str:
        """Why the mode is not exact; else empty."""

    @property
    def passing(self) -> bool:
        """It comes to its end by itself, soon."""


class CacheNotes(Protocol):
    """The same of all replicas."""

    @property
    def replicas(self) -> Mapping[str, CacheNote]: ...


class CacheObserver(Protocol):
    """Who keeps what replicas hold in their KV caches (`router.prefix.prefixes`)."""

    def opened(self, replica: str, info: EngineInfo) -> None:
        """A lane to the replica opened: all that was known of it is void."""

    def reported(self, replica: str, report: CacheReport) -> bool:
        """The replica's next report; False where one before it was missed. Raises `ValueError` for nonsense."""

    def lost(self, replica: str) -> None:
        """Its lane is gone, and with it all that was known."""

    def slept(self, replica: str) -> None:
        """Its engine sleeps, which empties its cache; one that reports exactly says that too."""

    def mode(self, replica: str) -> CacheMode:
        """What is known of its cache now."""

    def status(self) -> CacheNotes:
        """All that is known, for people."""

    def sweep(self) -> bool:
        """Does a slice of what was put off; whether there is more."""

    on_mode: Callable[[str, CacheMode], None]
    """Called whenever a replica's mode changes."""


class Unobserved:
    """Nobody keeps what replicas hold."""

    replicas: Mapping[str, CacheNote] = {}

    def __init__(self) -> None:
        self.on_mode: Callable[[str, CacheMode], None] = lambda replica, mode: None

    def opened(self, replica: str, info: EngineInfo) -> None: ...
    def lost(self, replica: str) -> None: ...
    def slept(self, replica: str) -> None: ...

    def reported(self, replica: str, report: CacheReport) -> bool:
        return True

    def mode(self, replica: str) -> CacheMode:
        return CacheMode.OFF

    def status(self) -> CacheNotes:
        return self

    def sweep(self) -> bool:
        return False


class _Member:
    """One replica: its record, its state, its lane, and the task that keeps the lane open."""

    def __init__(self, owner: Replicas, record: ReplicaRecord) -> None:
        self.record = record
        self.state = State.JOINING
        self.lane: Lane | None = None
        self.info: EngineInfo | None = None
        """What it last said of itself."""
        self._owner = owner
        self._opened = asyncio.Event()
        self._lost = asyncio.Event()
        self.tried = False
        """A lane was opened once, or could not be opened."""
        self.turned_away = False
        """It is there, and yet the last try to open a lane came to nothing."""
        self.task = asyncio.create_task(self._keep_lane(), name=f"lane {record.replica}")

    def happens(self, event: Event) -> None:
        before = self.state
        self.state = LIFE.get((before, event), before)
        if self.state is not before:
            log.info("replica %s: %s -> %s", self.record.replica, before.name.lower(), self.state.name.lower())
            self._owner.changed()

    @property
    def gone(self) -> bool:
        return self.state is State.GONE

    def unlisted(self) -> None:
        """Membership does not list it any more."""
        self.happens(Event.UNLISTED)
        if self.state is State.GONE:
            self.task.cancel()
            self._give_up_lane()

    async def _keep_lane(self) -> None:
        options = self._owner.options
        delay_s = options.reconnect_min_s
        while not self.gone:
            self._opened.clear()
            self._lost.clear()
            try:
                async with asyncio.timeout(options.connect_timeout_s):
                    await self._owner.carrier.connect(self.record, self._new_lane)
                    await self._opened.wait()
            except (OSError, TimeoutError) as error:
                reached = self.lane is not None and self.lane.reached
                self.turned_away = reached or isinstance(error, TlsFailed)
                cause = self._owner.troubles.failed(self.record.replica, error, self.lane)
                log.info("replica %s: no lane: %s", self.record.replica, cause)
                self._give_up_lane()
            except Exception as error:  # a carrier's defect must not keep the replica out for good
                self._owner.troubles.failed(self.record.replica, error, self.lane)
                log.exception("replica %s: the carrier failed", self.record.replica)
                self._give_up_lane()
            else:
                self.turned_away = self.info is None
                self._was_tried()
                if not self._lost.is_set():
                    delay_s = options.reconnect_min_s
                await self._lost.wait()
            self._was_tried()
            if not self.gone:
                await asyncio.sleep(delay_s * self._owner.random.uniform(0.5, 1.0))
                delay_s = min(delay_s * 2, options.reconnect_max_s)

    def _was_tried(self) -> None:
        self.tried = True
        self._owner.tried()

    def _give_up_lane(self) -> None:
        if self.lane is not None:
            self.lane.close()

    def _new_lane(self) -> Lane:
        owner = self._owner
        self.lane = Lane(self.record.replica, self.record.secret, owner.name, self, owner.foresee, owner.meter)
        return self.lane

    def lane_opened(self, lane: Lane) -> None:
        if lane is self.lane:
            self._opened.set()
            assert lane.welcome is not None
            self.info = lane.welcome.info
            self._owner.troubles.over(lane.replica)
            self._owner.opened(lane)
            self.happens(Event.OPENED)

    def lane_draining(self, lane: Lane) -> None:
        if lane is self.lane:
            self.happens(Event.SAID_DRAINING)

    def lane_lost(self, lane: Lane, error: ReplicaLost) -> None:
        if lane is self.lane:
            log.info("replica %s: %s", self.record.replica, error.message)
            self._owner.troubles.lost(lane, error, expected=self.state is not State.READY)
            self._owner.retired(lane)
            self.lane = None
            self.happens(Event.LOST)
            self._opened.set()
            self._lost.set()

    def first_output(self, waited_s: float, expected_s: float) -> None:
        self._owner.first_output(waited_s, expected_s)

    def cache_reported(self, lane: Lane, report: CacheReport) -> None:
        self._owner.cache_reported(lane, report)

    async def close(self) -> None:
        self.state = State.GONE
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)
        self._give_up_lane()


class Replicas:
    """The replicas of all models."""

    def __init__(
        self,
        name: str,
        carrier: Carrier,
        options: LaneOptions,
        required: Collection[str] = (),
        first_output: Callable[[float, float], None] = lambda waited_s, expected_s: None,
        rng: random.Random | None = None,
        caches: CacheObserver | None = None,
        foresee: Callable[[EngineInfo], Foresight] = lambda info: Blind(),
        held: Collection[str] = (),
    ) -> None:
        """`foresee` gives what the load model knows of an engine that a lane was opened to. Requests for the models
        in `held` wait where there is no replica, so that these are there for clients even then."""
        self.name = name
        """This router process, as replicas log it."""
        self.carrier = carrier
        self.options = options
        self.first_output = first_output
        """Takes each stream's time from submit to first output and what it was expected to be, in seconds; an
        expectation of 0 is none."""
        self.woke: Callable[[float | None, bool], None] = lambda waited_s, told: None
        """Takes for each replica that woke how long this router's oldest request waited for it, in seconds (None:
        none did), and whether this router told it to wake ahead of need."""
        self.foresee = foresee
        self.meter = FrameMeter()
        """Samples the frames of all lanes, for metrics."""
        self.troubles = Troubles()
        """Why replicas have no lane."""
        self.random = rng or random.Random()
        self._required = tuple(required)
        self._held = tuple(held)
        self._members: dict[str, _Member] = {}
        self._pools: dict[str, Pool] = {}
        self._lanes: dict[str, Lane] = {}
        self.reports = 0
        """Cache reports that counted."""
        self._caches = caches or Unobserved()
        self._caches.on_mode = self._cache_mode
        self._observed: dict[str, Lane] = {}
        """The lane whose reports count; a replica that came back at a new address has two for a while."""
        self._caching: frozenset[str] = frozenset()
        """Models of which some ready replica's cache is worth knowing."""
        self._cards: dict[str, ModelCard] = {}
        self._missed: dict[str, float] = {}
        """Models that nobody serves, since when in loop time."""
        self._routes: dict[str, tuple[re.Pattern[str], set[str]]] = {}
        self._news = asyncio.Event()
        self._told = False
        self._followers: list[Callable[[], None]] = []
        self._settled = False
        """Membership has told what there is, and a lane to each of that was tried and some opened, or none is there:
        that there is no replica is true."""
        self._complain_at = 0.0
        self._idle_at = 0.0
        """Until then something may have been put off."""
        self._retired_steps = self._retired_tokens = 0

    # -- for membership

    def listed(self, records: Mapping[str, ReplicaRecord]) -> None:
        """Takes all replicas that there are now."""
        for name, member in tuple(self._members.items()):
            if member.state is State.GONE:
                del self._members[name]
                self.troubles.over(member.record.replica)
            elif name not in records:
                member.unlisted()
            elif _same(records[name], member.record):
                member.happens(Event.LISTED)
        for name, record in records.items():
            known = self._members.get(name)
            if known is not None and not _same(known.record, record):
                known.unlisted()
                aside = f"{name} at {known.record.host}:{known.record.port}"
                while aside in self._members:  # It was there before, and is still leaving.
                    aside += " again"
                self._members[aside] = known
                known = None
            if known is None:
                self._members[name] = _Member(self, record)
        self._told = True
        self.tried()

    def tried(self) -> None:
        """Some member's lane is open, or could not be opened."""
        if self._settled or not self._told:
            return
        there = [member for member in self._members.values() if not member.gone]
        # Who is turned away by all that there is, by a wrong secret or certificate, does not know of zero replicas.
        shut_out = any(member.turned_away for member in there) and all(member.info is None for member in there)
        if all(member.tried for member in there) and not shut_out:
            self._settled = True
            self.changed()

    def changed(self) -> None:
        """Some replica's state changed: builds the pools anew."""
        lanes = [m.lane for m in self._members.values() if m.state is State.READY and m.lane is not None]
        pools: dict[str, list[Lane]] = {}
        for lane in lanes:
            assert lane.welcome is not None
            for card in lane.welcome.info.models:
                pools.setdefault(card.name, []).append(lane)
        for lane in (*self._lanes.values(), *lanes):
            lane.account.unwatch()
        self._lanes = {lane.replica: lane for lane in lanes}
        self._pools = {model: Pool(pool) for model, pool in pools.items()}
        for watching in self._pools.values():
            watching.watch()
        self._caching = _caching(self._pools)
        self._learn()
        news, self._news = self._news, asyncio.Event()
        news.set()
        for follower in self._followers:
            follower()

    def follow(self, changed: Callable[[], None]) -> None:
        """Has `changed` called after each change of any pool."""
        self._followers.append(changed)

    def opened(self, lane: Lane) -> None:
        """A lane opened; what it says of the replica's KV cache counts from now on."""
        assert lane.welcome is not None
        self._observed.pop(lane.replica, None)
        self._caches.opened(lane.replica, lane.welcome.info)
        self._idle_at = asyncio.get_running_loop().time() + IDLE_AFTER_S
        self._observed[lane.replica] = lane
        lane.account.caches(self._caches.mode(lane.replica))
        lane.account.on_sleep = partial(self._sleeps, lane)

    def _sleeps(self, lane: Lane) -> None:
        """A replica fell asleep or is awake again."""
        asleep = lane.account.load.asleep
        log.info("replica %s: %s", lane.replica, "asleep" if asleep else "awake")
        if not asleep:
            self.woke(lane.oldest_s(), lane.told_to_wake)
            lane.told_to_wake = False
        elif self._observed.get(lane.replica) is lane:
            self._caches.slept(lane.replica)
        for pool in self._pools.values():
            if lane.replica in pool.places:
                pool.regroup()

    def cache_reported(self, lane: Lane, report: CacheReport) -> None:
        """A replica said how its KV cache changed."""
        if self._observed.get(lane.replica) is not lane:
            return
        self.reports += 1
        if not self._caches.reported(lane.replica, report):
            lane.resync()

    def _cache_mode(self, replica: str, mode: CacheMode) -> None:
        """What is known of a replica's cache is of another kind now."""
        lane = self._observed.get(replica)
        if lane is not None and mode is not lane.account.cache:
            lane.account.caches(mode)
            self._caching = _caching(self._pools)
            note = self._caches.status().replicas.get(replica)
            passing = mode is CacheMode.EXACT or (note is not None and note.passing)
            level = logging.INFO if passing else logging.WARNING
            cause = f": {note.cause}" if note is not None and note.cause else ""
            log.log(level, "replica %s: KV cache %s%s", replica, mode, cause)

    def retired(self, lane: Lane) -> None:
        """A lane is gone; its counts stay in the totals."""
        if self._observed.get(lane.replica) is lane:
            del self._observed[lane.replica]
            self._caches.lost(lane.replica)
        self._retired_steps += lane.steps
        self._retired_tokens += lane.tokens

    def _learn(self) -> None:
        """The models and routes that members have announced; a model that nobody serves stays known a while."""
        now = asyncio.get_running_loop().time()
        announced: dict[str, ModelCard] = {}
        for member in self._members.values():
            if member.info is not None and not member.gone:
                announced.update({card.name: card for card in member.info.models})
                for route in member.info.routes:
                    if route.path not in self._routes:
                        self._routes[route.path] = (_pattern(route.path), set())
                    self._routes[route.path][1].update(route.methods)
        missed = {name: self._missed.get(name, now) for name in self._cards if name not in announced}
        self._missed = {name: t for name, t in missed.items() if now - t < FORGET_S or self._is_held(name)}
        self._cards = {name: self._cards[name] for name in self._missed} | announced

    async def keep_alive(self) -> None:
        """Pings silent lanes, and forgets models that are gone for long, until cancelled."""
        interval_s = self.options.ping_interval_s
        while True:
            await asyncio.sleep(interval_s)
            self._learn()
            for member in tuple(self._members.values()):
                if member.lane is not None:
                    member.lane.tick(interval_s, self.options.ping_timeout_s)

    async def sweep(self) -> None:
        """Does what the caches' observer put off, in slices between which others run, until cancelled."""
        loop = asyncio.get_running_loop()
        self._idle_at = loop.time() + IDLE_AFTER_S  # The first reports are the largest.
        while True:
            if self._slice():
                pause_s, self._idle_at = SLICE_PAUSE_S, loop.time() + IDLE_AFTER_S
            else:
                pause_s = SWEEP_INTERVAL_S if loop.time() < self._idle_at else IDLE_SWEEP_INTERVAL_S
            await asyncio.sleep(pause_s)

    def _slice(self) -> bool:
        """One slice of it; whether there is more. A slice that fails must not end all others."""
        try:
            return self._caches.sweep()
        except Exception:
            now = asyncio.get_running_loop().time()
            if now >= self._complain_at:
                self._complain_at = now + COMPLAIN_INTERVAL_S
                log.exception("what is known of KV caches could not be kept up")
            return False

    async def close(self) -> None:
        """Closes all lanes; streams in flight fail."""
        await asyncio.gather(*(member.close() for member in self._members.values()))
        self._members.clear()
        self.changed()

    # -- for dispatch

    def snapshot(self, model: str, excluding: Collection[str] = ()) -> Snapshot:
        """The pool of `model` without some replicas, and without those that sleep while others have room. Raises
        `ModelNotFound`, or `NoReplica` where it is empty."""
        pool = self._pools.get(model)
        if pool is None and model not in self._cards and model not in self._required and model not in self._held:
            raise ModelNotFound(f"The model `{cut(model)}` does not exist.", param="model")
        if excluding and pool is not None:
            pool = Pool([lane for lane in pool.lanes if lane.replica not in excluding])
        if pool is None or not pool.lanes:
            raise NoReplica(f"no replica of model `{cut(model)}` is ready")
        now = asyncio.get_running_loop().time()
        if pool.asleep:
            pool = pool.on_duty(now)
        return pool.snapshot(model, now)

    def caching(self, model: str) -> bool:
        """Whether some ready replica of the model reuses prefixes, so that it pays to hash a prompt."""
        return model in self._caching

    def lease(self, replica: str) -> Lease:
        """A charge on a replica of the last snapshot. No await may stand between the two."""
        return self._lanes[replica].lease()

    def ready(self, model: str) -> bool:
        """Whether the model has a ready replica at all."""
        return bool(self._pools.get(model))

    async def wait_for_news(self) -> None:
        """Returns after the next change of any pool."""
        await self._news.wait()

    # -- for the ingresses

    def models(self) -> tuple[ModelStatus, ...]:
        known = [ModelStatus(card, len(self._pools.get(name, ()))) for name, card in self._cards.items()]
        unseen = [ModelStatus(ModelCard(name), 0, announced=False) for name in self._held if name not in self._cards]
        return tuple(sorted([*known, *unseen], key=lambda status: status.card.name))

    def parent(self, model: str) -> str:
        """The base model where `model` is a LoRA adapter; else empty."""
        card = self._cards.get(model)
        return card.parent if card is not None else ""

    def methods(self, path: str) -> tuple[str, ...]:
        found: set[str] = set()
        exact = self._routes.get(path)
        if exact is not None:
            found = exact[1]
        else:
            for pattern, methods in self._routes.values():
                if pattern.fullmatch(path):
                    found |= methods
        return tuple(sorted(found))

    def readiness(self) -> Readiness:
        counts = {name: len(self._pools.get(name, ())) for name in (*self._required, *self._held, *self._cards)}
        held = {name: HELD for name in self._held if not counts[name]} if self._settled else {}
        wanted = [counts[name] > 0 or name in held for name in self._required]
        ready = all(wanted) if wanted else any(counts.values()) or bool(held)
        joining = {m.record.replica for m in self._members.values() if m.state is State.JOINING}
        troubles = {replica: text for replica, text in self.troubles.last.items() if replica in joining}
        return Readiness(
            ready,
            counts,
            self.caches(),
            troubles,
            held=held or msgspec.UNSET,
            asleep=self.asleep() or msgspec.UNSET,
        )

    def _is_held(self, model: str) -> bool:
        """Whether requests for the model, or for the adapter of that name, may wait without any replica."""
        return model in self._held or self.parent(model) in self._held

    def asleep(self) -> dict[str, int]:
        """How many of the ready replicas sleep, of models where any does."""
        return {model: len(pool.asleep) for model, pool in self._pools.items() if pool.asleep}

    def caches(self) -> dict[str, CacheStatus]:
        """What is known of the ready replicas' KV caches."""
        notes = self._caches.status().replicas
        return {name: CacheStatus(notes[name].mode, notes[name].cause) for name in self._lanes if name in notes}

    # -- for metrics

    def lanes(self) -> tuple[Lane, ...]:
        """The lanes of all ready replicas."""
        return tuple(self._lanes.values())

    def totals(self) -> tuple[int, int]:
        """Step frames and tokens received since the start."""
        open_lanes = [member.lane for member in self._members.values() if member.lane is not None]
        return (
            self._retired_steps + sum(lane.steps for lane in open_lanes),
            self._retired_tokens + sum(lane.tokens for lane in open_lanes),
        )


def _caching(pools: Mapping[str, Pool]) -> frozenset[str]:
    off = CacheMode.OFF
    return frozenset(model for model, pool in pools.items() if any(there.cache is not off for there in pool.accounts))


def _same(one: ReplicaRecord, other: ReplicaRecord) -> bool:
    """Whether two records lead to the same lane; actor handles of one actor are not equal."""
    return (one.host, one.port, one.secret, one.tls) == (other.host, other.port, other.secret, other.tls)


def _pattern(template: str) -> re.Pattern[str]:
    """A path template such as ``/v1/responses/{id}`` or ``/files/{name:path}`` as an expression."""
    parts = re.split(r"\{([^}]*)\}", template)
    pieces = [
        re.escape(part) if i % 2 == 0 else (".+" if part.endswith(":path") else "[^/]+") for i, part in enumerate(parts)
    ]
    return re.compile("".join(pieces))
