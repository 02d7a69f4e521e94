"""Which streams go past vLLM's web framework, and what is left to it; the application is a stand-in."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from types import SimpleNamespace
from typing import Any

import pytest

from engine.vllm_direct import DirectStreams, bodies_stay
from router.lane.frames import Submit
from router.types import Rpc

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning"),
]

PATH = "/v1/completions"
HEAD = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]}


class Serving:
    """As vLLM's serving object."""

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.answer: Any = None

    async def create_completion(self, request: Any, raw_request: Any) -> Any:
        self.asked.append(request)
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


async def stream() -> AsyncGenerator[str, None]:
    yield "data: x\n\n"


def application(serving: Serving, *middleware: str, **args: Any) -> Any:
    classes = [SimpleNamespace(cls=type(name, (), {})) for name in ("CORSMiddleware", *middleware)]
    state = SimpleNamespace(args=SimpleNamespace(**args), openai_serving_completion=serving)
    return SimpleNamespace(state=state, user_middleware=classes)


def call(body: Any = None, **changed: Any) -> Submit:
    raw = body if isinstance(body, bytes) else json.dumps(body or {"prompt": "x", "stream": True}).encode()
    fields = {"method": "POST", "path": PATH, "headers": (("Content-Type", "application/json; charset=utf-8"),)}
    return Submit(1, "r1", Rpc.HTTP, **(fields | changed), body=raw)


@pytest.fixture
def serving() -> Serving:
    return Serving()


@pytest.fixture
def direct(serving: Serving) -> DirectStreams:
    return DirectStreams(application(serving))


def scope() -> dict[str, Any]:
    return {"type": "http", "headers": []}


@pytest.mark.parametrize(
    "other",
    [
        call(method="GET"),
        call(path="/v1/completions?x=1"),
        call(path="/v1/chat/completions"),
        call(path="/v1/embeddings"),
        call({"prompt": "x"}),
        call(headers=()),
        call(headers=(("content-type", "text/plain"),)),
        call(headers=(("content-type", "application/json ; charset=utf-8"),)),
        call(headers=(("content-type", "text/plain"), ("content-type", "application/json"))),
        call(headers=(("content-type", "application/json"), ("content-type", "text/plain"))),
        call(headers=(("content-type", "application/json"), ("Origin", "http://elsewhere"))),
    ],
)
def test_only_streamed_json_of_known_paths_is_taken(direct: DirectStreams, other: Submit) -> None:
    assert direct.takes(call())
    assert not direct.takes(other)


@pytest.mark.parametrize("middleware", ["XRequestIdMiddleware", "AuthenticationMiddleware", "SomebodysMiddleware"])
def test_an_application_with_middleware_that_may_matter_keeps_all(serving: Serving, middleware: str) -> None:
    assert not DirectStreams(application(serving, middleware)).takes(call())


@pytest.mark.parametrize(
    ("middleware", "stay"),
    [("ScalingMiddleware", True), ("XRequestIdMiddleware", True), ("BaseHTTPMiddleware", False), ("Redaction", False)],
)
def test_middleware_that_is_not_known_gets_to_see_every_body(serving: Serving, middleware: str, stay: bool) -> None:
    assert bodies_stay(application(serving, middleware)) is stay


@pytest.mark.parametrize("name", ["enable_server_load_tracking", "enable_elastic_ep", "sse_keep_alive_interval"])
def test_an_application_that_does_more_with_streams_keeps_all(serving: Serving, name: str) -> None:
    assert not DirectStreams(application(serving, **{name: 1})).takes(call())


def test_the_head_is_that_of_the_first_stream_that_went_well(direct: DirectStreams) -> None:
    assert direct.head(call()) is None
    direct.begun(call(), HEAD | {"status": 503})
    assert direct.head(call()) is None
    direct.begun(call(), HEAD)
    direct.begun(call(), HEAD | {"headers": []})
    assert direct.head(call()) == HEAD


async def test_a_stream_is_vllms_own(direct: DirectStreams, serving: Serving) -> None:
    serving.answer = stream()
    events = await direct.events(call({"prompt": "x", "stream": True, "max_tokens": 7}), scope())
    assert events is not None
    assert [event async for event in events] == ["data: x\n\n"]
    assert (serving.asked[0].prompt, serving.asked[0].max_tokens) == ("x", 7)


@pytest.mark.parametrize(
    "body",
    [
        b'{"stream"',
        b'"stream"',
        b'{"stream": true, "prompt": "\xff"}',
        {"stream": False, "prompt": "x"},
        {"stream": "true", "prompt": "x"},
        {"stream": True},
        {"stream": True, "prompt": "x", "max_tokens": "many"},
    ],
)
async def test_what_is_no_valid_stream_is_the_applications_to_answer(
    direct: DirectStreams, serving: Serving, body: Any
) -> None:
    assert await direct.events(call(body), scope()) is None
    assert not serving.asked


@pytest.mark.parametrize("answer", [ValueError("too long"), {"error": "no such model"}, None])
async def test_what_vllm_refuses_is_the_applications_to_answer(
    direct: DirectStreams, serving: Serving, answer: Any
) -> None:
    serving.answer = answer
    assert await direct.events(call(), scope()) is None
