"""Reads prompts from kvlane's own gRPC requests. Pure; `canonical` owns the form."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Callable, Sequence
from typing import Any, Final

import msgspec
from kvlane.v1 import inference_pb2 as pb

from router.prefix.draft import ASSISTANT, MAX_PARTS, Draft, call, call_id, head, name, utf8


def read(path: str, body: bytes, limit: int) -> Draft | None:
    """The prompt of a call to `path`; None where it has none. Raises protobuf's `DecodeError` and `ValueError`."""
    reader = _READERS.get(path)
    return None if reader is None else reader(body, limit)


def token_bytes(ids: Sequence[int]) -> bytes:
    """Token ids as they are hashed. Raises `OverflowError` where one takes more than 32 bits."""
    packed = array("I", ids)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def _generate(body: bytes, limit: int) -> Draft | None:
    request = pb.GenerateRequest.FromString(body)
    draft = Draft("completion", "")
    if request.WhichOneof("prompt") == "token_ids":
        ids = request.token_ids.ids
        draft.tokens = token_bytes(ids[: limit // 4])
        draft.unread_bytes = 4 * len(ids) - len(draft.tokens)
    else:
        draft.parts.append(utf8(request.text))
    _truncation(draft, request.sampling)
    return draft


def _chat(body: bytes, limit: int) -> Draft | None:
    request = pb.ChatRequest.FromString(body)
    draft = Draft("chat", ASSISTANT)
    add = draft.parts.append
    for message in request.messages:
        add(head(message.role))
        if content := message.content:
            add(utf8(content))
        for made in message.tool_calls:
            add(call(made.name))
            add(utf8(made.arguments_json or "{}"))
            add(call_id(made.id))
        if caller := message.name:
            add(name(caller))
        if answered := message.tool_call_id:
            add(call_id(answered))
        if len(draft.parts) > MAX_PARTS:
            draft.unread_bytes = max(1, len(body) - sum(map(len, draft.parts)))
            break
    if request.tools:
        draft.shape.append(("tools", _encoder.encode(list(map(tool_of, request.tools)))))
    if request.chat_template_kwargs_json:
        draft.shape.append(("chat_template_kwargs", request.chat_template_kwargs_json.encode()))
    _truncation(draft, request.sampling)
    return draft


def _embed(body: bytes, limit: int) -> Draft | None:
    request = pb.EmbedRequest.FromString(body)
    if not request.texts:
        return None
    draft = Draft("embedding")
    draft.parts.append(utf8(request.texts[0]))
    return draft


def _truncation(draft: Draft, sampling: pb.SamplingParams) -> None:
    """Prompts that lose their beginning share no prefix with whole ones."""
    if sampling.HasField("truncate_prompt_tokens"):
        draft.shape.append(("truncate_prompt_tokens", b"%d" % sampling.truncate_prompt_tokens))


_encoder: Final = msgspec.json.Encoder()


def tool_of(tool: pb.Tool) -> dict[str, Any]:
    """A tool as it is hashed."""
    parameters = msgspec.Raw(tool.parameters_json.encode() or b"null")
    return {"name": tool.name, "description": tool.description, "parameters": parameters}


_READERS: Final[dict[str, Callable[[bytes, int], Draft | None]]] = {
    "/kvlane.v1.Inference/Generate": _generate,
    "/kvlane.v1.Inference/Chat": _chat,
    "/kvlane.v1.Inference/Embed": _embed,
}
