"""What is rendered beside vLLM's server, and when it is left alone; vLLM's objects are stand-ins here."""

from __future__ import annotations

import asyncio
import gc
import json
import weakref
from types import SimpleNamespace
from typing import Any

import pytest

from engine.vllm_rendering import Rendering, show_outputs, show_streams, watching


class Queue:
    """As vLLM's `RequestOutputCollector`: holds one output, to which later ones are added."""

    def __init__(self) -> None:
        self.output: Any = None
        self.taken: list[Any] = []

    def put(self, output: Any) -> None:
        if self.output is None or isinstance(output, Exception):
            self.output = output
        else:
            self.output.outputs[0].text += output.outputs[0].text
            self.output.outputs[0].token_ids += output.outputs[0].token_ids

    def take(self) -> Any:
        """As the stream's task."""
        output, self.output = self.output, None
        self.taken.append(output)
        return output


class Piece:
    def __init__(self, text: str, token_ids: list[int], finish_reason: str | None = None) -> None:
        self.outputs = [self]
        self.text = text
        self.token_ids = token_ids
        self.finish_reason = finish_reason


class State:
    """As vLLM's `RequestState`, and its own detokenizer."""

    def __init__(self) -> None:
        self.parent_req: Any = None
        self.stream_interval = 1
        self.detokenizer = self
        self.text = ""

    def get_next_output_text(self, finished: bool, delta: bool) -> str:
        text, self.text = self.text, ""
        return text

    def make_request_output(
        self, new_token_ids: list[int], pooling_output: Any, finish_reason: Any, stop_reason: Any
    ) -> Piece:
        return Piece(self.get_next_output_text(finish_reason is not None, True), new_token_ids, finish_reason)


class Stream:
    """One stream between an engine and vLLM's server, neither of which is there."""

    def __init__(self, *, plain: bool = True, without_empty: bool = False) -> None:
        self.written: list[tuple[bytes, int]] = []
        self.rendering = Rendering(self.write)
        self.broken = False
        self.queue, self.state = Queue(), State()
        if plain:
            self.rendering.plain(without_empty=without_empty)
        self.rendering.watch(self.queue, self.state)

    def write(self, event: bytes, tokens: int) -> None:
        if self.broken:
            raise OSError("no")
        self.written.append((event, tokens))

    def step(self, text: str, token_ids: list[int], finish_reason: str | None = None) -> None:
        """As vLLM's output handler."""
        self.state.text += text
        output = self.state.make_request_output(token_ids, None, finish_reason, None)
        if output is not None:
            self.queue.put(output)

    def server(self, usage: int | None = None) -> Piece:
        """As vLLM's server: takes an output and sends its event."""
        output: Piece = self.queue.take()
        self.rendering.sent(event(output.text, output.finish_reason, usage))
        return output


def event(text: str, finish_reason: str | None = None, usage: int | None = None) -> bytes:
    choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": finish_reason}
    chunk: dict[str, Any] = {"id": "x", "choices": [choice]}
    if usage is not None:
        chunk["usage"] = {"prompt_tokens": 5, "total_tokens": 5 + usage, "completion_tokens": usage}
    return f"data: {json.dumps(chunk, separators=(',', ':'))}\n\n".encode()


def begun(**how: Any) -> Stream:
    """A stream with its first token out."""
    stream = Stream(**how)
    stream.step("one", [1])
    stream.server()
    return stream


def test_the_tokens_after_the_first_are_rendered_here_and_wake_nobody() -> None:
    stream = begun()
    stream.step(" two", [2])
    stream.step(" three", [3, 4])
    assert stream.written == [(event(" two"), 1), (event(" three"), 2)]
    assert stream.queue.output is None


def test_the_last_output_is_the_servers_with_the_tokens_of_all_that_it_did_not_see() -> None:
    stream = begun()
    stream.step(" two", [2])
    stream.step(" three", [3, 4])
    stream.step(" end", [5], "stop")
    last = stream.server()
    assert (last.text, last.token_ids, last.finish_reason) == (" end", [2, 3, 4, 5], "stop")
    assert len(stream.written) == 2


def test_nothing_overtakes_what_is_still_in_the_servers_hands() -> None:
    stream = Stream()
    stream.step("one", [1])
    first = stream.queue.take()
    stream.step(" two", [2])
    stream.rendering.sent(event(first.text))  # The second waits in the collector.
    stream.step(" three", [3])
    assert not stream.written
    assert stream.server().text == " two three"
    stream.step(" four", [4])
    assert stream.written == [(event(" four"), 1)]


def test_nothing_overtakes_what_the_server_has_taken_and_not_sent() -> None:
    stream = Stream()
    stream.step("one", [1])
    first = stream.queue.take()
    stream.step(" two", [2])
    second = stream.queue.take()
    stream.rendering.sent(event(first.text))
    stream.step(" three", [3])
    assert not stream.written
    stream.rendering.sent(event(second.text))
    stream.server()
    stream.step(" four", [4])
    assert stream.written == [(event(" four"), 1)]


def test_tokens_without_text_are_counted_and_give_an_event_only_where_the_server_would_send_one() -> None:
    stream, silent = begun(), begun(without_empty=True)
    for each in (stream, silent):
        each.step("", [2])
        each.step("x", [3], "length")
        assert each.server().token_ids == [2, 3]
    assert stream.written == [(event(""), 1)]
    assert not silent.written


