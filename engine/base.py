"""The seam between a replica and its engine.

An engine takes submitted streams and writes each one's output to its `StreamOut`; it never sees lanes. All calls come
from one event loop. Rule: every submitted stream gets exactly one `end` or `fail`, unless it was aborted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

from engine.cache_report import CacheFeed
from router.errors import KvlaneError
from router.lane.frames import Submit
from router.types import EngineInfo, Headers, Load

Abort = Callable[[], None]
"""Stops a stream's work in the engine at once; harmless after the stream's end."""


class StreamOut(Protocol):
    """One stream's way back. Never blocks and never raises; calls after the end are ignored."""

    def head(self, status: int, headers: Headers) -> None:
        """HTTP only, once, before any data."""

    def data(self, payload: bytes, tokens: int = 0, *, urgent: bool = False) -> None:
        """Rendered bytes: a piece of the HTTP body, or exactly one serialized gRPC message.

        Data written in one turn of the event loop travels in one frame. `urgent` sends the frame at once, for a
        stream's first token while other streams' rendering still holds the loop.
        """

    def end(self, finish: str = "") -> None:
        """The stream is complete. The last data may still wait; it goes out with or before the end."""

    def fail(self, error: KvlaneError) -> None:
        """The stream cannot go on. After a first byte the client sees it as an in-band error."""


class Engine(Protocol):
    """An inference engine under one replica."""

    async def start(self) -> None:
        """Loads the model. Raises `ConfigError` for arguments it does not know."""

    def info(self) -> EngineInfo:
        """What the replica serves; valid after `start`."""

    def load(self) -> Load:
        """The load after the last step."""

    def cache(self) -> CacheFeed | None:
        """What is known of the KV cache, for cache reports; None where nothing is told. Valid after `start`."""

    def on_step(self, listener: Callable[[], None]) -> None:
        """Calls `listener` after each engine step, outputs or not, when an abort lowers the load, and when it dies."""

    def submit(self, call: Submit, out: StreamOut) -> Abort:
        """Takes a stream; returns at once. Faults of the request itself go to `out.fail`."""

    def dead(self) -> bool:
        """Whether the engine has died; `on_step` listeners are called when it does."""

    async def check_health(self) -> None:
        """Raises `ReplicaFailed` when the engine is dead."""

    async def close(self) -> None:
        """Stops the engine and what it started."""


@runtime_checkable
class SleepyEngine(Engine, Protocol):
    """An engine that can give its memory back and come to again faster than a new one starts (`engine.sleep`)."""

    async def sleep(self, level: int) -> None:
        """Sleeps; only called without a stream in flight, and none is submitted until `wake` is done. Its KV cache is
        empty from then on, and `cache` says so. Level 1 keeps the weights in the host's memory, level 2 drops them.
        """

    async def wake(self) -> None:
        """Returns when the engine computes again. The event loop stays free meanwhile; it may take minutes."""
