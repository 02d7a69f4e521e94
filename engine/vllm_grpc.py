"""Answers gRPC streams on an `AsyncLLM`: Generate, Chat and Embed.

Rule: a prompt is rendered and a request's defaults are filled in by vLLM's own server code, so that a gRPC request and
the same one over HTTP give the engine the same work; only the answer's form is ours. Cancelling the task that runs a
stream aborts it in the engine.
"""

from __future__ import annotations

import json
from array import array
from base64 import b64decode
from collections.abc import Callable, Mapping, Sequence
from contextlib import aclosing
from typing import Any, Final, TypeVar

from google.protobuf.message import DecodeError, Message
from kvlane.v1 import inference_pb2 as pb

from engine.base import StreamOut
from engine.vllm_cache import serving
from engine.vllm_errors import FAILED, mapped, of_response
from engine.vllm_rendering import watching
from engine.vllm_requests import chat_request, completion_request, embedding_request
from router.errors import InvalidRequest, NotSupported, PathNotFound, ReplicaFailed, ReplicaLost
from router.lane.frames import Submit

M = TypeVar("M", bound=Message)

_LOWEST_LOGPROB: Final = -9999.0
"""What vLLM's server writes for minus infinity."""


class GrpcStreams:
    """Answers gRPC calls on one engine.

    `state` is the state of vLLM's application, which holds its serving objects; `lost` says whether the engine is dead.
    """

    def __init__(self, engine: Any, state: Any, lost: Callable[[], bool]) -> None:
        self._engine = engine
        self._lost = lost
        self._completions = getattr(state, "openai_serving_completion", None)
        self._chat = getattr(state, "openai_serving_chat", None)
        self._embeddings = getattr(state, "serving_embedding", None)
        self._models = state.openai_serving_models
        self._methods = {
            "/kvlane.v1.Inference/Generate": self._run_generate,
            "/kvlane.v1.Inference/Chat": self._run_chat,
            "/kvlane.v1.Inference/Embed": self._run_embed,
        }

    async def run(self, call: Submit, out: StreamOut) -> None:
        """Runs one call; `out` is ended or failed when it returns. Raises `CancelledError` alone."""
        try:
            method = self._methods.get(call.path)
            if method is None:
                raise PathNotFound(f"the engine has no method {call.path}")
            with serving(call):
                finish = await method(call, out)
        except Exception as error:
            # A dead engine makes for errors of all sorts.
            out.fail(ReplicaLost("the engine died") if self._lost() else mapped(error, call.request_id))
        else:
            out.end(finish)

    async def _run_generate(self, call: Submit, out: StreamOut) -> str:
        request = _parse(pb.GenerateRequest, call.body)
        serving = _supported(self._completions, "generate text")
        made = completion_request(request, call.request_id)
        inputs = await serving.render_completion_request(made)
        (prompt,) = inputs if isinstance(inputs, list) else _raise_response(inputs)
        params = self._params(serving, made, made.max_tokens, prompt)
        answer = _Answer(out, _generate_response, request.sampling)
        return await self._stream(answer, made, prompt, params, call)

    async def _run_chat(self, call: Submit, out: StreamOut) -> str:
        request = _parse(pb.ChatRequest, call.body)
        serving = _supported(self._chat, "chat")
        made = chat_request(request, call.request_id)
        rendered = await serving.render_chat_request(made)
        _, (prompt,) = rendered if isinstance(rendered, tuple) else _raise_response(rendered)
        params = self._params(serving, made, made.max_completion_tokens, prompt)
        answer = _Answer(out, _chat_response, request.sampling)
        return await self._stream(answer, made, prompt, params, call)

    def _params(self, serving: Any, made: Any, max_tokens: int | None, prompt: Any) -> Any:
        """The sampling parameters, with the defaults that vLLM's server fills in."""
        from vllm.entrypoints.serve.utils.api_utils import get_max_tokens
        from vllm.renderers.inputs.preprocess import extract_prompt_len
        from vllm.sampling_params import RequestOutputKind

        params = made.to_sampling_params(
            get_max_tokens(
                self._engine.model_config.max_model_len,
                max_tokens,
                extract_prompt_len(self._engine.model_config, prompt),
                serving.default_sampling_params,
                serving.override_max_tokens,
                truncate_prompt_tokens=made.truncate_prompt_tokens,
            ),
            serving.default_sampling_params,
        )
        # Set here and not by `stream` in the request, which would refuse prompt_logprobs.
        params.output_kind = RequestOutputKind.DELTA
        return params

    async def _stream(self, answer: _Answer, made: Any, prompt: Any, params: Any, call: Submit) -> str:
        results = self._engine.generate(
            prompt,
            params,
            call.request_id,
            lora_request=self._models.lora_requests.get(made.model),
            priority=made.priority,
            trace_headers=await self._trace_headers(call),
        )
        async with aclosing(results):
            with watching(answer):
                async for result in results:
                    answer.add(result)
        return answer.finish

    async def _trace_headers(self, call: Submit) -> Mapping[str, str] | None:
        from vllm.tracing import extract_trace_headers

        if not await self._engine.is_tracing_enabled():
            return None
        headers: Mapping[str, str] | None = extract_trace_headers(dict(call.headers))
        return headers

    async def _run_embed(self, call: Submit, out: StreamOut) -> str:
        request = _parse(pb.EmbedRequest, call.body)
        serving = _supported(self._embeddings, "embed")
        response = await serving(embedding_request(request, call.request_id))
        body = json.loads(bytes(response.body))
        usage = pb.Usage(prompt_tokens=body["usage"]["prompt_tokens"])
        answer = pb.EmbedResponse(embeddings=map(_embedding, body["data"]), usage=usage)
        out.data(answer.SerializeToString(), 0)
        return ""


