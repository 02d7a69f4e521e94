"""The supervisor: keeps the asked number of workers alive, and replaces them by others with a new configuration.

Job: start workers, restart those that die, reload, and add up their figures. Rule: a worker is replaced before it is
taken away: its successor is ready and has the sockets, with whatever waits there, before it is told to drain. The
supervisor owns the listening sockets and the processes; it serves nothing itself.
"""

from __future__ import annotations

import asyncio
import logging
import signal
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from typing import Final

from router.errors import ConfigError
from router.generation import Generation
from router.listeners import Listeners, share
from router.observe.merge import Families, exposition, merge, remains
from router.observe.workers import WorkerMetrics
from router.options import Config
from router.signals import Stop
from router.watched import LOOK_S, WatchedFile
from router.worker_process import State, WorkerProcess

log = logging.getLogger(__name__)

READY_LIMIT_S: Final = 120.0
"""For the workers of a new configuration to become ready, where those of the old one are."""
DRAIN_LIMIT_S: Final = 3600.0
"""For the streams of replaced workers to end."""
RENEW_AGAIN_S: Final = 30.0
"""Between two tries to replace workers that belong to a Ray node which is gone."""
COLLECT_LIMIT_S: Final = 2.0
"""For a worker to tell its figures; a healthy one takes milliseconds."""


