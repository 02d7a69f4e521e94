"""The hold: requests that find no replica wait here, in order, until there is one.

Job: let them go on in slices as replicas have room, end those that waited too long, tell clients that they still wait,
and tell the waker how many there are. Rule: who comes while others of its model wait goes behind them. A model that may
be held has `hold.timeout_s`; of any other only a replica's replacement is bridged (`limits.no_replica_wait_s`). The
hold owns its queues and one timer, which runs only while somebody waits.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Collection, Mapping
from types import TracebackType
from typing import Final, Protocol

from router.errors import HoldFull, KvlaneError, NoReplica, ShuttingDown, cut
from router.holding import RETRY_AFTER_S, Holding, Place, Queue, room
from router.options import HoldOptions
from router.types import Request, Sink, Snapshot
from router.wake import NoWaker, Waker

log = logging.getLogger(__name__)

SLICE: Final = 32
"""Requests that go on, or are ended, in one turn of the event loop: to route and submit so many takes 3 to 5 ms."""
LARGE_BODY_BYTES: Final = 64 << 10
"""To read and hash such a prompt takes up to 5 ms: other streams get their turn meanwhile."""
LOOK_S: Final = 0.02
"""How often it is looked whether busy replicas have room again. Steps could tell, but they come far more often."""
FAILED_LOOK_S: Final = 1.0
"""After a defect."""


class Pools(Protocol):
    """What the hold needs of `router.replicas`."""

    def snapshot(self, model: str) -> Snapshot:
        """The ready replicas of the model. Raises `NoReplica` where there are none."""

    def parent(self, model: str) -> str:
        """The base model where `model` is a LoRA adapter; else empty."""

    def follow(self, changed: Callable[[], None]) -> None:
        """Has `changed` called after each change of any pool."""


class HoldObserver(Protocol):
    """Who counts."""

    def held(self, model: str, outcome: str, waited_s: float) -> None:
        """A request's waiting is over: `released`, `gave_up`, `expired` or `refused`."""


class Unobserved:
    """Nobody counts."""

    def held(self, model: str, outcome: str, waited_s: float) -> None: ...


