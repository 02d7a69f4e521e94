"""Renders plain text streams inside vLLM's output handler: no task wakes for a token, and no model is built for it.

vLLM's own server takes the request, renders a stream's first text event and its last ones, and answers all faults. The
tokens in between are put into the first event's form (`engine.chunk_template`) right where the output handler hands
them out, and never wake the stream's task. Rule: only a stream whose events differ in nothing but their text goes this
way, and vLLM's own rendering takes over from the first output that is out of the ordinary. `Rendering` owns the state
of one stream.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, Final, Protocol

from engine.chunk_template import ChunkTemplate

_log = logging.getLogger(__name__)

_UNKNOWN: Final = "this vLLM's insides are not the known ones: its own server renders all tokens"


class Watcher(Protocol):
    """Looks on as vLLM hands out the outputs of one stream."""

    def watch(self, queue: Any, state: Any) -> None:
        """vLLM's `RequestOutputCollector` and `RequestState` of a request of this stream, before its first output."""


class _Watched:
    """One stream that is watched."""

    __slots__ = ("watcher",)

    def __init__(self, watcher: Watcher | None) -> None:
        self.watcher = watcher


_watched: ContextVar[_Watched | None] = ContextVar("watched", default=None)
"""The stream that the running task serves. vLLM's handlers run in tasks of their own, which inherit it."""


@contextmanager
def watching(watcher: Watcher | None) -> Iterator[None]:
    """Requests that vLLM takes in this block, and in tasks that begin in it, are shown to `watcher`."""
    watched = _Watched(watcher)
    token = _watched.set(watched)
    try:
        yield
    finally:
        _watched.reset(token)
        watched.watcher = None  # Tasks that live on keep the variable; not the stream with it.


def _watcher() -> Watcher | None:
    watched = _watched.get()
    return watched.watcher if watched is not None else None


def show_outputs(engine: Any) -> bool:
    """Has `engine` (an `AsyncLLM`) show each request's collector to its watcher; False where vLLM's insides differ.

    The instance's own method is wrapped, which leaves vLLM's classes as they are.
    """
    processor = engine.output_processor
    take, states = processor.add_request, processor.request_states
    if not _collects_as_known():
        _log.warning(_UNKNOWN)
        return False

    def add_request(
        request: Any, prompt: Any, parent_req: Any = None, request_index: int = 0, queue: Any = None, **more: Any
    ) -> None:
        take(request, prompt, parent_req, request_index, queue, **more)
        watcher, state = _watcher(), states.get(request.request_id)
        if watcher is not None and queue is not None and state is not None:
            watcher.watch(queue, state)

    processor.add_request = add_request
    return True


def show_streams(state: Any) -> bool:
    """Has vLLM's server say which of its streams are plain text; False where its insides differ.

    `state` is that of its application. Streams that get comments while they are silent are left to it.
    """
    if getattr(state.args, "sse_keep_alive_interval", 0):
        return False
    served = [
        (getattr(state, "openai_serving_chat", None), "chat_completion_stream_generator", _chat_is_plain),
        (getattr(state, "openai_serving_completion", None), "completion_stream_generator", _completion_is_plain),
    ]
    for serving, name, _ in served:
        if serving is not None and not inspect.isasyncgenfunction(getattr(serving, name, None)):
            _log.warning(_UNKNOWN)
            return False
    for serving, name, is_plain in served:
        if serving is not None:
            _tell_of_streams(serving, name, is_plain)
    return True


