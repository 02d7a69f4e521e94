"""Where an HTTP request goes: to the router's own pages, or to a replica.

Sans-IO. The order of the checks is path, method, body, so that a client learns of the most basic mistake first. Only
paths on `RELAYED` reach an engine, however many its application answers: the others (health, metrics, profiling, cache
resets, weight updates …) are one engine's administration and must not be in reach of clients.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Generator, Mapping
from typing import Final
from urllib.parse import parse_qsl, unquote_to_bytes

import httptools
import msgspec

from router.errors import InvalidRequest, MethodNotAllowed, ModelNotFound, PathNotFound, UnsupportedEncoding, cut
from router.ingress import large_json, multipart, openai, request_ids
from router.ingress.base import Fleet, ModelStatus
from router.ingress.gate import CREDENTIALS, Gate, visible
from router.ingress.http_parser import HttpRequest
from router.ingress.http_response import Reply
from router.keys import Key
from router.options import HttpOptions
from router.types import ModelCard, Request, Rpc

RELAYED_PREFIXES: Final = ("/v1/", "/v2/", "/inference/v1/", "/cohere/v2/")
RELAYED: Final = frozenset(
    {"/tokenize", "/detokenize", "/pooling", "/classify", "/score", "/rerank", "/generative_scoring"}
)
# These would change one replica of many behind the others' backs.
_ONE_REPLICAS_STATE: Final = frozenset({"/v1/load_lora_adapter", "/v1/unload_lora_adapter"})

_OPEN: Final = frozenset({"/healthz", "/readyz", "/metrics"})
"""For probes and scrapers, which need no API key."""
_OWN: Final = _OPEN | {"/v1/models"}
_MODEL_PREFIX: Final = "/v1/models/"
_JSON: Final = "application/json"

_NOBODY: Final = (ModelStatus(ModelCard(""), 0, announced=False),)

Metrics = Callable[[], tuple[bytes, str] | Awaitable[tuple[bytes, str]]]
"""Makes ``/metrics``: its body and content type, at once or after others were asked."""


class Target(msgspec.Struct):
    """A request target taken apart."""

    path: str
    """Decoded; for matching."""
    query: str
    raw: str
    """Path and query as they came; for the replica."""


def read_target(target: bytes) -> Target:
    """Raises `InvalidRequest` where it is no path or not UTF-8."""
    try:
        raw = target.decode("ascii")
        if not raw.startswith("/") and raw != "*":
            raw = _origin_form(target)
        raw = raw.partition("#")[0]
        path, _, query = raw.partition("?")
        if "%" in path:
            path = unquote_to_bytes(path).decode()
    except UnicodeDecodeError as error:
        raise InvalidRequest("The path is not valid UTF-8") from error
    return Target(path, query, raw)


def _origin_form(target: bytes) -> str:
    """``http://host/path?query``, as sent to proxies, without scheme and host."""
    try:
        url = httptools.parse_url(target)
    except httptools.HttpParserInvalidURLError as error:
        raise InvalidRequest("The request target is not a path") from error
    path = (url.path or b"/").decode("ascii")
    return f"{path}?{url.query.decode('ascii')}" if url.query else path


