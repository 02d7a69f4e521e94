"""Wakes models that have no replica: while requests of one are held, a call waits at its Serve deployment's handle.

A deployment at zero replicas hears of nothing but such calls, and one call is as good as many: Serve starts the same
number of replicas for any. Where replicas run, calls are answered at once; each tells one of them how many requests are
held here, and the replica reports it to the autoscaler. Rule: the event loop only sets a flag; whatever speaks
with Ray, which blocks and may hang while the cluster's head is away, does so in a thread of the model's own. That ends
when nothing has been held for a while. `RayWaker` owns the threads.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Final

import ray
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
        router = f"{socket.gethostname()}:{os.getpid()}"
        self._callers = {
            engine.served_model_name or engine.name: Caller(application_name(engine.name), router)
            for engine in engines
            if engine.autoscaling is not None
        }

    def wanted(self, model: str, held: int) -> None:
        """See `router.wake.Waker.wanted`. Models without autoscaling have no use for it."""
        caller = self._callers.get(model)
        if caller is not None:
            caller.want(held)

    async def close(self) -> None:
        """Takes all calls back; does not wait for Ray."""
        for caller in self._callers.values():
            caller.close()


class Caller:
    """Keeps a call waiting at one application's handle while it is wanted."""

    def __init__(self, application: str, router: str) -> None:
        """`router` is this process's name, one of its own."""
        self._application = application
        self._router = router
        self._changed = threading.Condition()
        self._held = 0
        self._running = self._closed = False
        self._failed = ""
        self._handle: Any = None

    def want(self, held: int) -> None:
        """So many requests are held now. Returns at once."""
        with self._changed:
            began, over = held > 0 and not self._held, self._held > 0 and not held
            self._held = held
            if began or over:
                self._changed.notify()
            if began and not self._running:
                self._running = True
                # A daemon, so that a call that hangs does not hold up the end of the process.
                threading.Thread(target=self._run, name=f"wake {self._application}", daemon=True).start()

    def close(self) -> None:
        """Takes the call back, and ends the thread as soon as Ray lets it."""
        with self._changed:
            self._held, self._closed = 0, True
            self._changed.notify()

    def _run(self) -> None:
        response: Any = None
        while self._is_wanted():
            try:
                response = self._call(response)
                self._failed = ""
            except Exception as error:
                response = None
                self._complain(error)
                self._rest()
            if not self._held:
                _take_back(response)
                response = None

    def _is_wanted(self) -> bool:
        """Whether a call is wanted, now or soon; where none is, the thread is over."""
        with self._changed:
            self._changed.wait_for(lambda: self._held or self._closed, LINGER_S)
            self._running = self._held > 0
            return self._running

    def _call(self, previous: Any) -> Any:
        """Has a call wait for `CALL_S`, until it is answered, or until none is wanted; gives it if it still waits."""
        if not ray.is_initialized():
            raise ConnectionError("this process is no part of the Ray cluster yet")  # Serve would start another one.
        if self._handle is None:
            self._handle = serve.get_deployment_handle(DEPLOYMENT, self._application)
        response = self._handle.remote(self._router, self._held)
        _take_back(previous)  # Only now, so that Serve sees one all the time.
        until = time.monotonic() + CALL_S
        while self._held and time.monotonic() < until:
            with suppress(TimeoutError):
                response.result(timeout_s=LOOK_INTERVAL_S)
                self._rest()
                return None
        if self._held:  # Else Ray may be shut down by now, and asking would start another one.
            serve.status()  # Raises where Serve has gone.
        return response

    def _rest(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self._held, PAUSE_S)

    def _complain(self, error: Exception) -> None:
        """Once for each cause. The next call begins anew, for Serve may have been, too."""
        handle, self._handle = self._handle, None
        if handle is not None:
            with suppress(Exception):
                handle.shutdown()  # It would go on reporting to Serve for ever, and so would each one after it.
        ray_private.forget_serve()
        cause = ray_private.reason(error)
        if cause != self._failed:
            self._failed = cause
            log.warning("%s cannot be woken: %s", self._application, cause)


def _take_back(response: Any) -> None:
    if response is not None:
        with suppress(Exception):
            response.cancel()
