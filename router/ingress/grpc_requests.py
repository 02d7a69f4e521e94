"""Reads serialized gRPC requests: what routing must know, and the faults that are plain before any engine sees them.

Pure functions over bytes. Rule: a request is parsed once, to learn from it; its own bytes travel on untouched.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final, TypeVar

import msgspec
from google.protobuf.message import DecodeError, Message
from kvlane.v1 import inference_pb2 as pb

from router.errors import InvalidRequest
from router.ingress import request_ids
from router.types import Request, Rpc

SERVICE: Final = "kvlane.v1.Inference"
FORWARDED: Final = ("x-request-id", "traceparent", "tracestate", "x-session-id", "x-kvlane-explain")
"""Request metadata that travels on to the engine."""
_REQUEST_ID: Final = FORWARDED[0]

AnyRequest = TypeVar("AnyRequest", pb.GenerateRequest, pb.ChatRequest, pb.EmbedRequest)


class Caller(msgspec.Struct, frozen=True):
    """What a call says of itself beside its message."""

    headers: tuple[tuple[str, str], ...]
    """Those of `FORWARDED` that it carries."""
    timeout_s: float | None = None
    """Time left until its deadline; None where it has none."""

    def header(self, name: str) -> str:
        """The first value of that name; empty where there is none."""
        return next((value for key, value in self.headers if key == name), "")


def generate_request(body: bytes, caller: Caller, new_id: Callable[[], str]) -> Request:
    """A `GenerateRequest` to route. Raises `InvalidRequest`."""
    message = _parse(pb.GenerateRequest, body)
    kind = message.WhichOneof("prompt")
    if not (message.text if kind == "text" else message.token_ids.ids):
        raise InvalidRequest("the prompt is empty: set text or token_ids", param=kind or "text")
    return _request("Generate", message, body, caller, new_id)


def chat_request(body: bytes, caller: Caller, new_id: Callable[[], str]) -> Request:
    """A `ChatRequest` to route. Raises `InvalidRequest`."""
    message = _parse(pb.ChatRequest, body)
    if not message.messages:
        raise InvalidRequest("the conversation is empty: messages holds nothing", param="messages")
    for position, turn in enumerate(message.messages):
        if not turn.role:
            raise InvalidRequest(f"messages[{position}] has no role", param=f"messages[{position}].role")
    return _request("Chat", message, body, caller, new_id)


def embed_request(body: bytes, caller: Caller, new_id: Callable[[], str]) -> Request:
    """An `EmbedRequest` to route. Raises `InvalidRequest`."""
    message = _parse(pb.EmbedRequest, body)
    if not message.texts:
        raise InvalidRequest("there is nothing to embed: texts is empty", param="texts")
    for position, text in enumerate(message.texts):
        if not text:
            raise InvalidRequest(f"texts[{position}] is empty", param=f"texts[{position}]")
    return _request("Embed", message, body, caller, new_id)


def models_request(body: bytes) -> None:
    """Checks a `ModelsRequest`, which asks for nothing in particular. Raises `InvalidRequest`."""
    _decode(pb.ModelsRequest(), body)


def caller_of(metadata: Mapping[str, str], timeout_s: float | None) -> Caller:
    """The caller behind request metadata, whose names are lower case; a request id that is not valid is left out."""
    headers = tuple((name, metadata[name]) for name in FORWARDED if name in metadata)
    if headers and headers[0][0] == _REQUEST_ID and not request_ids.accepted(headers[0][1]):
        headers = headers[1:]
    return Caller(headers, timeout_s)


def _parse(kind: type[AnyRequest], body: bytes) -> AnyRequest:
    message = kind()
    _decode(message, body)
    if not message.model:
        raise InvalidRequest("the request names no model", param="model")
    return message


def _decode(message: Message, body: bytes) -> None:
    try:
        message.ParseFromString(body)
    except DecodeError as error:
        raise InvalidRequest(f"the request is no valid {message.DESCRIPTOR.full_name}") from error


def _request(
    method: str,
    message: pb.GenerateRequest | pb.ChatRequest | pb.EmbedRequest,
    body: bytes,
    caller: Caller,
    new_id: Callable[[], str],
) -> Request:
    routing = message.routing
    return Request(
        request_id=request_ids.accepted(routing.request_id) or caller.header(_REQUEST_ID) or new_id(),
        model=message.model,
        rpc=Rpc.GRPC,
        path=f"/{SERVICE}/{method}",
        body=body,
        headers=caller.headers,
        session_id=routing.session_id or caller.header("x-session-id"),
        lora=routing.lora,
        cache_salt=routing.cache_salt,
        priority=routing.priority,
        timeout_s=caller.timeout_s,
    )
