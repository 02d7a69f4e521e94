"""A small typed client for kvlane's gRPC interface.

::

    async with Client("127.0.0.1:9000") as client:
        async for delta in client.generate("tiny", "Once upon a time", max_tokens=32):
            print(delta.text, end="")

Needs grpcio and protobuf, nothing else of kvlane. Every failure of a call is a `KvlaneCallError`, the end of a call by
`Stream.cancel` or `Client.close` and calls after that included; only the cancelling of the task that waits stays
`asyncio.CancelledError`, as everywhere. A stream that is left
early is cancelled, which stops its work in the engine: at once when it was used as a context manager, else when it is
collected.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NoReturn, Self, TypeAlias, TypedDict, Unpack

import grpc
import grpc.aio

from kvlane.v1 import inference_pb2 as pb

Message: TypeAlias = Mapping[str, Any] | pb.ChatMessage
"""A turn of a conversation: ``{"role": "user", "content": "…"}``, or the protobuf message."""
Prompt: TypeAlias = str | Sequence[int]
"""Text, or token ids."""

_SERVICE = "/kvlane.v1.Inference/"
_KEEPALIVE = (("grpc.keepalive_time_ms", 30_000), ("grpc.keepalive_timeout_ms", 20_000))


class Sampling(TypedDict, total=False):
    """Sampling parameters; what is left out takes vLLM's defaults."""

    n: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    seed: int
    max_tokens: int
    min_tokens: int
    stop: Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    include_stop_str_in_output: bool
    skip_special_tokens: bool
    spaces_between_special_tokens: bool
    logprobs: int
    prompt_logprobs: int
    logit_bias: Mapping[int, float]
    bad_words: Sequence[str]
    allowed_token_ids: Sequence[int]
    truncate_prompt_tokens: int
    json_schema: str | Mapping[str, Any]
    regex: str
    choice: Sequence[str]
    grammar: str
    json_object: bool


@dataclass(frozen=True, slots=True)
class Routing:
    """Where a request may go and what it is counted as."""

    lora: str = ""
    cache_salt: str = ""
    session_id: str = ""
    priority: int = 0
    request_id: str = ""


@dataclass(frozen=True, slots=True)
class Route:
    """Why a request went where it went."""

    replica: str
    policy: str
    reason: str
    queue_depth: int
    request_id: str
    matched_blocks: int = 0
    """Prefix blocks of the prompt that the replica was believed to hold, of `prompt_blocks`."""
    prompt_blocks: int = 0
    cached_tokens: int = 0
    """The same in tokens, estimated, of `prompt_tokens`."""
    prompt_tokens: int = 0
    expected_s: float = 0.0
    """When the first output was expected, from the submit; 0 where nobody knows."""
    score: float = 0.0
    """The policy's own measure of the choice; lower is better."""
    candidates: tuple[RouteCandidate, ...] = ()
    """Every replica that was there, the chosen one first; only for a call with the metadata ``x-kvlane-explain: 1``."""


@dataclass(frozen=True, slots=True)
class RouteCandidate:
    """One replica that a request could have gone to."""

    replica: str
    queue_depth: int
    matched_blocks: int
    cached_tokens: int
    expected_s: float
    score: float | None


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    token_id: int
    logprob: float
    rank: int
    text: str


@dataclass(frozen=True, slots=True)
class PositionLogprobs:
    chosen: TokenLogprob
    top: tuple[TokenLogprob, ...]


@dataclass(frozen=True, slots=True)
class Delta:
    """What one message of a stream adds. The first one has only `route`."""

    text: str = ""
    token_ids: tuple[int, ...] = ()
    index: int = 0
    """Which of the `n` choices this belongs to."""
    finish_reason: str | None = None
    stop_reason: str | None = None
    logprobs: tuple[PositionLogprobs, ...] = ()
    prompt_logprobs: tuple[PositionLogprobs, ...] = ()
    usage: Usage | None = None
    route: Route | None = None


@dataclass(frozen=True, slots=True)
class Embeddings:
    vectors: tuple[tuple[float, ...], ...]
    """One per text, in order."""
    usage: Usage | None = None
    route: Route | None = None


@dataclass(frozen=True, slots=True)
class Model:
    name: str
    parent: str
    """The base model of a LoRA adapter; empty for a base model."""
    max_model_len: int
    ready_replicas: int


class KvlaneCallError(Exception):
    """A call that failed."""

    def __init__(
        self, status: grpc.StatusCode, name: str, message: str, retryable: bool, request_id: str | None = None
    ) -> None:
        super().__init__(f"{status.name}{f' ({name})' if name else ''}: {message}")
        self.status = status
        self.name = name
        """kvlane's stable error name, such as ``model_not_found``; empty where the failure is not the router's own."""
        self.message = message
        self.retryable = retryable
        """Whether the same request may succeed a moment later."""
        self.request_id = request_id

    @classmethod
    def of(cls, error: grpc.aio.AioRpcError) -> Self:
        """The error behind a failed call's status and trailing metadata."""
        trailers = dict(error.trailing_metadata() or ())
        name = trailers.get("kvlane-error", "")
        # Without the router's own word: it was not reached, or it went away.
        retryable = trailers.get("kvlane-retryable") == "1" if name else error.code() is grpc.StatusCode.UNAVAILABLE
        return cls(error.code(), str(name), error.details() or "", retryable, _text(trailers.get("x-request-id")))


