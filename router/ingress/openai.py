"""What the router must know of OpenAI-compatible traffic: a body's model, error objects, the models list.

Sans-IO: plain functions on bytes. The one rule: the body itself is never changed, and what the engine can judge better
(every field but `model`) is left to it.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec
import python_multipart
from python_multipart.exceptions import FormParserError

from router.errors import ClientTooSlow, InvalidRequest, KvlaneError
from router.ingress.base import ModelStatus

_MAX_PRIORITY: Final = 2**31
_STOP_WORD: Final = "data: [DONE]\n\n"


class Facts(msgspec.Struct, frozen=True):
    """What routing needs of a body; empty where the body does not say."""

    model: str = ""
    user: str = ""
    cache_salt: str = ""
    priority: int = 0


class _Body(msgspec.Struct):
    model: str | None = None
    # Typed loosely: a wrong type of these is the engine's to refuse, with its own words.
    user: Any = None
    cache_salt: Any = None
    priority: Any = None


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
_encoder = msgspec.json.Encoder()


def read_json(body: bytes) -> Facts:
    """The facts of a JSON body. Raises `InvalidRequest` that names the byte or the field at fault."""
    try:
        # Fields that are skipped are not checked for UTF-8 by the decoder; the engine would choke on them later.
        if not body.isascii():
            body.decode()
        found = _body_decoder.decode(body)
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"The body is not valid UTF-8 (byte {error.start})") from error
    except msgspec.ValidationError as error:
        raise _wrong_type(error) from error
    except msgspec.DecodeError as error:
        position = "" if "(byte " in str(error) else f" (byte {len(body)})"
        raise InvalidRequest(f"The body is not valid JSON: {error}{position}") from error
    except RecursionError as error:
        raise InvalidRequest("The body is not valid JSON: nested too deeply") from error
    return Facts(
        model=found.model or "",
        user=found.user if type(found.user) is str else "",
        cache_salt=found.cache_salt if type(found.cache_salt) is str else "",
        priority=_priority(found.priority),
    )


def _wrong_type(error: msgspec.ValidationError) -> InvalidRequest:
    reason, _, place = str(error).partition(" - at `$.")
    if not place:
        return InvalidRequest(f"The body must be a JSON object: {reason}")
    field = place.rstrip("`").split(".")[0].split("[")[0]
    return InvalidRequest(f"{field}: {reason}", param=field)


def _priority(value: object) -> int:
    if type(value) is int and -_MAX_PRIORITY <= value < _MAX_PRIORITY:
        return value
    return 0


def read_multipart(body: bytes, content_type: str) -> Facts:
    """The facts of a multipart/form-data body, read no further than its `model`. Raises `InvalidRequest`."""
    _, parameters = python_multipart.multipart.parse_options_header(content_type)
    boundary = parameters.get(b"boundary")
    if not boundary:
        raise InvalidRequest("multipart/form-data needs a boundary")
    form = _ModelField()
    try:
        parser = python_multipart.MultipartParser(boundary, form.callbacks())
        parser.write(body)
        model = form.value.decode()
    except _Found:
        model = form.text()
    except (FormParserError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"The body is not valid multipart/form-data: {error}") from error
    return Facts(model=model)


class _Found(Exception):
    """Unwinds the parser: what follows the field need not be read."""


class _ModelField:
    """Callbacks for a multipart parser that keep the field `model` and nothing else."""

    def __init__(self) -> None:
        self.value = b""
        self._wanted = False
        self._name = b""
        self._header = b""

    def callbacks(self) -> Any:
        return {
            "on_part_begin": self._part_begin,
            "on_header_field": self._header_field,
            "on_header_value": self._header_value,
            "on_header_end": self._header_end,
            "on_part_data": self._part_data,
            "on_part_end": self._part_end,
        }

    def text(self) -> str:
        try:
            return self.value.decode()
        except UnicodeDecodeError as error:
            raise InvalidRequest("model: not valid UTF-8", param="model") from error

    def _part_begin(self) -> None:
        self._wanted = False
        self._name = self._header = b""

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._name += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _header_end(self) -> None:
        if self._name.lower() == b"content-disposition":
            _, parameters = python_multipart.multipart.parse_options_header(self._header)
            self._wanted = parameters.get(b"name") == b"model" and b"filename" not in parameters
        self._name = self._header = b""

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        if self._wanted:
            self.value += data[start:end]

    def _part_end(self) -> None:
        if self._wanted:
            raise _Found


def error_body(error: KvlaneError, path: str = "") -> bytes:
    """The error object as vLLM shapes it; `code` is the HTTP status."""
    info = _ErrorInfo(error.message, error.openai_type, error.param, error.http_status)
    if path.startswith("/v1/messages"):
        return _encoder.encode(_MessagesError("error", info))
    return _encoder.encode(_ErrorBody(info))


def error_event(error: KvlaneError, path: str) -> bytes:
    """How an event stream that broke tells so: what vLLM itself sends, then the end that its clients wait for.

    Streams of the Messages and Responses APIs have named events and no closing `[DONE]`.
    """
    info = _ErrorInfo(error.message, error.openai_type, error.param, error.http_status)
    if path.startswith(("/v1/messages", "/v1/responses")):
        return b"event: error\ndata: %b\n\n" % _encoder.encode(_MessagesError("error", info))
    return b"data: %b\n\n%b" % (_encoder.encode(_ErrorBody(info)), _STOP_WORD.encode())


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