class _Answer:
    """One stream's answer as it grows: a message for each choice of each step, usage on the last.

    Where vLLM shows its outputs (`engine.vllm_rendering`) all but the last are taken where its output handler hands
    them out; the stream's task wakes for the last one, and for what went wrong.
    """

    def __init__(self, out: StreamOut, make: Callable[..., Message], sampling: pb.SamplingParams) -> None:
        self.finish = ""
        self._out = out
        self._make = make
        self._top = sampling.logprobs
        self._prompt_top = sampling.prompt_logprobs
        self._prompt_ids: Sequence[int] = ()
        self._prompt_logprobs: list[pb.PositionLogprobs] = []
        self._prompt_positions = 0
        self._prompt_told_by: int | None = None
        """Each choice brings the whole prompt's logprobs; those of the first one that does are taken."""
        self._usage: pb.Usage | None = None
        self._queue: Any = None

    def watch(self, queue: Any, state: Any) -> None:
        """Takes outputs in place of the stream's collector."""
        if self._queue is None and state.parent_req is None:
            self._queue = queue
            queue.put = self._take

    def _take(self, result: Any) -> None:
        """What this raised would end the engine: the stream's task raises it instead."""
        queue = self._queue
        try:
            if queue.output is None and not isinstance(result, Exception) and not result.finished:
                self.add(result)
                return
        except Exception as error:
            result = error
        del queue.put
        queue.put(result)

    def add(self, result: Any) -> None:
        """Writes what one step brought. Raises `ReplicaFailed` where the engine gave the stream up."""
        if self._usage is None:
            self._prompt_ids = result.prompt_token_ids or ()
            self._usage = pb.Usage(prompt_tokens=len(self._prompt_ids), cached_tokens=result.num_cached_tokens or 0)
        if result.prompt_logprobs:
            choice = result.outputs[0].index
            if self._prompt_told_by is None:
                self._prompt_told_by = choice
            if self._prompt_told_by == choice:
                self._take_prompt_logprobs(result.prompt_logprobs)
        last = result.outputs[-1] if result.finished and result.outputs else None
        for output in result.outputs:
            self._add_output(output, self._usage, is_last=output is last)

    def _add_output(self, output: Any, usage: pb.Usage, *, is_last: bool) -> None:
        if output.finish_reason == "error":
            raise ReplicaFailed(FAILED)
        if not (output.text or output.token_ids or output.finish_reason):
            return  # A step that computed only a part of the prompt.
        first = not usage.completion_tokens
        usage.completion_tokens += len(output.token_ids)
        message = self._make(
            index=output.index,
            text=output.text,
            token_ids=output.token_ids,
            logprobs=self._logprobs(output),
            finish_reason=output.finish_reason or "",
            stop_reason="" if output.stop_reason is None else str(output.stop_reason),
            usage=usage if is_last else None,
            prompt_logprobs=self._prompt_logprobs,
        )
        self._prompt_logprobs = []
        self.finish = output.finish_reason or self.finish
        self._out.data(message.SerializeToString(), len(output.token_ids), urgent=first)

    def _logprobs(self, output: Any) -> list[pb.PositionLogprobs]:
        if not output.logprobs:
            return []
        pairs = zip(output.token_ids, output.logprobs, strict=True)
        return [_position(token, entries, self._top) for token, entries in pairs]

    def _take_prompt_logprobs(self, positions: Sequence[Mapping[int, Any] | None]) -> None:
        """A long prompt's come in parts. The first position has none: nothing comes before it."""
        for entries in positions:
            token = self._prompt_ids[self._prompt_positions]
            made = _position(token, entries, self._prompt_top) if entries else pb.PositionLogprobs()
            self._prompt_logprobs.append(made)
            self._prompt_positions += 1


def _generate_response(**fields: Any) -> pb.GenerateResponse:
    return pb.GenerateResponse(**fields)


def _chat_response(*, text: str, prompt_logprobs: object, **fields: Any) -> pb.ChatResponse:
    return pb.ChatResponse(content=text, **fields)


def _position(token: int, entries: Mapping[int, Any], top: int) -> pb.PositionLogprobs:
    ranked = sorted(entries.items(), key=lambda entry: entry[1].rank or 0)
    return pb.PositionLogprobs(
        chosen=_token_logprob(token, entries[token]),
        top=[_token_logprob(other, logprob) for other, logprob in ranked if 0 < (logprob.rank or 0) <= top],
    )


def _token_logprob(token: int, logprob: Any) -> pb.TokenLogprob:
    return pb.TokenLogprob(
        token_id=token,
        logprob=max(logprob.logprob, _LOWEST_LOGPROB),
        rank=logprob.rank or 0,
        text=logprob.decoded_token or "",
    )


def _embedding(item: Mapping[str, Any]) -> pb.Embedding:
    values = array("f")
    values.frombytes(b64decode(item["embedding"]))
    return pb.Embedding(values=values)


def _parse(kind: type[M], body: bytes) -> M:
    try:
        return kind.FromString(body)
    except DecodeError as error:
        raise InvalidRequest(f"the request is no {kind.DESCRIPTOR.full_name}: {error}") from error


def _supported(serving: Any, what: str) -> Any:
    if serving is None:
        raise NotSupported(f"the model does not {what}")
    return serving


def _raise_response(response: Any) -> Any:
    raise of_response(response)
