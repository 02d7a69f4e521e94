"""The workers of one configuration, each kept alive until the generation drains or closes."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable
from typing import Final

from router.listeners import Listeners
from router.observe.workers import WorkerMetrics
from router.options import Config
from router.worker_process import State, WorkerProcess

log = logging.getLogger(__name__)

RESTART_MIN_S: Final = 1.0
RESTART_MAX_S: Final = 30.0
"""Between two starts of a worker that dies again and again."""
STEADY_S: Final = 60.0
"""A worker that lived so long is not in a crash loop: it is started again at once."""


def restart_delay_s(early_ends: int) -> float:
    """How long to wait with another start after so many lives in a row that were too short: 0, 1, 2, 4 … 30 s."""
    return 0.0 if early_ends <= 1 else min(RESTART_MAX_S, RESTART_MIN_S * 2.0 ** min(early_ends - 2, 10))


class Generation:
    """Starts its workers when it is made, in the running loop."""

    def __init__(
        self,
        config: Config,
        listeners: Listeners,
        metrics: WorkerMetrics,
        changed: Callable[[], None],
        scraped: Callable[[WorkerProcess, int], None],
        gone: Callable[[WorkerProcess], None],
    ) -> None:
        """`changed` and `scraped` are the workers' (see `WorkerProcess.start`); `gone` takes each that has ended."""
        self.workers: dict[int, WorkerProcess] = {}
        """Those that run, by number."""
        self.failed = asyncio.Event()
        """One ended that had never started: another try would end the same way."""
        self.status = 0
        """Its exit status."""
        self._config = config
        self._listeners = listeners
        self._metrics = metrics
        self._changed = changed
        self._scraped = scraped
        self._gone = gone
        self._draining = False
        self._leaves_at = math.inf
        self._keepers = [
            asyncio.create_task(self._keep(number), name=f"worker {number}") for number in range(config.workers)
        ]
        for keeper in self._keepers:
            keeper.add_done_callback(_report)

    @property
    def started(self) -> bool:
        """Whether all its workers can listen."""
        return self._all(State.STARTED, State.READY)

    @property
    def ready(self) -> bool:
        """Whether all its workers are ready."""
        return self._all(State.READY)

    @property
    def serving(self) -> bool:
        """Whether any of its workers is ready."""
        return any(worker.state is State.READY for worker in self.workers.values())

    def _all(self, *states: State) -> bool:
        running = self.workers.values()
        return len(running) == self._config.workers and all(worker.state in states for worker in running)

    def notice(self, limit_s: float) -> None:
        """Tells its workers that the router goes away after that time, those too that are to be started until then."""
        self._leaves_at = asyncio.get_running_loop().time() + limit_s
        for worker in self.workers.values():
            worker.notice(limit_s)

    def hurry(self) -> None:
        """While it closes: has its workers end without their streams in flight."""
        for worker in self.workers.values():
            worker.hurry()

    async def drain(self, limit_s: float) -> None:
        """Lets its workers finish what they have, and returns when all have ended."""
        self._draining = True
        for worker in tuple(self.workers.values()):
            worker.drain(limit_s)
        for number, keeper in enumerate(self._keepers):
            if number not in self.workers:
                keeper.cancel()  # It waits to start one again.
        await asyncio.wait(self._keepers)  # Who gives up waiting does not end them.

    async def close(self) -> None:
        """Stops its workers and waits for their end."""
        self._draining = True
        for keeper in self._keepers:
            if not keeper.cancelling():  # A second time would keep it from seeing its worker's end.
                keeper.cancel()
        await asyncio.wait(self._keepers)

    async def _keep(self, number: int) -> None:
        """Runs one worker, again when it dies."""
        early_ends, once_started = 0, False
        loop = asyncio.get_running_loop()
        while True:
            began = loop.time()
            try:
                status, started = await self._live(number)
            except OSError as error:
                log.error("worker %d could not be started: %s", number, error)
                status, started = 1, False
            if self._draining:
                return
            once_started = once_started or started
            if not once_started:
                self.status = status or 1
                self.failed.set()
                self._changed()
                return
            early_ends = early_ends + 1 if loop.time() - began < STEADY_S else 1
            self._metrics.restarted()
            delay_s = restart_delay_s(early_ends)
            log.error("worker %d ended with status %d; it is started again in %.0f s", number, status, delay_s)
            await asyncio.sleep(delay_s)

    async def _live(self, number: int) -> tuple[int, bool]:
        """One worker's life: its exit status, and whether it had started."""
        worker = await WorkerProcess.start(number, self._config, self._listeners, self._changed, self._scraped)
        self.workers[number] = worker
        if self._leaves_at < math.inf:
            worker.notice(max(0.0, self._leaves_at - asyncio.get_running_loop().time()))
        try:
            status = await worker.run()
        finally:
            del self.workers[number]
            self._gone(worker)
        return status, worker.was_started


def _report(keeper: asyncio.Task[None]) -> None:
    if not keeper.cancelled() and (error := keeper.exception()) is not None:
        log.critical("%s is not kept alive any more", keeper.get_name(), exc_info=error)
