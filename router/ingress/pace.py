"""How many of those who ask, or leave, are attended to in one turn of the event loop.

Rule: a crowd that comes at one moment gets its turns in the order in which it came, and tokens that come meanwhile go
out in between. Those who ask and those who leave are attended to in turns, so that neither crowd holds the other up.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable


class Pace:
    """One server's."""

    def __init__(self, per_turn: int) -> None:
        self._per_turn = self._left = per_turn
        self._asking: deque[Callable[[], object]] = deque()
        self._leaving: deque[Callable[[], object]] = deque()
        self._first, self._second = self._leaving, self._asking

    def admits(self, loop: asyncio.AbstractEventLoop, read: Callable[[], object]) -> bool:
        """Whether the caller may read on now; if not, `read` is called in a later turn."""
        return self._begins(loop, self._asking, read)

    def cancel(self, loop: asyncio.AbstractEventLoop, task: asyncio.Task[None], *, begun: bool) -> None:
        """Cancels the task in its turn; at once where it has not begun to run, so that nothing is asked for nobody."""
        if begun:
            self.run(loop, task.cancel)
        else:
            task.cancel()

    def run(self, loop: asyncio.AbstractEventLoop, work: Callable[[], object]) -> None:
        """Does this for one who leaves, at once or in a later turn."""
        if self._begins(loop, self._leaving, work):
            work()

    def _begins(
        self, loop: asyncio.AbstractEventLoop, waiting: deque[Callable[[], object]], work: Callable[[], object]
    ) -> bool:
        left = self._left
        if left == self._per_turn:
            loop.call_soon(self._turn, loop)
        elif not left:
            waiting.append(work)
            return False
        self._left = left - 1
        return True

    def _turn(self, loop: asyncio.AbstractEventLoop) -> None:
        asking, leaving, left = self._asking, self._leaving, self._per_turn
        self._left = 0  # Who is listened to and has more to ask is behind all others.
        if asking or leaving:
            loop.call_soon(self._turn, loop)
        while left and (asking or leaving):
            left -= 1
            self._first, self._second = self._second, self._first
            try:
                (self._first or self._second).popleft()()
            except Exception as error:
                loop.call_exception_handler({"message": "a defect in what waited for its turn", "exception": error})
        self._left = left