# What grpc raises for a call that failed, that was cancelled here, or whose channel is closed.
_FAILURES = (grpc.aio.AioRpcError, asyncio.CancelledError, grpc.aio.UsageError, grpc.aio.InternalError)


def _fail(error: BaseException) -> NoReturn:
    """Raises what tells of one of `_FAILURES`."""
    if isinstance(error, grpc.aio.AioRpcError):
        raise KvlaneCallError.of(error) from error
    task = asyncio.current_task()
    if isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling():
        raise error
    message = str(error) or "the call was cancelled on this side"
    raise KvlaneCallError(grpc.StatusCode.CANCELLED, "", message, retryable=False) from error


class Stream:
    """A streamed answer: an async iterator of `Delta`, and a context manager that cancels what is left."""

    def __init__(self, call: grpc.aio.UnaryStreamCall[Any, Any], to_delta: Callable[[Any], Delta]) -> None:
        self._call = call
        self._responses = aiter(call)
        self._to_delta = to_delta
        self._begun = False

    def cancel(self) -> None:
        """Ends the call; its work in the engine stops, and whoever waits for a delta gets CANCELLED. Harmless after the
        end."""
        self._call.cancel()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Delta:
        try:
            response = await anext(self._responses)
            while not self._begun and not response.ByteSize():
                response = await anext(self._responses)  # The last one said only that the request still waits.
            self._begun = True
            return self._to_delta(response)
        except _FAILURES as error:
            _fail(error)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.cancel()

    def __del__(self) -> None:
        # grpc's own call is part of a reference cycle, so its collection may take long while the engine works on.
        if not self._call.done():
            self._call.cancel()


class Client:
    """A connection to a kvlane router. All times are in seconds; None sets no deadline."""

    def __init__(
        self,
        target: str,
        *,
        tls: grpc.ChannelCredentials | bool = False,
        metadata: Sequence[tuple[str, str]] = (),
        options: Sequence[tuple[str, Any]] = (),
    ) -> None:
        """`target` is ``host:port``; `tls` is True for the system's authorities or credentials from
        `grpc.ssl_channel_credentials`; `metadata` goes with every call; `options` are gRPC channel arguments."""
        arguments = [("grpc.max_receive_message_length", -1), *_KEEPALIVE, *options]
        if tls:
            credentials = grpc.ssl_channel_credentials() if tls is True else tls
            self._channel = grpc.aio.secure_channel(target, credentials, options=arguments)
        else:
            self._channel = grpc.aio.insecure_channel(target, options=arguments)
        self._metadata = tuple(metadata)
        self._generate = self._channel.unary_stream(
            f"{_SERVICE}Generate",
            request_serializer=pb.GenerateRequest.SerializeToString,
            response_deserializer=pb.GenerateResponse.FromString,
        )
        self._chat = self._channel.unary_stream(
            f"{_SERVICE}Chat",
            request_serializer=pb.ChatRequest.SerializeToString,
            response_deserializer=pb.ChatResponse.FromString,
        )
        self._embed = self._channel.unary_unary(
            f"{_SERVICE}Embed",
            request_serializer=pb.EmbedRequest.SerializeToString,
            response_deserializer=pb.EmbedResponse.FromString,
        )
        self._models = self._channel.unary_unary(
            f"{_SERVICE}Models",
            request_serializer=pb.ModelsRequest.SerializeToString,
            response_deserializer=pb.ModelsResponse.FromString,
        )

    def generate(
        self,
        model: str,
        prompt: Prompt,
        *,
        routing: Routing | None = None,
        timeout_s: float | None = None,
        **sampling: Unpack[Sampling],
    ) -> Stream:
        """Streams the continuation of a prompt."""
        request = pb.GenerateRequest(model=model, sampling=_sampling(sampling), routing=_routing(routing))
        if isinstance(prompt, str):
            request.text = prompt
        else:
            request.token_ids.ids.extend(prompt)
        return self._stream(self._generate, request, timeout_s, _generate_delta)

    def chat(
        self,
        model: str,
        messages: Sequence[Message],
        *,
        tools: Sequence[pb.Tool] = (),
        chat_template_kwargs: Mapping[str, Any] | None = None,
        routing: Routing | None = None,
        timeout_s: float | None = None,
        **sampling: Unpack[Sampling],
    ) -> Stream:
        """Streams the assistant's answer to a conversation. Raises `ValueError` on a message with unknown fields."""
        request = pb.ChatRequest(
            model=model,
            messages=[turn if isinstance(turn, pb.ChatMessage) else pb.ChatMessage(**turn) for turn in messages],
            sampling=_sampling(sampling),
            routing=_routing(routing),
            tools=tools,
            chat_template_kwargs_json=json.dumps(chat_template_kwargs) if chat_template_kwargs else "",
        )
        return self._stream(self._chat, request, timeout_s, _chat_delta)

    async def embed(
        self,
        model: str,
        texts: Sequence[str],
        *,
        dimensions: int | None = None,
        routing: Routing | None = None,
        timeout_s: float | None = None,
    ) -> Embeddings:
        """Embeds texts."""
        request = pb.EmbedRequest(model=model, texts=texts, dimensions=dimensions, routing=_routing(routing))
        try:
            response = await self._embed(request, timeout=timeout_s, metadata=self._metadata)
        except _FAILURES as error:
            _fail(error)
        vectors = tuple(tuple(embedding.values) for embedding in response.embeddings)
        return Embeddings(vectors, _usage(response), _route(response))

    async def models(self, *, timeout_s: float | None = None) -> list[Model]:
        """The models that the router has heard of; one without a ready replica has `ready_replicas` 0."""
        try:
            response = await self._models(pb.ModelsRequest(), timeout=timeout_s, metadata=self._metadata)
        except _FAILURES as error:
            _fail(error)
        return [Model(each.name, each.parent, each.max_model_len, each.ready_replicas) for each in response.models]

    def _stream(
        self,
        method: grpc.aio.UnaryStreamMultiCallable[Any, Any],
        request: Any,
        timeout_s: float | None,
        to_delta: Callable[[Any], Delta],
    ) -> Stream:
        try:
            call = method(request, timeout=timeout_s, metadata=self._metadata)
        except _FAILURES as error:
            _fail(error)
        return Stream(call, to_delta)

    async def close(self) -> None:
        """Ends the connection and every call on it."""
        await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()


