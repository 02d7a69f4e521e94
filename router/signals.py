"""How router processes end, and what they make of a hang-up."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys

log = logging.getLogger(__name__)


def stop_event(*, parent_pipe: bool) -> asyncio.Event:
    """Set by SIGINT and SIGTERM, and with `parent_pipe` when the parent, who holds our standard input, is gone."""
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    stop_on_signals(stop)
    if parent_pipe:
        # Nothing more comes on it, so readable means closed; and closed it stays readable.
        def closed() -> None:
            loop.remove_reader(sys.stdin.fileno())
            stop.set()

        loop.add_reader(sys.stdin.fileno(), closed)
    return stop


def stop_on_signals(stop: asyncio.Event) -> None:
    """Sets it by SIGINT and SIGTERM."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)


def ignore_hangup(why: str) -> None:
    """SIGHUP, which asks for a reload, is refused with that reason."""
    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, lambda: log.error("no reload: %s", why))
