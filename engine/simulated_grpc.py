"""gRPC of the simulated engine: Generate and Chat of `protos/kvlane/v1/inference.proto`.

Parsing and rendering only. All streams share the serialized message of each word, so a token costs one table look-up.
"""

from __future__ import annotations

from typing import Final, TypeAlias, TypeVar

from google.protobuf.message import DecodeError, Message
from kvlane.v1.inference_pb2 import (
    ChatMessage,
    ChatRequest,
    ChatResponse,
    GenerateRequest,
    GenerateResponse,
    RoutingParams,
    SamplingParams,
    Usage,
)

from engine.base import StreamOut
from engine.simulated_ask import Ask, PromptMaker, check_sampling
from engine.simulated_core import Job
from engine.simulated_text import VOCABULARY, WORD_IDS, WORDS, chat_text, token_text, word
from router.errors import InvalidRequest, ModelNotFound, NotSupported, PathNotFound
from router.lane.frames import Submit

_Request = TypeVar("_Request", bound=Message)
Response: TypeAlias = GenerateResponse | ChatResponse


def _generated(index: int) -> GenerateResponse:
    return GenerateResponse(text=WORDS[index].decode(), token_ids=[WORD_IDS[index]])


def _said(index: int) -> ChatResponse:
    return ChatResponse(content=WORDS[index].decode(), token_ids=[WORD_IDS[index]])


_GENERATED: Final = tuple(_generated(index).SerializeToString() for index in range(VOCABULARY))
_SAID: Final = tuple(_said(index).SerializeToString() for index in range(VOCABULARY))


class Grpc:
    """The service of one simulated engine."""

    def __init__(self, model: str, prompts: PromptMaker) -> None:
        self._model = model
        self._prompts = prompts

    def ask(self, call: Submit, out: StreamOut) -> Ask:
        """What `call` asks of the engine. Raises `KvlaneError` for faulty requests."""
        if call.path == "/kvlane.v1.Inference/Generate":
            return self._generate(call, out)
        if call.path == "/kvlane.v1.Inference/Chat":
            return self._chat(call, out)
        if call.path == "/kvlane.v1.Inference/Embed":
            raise NotSupported("The simulated engine makes no embeddings.")
        raise PathNotFound(f"The engine has no method {call.path}.")

    def _generate(self, call: Submit, out: StreamOut) -> Ask:
        request = _parse(GenerateRequest, call.body)
        self._check(request.model, request.sampling)
        salt = request.routing.cache_salt
        if request.text:
            text = request.text.encode()
        elif request.token_ids.ids:
            text = token_text(request.token_ids.ids)
        else:
            raise InvalidRequest("`text` or `token_ids` must hold a prompt.", param="prompt")
        prompt = self._prompts.text(text, salt)
        return Ask(prompt, text, _max_tokens(request.sampling), _priority(request.routing, call), _Generated(out))

    def _chat(self, call: Submit, out: StreamOut) -> Ask:
        request = _parse(ChatRequest, call.body)
        self._check(request.model, request.sampling)
        if not request.messages:
            raise InvalidRequest("`messages` must hold at least one message.", param="messages")
        text = chat_text([(_role(message), message.content) for message in request.messages])
        prompt = self._prompts.text(text, request.routing.cache_salt)
        return Ask(prompt, text, _max_tokens(request.sampling), _priority(request.routing, call), _Said(out))

    def _check(self, model: str, sampling: SamplingParams) -> None:
        if model and model != self._model:
            raise ModelNotFound(f"The model `{model}` does not exist.", param="model")
        check_sampling(
            n=sampling.n if sampling.HasField("n") else None,
            max_tokens=_max_tokens(sampling),
            temperature=sampling.temperature if sampling.HasField("temperature") else None,
            top_p=sampling.top_p if sampling.HasField("top_p") else None,
        )


class _Generated:
    """An answer to Generate."""

    def __init__(self, out: StreamOut) -> None:
        self._out = out

    def token(self, job: Job) -> None:
        self._out.data(_GENERATED[(job.prompt.key + job.produced - 1) % VOCABULARY], 1)

    def last(self, job: Job) -> None:
        _finish(self._out, _generated(_last_word(job)), job)


class _Said:
    """An answer to Chat."""

    def __init__(self, out: StreamOut) -> None:
        self._out = out

    def token(self, job: Job) -> None:
        self._out.data(_SAID[(job.prompt.key + job.produced - 1) % VOCABULARY], 1)

    def last(self, job: Job) -> None:
        _finish(self._out, _said(_last_word(job)), job)


def _finish(out: StreamOut, message: Response, job: Job) -> None:
    message.finish_reason = job.finish
    message.usage.CopyFrom(
        Usage(prompt_tokens=job.prompt.tokens, completion_tokens=job.produced, cached_tokens=job.cached_tokens)
    )
    out.data(message.SerializeToString(), 1)


def _last_word(job: Job) -> int:
    return word(job.prompt.key, job.produced - 1)


def _parse(kind: type[_Request], body: bytes) -> _Request:
    try:
        return kind.FromString(body)
    except DecodeError as error:
        raise InvalidRequest(f"the request is no {kind.DESCRIPTOR.name} message") from error


def _role(message: ChatMessage) -> str:
    if not message.role:
        raise InvalidRequest("each message needs a `role`.", param="messages")
    return message.role


def _max_tokens(sampling: SamplingParams) -> int | None:
    return sampling.max_tokens if sampling.HasField("max_tokens") else None


def _priority(routing: RoutingParams, call: Submit) -> int:
    return routing.priority or call.priority
