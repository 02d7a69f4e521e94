"""What the router must know of OpenAI-compatible traffic: a JSON body's model, error objects, the models list.

Sans-IO: plain functions on bytes. The one rule: the body itself is never changed, and what the engine can judge better
(every field but `model`) is left to it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import msgspec

from router.errors import ClientTooSlow, InvalidRequest, KvlaneError, cut
from router.ingress.base import ModelStatus

_MAX_PRIORITY: Final = 2**31
_MAX_WORD_BYTES: Final = 1024  # Of `user` and `cache_salt` as JSON; longer ones are the engine's alone to judge.
_MAX_NUMBER_BYTES: Final = 11
_TRUE: Final = b"true"
_MAX_MESSAGE_CHARS: Final = 1024  # Messages may quote what a client sent.
_QUOTE: Final = ord('"')
STOP_EVENT: Final = b"data: [DONE]\n\n"
"""The end of an event stream, where its events have no names."""


class Facts(msgspec.Struct, frozen=True):
    """What routing needs of a body; empty where the body does not say."""

    model: str = ""
    user: str = ""
    cache_salt: str = ""
    priority: int = 0
    stream: bool = False


class _Body(msgspec.Struct):
    model: str | None = None
    # Not decoded, only skipped: a wrong type of these is the engine's to refuse, with its own words, and decoding a
    # hostile one (megabytes of nested lists) would hold up every other stream.
    user: msgspec.Raw = msgspec.Raw()
    cache_salt: msgspec.Raw = msgspec.Raw()
    priority: msgspec.Raw = msgspec.Raw()
    stream: msgspec.Raw = msgspec.Raw()


class _ErrorInfo(msgspec.Struct):
    message: str
    type: str
    param: str | None
    code: int


class _ErrorBody(msgspec.Struct):
    error: _ErrorInfo


class _MessagesError(msgspec.Struct):
    """The same, readable by clients of the Messages and Responses APIs, which look for `type` first."""

    type: str
    error: _ErrorInfo


class _Permission(msgspec.Struct):
    id: str
    object: str
    created: int
    allow_create_engine: bool = False
    allow_sampling: bool = True
    allow_logprobs: bool = True
    allow_search_indices: bool = False
    allow_view: bool = True
    allow_fine_tuning: bool = False
    organization: str = "*"
    group: str | None = None
    is_blocking: bool = False


class _Model(msgspec.Struct):
    id: str
    object: str
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int | None
    permission: list[_Permission]


class _ModelList(msgspec.Struct):
    object: str
    data: list[_Model]


_body_decoder = msgspec.json.Decoder(_Body)
_word_decoder = msgspec.json.Decoder(str)
_number_decoder = msgspec.json.Decoder(int)
_encoder = msgspec.json.Encoder()


def read_json(body: bytes) -> Facts:
    """The facts of a JSON body. Raises `InvalidRequest` that names the byte or the field at fault."""
    try:
        # Fields that are skipped are not checked for UTF-8 by the decoder; the engine would choke on them later.
        if not body.isascii():
            body.decode()
    except UnicodeDecodeError as error:
        raise not_utf8(error.start) from error
    return read_text(body, int)


def read_text(body: bytes, place: Callable[[int], int]) -> Facts:
    """The same of a body that is UTF-8; `place` gives where in what the client sent a byte of `body` is."""
    try:
        found = _body_decoder.decode(body)
        return Facts(
            found.model or "",
            _word(found.user),
            _word(found.cache_salt),
            _priority(found.priority),
            _is_true(found.stream),
        )
    except msgspec.ValidationError as error:
        raise _wrong_type(error) from error
    except msgspec.DecodeError as error:
        reason, _, at = str(error).partition(" (byte ")
        position = place(int(at.rstrip(")") or len(body)))
        raise InvalidRequest(f"The body is not valid JSON: {reason} (byte {position})") from error
    except RecursionError as error:
        raise InvalidRequest("The body is not valid JSON: nested too deeply") from error


def not_utf8(at: int) -> InvalidRequest:
    """The refusal of a body whose byte at `at` begins no character."""
    return InvalidRequest(f"The body is not valid UTF-8 (byte {at})")


def _wrong_type(error: msgspec.ValidationError) -> InvalidRequest:
    reason, _, place = str(error).partition(" - at `$.")
    if not place:
        return InvalidRequest(f"The body must be a JSON object: {reason}")
    field = place.rstrip("`").split(".")[0].split("[")[0]
    return InvalidRequest(f"{field}: {reason}", param=field)


def _word(raw: msgspec.Raw) -> str:
    """A short string; anything else counts as none."""
    text = memoryview(raw)
    if not 2 < len(text) <= _MAX_WORD_BYTES or text[0] != _QUOTE:
        return ""
    return _word_decoder.decode(text)


def _priority(raw: msgspec.Raw) -> int:
    """A small integer; anything else counts as none."""
    text = memoryview(raw)
    if not 0 < len(text) <= _MAX_NUMBER_BYTES:
        return 0
    try:
        value = _number_decoder.decode(text)
    except msgspec.ValidationError:
        return 0
    return value if -_MAX_PRIORITY <= value < _MAX_PRIORITY else 0


def _is_true(raw: msgspec.Raw) -> bool:
    text = memoryview(raw)
    return len(text) == len(_TRUE) and bytes(text) == _TRUE


def error_body(error: KvlaneError, path: str = "") -> bytes:
    """The error object as vLLM shapes it; `code` is the HTTP status."""
    info = _error_info(error)
    if path.startswith("/v1/messages"):
        return _encoder.encode(_MessagesError("error", info))
    return _encoder.encode(_ErrorBody(info))


def _error_info(error: KvlaneError) -> _ErrorInfo:
    return _ErrorInfo(cut(error.message, _MAX_MESSAGE_CHARS), error.openai_type, error.param, error.http_status)


def error_event(error: KvlaneError, path: str) -> bytes:
    """How an event stream that broke tells so: what vLLM itself sends, then the end that its clients wait for.

    Streams of the Messages and Responses APIs have named events and no closing `[DONE]`.
    """
    info = _error_info(error)
    if has_named_events(path):
        return b"event: error\ndata: %b\n\n" % _encoder.encode(_MessagesError("error", info))
    return b"data: %b\n\n%b" % (_encoder.encode(_ErrorBody(info)), STOP_EVENT)


def has_named_events(path: str) -> bool:
    """Whether event streams there name their events, and have no closing `[DONE]`."""
    return path.startswith(("/v1/messages", "/v1/responses"))


def ends_connection(error: KvlaneError) -> bool:
    """Whether nothing more can be said on a connection after this error."""
    return isinstance(error, ClientTooSlow)


def models_list(models: tuple[ModelStatus, ...], created: int) -> bytes:
    """The answer to ``GET /v1/models``; `created` in seconds since 1970."""
    return _encoder.encode(_ModelList("list", [_model(status, created) for status in models]))


def model_card(models: tuple[ModelStatus, ...], name: str, created: int) -> bytes | None:
    """The answer to ``GET /v1/models/{name}``; None where there is no such model."""
    for status in models:
        if status.card.name == name:
            return _encoder.encode(_model(status, created))
    return None


def _model(status: ModelStatus, created: int) -> _Model:
    card = status.card
    return _Model(
        id=card.name,
        object="model",
        created=created,
        owned_by="kvlane",
        root=card.parent or card.name,
        parent=card.parent or None,
        max_model_len=card.max_model_len or None,
        permission=[_Permission(f"modelperm-{card.name}", "model_permission", created)],
    )
