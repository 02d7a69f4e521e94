"""Requests across the seam to Ray Serve: what its request routers are shown of ours, and what we read out of its own.

Pure functions, without Ray: both sides meet in OpenAI's words. The rule: no client's input and no argument of a
deployment raises; what cannot be read is a request without a prompt.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

import msgspec
from google.protobuf.message import DecodeError
from kvlane.v1 import inference_pb2 as pb

from router.types import Request, Rpc

MAX_BODY_BYTES: Final = 1 << 20
"""Longer bodies are not shown to Ray's routers: reading one would take milliseconds on the event loop."""

_CHAT_PATH: Final = "/kvlane.v1.Inference/Chat"
_GENERATE_PATH: Final = "/kvlane.v1.Inference/Generate"


class Ask(dict[str, Any]):
    """An OpenAI request whose fields are both items and attributes: deployments take either, and so do routers."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


def ask_of(request: Request) -> Ask | None:
    """The request as a Serve LLM deployment would get it; None where it holds no text that a router could look at.

    Ray's own routers take requests with `messages` or `prompt`, and divide by the length of their text.
    """
    if request.method != "POST" or len(request.body) > MAX_BODY_BYTES:
        return None
    ask = _from_grpc(request) if request.rpc is Rpc.GRPC else _from_http(request.body)
    return ask if ask is not None and _has_text(ask) else None


def _from_http(body: bytes) -> Ask | None:
    try:
        found = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    return Ask(found) if isinstance(found, dict) else None


def _from_grpc(request: Request) -> Ask | None:
    try:
        if request.path == _CHAT_PATH:
            chat = pb.ChatRequest.FromString(request.body)
            messages = [{"role": each.role, "content": each.content} for each in chat.messages]
            return Ask(model=request.model, messages=messages, stream=True)
        if request.path == _GENERATE_PATH:
            generate = pb.GenerateRequest.FromString(request.body)
            return Ask(model=request.model, prompt=generate.text, stream=True)
    except DecodeError:
        return None
    return None


def _has_text(ask: Ask) -> bool:
    """Token ids are none."""
    messages = ask.get("messages")
    if messages is not None:
        return isinstance(messages, list) and any(isinstance(each, dict) and each.get("content") for each in messages)
    prompt = ask.get("prompt")
    if isinstance(prompt, list):
        return any(isinstance(each, str) and each for each in prompt)
    return isinstance(prompt, str) and bool(prompt)


_PATHS: Final = {"messages": "/v1/chat/completions", "prompt": "/v1/completions", "input": "/v1/embeddings"}
"""By the field that holds the prompt."""
_SHAPES: Final = (
    "tools",
    "documents",
    "chat_template",
    "chat_template_kwargs",
    "reasoning_effort",
    "mm_processor_kwargs",
    "truncate_prompt_tokens",
    "add_special_tokens",
)
"""What else is rendered into a prompt, or changes how it is."""


def request_of(
    args: Iterable[Any], kwargs: Mapping[str, Any], metadata: Any, *, default_model: str = ""
) -> tuple[Request, bool]:
    """What a call to a Serve deployment says to policies, and whether a prompt was found in it.

    Looks for the first argument with `messages`, `prompt` or `input`, be it a dictionary or an object such as Ray
    Serve's pydantic models; a string is a prompt. `metadata` is Ray's `RequestMetadata`.
    """
    argument, source = _prompt_argument((*args, *kwargs.values()))
    body = _body(argument, source) if source else b""
    path = _PATHS.get(source, metadata.route or f"/{metadata.call_method}")
    if source == "input" and "response" in metadata.call_method:
        path = "/v1/responses"
    lora = metadata.multiplexed_model_id
    request = Request(
        request_id=metadata.request_id,
        model=_word(argument, "model") or default_model,
        rpc=Rpc.HTTP,
        path=path,
        body=body,
        # Deployments that multiplex by user rather than by adapter mean a session by it.
        session_id=metadata.session_id or _word(argument, "user") or lora,
        lora=lora,
        cache_salt=_word(argument, "cache_salt"),
    )
    return request, bool(body)


def _prompt_argument(arguments: Iterable[Any]) -> tuple[Any, str]:
    """The argument that holds the prompt, and the field that it is in; an empty name where there is none."""
    for argument in arguments:
        if isinstance(argument, str):
            return {"prompt": argument}, "prompt"
        for source in _PATHS:
            if _field(argument, source) is not None:
                return argument, source
    return None, ""


def _body(argument: Any, source: str) -> bytes:
    """The prompt and its shape as JSON; empty where they hold something that is no JSON."""
    fields = {name: value for name in (source, *_SHAPES) if (value := _field(argument, name)) is not None}
    try:
        return msgspec.json.encode(fields, enc_hook=_plain)
    except (msgspec.MsgspecError, NotImplementedError, TypeError, ValueError, OverflowError, RecursionError):
        return b""


def _plain(value: Any) -> Any:
    """The set fields of a pydantic model, which may stand in a message. Iterators are left alone: reading them would
    take their items away from the deployment."""
    names = getattr(value, "model_fields_set", None)
    if names is None:
        raise NotImplementedError(type(value).__name__)
    return {name: getattr(value, name) for name in sorted(names)}


def _word(argument: Any, name: str) -> str:
    value = _field(argument, name)
    return value if isinstance(value, str) else ""


def _field(argument: Any, name: str) -> Any:
    """An item or attribute; None where there is none."""
    try:
        return argument.get(name) if isinstance(argument, Mapping) else getattr(argument, name, None)
    except Exception:  # a deployment's own object may raise anything when looked at; it is then no OpenAI request
        return None
