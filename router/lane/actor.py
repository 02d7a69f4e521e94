"""The `actor` carrier: a lane's bytes over direct calls on the replica's Ray actor.

For networks where only Ray's own ports are open. Up go batches, one call at a time, each with all that was written
since the last; down comes one stream that lives as long as the pipe. Rule: the pipe's bytes keep their order because no
second call starts before the first has returned. `ActorTransport` owns its two tasks, and both end with it.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from ray.exceptions import RayError

from router import ray_private
from router.lane import pipes
from router.membership.base import ReplicaRecord

log = logging.getLogger(__name__)

CALL_TIMEOUT_S = 30.0
"""One batch's way to the replica and back; the lane's own pings notice a dead replica long before."""
HIGH_WATER_BYTES = 1 << 20
LOW_WATER_BYTES = 256 << 10


class ActorCarrier:
    """Opens pipes through actor handles. The process must have joined Ray before the first."""

    def __init__(self) -> None:
        """Raises `ConfigError` where Ray's version is one that this carrier was not tried with."""
        ray_private.check_version()

    async def connect(self, record: ReplicaRecord, protocol: Callable[[], asyncio.Protocol]) -> asyncio.BaseTransport:
        """Opens a pipe to the replica and connects the protocol to it. Raises `OSError` where that fails."""
        if record.actor is None:
            raise ConnectionRefusedError(f"replica {record.replica} has no actor handle")
        pipe = uuid.uuid4().hex
        try:
            chunks = ray_private.stream(record.actor, pipes.down, record.replica, pipe)
            await (await anext(chunks))
        except (RayError, StopAsyncIteration) as error:
            raise ConnectionRefusedError(
                f"replica {record.replica} opened no pipe: {ray_private.reason(error)}"
            ) from error
        except asyncio.CancelledError:
            # Calls start in order, so the pipe is open, or refused, by the time this one arrives.
            ray_private.call(record.actor, pipes.up, record.replica, pipe, 0, b"", 0, True)
            raise
        return ActorTransport(record, pipe, chunks, protocol())


class ActorTransport(asyncio.Transport):
    """The router's end of one pipe."""

    def __init__(self, record: ReplicaRecord, pipe: str, chunks: Any, protocol: asyncio.Protocol) -> None:
        super().__init__({"peername": f"actor of {record.replica}"})
        self._record = record
        self._pipe = pipe
        self._chunks = chunks
        self._protocol = protocol
        self._loop = asyncio.get_running_loop()
        self._written: list[bytes] = []
        self._written_bytes = 0
        self._high, self._low = HIGH_WATER_BYTES, LOW_WATER_BYTES
        self._writing_paused = False
        self._taken = self._told = 0
        self._reading = asyncio.Event()
        self._reading.set()
        self._something_to_send = asyncio.Event()
        self._closing = self._lost = False
        self._reader = asyncio.create_task(self._read(), name=f"pipe from {record.replica}")
        self._writer = asyncio.create_task(self._write(), name=f"pipe to {record.replica}")
        protocol.connection_made(self)

    # -- the protocol's side

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if self._closing or not data:
            return
        self._written.append(bytes(data))
        self._written_bytes += len(data)
        self._something_to_send.set()
        if self._written_bytes > self._high and not self._writing_paused:
            self._writing_paused = True
            self._protocol.pause_writing()

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self._high = HIGH_WATER_BYTES if high is None else high
        self._low = self._high // 4 if low is None else low

    def get_write_buffer_size(self) -> int:
        return self._written_bytes

    def can_write_eof(self) -> bool:
        return False

    def pause_reading(self) -> None:
        self._reading.clear()

    def resume_reading(self) -> None:
        self._reading.set()

    def is_reading(self) -> bool:
        return self._reading.is_set() and not self._closing

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self._protocol = protocol  # type: ignore[assignment]

    def get_protocol(self) -> asyncio.BaseProtocol:
        return self._protocol

    def is_closing(self) -> bool:
        return self._closing

    def close(self) -> None:
        """Sends what was written, then ends the pipe on both sides."""
        if not self._closing:
            self._closing = True
            self._reader.cancel()
            self._something_to_send.set()

    def abort(self) -> None:
        """Ends the pipe on both sides now."""
        if self._lost:
            return
        self._closing = True
        self._writer.cancel()
        # Out of turn, so the replica sees a gap; a pipe with a gap is lost, which is what an abort says.
        ray_private.call(self._record.actor, pipes.up, self._record.replica, self._pipe, -1, b"", self._taken, True)
        self._lose(None)

    # -- the pipe's side

    async def _read(self) -> None:
        try:
            while True:
                await self._reading.wait()
                data = await (await anext(self._chunks))
                self._taken += len(data)
                if self._taken - self._told > pipes.WINDOW_BYTES // 4:
                    self._something_to_send.set()
                if data:
                    self._protocol.data_received(data)
        except StopAsyncIteration:
            self._lose(None)
        except RayError as error:
            self._lose(_reset(self._record, error))
        except Exception as error:  # The protocol's own failure: it loses its lane, as with asyncio's transports.
            log.exception("the lane to replica %s failed", self._record.replica)
            self._lose(error)

    async def _write(self) -> None:
        seq = 0
        try:
            while not self._lost:
                with suppress(TimeoutError):
                    async with asyncio.timeout(pipes.KEEP_ALIVE_S):
                        await self._something_to_send.wait()
                self._something_to_send.clear()
                last = self._closing
                await self._send(seq, last)
                seq += 1
                if last:
                    self._lose(None)
        except (RayError, TimeoutError) as error:
            self._lose(_reset(self._record, error))
        except Exception as error:
            log.exception("the lane to replica %s failed", self._record.replica)
            self._lose(error)

    async def _send(self, seq: int, last: bool) -> None:
        data = b"".join(self._written)
        self._written.clear()
        self._told = self._taken
        async with asyncio.timeout(CALL_TIMEOUT_S):
            await ray_private.call(
                self._record.actor, pipes.up, self._record.replica, self._pipe, seq, data, self._taken, last
            )
        self._written_bytes -= len(data)
        if self._writing_paused and self._written_bytes <= self._low:
            self._writing_paused = False
            self._protocol.resume_writing()

    def _lose(self, error: Exception | None) -> None:
        """The pipe is gone; tells the protocol once, in a turn of its own."""
        if self._lost:
            return
        self._closing = self._lost = True
        self._loop.call_soon(self._ended, error)

    def _ended(self, error: Exception | None) -> None:
        self._reader.cancel()
        self._writer.cancel()
        self._protocol.connection_lost(error)


def _reset(record: ReplicaRecord, error: Exception) -> ConnectionResetError:
    reset = ConnectionResetError(f"the pipe to replica {record.replica} broke: {ray_private.reason(error)}")
    reset.__cause__ = error
    return reset
