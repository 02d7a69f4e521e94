"""What a lane writes: frames in order, large ones in pieces between which the event loop runs.

Rule: a frame is never interrupted by another, so what is written behind a large one waits for its last piece and no
longer. Of small ones that come in one turn of the loop only those wait that may, and nothing overtakes them. While
nothing waits, `write` is the transport's own. `FrameOutput` owns what waits; whoever owns the transport tells it when
that is full and when it is lost.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Final

PIECE_BYTES: Final = 256 << 10
"""Written in one turn of the loop; the kernel was measured to copy 1 MB in 0.4 to 0.8 ms."""
JOINED_BYTES: Final = 32 << 10
"""Frames that are so many bytes wait for no more: about eight prompts of 4 KB, which come together within half a
millisecond."""

Bytes = bytes | memoryview


class FrameOutput:
    """The way to one transport."""

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._waiting: deque[Bytes] = deque()
        self._full = False
        self._due = False
        self._joined: list[bytes] = []
        self._joined_bytes = 0
        self._in_burst = False
        self.write: Callable[[Bytes], object] = transport.write
        """Takes one frame."""
        self.join: Callable[[bytes], object] = self._join
        """Takes one frame that may wait for others of this turn of the loop: of many that come together the first goes
        out at once, those behind it in few writes."""

    def write_large(self, parts: tuple[bytes, ...]) -> None:
        """Takes one frame in parts, which are not copied."""
        self._write_joined()
        for part in parts:
            view = memoryview(part)
            self._waiting.extend(view[at : at + PIECE_BYTES] for at in range(0, len(view), PIECE_BYTES))
        self.write = self._write_behind
        self._schedule()

    def pause(self) -> None:
        """The transport is full."""
        self._full = True

    def resume(self) -> None:
        """The transport has room again."""
        self._full = False
        self._schedule()

    def close(self) -> None:
        """Forgets what waits, and whatever else comes."""
        self._waiting.clear()
        self._joined.clear()
        self.write = self.join = _forget

    def _join(self, frame: bytes) -> None:
        if not self._in_burst:
            self._in_burst = True
            self._loop.call_soon(self._turned)
            self.write(frame)
        elif self._waiting:
            self.write(frame)
        else:
            self._joined.append(frame)
            self._joined_bytes += len(frame)
            self.write = self._write_after_joined
            if self._joined_bytes >= JOINED_BYTES:
                self._write_joined()

    def _turned(self) -> None:
        self._in_burst = False
        self._write_joined()

    def _write_joined(self) -> None:
        joined = self._joined
        if joined:
            data = joined[0] if len(joined) == 1 else b"".join(joined)
            joined.clear()
            self._joined_bytes = 0
            self.write = self._transport.write
            self.write(data)

    def _write_after_joined(self, frame: Bytes) -> None:
        self._write_joined()
        self._transport.write(frame)

    def _write_behind(self, frame: Bytes) -> None:
        self._waiting.append(frame)

    def _schedule(self) -> None:
        if self._waiting and not self._full and not self._due:
            self._due = True
            self._loop.call_soon(self._write_piece)

    def _write_piece(self) -> None:
        self._due = False
        written = 0
        while self._waiting and not self._full and written < PIECE_BYTES:
            piece = self._waiting.popleft()
            written += len(piece)
            self._transport.write(piece)
        if self._waiting:
            self._schedule()
        elif self.write == self._write_behind:
            self.write = self._transport.write


def _forget(frame: Bytes) -> None: ...
