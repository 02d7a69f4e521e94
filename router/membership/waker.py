"""Wakes models that have no replica: while requests of one are held, a call waits at its Serve deployment's handle.

A deployment at zero replicas hears of nothing but such calls. Rule: the event loop only sets a flag; whatever speaks
with Ray, which blocks and may hang while the cluster's head is away, does so in a thread of the model's own. That ends
when nothing has been held for a while. `RayWaker` owns the threads.

One call is as good as many: from zero Serve starts the same number of replicas for any, and when the first one runs it
reports what it got.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Final

from ray import serve

from router import ray_private
from router.membership.base import DEPLOYMENT, application_name
from router.options import EngineOptions

log = logging.getLogger(__name__)

LOOK_INTERVAL_S: Final = 0.1
"""How soon a call is taken back when nothing is held any more."""
CALL_S: Final = 10.0
"""How long one call waits. Then another takes its place, in case Serve was started anew and has forgotten it."""
PAUSE_S: Final = 1.0
"""Between calls that are answered, or fail, while requests are still held."""
LINGER_S: Final = 30.0
"""How long a thread outlasts the last held request."""


class RayWaker:
    """See `router.wake.Waker`; for the engines that Serve scales."""

    def __init__(self, engines: Sequence[EngineOptions]) -> None:
        """The process must be part of the Ray cluster before a request is held."""
        self._callers = {
            engine.served_model_name or engine.name: Caller(application_name(engine.name))
            for engine in engines
            if engine.autoscaling is not None
        }

    def wanted(self, model: str, held: int) -> None:
        """See `router.wake.Waker.wanted`. Models without autoscaling have no use for it."""
        caller = self._callers.get(model)
        if caller is not None:
            caller.want(held > 0)

    async def close(self) -> None:
        """Takes all calls back; does not wait for Ray."""
        for caller in self._callers.values():
            caller.want(False)


class Caller:
    """Keeps a call waiting at one application's handle while it is wanted."""

    def __init__(self, application: str) -> None:
        self._application = application
        self._changed = threading.Condition()
        self._wanted = False
        self._running = False
        self._failed = ""
        self._handle: Any = None

    def want(self, wanted: bool) -> None:
        """Returns at once."""
        with self._changed:
            if wanted == self._wanted:
                return
            self._wanted = wanted
            self._changed.notify()
            if wanted and not self._running:
                self._running = True
                # A daemon, so that a call that hangs does not hold up the end of the process.
                threading.Thread(target=self._run, name=f"wake {self._application}", daemon=True).start()

    def _run(self) -> None:
        response: Any = None
        while self._is_wanted(LINGER_S):
            try:
                response = self._call(response)
                self._failed = ""
            except Exception as error:
                response = None
                self._complain(error)
                self._rest()
        _take_back(response)

    def _is_wanted(self, wait_s: float) -> bool:
        """Whether a call is wanted, after waiting that long for it; where none is, the thread is over."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._wanted, wait_s):
                self._running = False
            return self._wanted

    def _call(self, previous: Any) -> Any:
        """Has a call wait for `CALL_S`, until it is answered, or until none is wanted; gives it if it still waits."""
        if self._handle is None:
            self._handle = serve.get_deployment_handle(DEPLOYMENT, self._application)
        response = self._handle.remote()
        _take_back(previous)  # Only now, so that Serve sees one all the time.
        until = time.monotonic() + CALL_S
        while self._wanted and time.monotonic() < until:
            with suppress(TimeoutError):
                response.result(timeout_s=LOOK_INTERVAL_S)
                self._rest()
                return None
        if self._wanted:
            serve.status()  # Raises where Serve has gone.
            return response
        _take_back(response)
        return None

    def _rest(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self._wanted, PAUSE_S)

    def _complain(self, error: Exception) -> None:
        """Once for each cause. The next call begins anew, for Serve may have been, too."""
        self._handle = None
        ray_private.forget_serve()
        cause = ray_private.reason(error)
        if cause != self._failed:
            self._failed = cause
            log.warning("%s cannot be woken: %s", self._application, cause)


def _take_back(response: Any) -> None:
    if response is not None:
        with suppress(Exception):
            response.cancel()
