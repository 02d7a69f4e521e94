"""A router that tells what it holds and how long its event loop was busy without a pause.

`python -m loadtests.watched FILE MODULE ARGUMENT…` runs a module so. On SIGUSR1 it adds a line to the file, on SIGUSR2
it collects garbage first. A *stretch* is the CPU time that the loop's thread took from one timer to the next, with
timers a millisecond apart: for so long no stream got its token. It is CPU time, so that other processes on the machine
do not count, unless they kept it from a CPU for so long that much had come meanwhile.
"""

from __future__ import annotations

import asyncio
import gc
import os
import runpy
import signal
import sys
import time
from collections import Counter
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, Final

import msgspec
import uvloop

from router.control import spawn_arguments

ANSWER_TIMEOUT_S: Final = 30.0
TICK_S: Final = 0.001
_PER_MS: Final = 20
"""Stretches are counted by twentieths of a millisecond."""


class Told(msgspec.Struct):
    """What a process says of itself."""

    tasks: int
    """asyncio's, not done."""
    objects: int
    """That garbage collection knows of; those frozen at the start are none of them. 0 where none was collected."""
    stretches: dict[int, int] = {}
    """How often each length came since the process was asked last; see `stretch_ms`."""

    def stretch_ms(self, share: float) -> float:
        """The length that this share of stretches is not above; 1 for the longest."""
        wanted, seen = share * sum(self.stretches.values()), 0
        for length, number in sorted(self.stretches.items()):
            seen += number
            if seen >= wanted:
                return length / _PER_MS
        return 0.0

    def longer(self, ms: float) -> int:
        """How many stretches were longer."""
        return sum(number for length, number in self.stretches.items() if length > ms * _PER_MS)


def command(file: Path) -> list[str]:
    """The command line of a router's worker that tells, in place of `spawn_arguments`."""
    python, _, *rest = spawn_arguments()
    return [python, "-m", "loadtests.watched", str(file), *rest]


def ask(pid: int, file: Path, *, collect: bool = False) -> Told:
    """What that process says now. To collect its garbage first stops its streams, for a while where it has many.

    Raises `TimeoutError`.
    """
    told = len(_lines(file))
    os.kill(pid, signal.SIGUSR2 if collect else signal.SIGUSR1)
    deadline = time.monotonic() + ANSWER_TIMEOUT_S
    while len(lines := _lines(file)) == told:
        if time.monotonic() > deadline:
            raise TimeoutError(f"process {pid} does not tell what it holds")
        time.sleep(0.01)
    return msgspec.json.decode(lines[-1], type=Told)


def _lines(file: Path) -> list[bytes]:
    return file.read_bytes().split(b"\n")[:-1] if file.exists() else []


class _Watch:
    def __init__(self, file: Path) -> None:
        self._file = file
        self._stretches: Counter[int] = Counter()
        self._skip = False
        self._loop: asyncio.AbstractEventLoop | None = None

    def tell(self, *, collect: bool) -> None:
        objects = 0
        if collect:
            gc.collect()
            objects = len(gc.get_objects())
        tasks = len(asyncio.all_tasks(self._loop)) if self._loop is not None else 0
        with self._file.open("ab") as out:
            out.write(msgspec.json.encode(Told(tasks, objects, self._stretches)) + b"\n")
        self._stretches = Counter()
        self._skip = True  # What telling took is nobody's fault.

    async def tick(self) -> None:
        before = time.thread_time()
        while True:
            await asyncio.sleep(TICK_S)
            now = time.thread_time()
            if not self._skip:
                self._stretches[round((now - before) * 1e3 * _PER_MS)] += 1
            before, self._skip = now, False

    async def beside(self, main: Coroutine[Any, Any, Any]) -> Any:
        self._loop = asyncio.get_running_loop()
        ticking = asyncio.create_task(self.tick())
        try:
            return await main
        finally:
            ticking.cancel()


def main(file: Path, module: str, arguments: list[str]) -> None:
    watch, run = _Watch(file), uvloop.run
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, lambda number, frame: watch.tell(collect=number == signal.SIGUSR2))
    uvloop.run = lambda main, **options: run(watch.beside(main), **options)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