def _sampling(given: Sampling) -> pb.SamplingParams:
    values: dict[str, Any] = dict(given)
    if isinstance(schema := values.get("json_schema"), Mapping):
        values["json_schema"] = json.dumps(schema)
    if (choice := values.get("choice")) is not None:
        values["choice"] = pb.Choices(values=choice)
    return pb.SamplingParams(**values)


def _routing(routing: Routing | None) -> pb.RoutingParams | None:
    if routing is None:
        return None
    return pb.RoutingParams(
        lora=routing.lora,
        cache_salt=routing.cache_salt,
        session_id=routing.session_id,
        priority=routing.priority,
        request_id=routing.request_id,
    )


def _generate_delta(response: pb.GenerateResponse) -> Delta:
    return Delta(
        text=response.text,
        token_ids=tuple(response.token_ids),
        index=response.index,
        finish_reason=response.finish_reason or None,
        stop_reason=response.stop_reason or None,
        logprobs=tuple(map(_position, response.logprobs)),
        prompt_logprobs=tuple(map(_position, response.prompt_logprobs)),
        usage=_usage(response),
        route=_route(response),
    )


def _chat_delta(response: pb.ChatResponse) -> Delta:
    return Delta(
        text=response.content,
        token_ids=tuple(response.token_ids),
        index=response.index,
        finish_reason=response.finish_reason or None,
        stop_reason=response.stop_reason or None,
        logprobs=tuple(map(_position, response.logprobs)),
        usage=_usage(response),
        route=_route(response),
    )


def _position(position: pb.PositionLogprobs) -> PositionLogprobs:
    return PositionLogprobs(_token(position.chosen), tuple(map(_token, position.top)))


def _token(token: pb.TokenLogprob) -> TokenLogprob:
    return TokenLogprob(token.token_id, token.logprob, token.rank, token.text)


def _usage(response: pb.GenerateResponse | pb.ChatResponse | pb.EmbedResponse) -> Usage | None:
    if not response.HasField("usage"):
        return None
    usage = response.usage
    return Usage(usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens)


def _route(response: pb.GenerateResponse | pb.ChatResponse | pb.EmbedResponse) -> Route | None:
    if not response.HasField("route"):
        return None
    route = response.route
    return Route(
        route.replica,
        route.policy,
        route.reason,
        route.queue_depth,
        route.request_id,
        route.matched_blocks,
        route.prompt_blocks,
        route.cached_tokens,
        route.prompt_tokens,
        route.expected_s,
        route.score,
        tuple(map(_candidate, route.candidates)),
    )


def _candidate(one: pb.RouteCandidate) -> RouteCandidate:
    score = one.score if one.HasField("score") else None
    return RouteCandidate(one.replica, one.queue_depth, one.matched_blocks, one.cached_tokens, one.expected_s, score)


def _text(value: str | bytes | None) -> str | None:
    return value.decode() if isinstance(value, bytes) else value
