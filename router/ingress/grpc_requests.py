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
from router.protobuf import Malformed
from router.types import Request, Rpc

SERVICE: Final = "kvlane.v1.Inference"
FORWARDED: Final = ("x-request-id", "traceparent", "tracestate", "x-session-id", "x-kvlane-explain")
"""Request metadata that travels on to the engine."""
_REQUEST_ID: Final = FORWARDED[0]

NOT_READABLE: Final = (DecodeError, Malformed)
"""What reading bytes that are no such message raises."""
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
        raise no_prompt(kind)
    return routed("Generate", message, body, caller, new_id)


def chat_request(body: bytes, caller: Caller, new_id: Callable[[], str]) -> Request:
    """A `ChatRequest` to route. Raises `InvalidRequest`."""
    message = _parse(pb.ChatRequest, body)
    if not message.messages:
        raise no_turns()
    for position, turn in enumerate(message.messages):
        if not turn.role:
            raise no_role(position)
    return routed("Chat", message, body, caller, new_id)


def embed_request(body: bytes, caller: Caller, new_id: Callable[[], str]) -> Request:
    """An `EmbedRequest` to route. Raises `InvalidRequest`."""
    message = _parse(pb.EmbedRequest, body)
    if not message.texts:
        raise no_texts()
    for position, text in enumerate(message.texts):
        if not text:
            raise empty_text(position)
    return routed("Embed", message, body, caller, new_id)


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
    check_model(message.model)
    return message


def _decode(message: Message, body: bytes) -> None:
    try:
        message.ParseFromString(body)
    except NOT_READABLE as error:
        raise not_valid(type(message)) from error


def check_model(name: str) -> None:
    """Raises `InvalidRequest` where it is empty."""
    if not name:
        raise InvalidRequest("the request names no model", param="model")


def not_valid(kind: type[Message]) -> InvalidRequest:
    return InvalidRequest(f"the request is no valid {kind.DESCRIPTOR.full_name}")


def no_prompt(kind: str | None) -> InvalidRequest:
    """`kind` is the field that is there, and empty."""
    return InvalidRequest("the prompt is empty: set text or token_ids", param=kind or "text")


def no_turns() -> InvalidRequest:
    return InvalidRequest("the conversation is empty: messages holds nothing", param="messages")


def no_role(position: int) -> InvalidRequest:
    return InvalidRequest(f"messages[{position}] has no role", param=f"messages[{position}].role")


def no_texts() -> InvalidRequest:
    return InvalidRequest("there is nothing to embed: texts is empty", param="texts")


def empty_text(position: int) -> InvalidRequest:
    return InvalidRequest(f"texts[{position}] is empty", param=f"texts[{position}]")


def routed(
    method: str,
    message: pb.GenerateRequest | pb.ChatRequest | pb.EmbedRequest,
    body: bytes,
    caller: Caller,
    new_id: Callable[[], str],
) -> Request:
    """The request of a call to `method`; of `message`, the model and the routing count."""
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
