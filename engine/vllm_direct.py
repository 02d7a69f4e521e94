"""Takes streamed completions and chats to vLLM's serving objects, past the web framework around them.

Rule: what the framework would do with such a request is to parse and validate its body and to write the answer's head.
That is all that is done here, and the head is the one that vLLM's application gave to the first such stream. Whatever
is not a plain success up to the first event is left to the application, which answers it from the beginning: vLLM may
count a refusal of it twice.
"""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncGenerator, Callable, Mapping
from http import HTTPStatus
from typing import Any, Final

from router.lane.frames import Submit

_KNOWN_MIDDLEWARE: Final = {
    "CORSMiddleware",
    "PrometheusInstrumentatorMiddleware",
    "ScalingMiddleware",
    "WebSocketMetricsMiddleware",
}
"""Those that leave such a request as it is, counts of requests apart."""
_OF_HEADERS: Final = {"XRequestIdMiddleware"}
"""Those that change no more than headers."""

_log = logging.getLogger(__name__)


def bodies_stay(app: Any) -> bool:
    """Whether all middleware of an application is known to leave the answers' bodies alone, and not to look at them."""
    return _middleware(app) <= _KNOWN_MIDDLEWARE | _OF_HEADERS


class DirectStreams:
    """The streams of one application that need not go through it. `app` is the application."""

    def __init__(self, app: Any) -> None:
        self._app = app
        self._makers: dict[str, tuple[Any, Callable[..., Any]]] = {}
        self._heads: dict[str, Mapping[str, Any]] = {}
        """Of the first stream on each path."""
        if self._changes_nothing():
            self._find_makers()

    def takes(self, call: Submit) -> bool:
        """Whether it may be one of them."""
        if call.method != "POST" or call.path not in self._makers or b'"stream"' not in call.body:
            return False
        media = []
        for name, value in call.headers:
            match name.lower():
                case "content-type":
                    media.append(value.partition(";")[0].lower())
                case "origin":
                    return False  # The answer's headers depend on it.
        return media == ["application/json"]

    def begun(self, call: Submit, head: Mapping[str, Any]) -> None:
        """The application has begun to stream one that `takes` might have taken; `head` is its first message."""
        if head["status"] == HTTPStatus.OK:
            self._heads.setdefault(call.path, head)

    def head(self, call: Submit) -> Mapping[str, Any] | None:
        """The first message of such a stream; None where the application is to answer."""
        return self._heads.get(call.path)

    async def events(self, call: Submit, scope: dict[str, Any]) -> AsyncGenerator[str, None] | None:
        """The events of a stream that has not begun; None where the application is to answer."""
        from starlette.requests import Request

        kind, make = self._makers[call.path]
        try:
            body = json.loads(call.body)
            if not isinstance(body, dict) or body.get("stream") is not True:
                return None
            made = await make(kind.model_validate(body), Request(scope | {"app": self._app}))
        except Exception:
            # Of the request, as a rule, and then the application says so to the client.
            _log.debug("request %s is left to vLLM's application", call.request_id, exc_info=True)
            return None
        return made if isinstance(made, AsyncGenerator) else None

    def _changes_nothing(self) -> bool:
        args = self._app.state.args
        return _middleware(self._app) <= _KNOWN_MIDDLEWARE and not (
            getattr(args, "enable_server_load_tracking", False)
            or getattr(args, "enable_elastic_ep", False)
            or getattr(args, "sse_keep_alive_interval", 0)
        )

    def _find_makers(self) -> None:
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
        from vllm.entrypoints.openai.completion.protocol import CompletionRequest

        state = self._app.state
        served = [
            ("/v1/completions", CompletionRequest, "openai_serving_completion", "create_completion"),
            ("/v1/chat/completions", ChatCompletionRequest, "openai_serving_chat", "create_chat_completion"),
        ]
        for path, kind, name, method in served:
            make = getattr(getattr(state, name, None), method, None)
            if make is not None:
                self._makers[path] = (kind, make)


def _middleware(app: Any) -> set[str]:
    return {getattr(each.cls, "__name__", "") for each in app.user_middleware}