def test_tokens_without_an_event_are_counted_with_the_next_one() -> None:
    stream = Stream(without_empty=True)
    stream.step("one", [1])
    stream.server(usage=1)
    stream.step("", [2])
    stream.step("", [3, 4])
    stream.step("x", [5])
    stream.step("y", [6])
    assert stream.written == [(event("x", usage=5), 4), (event("y", usage=6), 1)]


def test_outputs_that_give_no_event_are_not_waited_for() -> None:
    stream = Stream(without_empty=True)
    stream.step("", [1])
    stream.queue.take()
    stream.step("", [2])
    stream.step("one", [3])
    assert stream.server().token_ids == [2, 3]
    stream.step(" two", [4])
    assert stream.written == [(event(" two"), 1)]


def test_a_stream_that_is_not_plain_is_left_alone() -> None:
    stream = begun(plain=False)
    stream.step(" two", [2])
    assert stream.server().text == " two"
    assert not stream.written
    assert not {"put", "make_request_output"} & (vars(stream.queue).keys() | vars(stream.state).keys())


@pytest.mark.parametrize(("name", "value"), [("parent_req", object()), ("stream_interval", 4)])
def test_choices_of_one_prompt_and_longer_intervals_are_left_alone(name: str, value: Any) -> None:
    stream = Stream(plain=False)
    stream.rendering.plain(without_empty=False)
    setattr(stream.state, name, value)
    stream.rendering.watch(stream.queue, stream.state)
    stream.step("one", [1])
    stream.server()
    stream.step(" two", [2])
    assert not stream.written


def test_an_answer_of_two_requests_is_left_alone() -> None:
    stream = Stream()
    stream.rendering.watch(Queue(), State())
    stream.step("one", [1])
    stream.server()
    stream.step(" two", [2])
    assert not stream.written


def test_an_event_with_more_than_text_keeps_the_stream_with_the_server() -> None:
    stream = Stream()
    stream.step("one", [1])
    stream.queue.take()
    stream.rendering.sent(event("one").replace(b'"logprobs":null', b'"logprobs":{}'))
    stream.step(" two", [2])
    assert not stream.written


def test_an_abort_reaches_the_server() -> None:
    stream = begun()
    stream.step(" two", [2])
    stream.step("", [], "abort")
    assert stream.server().finish_reason == "abort"


def test_an_engine_that_dies_reaches_the_server() -> None:
    stream = begun()
    stream.step(" two", [2])
    stream.queue.put(RuntimeError("dead"))
    assert isinstance(stream.queue.take(), RuntimeError)


def test_what_cannot_be_written_goes_by_the_server_with_nothing_lost() -> None:
    stream = begun()
    stream.step(" two", [2])
    stream.broken = True
    stream.step(" three", [3])
    again = stream.server()
    assert (again.text, again.token_ids) == (" three", [2, 3])
    stream.broken = False
    stream.step(" four", [4])
    assert stream.server().text == " four"
    assert len(stream.written) == 1


def test_a_closed_stream_leaves_vllms_objects_as_they_were() -> None:
    waiting, rendering = Stream(), begun()
    for stream in (waiting, rendering):
        stream.rendering.close()
        assert not {"put", "make_request_output"} & (vars(stream.queue).keys() | vars(stream.state).keys())
        stream.rendering.close()
        stream.rendering.sent(event("late"))


class Serving:
    async def completion_stream_generator(self) -> Any:
        yield ""

    async def chat_completion_stream_generator(self) -> Any:
        yield ""


class AppState:
    def __init__(self, **named: Any) -> None:
        self.args = SimpleNamespace(sse_keep_alive_interval=0)
        vars(self).update(named)


def test_streams_that_are_made_in_another_way_are_the_servers(caplog: pytest.LogCaptureFixture) -> None:
    assert show_streams(AppState(openai_serving_chat=Serving(), openai_serving_completion=Serving()))
    assert show_streams(AppState())
    assert not caplog.records
    assert not show_streams(AppState(openai_serving_chat=Serving(), openai_serving_completion=object()))
    assert "insides" in caplog.text


def test_streams_with_comments_in_between_are_the_servers() -> None:
    state = AppState(openai_serving_chat=Serving())
    state.args.sse_keep_alive_interval = 5
    assert not show_streams(state)


class Seen:
    """A watcher."""

    def __init__(self) -> None:
        self.requests = 0

    def watch(self, queue: Any, state: Any) -> None:
        self.requests += 1


@pytest.mark.slow  # vLLM takes ten seconds to import.
async def test_tasks_that_outlive_a_stream_keep_nothing_of_it() -> None:
    pytest.importorskip("vllm")
    states = {"1": object()}
    processor = SimpleNamespace(request_states=states, add_request=lambda *args: None)
    assert show_outputs(SimpleNamespace(output_processor=processor))

    async def take(after: asyncio.Event) -> None:
        await after.wait()
        processor.add_request(SimpleNamespace(request_id="1"), None, None, 0, object())

    seen, early, late = Seen(), asyncio.Event(), asyncio.Event()
    with watching(seen):
        tasks = [asyncio.create_task(take(early)), asyncio.create_task(take(late))]
        early.set()
        await tasks[0]
    assert seen.requests == 1
    kept = weakref.ref(seen)
    del seen
    gc.collect()
    assert kept() is None
    late.set()
    await tasks[1]
