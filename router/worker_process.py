"""One worker as its supervisor sees it: the process, what it says, and what it last told of its figures."""

from __future__ import annotations

import asyncio
import enum
import logging
import socket
import sys
from collections.abc import Callable, Coroutine

import msgspec

from router.control import (
    HURRY_S,
    LAST_WORDS,
    STOP_MARGIN_S,
    Channel,
    Collect,
    Collected,
    Drain,
    Hurry,
    Leaving,
    Listen,
    Notice,
    Order,
    Page,
    Ready,
    Scrape,
    Seat,
    Started,
    ToSupervisor,
    spawn_arguments,
    supervisors_end,
)
from router.listeners import Listeners
from router.observe.merge import Families
from router.options import Config

log = logging.getLogger(__name__)


class State(enum.Enum):
    """Where a worker stands in its life."""

    STARTING = "starting"
    STARTED = "started"
    """It can listen, and has no replica of some required model."""
    READY = "ready"
    DRAINING = "draining"
    """It accepts nothing more and ends once it has served what it has."""


class WorkerProcess:
    """A child process; make one with `start`, and let `run` live through it."""

    def __init__(
        self,
        number: int,
        process: asyncio.subprocess.Process,
        channel: Channel[ToSupervisor],
        end_limit_s: float,
        changed: Callable[[], None],
        scraped: Callable[[WorkerProcess, int], None],
    ) -> None:
        """It is killed where it has not ended `end_limit_s` after it was told to."""
        self.number = number
        self.state = State.STARTING
        self.was_started = False
        """Whether it was ever able to serve."""
        self._slots: tuple[int, ...] | None = None
        """What it was told to listen on."""
        self.figures: Families = []
        """What it last told; kept for when it does not answer, and for when it has ended."""
        self._process = process
        self._channel = channel
        self._end_limit_s = end_limit_s
        self._ending: asyncio.Timeout | None = None
        self._changed = changed
        self._scraped = scraped
        self._asked = LAST_WORDS
        self._answers: dict[int, asyncio.Future[None]] = {}

    @classmethod
    async def start(
        cls,
        number: int,
        config: Config,
        listeners: Listeners,
        changed: Callable[[], None],
        scraped: Callable[[WorkerProcess, int], None],
    ) -> WorkerProcess:
        """A process with that number and configuration. `changed` is called with its every new state, `scraped` when
        it wants the figures of all workers, by a `Page` of the number given."""
        ours, theirs = socket.socketpair()
        channel = await supervisors_end(ours)
        with theirs:
            seat = Seat(
                number,
                theirs.fileno(),
                listeners.http.numbers() if listeners.http is not None else (),
                listeners.grpc.numbers() if listeners.grpc is not None else (),
                listeners.admin[number].numbers()[0] if listeners.admin else (),
            )
            try:
                process = await _spawned(seat)
            except BaseException:
                await channel.close()
                raise
        assert process.stdin is not None
        process.stdin.write(msgspec.json.encode(Order(listeners.settled(config, number), seat)) + b"\n")
        return cls(number, process, channel, config.shutdown.grace_s + STOP_MARGIN_S, changed, scraped)

    @property
    def pid(self) -> int:
        return self._process.pid

    async def run(self) -> int:
        """Hears it until it ends; returns its exit status. Ends it where the caller is cancelled."""
        try:
            while (message := await self._channel.receive()) is not None:
                self._heard(message)
        finally:
            # One that has closed the channel ends, or cannot be told anything any more.
            status = await _to_its_end(self._end())
            await self._channel.close()
            for answer in self._answers.values():
                answer.cancel()
        return status

    def _heard(self, message: ToSupervisor) -> None:
        if isinstance(message, Collected):
            self.figures = message.families
            answer = self._answers.pop(message.number, None)
            if answer is not None and not answer.done():
                answer.set_result(None)
        elif isinstance(message, Scrape):
            self._scraped(self, message.number)
        elif isinstance(message, Started):
            self._becomes(State.STARTED)
        elif isinstance(message, Ready):
            self._becomes(State.READY)
        elif isinstance(message, Leaving):
            self._becomes(State.DRAINING)

    def _becomes(self, state: State) -> None:
        if self.state is not State.DRAINING:
            self.state = state
            self.was_started = self.was_started or state in (State.STARTED, State.READY)
            self._changed()

    def listen(self, slots: tuple[int, ...]) -> None:
        """Tells it which slots to listen on, where that is news."""
        if slots != self._slots:
            self._slots = slots
            self._channel.send(Listen(slots))

    def drain(self, limit_s: float) -> None:
        """Tells it that others have taken over."""
        self._channel.send(Drain(limit_s))
        self._becomes(State.DRAINING)

    def notice(self, limit_s: float) -> None:
        """Tells it that the router goes away after that time."""
        self._channel.send(Notice(limit_s))

    def hurry(self) -> None:
        """Tells it to end without its streams in flight."""
        self._channel.send(Hurry())
        self._end_limit_s = HURRY_S
        if self._ending is not None and not self._ending.expired():
            self._ending.reschedule(asyncio.get_running_loop().time() + HURRY_S)

    def page(self, number: int, page: tuple[bytes, str]) -> None:
        """What it wanted to know."""
        self._channel.send(Page(number, *page))

    async def collect(self, limit_s: float) -> bool:
        """Has it tell its figures; whether it has within that time."""
        self._asked = number = self._asked + 1
        answer = self._answers[number] = asyncio.get_running_loop().create_future()
        self._channel.send(Collect(number))
        await asyncio.wait([answer], timeout=limit_s)
        self._answers.pop(number, None)
        return answer.done() and not answer.cancelled()

    async def _end(self) -> int:
        """Closing its standard input tells it to finish; hears its last words until it has, and returns its status."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            async with asyncio.timeout(self._end_limit_s) as self._ending:
                try:
                    while (message := await self._channel.receive()) is not None:
                        self._heard(message)
                    return await self._process.wait()
                finally:
                    self._ending = None
        except TimeoutError:
            log.error("worker process %d did not stop in time and is killed", self.pid)
            self._process.kill()
            return await self._process.wait()


async def _to_its_end(work: Coroutine[None, None, int]) -> int:
    """Awaits it whole, also where the caller is cancelled meanwhile: who goes on takes the process for ended."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await task
        raise


async def _spawned(seat: Seat) -> asyncio.subprocess.Process:
    inherited = [seat.control, *seat.admin, *(fd for slots in (seat.http, seat.grpc) for fds in slots for fd in fds)]
    return await asyncio.create_subprocess_exec(
        *spawn_arguments(),
        stdin=asyncio.subprocess.PIPE,
        stdout=sys.stderr.fileno(),  # ours tells addresses and nothing else
        pass_fds=inherited,
        start_new_session=True,  # a Ctrl-C at the terminal reaches the supervisor alone
    )
