"""A replica's sleep: an engine without streams for long enough sleeps, and wakes when it is wanted.

Job: put the engine to sleep, keep what is submitted meanwhile in order, wake the engine once, and hand it over. Rule: a
sleeping engine gets no stream; what waits for it ends as streams do, by its abort or with an error that another replica
can make good. `Sleeper` owns the task that sees the engine through one night, and the streams that wait for its end.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Final

import msgspec

from engine.base import Abort, SleepyEngine, StreamOut
from router.errors import ReplicaFailed, ReplicaLost
from router.lane.frames import Submit
from router.types import Load

log = logging.getLogger(__name__)

CHANGE_TIMEOUT_S: Final = 300.0
"""An engine that takes longer to fall asleep or to wake has failed: large weights from a slow disk take a minute or
two."""


class _Waiting:
    """A stream that waits for the engine."""

    __slots__ = ("_all", "call", "out", "stop")

    def __init__(self, call: Submit, out: StreamOut, all: dict[_Waiting, None]) -> None:
        self.call = call
        self.out = out
        self.stop: Abort = _nothing
        """What stops it once the engine has it."""
        self._all = all
        all[self] = None

    def abort(self) -> None:
        self._all.pop(self, None)
        self.stop()


class Sleeper:
    """One replica's sleep; between its nights it costs a stream nothing but a look at `asleep`."""

    def __init__(
        self,
        engine: SleepyEngine,
        after_s: float,
        level: int,
        busy: Callable[[], bool],
        tell: Callable[[], None],
        failed: Callable[[], None],
    ) -> None:
        """The engine sleeps after `after_s` seconds in which it was not `busy`. `tell` is called whenever `load` is
        another, `failed` where the engine does not do as it is told; `check` then says why."""
        self.asleep = False
        """From when it falls asleep until it is awake."""
        self._engine = engine
        self._after_s = after_s
        self._level = level
        self._busy = busy
        self._tell = tell
        self._failed = failed
        self._failure = ""
        self._closed = False
        self._loop = asyncio.get_running_loop()
        self._idle_since = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._night: asyncio.Task[None] | None = None
        self._wanted = asyncio.Event()
        self._waiting: dict[_Waiting, None] = {}
        """In the order of their submits."""

    def load(self) -> Load:
        """The engine's load, and what waits for it to wake."""
        load = self._engine.load()
        if not self.asleep:
            return load
        return msgspec.structs.replace(load, waiting=load.waiting + len(self._waiting), asleep=True)

    def submit(self, call: Submit, out: StreamOut) -> Abort:
        """As the engine's: takes a stream, at once or when the engine is awake. Wakes it."""
        if not self.asleep or self._engine.dead():
            return self._engine.submit(call, out)
        if self._failure:
            out.fail(ReplicaLost(self._failure))
            return _nothing
        waiting = _Waiting(call, out, self._waiting)
        self._wanted.set()
        self._tell()  # No engine step will.
        return waiting.abort

    def wake(self) -> None:
        """The engine is wanted soon; harmless where it is awake."""
        if self.asleep:
            self._wanted.set()

    def idle(self) -> None:
        """The last stream has ended, or there has been none yet."""
        self._idle_since = self._loop.time()
        if self._timer is None and not self.asleep and not self._closed:
            self._timer = self._loop.call_later(self._after_s, self._look)

    def check(self) -> None:
        """Raises `ReplicaFailed` where the engine did not fall asleep or wake."""
        if self._failure:
            raise ReplicaFailed(self._failure)

    def died(self) -> None:
        """The engine died: nobody waits for it any more."""
        if self._night is not None:
            self._night.cancel()
        self._fail_waiting("the engine died")

    async def close(self) -> None:
        """Fails what waits. The engine is left as it is, for good."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._night is not None:
            self._night.cancel()
            await asyncio.wait([self._night])
        self._fail_waiting("the replica has shut down")

    def _look(self) -> None:
        """The engine may have been idle for long enough."""
        self._timer = None
        if self.asleep or self._busy():
            return  # Its last stream's end sets the timer again.
        left_s = self._idle_since + self._after_s - self._loop.time()
        if left_s > 0:
            self._timer = self._loop.call_later(left_s, self._look)
        else:
            self._wanted.clear()
            self.asleep = True
            self._tell()
            self._night = asyncio.create_task(self._sleep_until_wanted(), name="sleep")

    async def _sleep_until_wanted(self) -> None:
        what = "fall asleep"
        try:
            async with asyncio.timeout(CHANGE_TIMEOUT_S):
                await self._engine.sleep(self._level)
            log.info("the engine sleeps after %g s without a stream", self._after_s)
            await self._wanted.wait()
            what, began = "wake", self._loop.time()
            async with asyncio.timeout(CHANGE_TIMEOUT_S):
                await self._engine.wake()
        except Exception as error:
            log.exception("the engine did not %s", what)
            self._failure = f"the engine did not {what}: {str(error) or type(error).__name__}"
            self._fail_waiting(self._failure)
            self._failed()
        else:
            log.info("the engine woke in %.2f s for %d streams", self._loop.time() - began, len(self._waiting))
            self._woke()

    def _woke(self) -> None:
        self.asleep = False
        while self._waiting:
            waiting = next(iter(self._waiting))
            del self._waiting[waiting]
            try:
                waiting.stop = self._engine.submit(waiting.call, waiting.out)
            except Exception:
                log.exception("the engine did not take request %s", waiting.call.request_id)
                waiting.out.fail(ReplicaFailed("the engine did not take the request"))
        self._tell()
        self.idle()

    def _fail_waiting(self, why: str) -> None:
        while self._waiting:
            waiting = next(iter(self._waiting))
            del self._waiting[waiting]
            waiting.out.fail(ReplicaLost(why))


def _nothing() -> None:
    """What there is to stop of a stream that the engine has not got."""
