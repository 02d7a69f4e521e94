"""How router processes are asked to end, and what they make of a hang-up.

Rule: whatever asks again asks for more haste, never for less.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import sys

log = logging.getLogger(__name__)


class Stop:
    """Whether a process shall end, and how fast; each signal after the first one hastens it."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.promptly = asyncio.Event()
        """Without notice: nobody has to be told first."""
        self.hurried = asyncio.Event()
        """Streams in flight are not waited for."""
        self.status = 0
        """The exit status: 0, or 128 and the number of the signal that hurried it, as shells have it."""

    async def within_notice(self, notice_s: float) -> None:
        """Returns after so many seconds, or once it shall be quicker."""
        try:
            async with asyncio.timeout(notice_s):
                await self.promptly.wait()
        except TimeoutError:
            pass  # They had their time.

    def signalled(self, number: int) -> None:
        """SIGTERM asks to end; SIGINT, from somebody who waits at a terminal, promptly; any second one to hurry."""
        if self.asked.is_set():
            self.status = self.status or 128 + number
            self.hurry()
        elif number == signal.SIGTERM:
            self.asked.set()
        else:
            self.at_once()

    def at_once(self) -> None:
        """Asks to end without notice."""
        self.promptly.set()
        self.asked.set()

    def hurry(self) -> None:
        """Asks to end without waiting for streams in flight."""
        self.hurried.set()
        self.at_once()


def stop_asked(*, parent_pipe: bool) -> Stop:
    """By SIGINT and SIGTERM, and with `parent_pipe` at once when the parent, who holds our standard input, is gone."""
    stop, loop = Stop(), asyncio.get_running_loop()
    stop_on_signals(stop)
    if parent_pipe:
        # Nothing more comes on it, so readable means closed; and closed it stays readable.
        def closed() -> None:
            loop.remove_reader(sys.stdin.fileno())
            stop.at_once()

        loop.add_reader(sys.stdin.fileno(), closed)
    return stop


def stop_on_signals(stop: Stop) -> None:
    """SIGINT and SIGTERM ask it to end."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.signalled, number)


def ignore_hangup(why: str) -> None:
    """SIGHUP, which asks for a reload, is refused with that reason."""
    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, lambda: log.error("no reload: %s", why))
