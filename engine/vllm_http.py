"""Runs one HTTP stream through vLLM's OpenAI application in process: no socket in between.

Rule: payload bytes are passed on as the application made them, or as it would have made them: streams of completions
and chats go past its web framework (`engine.vllm_direct`), and most events of plain text are rendered beside it
(`engine.vllm_rendering`). An abort is what a client's disconnect is to the application, which is how it reaches
`AsyncLLM.abort` at any moment: cancelling the task that runs the application would not, because vLLM's handlers run in
a task of their own. A stream that goes past the framework runs in this task, which is cancelled.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, MutableMapping
from contextlib import aclosing
from typing import Any, Final
from urllib.parse import unquote

from engine.base import StreamOut
from engine.vllm_cache import serving
from engine.vllm_direct import DirectStreams
from engine.vllm_rendering import Rendering, watching
from router.errors import ReplicaFailed, ReplicaLost
from router.lane.frames import Submit

Message = MutableMapping[str, Any]

_DONE: Final = b"data: [DONE]\n\n"
_ROLE: Final = b'"delta":{"role":'
"""In a chat stream's first event, which holds no token and goes with the one that does."""

_log = logging.getLogger(__name__)


class HttpStream:
    """One call of the application.

    `lost` says whether the engine is dead. What the application makes of a dead engine is not passed on: the stream
    fails with `ReplicaLost` instead, so that one without a byte yet can go to another replica. `direct` are the streams
    that may go past the application and be rendered beside it; None for none.
    """

    def __init__(
        self, app: Any, call: Submit, out: StreamOut, lost: Callable[[], bool], direct: DirectStreams | None
    ) -> None:
        self._app = app
        self._call = call
        self._out = out
        self._lost = lost
        self._gone = asyncio.Event()
        self._body_taken = False
        self._begun = False
        """The first token is on its way."""
        self._events = False
        self._complete = False
        self._failed = False
        self._direct = direct
        self._task: asyncio.Task[Any] | None = None
        """While the stream goes past the application."""
        self._teaches: DirectStreams | None = None
        """Who wants to know how the application begins such a stream."""
        self._rendering = Rendering(self._rendered) if direct is not None else None

    def disconnect(self) -> None:
        """The client is gone: the application stops its work and what it still sends is dropped."""
        self._gone.set()
        if self._task is not None:
            self._task.cancel()

    async def run(self) -> None:
        """Returns when the application is done with the call; `out` is ended or failed by then unless disconnected."""
        try:
            with serving(self._call), watching(self._rendering):
                if not await self._ran_direct():
                    await self._app(_scope(self._call), self._receive, self._send)
        except Exception as error:
            # The application answers 500 by itself and raises what happened for its server's log.
            _log.error("request %s: vLLM's application raised", self._call.request_id, exc_info=error)
        finally:
            if self._rendering is not None:
                self._rendering.close()
        if not self._complete and not self._failed and not self._gone.is_set():
            self._fail()

    async def _ran_direct(self) -> bool:
        """Whether the stream went past the application."""
        direct = self._direct
        if direct is None or not direct.takes(self._call) or self._gone.is_set():
            return False
        head = direct.head(self._call)
        if head is None:
            self._teaches = direct
            return False
        self._task = asyncio.current_task()
        events = await direct.events(self._call, _scope(self._call))
        if events is None:
            self._task = None
            return False
        async with aclosing(events):
            await self._send(head)
            async for event in events:
                await self._send({"type": "http.response.body", "body": event.encode(), "more_body": True})
                if self._failed:
                    return True
        await self._send({"type": "http.response.body"})
        return True

    async def _receive(self) -> Message:
        if not self._body_taken:
            self._body_taken = True
            return {"type": "http.request", "body": self._call.body, "more_body": False}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Mapping[str, Any]) -> None:
        if self._failed or self._gone.is_set():
            return
        if self._lost():
            self._fail()
        elif message["type"] == "http.response.start":
            self._start(message)
        elif message["type"] == "http.response.body":
            self._body(message)

    def _fail(self) -> None:
        self._failed = True
        if self._lost():
            self._out.fail(ReplicaLost("the engine died"))
        else:
            self._out.fail(ReplicaFailed("vLLM's application ended without a whole answer"))

    def _start(self, message: Mapping[str, Any]) -> None:
        headers = [(name.decode("latin-1").lower(), value.decode("latin-1")) for name, value in message["headers"]]
        self._events = any(name == "content-type" and value.startswith("text/event-stream") for name, value in headers)
        self._out.head(message["status"], headers)
        if self._teaches is not None and self._events:
            self._teaches.begun(self._call, message)

    def _body(self, message: Mapping[str, Any]) -> None:
        body = message.get("body", b"")
        if body:
            # vLLM sends each event as one piece, and an event holds one token as good as always; parsing it to be
            # sure would cost more than the number is worth. Comments (":") keep the connection alive and hold none,
            # and a body that is no event stream counts none.
            tokens = 1 if self._events and body != _DONE and not body.startswith(b":") else 0
            if not self._begun and _ROLE in body:
                tokens = 0
            urgent = tokens > 0 and not self._begun
            self._begun = self._begun or urgent
            self._out.data(body, tokens, urgent=urgent)
            if self._rendering is not None and tokens:
                self._rendering.sent(body)
        if not message.get("more_body", False):
            self._complete = True
            self._out.end()

    def _rendered(self, event: bytes, tokens: int) -> None:
        if not self._failed and not self._gone.is_set():
            self._out.data(event, tokens)


def _scope(call: Submit) -> dict[str, Any]:
    """The ASGI scope, as uvicorn would make it from the same request."""
    path, _, query = call.path.partition("?")
    return {
        "type": "http",
        # Below 2.4 Starlette watches `receive` for a disconnect instead of waiting for a send to fail.
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "scheme": "http",
        "method": call.method,
        "path": unquote(path),
        "raw_path": path.encode("latin-1", "replace"),
        "query_string": query.encode("latin-1", "replace"),
        "root_path": "",
        "headers": [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in call.headers],
        "client": None,
        "server": ("replica", None),
        "state": {},
    }