class Routes:
    """Answers the router's own paths and turns the others into `Request`s."""

    def __init__(
        self,
        options: HttpOptions,
        fleet: Fleet,
        metrics: Metrics,
        wall: Callable[[], float],
        chance: random.Random,
        gate: Gate | None = None,
    ) -> None:
        self._default_model = options.default_model
        self._trust_request_id = options.trust_request_id
        self._fleet = fleet
        self._gate = gate
        self._metrics = metrics
        self._wall = wall
        self._random_bits = chance.getrandbits
        self._created = int(wall())
        self._leaving = False

    def leave(self) -> None:
        """The router goes away: from now on it is not ready."""
        self._leaving = True

    @property
    def glance(self) -> Callable[[Mapping[str, str]], None]:
        """Refuses large bodies before they are read: compressed ones, and those of clients who lack a key."""
        return self._glance

    def _glance(self, noted: Mapping[str, str]) -> None:
        if self._gate is not None:
            self._gate.check("http", noted)
        encoding = noted.get("content-encoding")
        if encoding is not None:
            _check_encoding(encoding)

    def request_id(self, request: HttpRequest | None) -> str:
        """The client's own where it may choose one, else 32 random hexadecimal digits."""
        if request is not None and self._trust_request_id:
            given = request_ids.accepted(request.noted.get("x-request-id"))
            if given:
                return given
        return f"{self._random_bits(128):032x}"

    def own(self, request: HttpRequest, target: Target) -> Reply | Awaitable[Reply] | None:
        """The router's own answer, at once or later; None where a replica must give it. Raises `KvlaneError`."""
        path = target.path
        if self._gate is not None and path not in _OPEN:
            request.key = self._gate.admit("http", request.noted)
        if path not in _OWN and not path.startswith(_MODEL_PREFIX):
            return None
        if request.method not in ("GET", "HEAD"):
            raise MethodNotAllowed(f"{request.method} is not allowed at {cut(path)}", allow=("GET", "HEAD"))
        if path == "/healthz":
            return Reply(200, "text/plain; charset=utf-8", b"ok")
        if path == "/readyz":
            readiness = self._fleet.readiness()
            if self._leaving:
                readiness = msgspec.structs.replace(readiness, ready=False, leaving=True)
            return Reply(200 if readiness.ready else 503, _JSON, msgspec.json.encode(readiness))
        if path == "/metrics":
            page = self._metrics()
            return _page(*page) if isinstance(page, tuple) else _later(page)
        return self._models(path, request.key)

    def _models(self, path: str, key: Key | None) -> Reply:
        models = visible(self._fleet.models(), key)
        if path == "/v1/models":
            return Reply(200, _JSON, openai.models_list(models, self._created))
        name = path.removeprefix(_MODEL_PREFIX)
        card = openai.model_card(models, name, self._created)
        if card is None:
            raise ModelNotFound(f"The model `{cut(name)}` does not exist.", param="model")
        return Reply(200, _JSON, card)

    def relay(self, request: HttpRequest, target: Target, request_id: str) -> Request | Generator[None, None, Request]:
        """The request for a replica; where its body is large, in slices.

        Raises `PathNotFound`, `MethodNotAllowed`, `UnsupportedEncoding` and `InvalidRequest`; the last from slices too.
        """
        # The engine's application answers a HEAD with 405; the head of a GET is what is asked for.
        method = "GET" if request.method == "HEAD" else request.method
        self._check(request.method, method, target.path)
        encoding = request.noted.get("content-encoding")
        if encoding is not None and request.body:
            _check_encoding(encoding)
        if len(request.body) >= large_json.LARGE_BYTES and not _is_form(request):
            return self._relay_large(request, target, method, request_id)
        if request.key is not None and request.key.models is not None and _is_form(request):
            return self._relay_form(request, target, method, request_id)
        return self._request(request, target, method, request_id, self._facts(request, target))

    def _relay_form(
        self, request: HttpRequest, target: Target, method: str, request_id: str
    ) -> Generator[None, None, Request]:
        """Of a client that may not name every model."""
        model = yield from multipart.read_model_strictly(request.body, request.noted["content-type"])
        return self._request(request, target, method, request_id, self._named(openai.Facts(model=model), model))

    def _relay_large(
        self, request: HttpRequest, target: Target, method: str, request_id: str
    ) -> Generator[None, None, Request]:
        facts = yield from large_json.read_json(request.body)
        return self._request(request, target, method, request_id, self._named(facts, facts.model))

    def _request(
        self, request: HttpRequest, target: Target, method: str, request_id: str, facts: openai.Facts
    ) -> Request:
        headers, key = request.headers, request.key
        if key is not None and self._gate is not None:
            self._gate.check_model("http", key, facts.model)
            headers = [header for header in headers if header[0] not in CREDENTIALS]
        headers.append(("x-request-id", request_id))
        return Request(
            request_id=request_id,
            model=facts.model,
            rpc=Rpc.HTTP,
            path=target.raw,
            body=request.body,
            method=method,
            headers=tuple(headers),
            session_id=request.noted.get("x-session-id") or facts.user,
            lora=facts.model if self._fleet.parent(facts.model) else "",
            cache_salt=facts.cache_salt,
            priority=facts.priority,
            tenant=key.tenant if key is not None else "",
            streamed=facts.stream,
        )

    def _check(self, asked: str, method: str, path: str) -> None:
        relayed = (path in RELAYED or path.startswith(RELAYED_PREFIXES)) and path not in _ONE_REPLICAS_STATE
        allowed = self._fleet.methods(path) if relayed else ()
        if relayed and not allowed and not all(status.announced for status in self._fleet.models() or _NOBODY):
            return  # Some model has not said yet what there is: its first replica will judge path and method.
        if not allowed:
            raise PathNotFound(f"There is nothing at {cut(path)}")
        if method not in allowed:
            allow = (*allowed, "HEAD") if "GET" in allowed and "HEAD" not in allowed else allowed
            raise MethodNotAllowed(f"{asked} is not allowed at {cut(path)}", allow=allow)

    def _facts(self, request: HttpRequest, target: Target) -> openai.Facts:
        if request.body:
            if _is_form(request):
                facts = openai.Facts(model=multipart.read_model(request.body, request.noted["content-type"]))
            else:
                facts = openai.read_json(request.body)
            return self._named(facts, facts.model)
        return self._named(openai.Facts(), self._unnamed_model(request, target.query))

    def _named(self, facts: openai.Facts, model: str) -> openai.Facts:
        """With a model in any case. Raises `InvalidRequest`."""
        model = model or self._default_model
        if not model:
            raise InvalidRequest("you must provide a model parameter", param="model")
        return facts if facts.model else msgspec.structs.replace(facts, model=model)

    def _unnamed_model(self, request: HttpRequest, query: str) -> str:
        """The model of a request without a body, from where it can stand, in order."""
        named = dict(parse_qsl(query)).get("model") if "model=" in query else None
        model = named or request.noted.get("x-kvlane-model") or self._default_model
        if model:
            return model
        base_models = [status.card.name for status in self._fleet.models() if not status.card.parent]
        return base_models[0] if len(base_models) == 1 else ""


def _check_encoding(value: str) -> None:
    if any(coding.strip().lower() not in ("", "identity") for coding in value.split(",")):
        raise UnsupportedEncoding(f"A body in the encoding {cut(value)!r} is not taken: send it as it is")


def _is_form(request: HttpRequest) -> bool:
    return request.noted.get("content-type", "")[:19].lower() == "multipart/form-data"


def _page(body: bytes, content_type: str) -> Reply:
    return Reply(200, content_type, body)


async def _later(page: Awaitable[tuple[bytes, str]]) -> Reply:
    return _page(*await page)