class Hold:
    """All held requests of one router process."""

    def __init__(
        self,
        options: HoldOptions,
        bridge_s: float,
        pools: Pools,
        clock: Callable[[], float],
        observer: HoldObserver | None = None,
        from_zero: Collection[str] = (),
        waker: Waker | None = None,
    ) -> None:
        """`bridge_s` is how long models wait that may not be held; `from_zero` names those that may scale to zero."""
        self._options = options
        self._bridge_s = bridge_s
        self._pools = pools
        self._clock = clock
        self._observer = observer or Unobserved()
        self._from_zero = frozenset(from_zero)
        self._waker = waker or NoWaker()
        self._holding = Holding(options.max_requests, options.max_bytes)
        self._told: dict[str, int] = {}
        self._began: dict[str, tuple[float, int]] = {}
        """Of each model in the hold, since when, and how many have left it since."""
        self._timer: asyncio.Handle | None = None
        self._soon = False
        self._closed = False
        pools.follow(self._news)

    @property
    def queues(self) -> Mapping[str, Queue]:
        """Who waits, by model; a model for which nobody does is not in it. Always the same object."""
        return self._holding.queues

    def limit_s(self, model: str) -> float:
        """How long requests of the model may wait for a first replica; 0 where they may not."""
        options = self._options
        if options.enabled == "never":
            return self._bridge_s
        held = options.enabled == "always" or self._base(model) in self._from_zero
        return max(options.timeout_s, self._bridge_s) if held else self._bridge_s

    def place(self, request: Request, sink: Sink) -> HeldRequest:
        """A place for the request, taken and left by `with`. Raises `NoReplica` where it may not wait."""
        limit_s = self.limit_s(request.model)
        if self._closed:
            raise ShuttingDown("this router is shutting down", retry_after_s=1)
        if limit_s <= 0:
            raise NoReplica(f"no replica of model `{cut(request.model)}` is ready", retry_after_s=1)
        return HeldRequest(self, request, sink, self._clock(), limit_s, self._options.comment_interval_s)

    async def close(self) -> None:
        """Ends all that is held, and tells the waker so."""
        self._closed = True
        for queue in tuple(self._holding.queues.values()):
            for place in tuple(queue.places):
                assert isinstance(place, HeldRequest)
                place.end(ShuttingDown("this router is shutting down", retry_after_s=1))
        for model in self._told:
            self._waker.wanted(model, 0)
        self._told = {}
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        await self._waker.close()

    # -- for places

    def enter(self, place: HeldRequest) -> None:
        """One more. Raises `HoldFull`."""
        model = place.model
        try:
            self._holding.join(place)
        except HoldFull:
            self._observer.held(model, "refused", 0.0)
            raise
        if model not in self._began:
            self._began[model] = (place.since, 0)
            log.info("model %s: no replica is ready; requests for it are held", cut(model))
        self._look_soon()

    def leave(self, place: HeldRequest, outcome: str) -> None:
        """One less."""
        model, now = place.model, self._clock()
        self._holding.leave(place)
        self._observer.held(model, outcome, now - place.since)
        since, left = self._began[model]
        if model in self._holding.queues:
            self._began[model] = (since, left + 1)
        else:
            del self._began[model]
            took_s = now - since
            log.info("model %s: nobody is held any more, after %d requests and %.1f s", cut(model), left + 1, took_s)
        self._look_soon()

    def put_back(self, place: HeldRequest) -> None:
        """What it was called for is gone."""
        self._holding.put_back(place)
        self._look_soon()

    # -- the timer

    def _news(self) -> None:
        if self._holding.queues:
            self._look_soon()

    def _look_soon(self) -> None:
        if not self._soon and not self._closed:
            self._soon = True
            if self._timer is not None:
                self._timer.cancel()
            self._timer = asyncio.get_running_loop().call_soon(self._look)

    def _look(self) -> None:
        self._timer, self._soon = None, False
        try:
            pause_s = self._advance(self._clock())
            self._tell()
        except Exception:
            log.exception("held requests could not be looked after")
            pause_s = FAILED_LOOK_S
        if pause_s < math.inf and not self._soon:
            self._timer = asyncio.get_running_loop().call_later(pause_s, self._look)

    def _advance(self, now: float) -> float:
        """Does what is due; returns the seconds until it must be looked again, if nothing happens before."""
        pause_s, left = math.inf, SLICE
        queues = self._holding.queues
        # Adapters have queues of their own and share their base's room.
        busy = {self._base(model) for model, queue in queues.items() if queue.called}
        for model, queue in tuple(queues.items()):
            base = self._base(model)
            if left and base not in busy:  # Else it goes on when the last of those that were called has left.
                pause_s = min(pause_s, self._advance_one(model, queue, now, left))
                if queue.called:
                    left -= queue.called
                    busy.add(base)
        for place in self._holding.ring(now, self._options.comment_interval_s, SLICE):
            assert isinstance(place, HeldRequest)
            place.ring()
        return max(0.0, min(pause_s, self._holding.next_ring() - now))

    def _advance_one(self, model: str, queue: Queue, now: float, most: int) -> float:
        overdue = self._holding.overdue(model, now, SLICE)
        try:
            replicas = self._pools.snapshot(model).replicas
        except KvlaneError:
            for place in overdue:
                assert isinstance(place, HeldRequest)
                place.end(self._expired(place, now))
            first = next(queue.waiting(), None)
            return math.inf if first is None else max(0.0, first.deadline - now)
        # Who has waited its time and finds replicas, busy as they may be, waits there and not here.
        called = self._holding.call(model, min(most, max(room(replicas), len(overdue))))
        for place in called:
            assert isinstance(place, HeldRequest)
            place.go_on()
        return math.inf if called else LOOK_S

    def _expired(self, place: Place, now: float) -> NoReplica:
        waited = f"{now - place.since:.0f} s" if now - place.since >= 1 else f"{(now - place.since) * 1e3:.0f} ms"
        return NoReplica(
            f"no replica of model `{cut(place.model)}` became ready within {waited}", retry_after_s=RETRY_AFTER_S
        )

    def _tell(self) -> None:
        """Tells the waker of numbers that have changed."""
        wanted = dict.fromkeys(self._told, 0)
        for model, queue in self._holding.queues.items():
            base = self._base(model)
            wanted[base] = wanted.get(base, 0) + len(queue)
        for model, count in wanted.items():
            if count != self._told.get(model, 0):
                self._waker.wanted(model, count)
        self._told = {model: count for model, count in wanted.items() if count}

    def _base(self, model: str) -> str:
        return model if model in self._from_zero else self._pools.parent(model) or model


class HeldRequest(Place):
    """One request's place in the hold."""

    __slots__ = ("_hold", "_outcome", "_request", "_ring", "_turn")

    def __init__(self, hold: Hold, request: Request, sink: Sink, now: float, limit_s: float, interval_s: float) -> None:
        self._ring: Callable[[Request], None] | None = getattr(sink, "waiting", None) if interval_s else None
        size = len(request.body)
        super().__init__(
            request.model,
            size,
            now,
            now + limit_s,
            now + interval_s if self._ring is not None else math.inf,
            alone=size >= LARGE_BODY_BYTES,
        )
        self._hold = hold
        self._request = request
        self._outcome = "released"
        self._turn: asyncio.Future[None] | None = None

    def __enter__(self) -> HeldRequest:
        """Raises `HoldFull`."""
        self._hold.enter(self)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is not None and issubclass(kind, asyncio.CancelledError):
            self._outcome = "gave_up"
        self._turn = None
        self._hold.leave(self, self._outcome)

    async def turn(self) -> None:
        """Returns when it is this request's turn, and nobody else's of its model until it leaves or is put back.

        Raises `NoReplica` where none became ready in time, and `ShuttingDown`.
        """
        if not self.called:
            self._turn = asyncio.get_running_loop().create_future()
            await self._turn

    def put_back(self) -> None:
        """There is no replica after all: waits on, with the place that it had."""
        self._hold.put_back(self)

    # -- for the hold

    def go_on(self) -> None:
        """It is its turn."""
        if self._turn is not None and not self._turn.done():
            self._turn.set_result(None)

    def end(self, error: KvlaneError) -> None:
        """It has waited in vain."""
        if self._turn is not None and not self._turn.done():
            self._outcome = "expired" if isinstance(error, NoReplica) else "gave_up"
            self._turn.set_exception(error)

    def ring(self) -> None:
        """Tells its client that it waits, unless that is just over."""
        assert self._ring is not None
        if self._turn is None or self._turn.done():
            return
        try:
            self._ring(self._request)
        except Exception:
            log.exception("a client could not be told that it waits")
