"""HTTP of the simulated engine, in the shape of vLLM's OpenAI application: completions, chat, models, health.

Parsing and rendering only. A token of a stream costs one concatenation: what stands around it is built once.
"""

from __future__ import annotations

import re
from typing import Any, Final, TypeAlias

import msgspec

from engine.base import StreamOut
from engine.simulated_ask import Ask, PromptMaker, check_sampling
from engine.simulated_core import Job
from engine.simulated_text import VOCABULARY, WORDS, answer, chat_text, token_text
from router.errors import InvalidRequest, KvlaneError, MethodNotAllowed, ModelNotFound, NotSupported, PathNotFound
from router.lane.frames import Submit
from router.types import Headers, ModelCard, RouteInfo

ROUTES: Final = (
    RouteInfo("/v1/chat/completions", ("POST",)),
    RouteInfo("/v1/completions", ("POST",)),
    RouteInfo("/v1/models", ("GET",)),
    RouteInfo("/health", ("GET",)),
)
_METHODS: Final = {route.path: route.methods for route in ROUTES}
_SSE: Final[Headers] = (("content-type", "text/event-stream; charset=utf-8"),)
_DONE: Final = b"data: [DONE]\n\n"

TokenIds: TypeAlias = list[int]


class _StreamOptions(msgspec.Struct):
    include_usage: bool | None = False


class _Body(msgspec.Struct):
    """What both endpoints take; unknown fields are ignored."""

    model: str | None = None
    max_tokens: int | None = None
    n: int | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    cache_salt: str | None = None
    priority: int | None = None


class _CompletionBody(_Body):
    prompt: Any = None
    """Text, token ids, or a list of one of these."""


class _Message(msgspec.Struct):
    role: str
    content: str | list[dict[str, Any]] | None = None


class _ChatBody(_Body, kw_only=True):
    messages: list[_Message]
    max_completion_tokens: int | None = None


_completion_decoder = msgspec.json.Decoder(_CompletionBody)
_chat_decoder = msgspec.json.Decoder(_ChatBody)
_encode = msgspec.json.Encoder().encode


class OpenAi:
    """The application of one simulated engine."""

    def __init__(self, card: ModelCard, prompts: PromptMaker) -> None:
        self._card = card
        self._prompts = prompts

    def ask(self, call: Submit, out: StreamOut, created: int) -> Ask | None:
        """What `call` asks of the engine; None where it is answered already. `created` is in Unix seconds.

        Raises `KvlaneError` for faulty requests; `refuse` renders it.
        """
        path = call.path.partition("?")[0]
        methods = _METHODS.get(path)
        if methods is None:
            raise PathNotFound("Not Found")
        if call.method not in methods:
            raise MethodNotAllowed("Method Not Allowed", allow=methods)
        if path == "/v1/completions":
            return self._completion(call, out, created)
        if path == "/v1/chat/completions":
            return self._chat(call, out, created)
        _respond(out, 200, b"" if path == "/health" else self._models(created))
        return None

    def _completion(self, call: Submit, out: StreamOut, created: int) -> Ask:
        body = _decode(_completion_decoder, call.body)
        self._check(body, body.max_tokens)
        prompt = _one_prompt(body.prompt)
        text = prompt.encode() if isinstance(prompt, str) else token_text(prompt)
        known = self._prompts.text(text, body.cache_salt)
        shape = _Shape("cmpl-" + call.request_id, "text_completion", "text_completion", created, self._card.name)
        reply = _stream(out, shape, body) if body.stream else _WholeAnswer(out, shape)
        return Ask(known, text, body.max_tokens, body.priority or call.priority, reply)

    def _chat(self, call: Submit, out: StreamOut, created: int) -> Ask:
        body = _decode(_chat_decoder, call.body)
        max_tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        self._check(body, max_tokens)
        if not body.messages:
            raise InvalidRequest("`messages` must hold at least one message.", param="messages")
        text = chat_text([(message.role, _content(message)) for message in body.messages])
        known = self._prompts.text(text, body.cache_salt)
        shape = _Shape(
            "chatcmpl-" + call.request_id, "chat.completion", "chat.completion.chunk", created, self._card.name
        )
        reply = _stream(out, shape, body) if body.stream else _WholeAnswer(out, shape)
        return Ask(known, text, max_tokens, body.priority or call.priority, reply)

    def _check(self, body: _Body, max_tokens: int | None) -> None:
        if body.model and body.model != self._card.name:
            raise ModelNotFound(f"The model `{body.model}` does not exist.", param="model")
        if body.stream_options is not None and not body.stream:
            raise InvalidRequest("Stream options can only be defined when `stream=True`.", param="stream_options")
        check_sampling(n=body.n, max_tokens=max_tokens, temperature=body.temperature, top_p=body.top_p)

    def _models(self, created: int) -> bytes:
        card = {
            "id": self._card.name,
            "object": "model",
            "created": created,
            "owned_by": "kvlane",
            "root": self._card.name,
            "parent": None,
            "max_model_len": self._card.max_model_len,
        }
        return _encode({"object": "list", "data": [card]})


def refuse(out: StreamOut, error: KvlaneError) -> None:
    """Answers with OpenAI's error object, as vLLM does."""
    detail = {
        "message": error.message,
        "type": error.openai_type,
        "param": error.param,
        "code": error.http_status,
    }
    allow = (("allow", ", ".join(error.allow)),) if isinstance(error, MethodNotAllowed) else ()
    _respond(out, error.http_status, _encode({"error": detail}), allow)


