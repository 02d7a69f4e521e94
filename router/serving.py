"""The main functions of the processes that serve: one alone, or one of several workers under a supervisor.

Rule: both end by SIGINT, by SIGTERM and with whoever started them, and give streams in flight time to end unless they
are asked twice.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from typing import Final

from router import garbage
from router.app import App, Sockets
from router.control import (
    LAST_WORDS,
    Channel,
    Collect,
    Collected,
    Drain,
    Hurry,
    Leaving,
    Listen,
    Notice,
    Page,
    Ready,
    Scrape,
    Seat,
    Started,
    ToWorker,
    address_line,
    workers_end,
)
from router.errors import InternalError
from router.options import Config
from router.signals import Stop, ignore_hangup, stop_asked, stop_on_signals

log = logging.getLogger(__name__)

PAGE_LIMIT_S: Final = 5.0
"""For the supervisor to add up all workers' figures; longer than it waits for any of them."""


async def alone(config: Config, ready: Callable[[str], None]) -> int:
    """A router by itself until a signal or its parent's end; `ready` takes the line that tells its addresses."""
    stop = stop_asked(parent_pipe=True)
    ignore_hangup("this router was not started from a configuration that could be read again")
    # Joining Ray puts a handler over ours that prints a stack trace and does not stop.
    app = App(config, joined=lambda: stop_on_signals(stop))
    await app.start()

    async def announce() -> None:
        await app.wait_ready()
        garbage.settle()
        ready(address_line(config, app.http_port, app.grpc_port, app.admin_port))

    announcing = asyncio.create_task(announce())
    await stop.asked.wait()
    announcing.cancel()
    await asyncio.gather(announcing, return_exceptions=True)
    if not stop.promptly.is_set():
        await _give_notice(app, config.shutdown.notice_s, stop)
    await _stopped(app, stop)
    return stop.status


async def _give_notice(app: App, notice_s: float, stop: Stop) -> None:
    log.info("going away: unready, and serving for another %g s", notice_s)
    app.notice(notice_s)
    await stop.within_notice(notice_s)


async def _stopped(app: App, stop: Stop) -> None:
    """Stops it, faster where it is hurried."""
    log.info("stopping: streams in flight %s", "are cut" if stop.hurried.is_set() else "may end")
    stopping = asyncio.create_task(app.stop(0 if stop.hurried.is_set() else None))
    hurried = asyncio.create_task(stop.hurried.wait())
    await asyncio.wait([stopping, hurried], return_when=asyncio.FIRST_COMPLETED)
    if not stopping.done():
        log.warning("hurrying: streams in flight are cut")
        await app.hurry()
    hurried.cancel()
    await stopping
    # The process only ends now. Nobody waits for an answer of the directory that comes yet, and Ray, being shut
    # down, would log with a stack trace that it cannot read it.
    logging.getLogger("ray._private.serialization").disabled = True


async def seated(config: Config, seat: Seat) -> int:
    """One of several workers, until the supervisor ends it, is gone, or has it replaced."""
    return await _Worker(config, seat, await workers_end(seat)).run()


class _Worker:
    """Does what the supervisor says."""

    def __init__(self, config: Config, seat: Seat, channel: Channel[ToWorker]) -> None:
        self._seat = seat
        self._channel = channel
        self._stop = stop_asked(parent_pipe=True)
        ignore_hangup("a reload is the supervisor's to do")
        self._app = App(
            config,
            joined=lambda: stop_on_signals(self._stop),
            worker=seat.number,
            sockets=_inherited(seat),
            page=self._page,
        )
        self._draining: asyncio.Task[None] | None = None
        self._asked = 0
        self._pages: dict[int, asyncio.Future[tuple[bytes, str]]] = {}

    async def run(self) -> int:
        await self._app.start()
        self._channel.send(Started())
        tasks = [asyncio.create_task(self._hear()), asyncio.create_task(self._announce())]
        await self._stop.asked.wait()
        self._channel.send(Leaving())
        if self._draining is not None:
            self._draining.cancel()
            tasks.append(self._draining)
        await _stopped(self._app, self._stop)
        self._channel.send(Collected(LAST_WORDS, await self._app.figures()))
        for task in tasks:
            task.cancel()
        for end in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(end, Exception):
                log.critical("a worker failed", exc_info=end)
        await self._channel.close()
        return self._stop.status

    async def _announce(self) -> None:
        """Tells whenever its readiness changes."""
        await self._app.wait_ready()
        garbage.settle()
        while True:
            self._channel.send(Ready())
            await self._app.wait_ready(False)
            self._channel.send(Started())
            await self._app.wait_ready()

    async def _hear(self) -> None:
        """Ends the worker if it fails: one that cannot be told anything must not go on."""
        try:
            while (message := await self._channel.receive()) is not None:
                await self._obey(message)
        finally:
            self._stop.at_once()

    async def _obey(self, message: ToWorker) -> None:
        if isinstance(message, Listen):
            if self._draining is None and not self._stop.asked.is_set():  # It may have been sent before that was known.
                await self._app.listen(message.slots)
        elif isinstance(message, Collect):
            self._channel.send(Collected(message.number, await self._app.figures()))
        elif isinstance(message, Page):
            page = self._pages.pop(message.number, None)
            if page is not None and not page.done():
                page.set_result((message.text, message.content_type))
        elif isinstance(message, Notice):
            self._app.notice(message.limit_s)
        elif isinstance(message, Hurry):
            self._stop.hurry()
        elif isinstance(message, Drain) and self._draining is None:
            self._draining = asyncio.create_task(self._drain(message.limit_s))

    async def _drain(self, limit_s: float) -> None:
        try:
            await self._app.drain(limit_s)
        finally:
            self._stop.at_once()

    async def _page(self) -> tuple[bytes, str]:
        """The metrics of all workers. Raises `InternalError` where the supervisor does not tell."""
        self._asked = number = self._asked + 1
        page: asyncio.Future[tuple[bytes, str]] = asyncio.get_running_loop().create_future()
        self._pages[number] = page
        self._channel.send(Scrape(number))
        try:
            async with asyncio.timeout(PAGE_LIMIT_S):
                return await page
        except TimeoutError as error:
            raise InternalError("the workers' metrics could not be collected in time") from error
        finally:
            self._pages.pop(number, None)


def _inherited(seat: Seat) -> Sockets:
    def sockets(numbers: tuple[int, ...]) -> tuple[socket.socket, ...]:
        found = tuple(socket.socket(fileno=number) for number in numbers)
        for sock in found:
            sock.set_inheritable(False)  # Whatever this process may start has no part in them.
        return found

    return Sockets(tuple(map(sockets, seat.http)), tuple(map(sockets, seat.grpc)), sockets(seat.admin))
