"""An engine without a model: it answers noise at the pace of `SimulatedCore`, over asyncio or a virtual clock.

One timer serves the whole engine, and a step's output goes to all its streams in one callback, so that it travels in
one frame. The engine owns its core; nothing else touches it.
"""

from __future__ import annotations

import asyncio
import difflib
import itertools
import logging
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import Any, Final, Protocol

import msgspec

from engine.base import Abort, StreamOut
from engine.cache_report import CacheFeed
from engine.simulated_ask import Ask, PromptMaker, Reply
from engine.simulated_core import SimulatedCore, SimulatedOptions, StepResult
from engine.simulated_grpc import Grpc
from engine.simulated_openai import ROUTES, OpenAi, refuse
from engine.simulated_reports import SimulatedReports
from router.errors import ConfigError, InternalError, KvlaneError, ReplicaFailed, ReplicaLost
from router.lane.frames import Submit
from router.types import EngineInfo, Load, ModelCard, Rpc

_log = logging.getLogger(__name__)

MAX_LAG_S: Final = 1.0
"""An engine whose event loop was held up longer than this goes on from now instead of catching up."""


class Timer(Protocol):
    """A call that may still be cancelled."""

    def cancel(self) -> None: ...


class Clock(Protocol):
    """Time in seconds from any origin, and calls at a time; an event loop is one."""

    def time(self) -> float: ...

    def call_at(self, when: float, callback: Callable[[], None], /) -> Timer:
        """Calls back at `when`, or as soon as possible where that is past; never before it returns."""


def parse_options(options: Mapping[str, Any]) -> SimulatedOptions:
    """Raises `ConfigError` for a name that does not exist, with the nearest one, and for values out of bounds."""
    known = SimulatedOptions.__struct_fields__
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0)
            raise ConfigError(f"the simulated engine has no option `{name}`; did you mean `{near[0]}`?", param=name)
    try:
        return msgspec.convert(dict(options), SimulatedOptions)
    except msgspec.ValidationError as error:
        raise ConfigError(f"the simulated engine's options: {error}") from error


class _Stream(msgspec.Struct, frozen=True):
    out: StreamOut
    reply: Reply