def _respond(out: StreamOut, status: int, body: bytes, headers: Headers = (), tokens: int = 0) -> None:
    kind = (("content-type", "application/json"),) if body else ()
    out.head(status, (*kind, ("content-length", str(len(body))), *headers))
    if body:
        out.data(body, tokens)


class _Shape(msgspec.Struct, frozen=True):
    """What the pieces of one answer have in common."""

    id: str
    kind: str
    chunk_kind: str
    created: int
    model: str

    @property
    def chat(self) -> bool:
        return self.kind == "chat.completion"

    def chunk(self, choices: list[dict[str, Any]], **more: Any) -> bytes:
        fields = {"id": self.id, "object": self.chunk_kind, "created": self.created, "model": self.model}
        return b"data: " + _encode({**fields, "choices": choices, **more}) + b"\n\n"

    def piece(self, text: str, finish: str | None) -> bytes:
        content = {"delta": {"content": text}} if self.chat else {"text": text}
        return self.chunk([{"index": 0, **content, "logprobs": None, "finish_reason": finish, "stop_reason": None}])


class _StreamedAnswer:
    """An answer as server-sent events; the role and the first token travel together, and so do the last and the end."""

    def __init__(self, out: StreamOut, shape: _Shape, include_usage: bool) -> None:
        self._out = out
        self._shape = shape
        self._include_usage = include_usage
        # A word needs no escaping, so each piece is the same bytes around it. Parted at the text's own field: the
        # model's name may hold anything.
        before, _, after = shape.piece("", None).rpartition(b'""')
        self._before = before + b'"'
        self._after = b'"' + after

    def token(self, job: Job) -> None:
        piece = self._before + WORDS[(job.prompt.key + job.produced - 1) % VOCABULARY] + self._after
        if job.produced == 1:
            piece = self._opening() + piece
        self._out.data(piece, 1)

    def last(self, job: Job) -> None:
        text = answer(job.prompt.key, job.produced - 1, job.produced).decode()
        pieces = [self._opening() if job.produced == 1 else b"", self._shape.piece(text, job.finish)]
        if self._include_usage:
            pieces.append(self._shape.chunk([], usage=_usage(job)))
        pieces.append(_DONE)
        self._out.data(b"".join(pieces), 1)

    def _opening(self) -> bytes:
        """The head, which can wait for the first token, and the event before it."""
        self._out.head(200, _SSE)
        if not self._shape.chat:
            return b""
        delta = {"role": "assistant", "content": ""}
        return self._shape.chunk([{"index": 0, "delta": delta, "logprobs": None, "finish_reason": None}])


class _WholeAnswer:
    """An answer in one piece."""

    def __init__(self, out: StreamOut, shape: _Shape) -> None:
        self._out = out
        self._shape = shape

    def token(self, job: Job) -> None:
        pass

    def last(self, job: Job) -> None:
        shape = self._shape
        text = answer(job.prompt.key, 0, job.produced).decode()
        content = {"message": {"role": "assistant", "content": text}} if shape.chat else {"text": text}
        choice = {"index": 0, **content, "logprobs": None, "finish_reason": job.finish, "stop_reason": None}
        body = {
            "id": shape.id,
            "object": shape.kind,
            "created": shape.created,
            "model": shape.model,
            "choices": [choice],
            "usage": _usage(job),
        }
        _respond(self._out, 200, _encode(body), tokens=job.produced)


def _stream(out: StreamOut, shape: _Shape, body: _Body) -> _StreamedAnswer:
    usage = body.stream_options is not None and bool(body.stream_options.include_usage)
    return _StreamedAnswer(out, shape, usage)


def _usage(job: Job) -> dict[str, Any]:
    return {
        "prompt_tokens": job.prompt.tokens,
        "total_tokens": job.prompt.tokens + job.produced,
        "completion_tokens": job.produced,
        "prompt_tokens_details": {"cached_tokens": job.cached_tokens},
    }


_FIELD: Final = re.compile(r"`\$\.([^`]+)`$|missing required field `(\w+)`$")


def _decode(decoder: msgspec.json.Decoder[Any], body: bytes) -> Any:
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        field = _FIELD.search(str(error))
        raise InvalidRequest(str(error), param=field and (field[1] or field[2])) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequest(f"JSON decode error: {error}") from error


def _one_prompt(prompt: Any) -> str | TokenIds:
    """Text or token ids out of the forms that `prompt` may have."""
    if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
        if len(prompt) > 1:
            raise NotSupported("The simulated engine takes one prompt per request.", param="prompt")
        prompt = prompt[0]
    if isinstance(prompt, str) and prompt:
        return prompt
    if isinstance(prompt, list) and prompt:
        if all(type(token) is int and 0 <= token < 1 << 32 for token in prompt):
            return prompt
        raise InvalidRequest("Token ids are whole numbers from 0 to 4294967295.", param="prompt")
    raise InvalidRequest("`prompt` must be a non-empty text or list of token ids.", param="prompt")


def _content(message: _Message) -> str:
    """The text of a message; parts that are no text count as what their JSON holds."""
    if isinstance(message.content, list):
        return "".join(_part(part) for part in message.content)
    return message.content or ""


def _part(part: dict[str, Any]) -> str:
    text = part.get("text")
    return text if isinstance(text, str) else _encode(part).decode()