class Rendering:
    """One HTTP stream. `write` takes the events that are rendered here, each with the tokens in it."""

    def __init__(self, write: Callable[[bytes, int], None]) -> None:
        self._write = write
        self._plain = False
        self._without_empty = False
        self._queue: Any = None
        self._state: Any = None
        self._given = 0
        """Outputs on their way through vLLM's rendering that give an event, and how many of them have become one."""
        self._rendered = 0
        self._rendering = False
        self._token_ids: list[int] = []
        """Of what was rendered here: vLLM's rendering is to count them with the next output that it gets."""
        self._silent_tokens = 0
        """Those among them since the last event: tokens without text that gave none."""

    def plain(self, *, without_empty: bool) -> None:
        """The stream is plain text of one choice; `without_empty` says that its tokens without text give no event."""
        self._plain = True
        self._without_empty = without_empty

    def watch(self, queue: Any, state: Any) -> None:
        """The stream's request is in the engine."""
        if self._queue is not None:
            self._plain = False  # Two requests for one answer.
        if not self._plain or state.parent_req is not None or state.stream_interval != 1:
            return
        self._queue, self._state = queue, state
        queue.put = self._count

    def sent(self, event: bytes) -> None:
        """The event of an output, rendered by vLLM, is on its way to the client."""
        if not self._plain or self._queue is None or self._rendering:
            return
        self._rendered += 1
        if self._rendered != self._given or self._queue.output is not None:
            return  # What is rendered here could overtake what is still in vLLM's rendering.
        template = ChunkTemplate.of(event)
        if template is not None:  # The event of an echo is none; those after it are.
            self._rendering = True
            del self._queue.put
            self._state.make_request_output = partial(self._render, template)

    def close(self) -> None:
        """The stream is over; vLLM's objects are as they were."""
        self._plain = False
        if self._queue is not None:
            vars(self._queue).pop("put", None)
            vars(self._state).pop("make_request_output", None)
            self._queue = self._state = None

    def _count(self, output: Any) -> None:
        """In place of the collector's `put`."""
        queue = self._queue
        before = self._gives_event(queue.output)
        type(queue).put(queue, output)
        if not before and self._gives_event(queue.output):
            self._given += 1  # Otherwise it joined the one that waits.

    def _gives_event(self, output: Any) -> bool:
        """Whether vLLM's rendering sends an event for what waits in the collector."""
        if output is None or isinstance(output, Exception):
            return False
        return not self._without_empty or bool(output.outputs[0].text)

    def _render(
        self,
        template: ChunkTemplate,
        new_token_ids: list[int],
        pooling_output: Any,
        finish_reason: Any,
        *more: Any,
        **named: Any,
    ) -> Any:
        """In place of the state's `make_request_output`: None where there is nothing left to hand out."""
        text = ""
        if finish_reason is None:
            text = self._state.detokenizer.get_next_output_text(False, True)
            tokens = self._silent_tokens + len(new_token_ids)
            try:
                if text or not self._without_empty:
                    self._write(template.render(text, tokens), tokens)
                    tokens = 0
                self._silent_tokens = tokens
                self._token_ids += new_token_ids
                return None
            except Exception:
                # What this raised would end the engine.
                _log.exception("a stream is left to vLLM's rendering")
        state, token_ids = self._state, [*self._token_ids, *new_token_ids]
        self.close()
        output = state.make_request_output(token_ids, pooling_output, finish_reason, *more, **named)
        if text and output is not None:
            output.outputs[0].text = text + output.outputs[0].text
        return output


def _tell_of_streams(serving: Any, name: str, is_plain: Callable[..., bool]) -> None:
    make = getattr(serving, name)

    def stream(request: Any, *args: Any, **named: Any) -> Any:
        watcher = _watcher()
        if isinstance(watcher, Rendering) and (request.n or 1) == 1 and is_plain(serving, request, named):
            watcher.plain(without_empty=getattr(serving, "parser_cls", None) is not None)
        return make(request, *args, **named)

    setattr(serving, name, stream)


def _completion_is_plain(serving: Any, request: Any, named: dict[str, Any]) -> bool:
    return named.get("num_prompts") == 1


def _chat_is_plain(serving: Any, request: Any, named: dict[str, Any]) -> bool:
    if request.echo or (serving.enable_log_outputs and serving.request_logger is not None):
        return False  # One event more than outputs; a log of each piece as vLLM rendered it.
    return serving.parser_cls is None or (request.tool_choice == "none" and _leaves_text_alone(serving.parser_cls))


def _leaves_text_alone(parser: Any) -> bool:
    """Whether an answer that is not to call tools comes back from this parser as it is."""
    from vllm.parser.abstract_parser import DelegatingParser

    return (
        issubclass(parser, DelegatingParser)
        and parser.parse_delta is DelegatingParser.parse_delta
        and parser._extract_tool_calls_streaming is DelegatingParser._extract_tool_calls_streaming
        and parser.reasoning_parser_cls is None
        and not getattr(parser.tool_parser_cls, "engine_based_streaming", True)
    )


def _collects_as_known() -> bool:
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine import output_processor as module
    from vllm.v1.engine.detokenizer import IncrementalDetokenizer

    takes = _parameters(module.OutputProcessor.add_request)
    makes = _parameters(module.RequestState.make_request_output)
    state = _parameters(module.RequestState.__init__)
    collector = module.RequestOutputCollector(RequestOutputKind.DELTA, "probe")
    return (
        takes[1:] == ["request", "prompt", "parent_req", "request_index", "queue"]
        and makes[1:5] == ["new_token_ids", "pooling_output", "finish_reason", "stop_reason"]
        and {"parent_req", "detokenizer", "stream_interval"} <= set(state)
        and hasattr(collector, "__dict__")
        and getattr(collector, "output", collector) is None
        and _parameters(collector.put) == ["output"]
        and _parameters(IncrementalDetokenizer.get_next_output_text)[1:] == ["finished", "delta"]
    )


def _parameters(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)