class Supervisor:
    """Runs workers until told to stop."""

    def __init__(
        self, config: Config, read_again: Callable[[], Config] | None, file: WatchedFile | None = None
    ) -> None:
        """Binds the ports. `read_again` reads the configuration anew; None where there is nothing to read it from.
        `file` is what it reads, if any.

        Raises `ConfigError`.
        """
        self._config = config
        self._read_again = read_again
        self._file = file
        self._listeners = Listeners(config)
        self._generations: list[Generation] = []
        """The last serves; those before it drain."""
        self._ended: Families = []
        """What workers had counted that have ended."""
        self._metrics = WorkerMetrics(self._states)
        self._news = asyncio.Event()
        self._hangup = asyncio.Event()
        self._forced = False
        """A signal asks for the reload, and not only a file that has changed."""
        self._renewing = False
        """The workers belong to a Ray node that is gone, and hear of no new replicas before they are replaced."""
        self._candidate: Generation | None = None
        """What a reload waits for; it may yet replace the last generation."""
        self._closing = False
        self._tasks: set[asyncio.Task[object]] = set()

    async def run(self, ready: Callable[[Listeners], None], stop: Stop) -> int:
        """Until `stop` is asked for; returns the exit status. `ready` is called once all workers are.

        That is the status of a worker that ended before it had started, where that happens at the start: another try
        would end the same way.
        """
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self._hung_up)
        first = self._generation(self._config, self._listeners)
        self._generations.append(first)
        self._own(self._announce(ready), "announce")
        changes = [self._own(self._reloads(), "reloads"), self._own(self._watch(), "watch of the configuration")]
        ends = [asyncio.create_task(stop.asked.wait()), asyncio.create_task(first.failed.wait())]
        try:
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            for change in changes:
                change.cancel()
            if stop.asked.is_set():
                await self._give_notice(stop)
        finally:
            await self._close(stop, ends)
        return stop.status if stop.asked.is_set() else first.status

    async def _give_notice(self, stop: Stop) -> None:
        """Has load balancers notice that the router goes away, while it serves what they still send."""
        serving, notice_s = self._generations[-1], self._config.shutdown.notice_s
        if stop.promptly.is_set() or not any(worker.was_started for worker in serving.workers.values()):
            return
        log.info("going away: unready, and serving for another %g s", notice_s)
        serving.notice(notice_s)
        await stop.within_notice(notice_s)

    async def _close(self, stop: Stop, ends: Sequence[asyncio.Task[object]]) -> None:
        log.info("stopping: streams in flight may end; another signal cuts them")
        # First of all, so that nobody new waits for workers that accept no more.
        self._closing = True
        self._listeners.close()
        for task in (*ends, *self._tasks):
            if not task.cancelling():  # A second time would keep a reload from seeing its workers' end.
                task.cancel()
        hurrying = asyncio.create_task(self._hurry(stop))
        # All at once: what a reload began or leaves behind has no more time than the rest.
        closing = [generation.close() for generation in self._generations]
        await asyncio.gather(*closing, *ends, *self._tasks, return_exceptions=True)
        hurrying.cancel()
        await asyncio.gather(hurrying, return_exceptions=True)

    async def _hurry(self, stop: Stop) -> None:
        await stop.hurried.wait()
        log.warning("hurrying: streams in flight are cut")
        for generation in (*self._generations, self._candidate):
            if generation is not None:
                generation.hurry()

    def _generation(self, config: Config, listeners: Listeners) -> Generation:
        return Generation(config, listeners, self._metrics, self._changed, self._scraped, self._gone)

    def _own(self, work: Coroutine[object, object, object], name: str) -> asyncio.Task[object]:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[object]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.critical("%s failed; the workers go on without it", task.get_name(), exc_info=error)

    # Who listens where.

    def _changed(self) -> None:
        """Some worker's state is another."""
        news, self._news = self._news, asyncio.Event()
        news.set()
        if self._generations and not self._closing:
            self._share_out()

    def _share_out(self) -> None:
        """Tells the workers that serve which slots are theirs."""
        workers = self._generations[-1].workers
        ready = [number for number, worker in workers.items() if worker.state is State.READY]
        started = [number for number, worker in workers.items() if worker.state is State.STARTED]
        shares = share(self._listeners.slots, ready, started)
        for number, worker in workers.items():
            if worker.state in (State.STARTED, State.READY):
                worker.listen(shares.get(number, ()))

    async def _announce(self, ready: Callable[[Listeners], None]) -> None:
        while not self._generations[-1].ready:
            await self._news.wait()
        ready(self._listeners)

    # Reloads.

    def _hung_up(self) -> None:
        self._forced = True
        self._hangup.set()

    def renew(self) -> None:
        """The workers' Ray node is gone and another there: has others take over, however often that fails."""
        self._renewing = True
        self._hung_up()

    def _renew_again(self) -> None:
        if self._renewing:
            self._hung_up()

    async def _reloads(self) -> None:
        while True:
            await self._hangup.wait()
            self._hangup.clear()
            forced, self._forced = self._forced, False
            try:
                outcome = await self._reload(forced)
            except Exception:  # The next one, with another configuration, must find somebody to do it.
                log.exception("reload failed, the configuration in use stays")
                outcome = "failed"
            if outcome:
                self._metrics.reloaded(outcome)
            self._renewing = self._renewing and outcome != "ok"
            if self._renewing:
                asyncio.get_running_loop().call_later(RENEW_AGAIN_S, self._renew_again)

    async def _watch(self) -> None:
        """Asks for a reload where the file that the configuration was read from has changed."""
        while self._file is not None:
            await asyncio.sleep(LOOK_S)
            if self._file.changed() and self._config.reload_on_change:
                log.info("%s has changed", self._file.path)
                self._hangup.set()

    async def _reload(self, forced: bool) -> str:
        """Its outcome; empty where the file says what is in use already, unless it is `forced`."""
        log.info("reloading the configuration")
        if self._read_again is None:
            log.error("reload refused: this router was not started from a configuration that could be read again")
            return "refused"
        if self._file is not None:
            self._file.reading()
        try:
            config = self._read_again()
            if config == self._config and not forced:
                log.info("no reload: the configuration is the one in use")
                return ""
            listeners = Listeners(config, self._listeners)
        except ConfigError as error:
            log.error("reload refused, the configuration in use stays: %s", error.message)
            return "refused"
        return await self._replace(config, listeners)

    async def _replace(self, config: Config, listeners: Listeners) -> str:
        """Has workers with that configuration take over; the outcome."""
        old, new = self._generations[-1], self._generation(config, listeners)
        taken_over, self._candidate = False, new
        try:
            taken_over = await self._can_take_over(new, old) and _opened(listeners)
        finally:
            if not taken_over:
                await new.close()
                listeners.abandon()
            self._candidate = None
        if not taken_over:
            log.error("reload failed, the configuration in use stays")
            return "failed"
        self._config, self._listeners = config, listeners
        self._generations.append(new)
        self._share_out()
        self._own(self._drain(old), "drain")
        for address in listeners.dropped:
            address.close()
        logging.getLogger().setLevel(config.log.level.upper())
        log.info("reloaded: %d workers serve, %d finish what they have", len(new.workers), len(old.workers))
        return "ok"

    async def _can_take_over(self, new: Generation, old: Generation) -> bool:
        """Waits until the new workers are as ready as the old ones; False where they do not become so."""
        try:
            async with asyncio.timeout(READY_LIMIT_S):
                while not (new.ready or (new.started and not old.serving)):
                    if new.failed.is_set():
                        return _unready()
                    await self._news.wait()
        except TimeoutError:
            return _unready()
        return True

    async def _drain(self, generation: Generation) -> None:
        await generation.drain(DRAIN_LIMIT_S)
        self._generations.remove(generation)

    # Figures.

    def _gone(self, worker: WorkerProcess) -> None:
        """It has ended and is none of its generation's workers any more: what it had counted stays."""
        self._ended = merge([self._ended, remains(worker.figures)])
        self._changed()

    def _workers(self) -> list[WorkerProcess]:
        return [worker for generation in self._generations for worker in generation.workers.values()]

    def _states(self) -> dict[str, int]:
        counts = Counter(worker.state for worker in self._workers())
        return {state.value: counts[state] for state in State}

    def _scraped(self, worker: WorkerProcess, number: int) -> None:
        self._own(self._tell(worker, number), "scrape")

    async def _tell(self, asking: WorkerProcess, number: int) -> None:
        workers = [worker for worker in self._workers() if worker.state is not State.STARTING]  # They have no figures.
        answered = await asyncio.gather(*(worker.collect(COLLECT_LIMIT_S) for worker in workers))
        fresh = {worker for worker, has in zip(workers, answered, strict=True) if has}
        # Those that there are now: one that ended meanwhile is among the ended, and must not count twice.
        there = self._workers()
        counted = [worker for worker in there if worker in fresh]
        silent = [remains(worker.figures) for worker in there if worker not in fresh]
        figures = [self._metrics.snapshot(len(counted)), *(worker.figures for worker in counted), *silent, self._ended]
        asking.page(number, exposition(merge(figures)))


def _unready() -> bool:
    log.error("the new workers did not become ready")
    return False


def _opened(listeners: Listeners) -> bool:
    try:
        listeners.open()
    except OSError as error:
        log.error("cannot listen where the configuration says: %s", error)
        return False
    return True