class SimulatedEngine:
    """An `Engine`. `clock` replaces the event loop's; `unix_time` is what answers are stamped with."""

    def __init__(
        self,
        options: Mapping[str, Any] | SimulatedOptions,
        model: str,
        clock: Clock | None = None,
        unix_time: Callable[[], float] = time.time,
    ) -> None:
        self._options = options if isinstance(options, SimulatedOptions) else parse_options(options)
        self._card = ModelCard(model, max_model_len=self._options.max_model_len)
        self._core = SimulatedCore(self._options)
        self._reports = SimulatedReports(self._options)
        self._clock = clock
        self._unix_time = unix_time
        prompts = PromptMaker(self._options)
        self._openai = OpenAi(self._card, prompts)
        self._grpc = Grpc(model, prompts)
        self._streams: dict[int | str, _Stream] = {}
        self._ids = itertools.count(1)
        self._listeners: list[Callable[[], None]] = []
        self._timer: Timer | None = None
        self._due = 0.0
        self._failure = ""
        self.asleep = False

    async def start(self) -> None:
        if self._clock is None:
            self._clock = asyncio.get_running_loop()

    def info(self) -> EngineInfo:
        options = self._options
        return EngineInfo(
            kind="sim",
            models=(self._card,),
            routes=ROUTES,
            max_num_seqs=options.max_num_seqs,
            kv_blocks=options.kv_blocks,
            kv_block_tokens=options.block_tokens,
            prefix_caching=options.prefix_caching,
            version=version("kvlane"),
        )

    def load(self) -> Load:
        return self._core.load()

    def cache(self) -> CacheFeed:
        return self._reports.feed

    def on_step(self, listener: Callable[[], None]) -> None:
        self._listeners.append(listener)

    def submit(self, call: Submit, out: StreamOut) -> Abort:
        if self._failure or self.asleep:
            out.fail(ReplicaLost(self._failure) if self._failure else ReplicaFailed("the simulated engine sleeps"))
            return _nothing
        try:
            ask = self._ask(call, out)
            if ask is None:
                out.end()
                return _nothing
            id = next(self._ids)
            job = self._core.add(id, ask.prompt, ask.max_tokens, ask.priority)
        except KvlaneError as error:
            if call.rpc == Rpc.HTTP:
                refuse(out, error)
                out.end()
            else:
                out.fail(error)
            return _nothing
        self._streams[id] = _Stream(out, ask.reply)
        self._reports.asked(call, ask, job)
        self._wake()
        return lambda: self._abort(id)

    def dead(self) -> bool:
        return bool(self._failure)

    async def check_health(self) -> None:
        if self._failure:
            raise ReplicaFailed(self._failure)

    async def close(self) -> None:
        if not self._failure:
            self._stop("the engine was closed")

    async def sleep(self, level: int) -> None:
        """Takes no time beyond the steps that there is work for. Either level is the same."""
        while self._timer is not None:
            await self._until(self._due)
        self.asleep = True
        self._core.pool.forget()
        self._reports.cleared()

    async def wake(self) -> None:
        """Takes the `wake_ms` of the options."""
        options = self._options
        await self._until(self._running_clock().time() + options.wake_ms * options.time_scale / 1000)
        if self._failure:
            raise ReplicaFailed(self._failure)
        self.asleep = False

    async def _until(self, when: float) -> None:
        reached = asyncio.get_running_loop().create_future()
        timer = self._running_clock().call_at(when, lambda: reached.set_result(None))
        try:
            await reached
        finally:
            timer.cancel()

    def fail(self, reason: str = "the simulated engine was told to fail") -> None:
        """Dies as an engine does: all its streams fail, and so does whatever is asked of it from now on."""
        self._failure = reason
        for listener in self._listeners:
            try:
                listener()
            except Exception:
                _log.exception("a listener of the simulated engine failed")
        self._stop(reason)

    def _stop(self, reason: str) -> None:
        self._failure = reason
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        streams, self._streams = self._streams, {}
        for id, stream in streams.items():
            self._core.abort(id)
            stream.out.fail(ReplicaLost(reason))

    def _ask(self, call: Submit, out: StreamOut) -> Ask | None:
        if call.rpc == Rpc.HTTP:
            return self._openai.ask(call, out, int(self._unix_time()))
        return self._grpc.ask(call, out)

    def _abort(self, id: int) -> None:
        if self._streams.pop(id, None) is not None:
            self._reports.aborted(id)
            self._core.abort(id)

    def _wake(self) -> None:
        if self._timer is None:
            # At the end of this turn of the loop: requests that come together start in one step.
            clock = self._running_clock()
            self._due = clock.time()
            self._timer = clock.call_at(self._due, self._begin)

    def _begin(self) -> None:
        self._guarded(self._next_step)

    def _complete(self) -> None:
        self._guarded(self._end_step)

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:
            # A defect must not leave streams hanging: nobody would ever set the timer again.
            _log.exception("the simulated engine failed")
            self.fail(f"the simulated engine failed: {error!r}")

    def _next_step(self) -> None:
        duration_ms = self._core.plan()
        if duration_ms is None:
            self._timer = None
            return
        clock = self._running_clock()
        now = clock.time()
        if now - self._due > MAX_LAG_S:
            self._due = now
        # From when the last step should have ended, not from when the loop got to it: delays do not add up.
        self._due += duration_ms / 1000
        self._timer = clock.call_at(self._due, self._complete)

    def _end_step(self) -> None:
        result = self._core.commit()
        self._reports.stepped(result)  # First, so that a prompt's blocks go out with its first token.
        self._deliver(result)
        for listener in self._listeners:
            listener()
        limit = self._options.fail_after_steps
        if limit and self._core.steps >= limit:
            self.fail(f"the simulated engine failed after {limit} steps, as its options say")
        elif not self._failure:
            self._next_step()

    def _deliver(self, result: StepResult) -> None:
        streams = self._streams
        for job in result.produced:
            stream = streams.get(job.id)
            if stream is None:
                continue  # Aborted by an earlier output of this very step.
            if job.finish:
                del streams[job.id]
                stream.reply.last(job)
                stream.out.end(job.finish)
            else:
                stream.reply.token(job)

    def _running_clock(self) -> Clock:
        if self._clock is None:
            raise InternalError("the simulated engine was not started")
        return self._clock


def _nothing() -> None:
    """The abort of a stream that is over."""
