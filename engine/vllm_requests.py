"""Turns kvlane's gRPC requests into the request objects of vLLM's own server.

Rule: a field that the caller left unset is not passed, so vLLM's defaults (and the model's generation config) hold, as
they do for the same request over HTTP. Raises `InvalidRequest` for what cannot be said to vLLM at all; vLLM judges the
rest.
"""

from __future__ import annotations

import json
from typing import Any, Final

from kvlane.v1 import inference_pb2 as pb

from router.errors import InvalidRequest

# Named alike on both sides; optional in the proto.
_SCALARS: Final = (
    "n", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty",
    "seed", "max_tokens", "min_tokens", "ignore_eos", "include_stop_str_in_output", "skip_special_tokens",
    "spaces_between_special_tokens", "prompt_logprobs",
)  # fmt: skip
_LISTS: Final = ("stop", "stop_token_ids", "bad_words", "allowed_token_ids")


def completion_request(request: pb.GenerateRequest, request_id: str) -> Any:
    """vLLM's `CompletionRequest`. Raises `InvalidRequest`, and pydantic's or vLLM's own errors for bad values."""
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest

    fields = _common(request.model, request.sampling, request.routing, request_id)
    if request.sampling.HasField("logprobs"):
        fields["logprobs"] = request.sampling.logprobs
    made = CompletionRequest(prompt=_prompt(request), **fields)
    if not request.sampling.HasField("max_tokens"):
        # The completions API fills in 16; here unset means what is left of the context.
        made.max_tokens = None
    return made


def chat_request(request: pb.ChatRequest, request_id: str) -> Any:
    """vLLM's `ChatCompletionRequest`. Raises `InvalidRequest`, and pydantic's or vLLM's own errors for bad values."""
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

    if not request.messages:
        raise InvalidRequest("messages must not be empty", param="messages")
    fields = _common(request.model, request.sampling, request.routing, request_id)
    if "max_tokens" in fields:
        fields["max_completion_tokens"] = fields.pop("max_tokens")
    if request.sampling.HasField("logprobs"):
        fields["logprobs"] = True
        fields["top_logprobs"] = request.sampling.logprobs
    if request.tools:
        fields["tools"] = [_tool(tool) for tool in request.tools]
        # The prompt shows the tools all the same; it is the answer that nobody parses, since deltas are raw text.
        fields["tool_choice"] = "none"
    if request.chat_template_kwargs_json:
        fields["chat_template_kwargs"] = _object(request.chat_template_kwargs_json, "chat_template_kwargs_json")
    return ChatCompletionRequest(messages=[_message(message) for message in request.messages], **fields)


def embedding_request(request: pb.EmbedRequest, request_id: str) -> Any:
    """vLLM's `EmbeddingCompletionRequest`, its vectors asked for in base64 so that no digit is lost."""
    from vllm.entrypoints.pooling.embed.protocol import EmbeddingCompletionRequest

    if not request.texts:
        raise InvalidRequest("texts must not be empty", param="texts")
    fields = _routing(request.model, request.routing, request_id)
    if request.HasField("dimensions"):
        fields["dimensions"] = request.dimensions
    return EmbeddingCompletionRequest(input=list(request.texts), encoding_format="base64", **fields)


def _prompt(request: pb.GenerateRequest) -> str | list[int]:
    if request.WhichOneof("prompt") == "token_ids":
        prompt: str | list[int] = list(request.token_ids.ids)
    else:
        prompt = request.text
    if not prompt:
        raise InvalidRequest("the prompt must not be empty", param="prompt")
    return prompt


def _common(model: str, sampling: pb.SamplingParams, routing: pb.RoutingParams, request_id: str) -> dict[str, Any]:
    fields = _routing(model, routing, request_id)
    fields |= {name: getattr(sampling, name) for name in _SCALARS if sampling.HasField(name)}
    fields |= {name: list(values) for name in _LISTS if (values := getattr(sampling, name))}
    if sampling.logit_bias:
        fields["logit_bias"] = {str(token): bias for token, bias in sampling.logit_bias.items()}
    if sampling.HasField("truncate_prompt_tokens"):
        fields["truncate_prompt_tokens"] = sampling.truncate_prompt_tokens
        fields["truncation_side"] = "left"
    if structured := _structured(sampling):
        fields["structured_outputs"] = structured
    return fields


def _routing(model: str, routing: pb.RoutingParams, request_id: str) -> dict[str, Any]:
    fields: dict[str, Any] = {"model": routing.lora or model or None, "request_id": request_id}
    if routing.cache_salt:
        fields["cache_salt"] = routing.cache_salt
    if routing.priority:
        fields["priority"] = routing.priority
    return fields


def _structured(sampling: pb.SamplingParams) -> Any:
    from vllm.sampling_params import StructuredOutputsParams

    match sampling.WhichOneof("structured_output"):
        case "json_schema":
            return StructuredOutputsParams(json=_object(sampling.json_schema, "json_schema"))
        case "regex":
            return StructuredOutputsParams(regex=sampling.regex)
        case "choice":
            return StructuredOutputsParams(choice=list(sampling.choice.values))
        case "grammar":
            return StructuredOutputsParams(grammar=sampling.grammar)
        case "json_object" if sampling.json_object:
            return StructuredOutputsParams(json_object=True)
        case _:
            return None


def _message(message: pb.ChatMessage) -> dict[str, Any]:
    if not message.role:
        raise InvalidRequest("a message must have a role", param="messages")
    made: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.name:
        made["name"] = message.name
    if message.tool_call_id:
        made["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        made["tool_calls"] = [_tool_call(call) for call in message.tool_calls]
    return made


def _tool_call(call: pb.ToolCall) -> dict[str, Any]:
    _object(call.arguments_json or "{}", "arguments_json")
    function = {"name": call.name, "arguments": call.arguments_json or "{}"}
    return {"id": call.id, "type": "function", "function": function}


def _tool(tool: pb.Tool) -> dict[str, Any]:
    function: dict[str, Any] = {"name": tool.name}
    if tool.description:
        function["description"] = tool.description
    if tool.parameters_json:
        function["parameters"] = _object(tool.parameters_json, "parameters_json")
    return {"type": "function", "function": function}


def _object(text: str, field: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise InvalidRequest(f"{field} is not JSON: {error}", param=field) from error
    except RecursionError as error:
        raise InvalidRequest(f"{field} is nested too deeply", param=field) from error
    if not isinstance(value, dict):
        raise InvalidRequest(f"{field} must be a JSON object", param=field)
    return value
