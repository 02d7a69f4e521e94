"""The simulated engine behind its seam, on a virtual clock."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import json
import logging
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kvlane.v1 import inference_pb2 as pb

from engine.base import Abort, Engine
from engine.simulated import MAX_LAG_S, SimulatedEngine
from router.errors import (
    ConfigError,
    InternalError,
    InvalidRequest,
    KvlaneError,
    ModelNotFound,
    NotSupported,
    PathNotFound,
    ReplicaFailed,
    ReplicaLost,
)
from router.lane.frames import Submit
from router.types import Headers, Rpc

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
GENERATE = "/kvlane.v1.Inference/Generate"
GRPC_CHAT = "/kvlane.v1.Inference/Chat"


class VirtualTimer:
    def __init__(self, callback: Callable[[], None]) -> None:
        self.callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        self.callback = None


class VirtualClock:
    """Time passes only in `run`."""

    def __init__(self) -> None:
        self.now = 100.0
        self.turn = 0
        self._timers: list[tuple[float, int, VirtualTimer]] = []
        self._order = itertools.count()

    def time(self) -> float:
        return self.now

    def call_at(self, when: float, callback: Callable[[], None]) -> VirtualTimer:
        timer = VirtualTimer(callback)
        heapq.heappush(self._timers, (when, next(self._order), timer))
        return timer

    @property
    def pending(self) -> int:
        return sum(timer.callback is not None for _, _, timer in self._timers)

    def run(self, until: float = float("inf")) -> None:
        """Runs what is due up to `until`; each callback is one turn."""
        for _ in range(100_000):
            if not self._timers or self._timers[0][0] > until:
                if until != float("inf"):
                    self.now = until
                return
            when, _, timer = heapq.heappop(self._timers)
            self.now = max(self.now, when)
            self.turn += 1
            if timer.callback is not None:
                timer.callback()
        raise AssertionError("the clock never gets idle")


class Out:
    """A stream's way back that remembers everything."""

    def __init__(self, clock: VirtualClock, on_data: Callable[[], None] | None = None) -> None:
        self.clock = clock
        self.status = 0
        self.headers: dict[str, str] = {}
        self.pieces: list[bytes] = []
        self.tokens: list[int] = []
        self.times: list[float] = []
        self.turns: list[int] = []
        self.ends: list[str] = []
        self.errors: list[KvlaneError] = []
        self.on_data = on_data

    def head(self, status: int, headers: Headers) -> None:
        assert not self.status
        assert not self.pieces
        self.status = status
        self.headers = dict(headers)

    def data(self, payload: bytes, tokens: int = 0, *, urgent: bool = False) -> None:
        assert not self.over
        self.pieces.append(payload)
        self.tokens.append(tokens)
        self.times.append(self.clock.now)
        self.turns.append(self.clock.turn)
        if self.on_data is not None:
            self.on_data()

    def end(self, finish: str = "") -> None:
        assert not self.over
        self.ends.append(finish)

    def fail(self, error: KvlaneError) -> None:
        assert not self.over
        self.errors.append(error)

    @property
    def over(self) -> bool:
        return bool(self.ends or self.errors)

    @property
    def body(self) -> bytes:
        return b"".join(self.pieces)

    def events(self) -> list[Any]:
        events = self.body.decode().split("\n\n")
        assert events.pop() == ""
        assert events.pop() == "data: [DONE]"
        return [json.loads(event.removeprefix("data: ")) for event in events]


class Bench:
    """An engine on a virtual clock."""

    def __init__(self, **options: Any) -> None:
        defaults = {"step_base_ms": 10, "prefill_ms_per_token": 0, "decode_ms_per_seq": 0}
        self.clock = VirtualClock()
        self.engine = SimulatedEngine(
            {**defaults, "context_ms_per_1k_tokens": 0, **options}, "sim-model", self.clock, lambda: 1_700_000_000.9
        )
        self.streams = itertools.count(1)
        self.abort: Abort

    def submit(self, rpc: Rpc, path: str, body: bytes, method: str = "POST", out: Out | None = None) -> Out:
        out = out or Out(self.clock)
        stream = next(self.streams)
        self.abort = self.engine.submit(Submit(stream, f"r{stream}", rpc, method, path, (), body), out)
        return out

    def post(self, path: str, out: Out | None = None, **body: Any) -> Out:
        return self.submit(Rpc.HTTP, path, json.dumps(body).encode(), out=out)

    def grpc(self, path: str, message: Any) -> Out:
        return self.submit(Rpc.GRPC, path, message.SerializeToString())


def conforms(engine: SimulatedEngine) -> Engine:
    return engine


async def test_a_streamed_chat_has_the_role_first_the_reason_last_and_then_usage() -> None:
    bench = Bench()
    out = bench.post(
        CHAT,
        model="sim-model",
        messages=[{"role": "user", "content": "hello"}],
        max_tokens=3,
        stream=True,
        stream_options={"include_usage": True},
    )
    assert out.status == 0
    bench.clock.run()
    assert out.status == 200
    assert out.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert out.ends == ["length"]
    assert out.tokens == [1, 1, 1]
    events = out.events()
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert [event["choices"][0]["finish_reason"] for event in events[:-1]] == [None, None, None, "length"]
    assert all(len(event["choices"][0]["delta"]["content"]) == 4 for event in events[1:-1])
    assert {(event["id"], event["object"], event["created"], event["model"]) for event in events} == {
        ("chatcmpl-r1", "chat.completion.chunk", 1_700_000_000, "sim-model")
    }
    assert events[-1]["choices"] == []
    assert events[-1]["usage"]["completion_tokens"] == 3
    assert events[-1]["usage"]["total_tokens"] == events[-1]["usage"]["prompt_tokens"] + 3


async def test_a_streamed_chat_of_one_token_is_whole() -> None:
    bench = Bench()
    out = bench.post(CHAT, messages=[{"role": "user", "content": "hello"}], max_completion_tokens=1, stream=True)
    bench.clock.run()
    events = out.events()
    assert out.status == 200
    assert [event["choices"][0]["finish_reason"] for event in events] == [None, "length"]


@pytest.mark.parametrize("model", ['quo"te\\', '""', '{"text":""}', "ümlaut"])
async def test_a_stream_is_valid_json_whatever_the_model_is_called(model: str) -> None:
    clock = VirtualClock()
    engine = SimulatedEngine({}, model, clock)
    for path, body in ((CHAT, {"messages": [{"role": "user", "content": "x"}]}), (COMPLETIONS, {"prompt": "x"})):
        out = Out(clock)
        text = json.dumps({**body, "stream": True, "max_tokens": 4}).encode()
        engine.submit(Submit(1, 'id"', Rpc.HTTP, "POST", path, (), text), out)
        clock.run()
        assert {event["model"] for event in out.events()} == {model}


async def test_streamed_and_whole_answers_to_one_prompt_are_equal() -> None:
    bench = Bench()
    for path, body in ((CHAT, {"messages": [{"role": "user", "content": "x"}]}), (COMPLETIONS, {"prompt": "x"})):
        streamed = bench.post(path, **body, max_tokens=6, stream=True)
        whole = bench.post(path, **body, max_tokens=6)
        bench.clock.run()
        answer = json.loads(whole.body)
        choice = answer["choices"][0]
        text = choice["message"]["content"] if path == CHAT else choice["text"]
        choices = [event["choices"][0] for event in streamed.events()]
        assert "".join(c["delta"]["content"] if path == CHAT else c["text"] for c in choices) == text
        assert len(text) == 6 * 4
        assert choice["finish_reason"] == "length"
        assert whole.status == 200
        assert whole.headers == {"content-type": "application/json", "content-length": str(len(whole.body))}
        assert (len(whole.pieces), whole.tokens) == (1, [6])
        assert answer["usage"]["completion_tokens"] == 6


async def test_a_prompt_counts_one_token_per_four_bytes_and_token_ids_one_each() -> None:
    bench = Bench()
    text = bench.post(COMPLETIONS, prompt="x" * 41, max_tokens=1)
    listed = bench.post(COMPLETIONS, prompt=["x" * 41], max_tokens=1)
    ids = bench.post(COMPLETIONS, prompt=[1, 2, 3], max_tokens=1)
    bench.clock.run()
    assert [json.loads(out.body)["usage"]["prompt_tokens"] for out in (text, listed, ids)] == [11, 11, 3]


async def test_usage_tells_how_much_of_the_prompt_was_cached() -> None:
    bench = Bench()
    bench.post(COMPLETIONS, prompt="x" * 640, max_tokens=1)
    bench.clock.run()
    again = bench.post(COMPLETIONS, prompt="x" * 640, max_tokens=1)
    salted = bench.post(COMPLETIONS, prompt="x" * 640, max_tokens=1, cache_salt="mine")
    bench.clock.run()
    cached = [json.loads(out.body)["usage"]["prompt_tokens_details"]["cached_tokens"] for out in (again, salted)]
    assert cached == [144, 0]


async def test_an_answer_without_a_length_has_the_options_length_and_stops() -> None:
    bench = Bench(answer_tokens=9)
    out = bench.post(COMPLETIONS, prompt="x")
    bench.clock.run()
    assert out.ends == ["stop"]
    assert json.loads(out.body)["usage"]["completion_tokens"] == 9


async def test_models_and_health_answer_at_once() -> None:
    bench = Bench()
    models = bench.submit(Rpc.HTTP, "/v1/models?x=1", b"", "GET")
    health = bench.submit(Rpc.HTTP, "/health", b"", "GET")
    assert [card["id"] for card in json.loads(models.body)["data"]] == ["sim-model"]
    assert (models.status, health.status, health.body) == (200, 200, b"")
    assert models.ends == health.ends == [""]
    assert bench.clock.pending == 0


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/v1/nothing", {}, 404, None),
        (COMPLETIONS, {"prompt": "x", "model": "other"}, 404, "model"),
        (COMPLETIONS, {}, 400, "prompt"),
        (COMPLETIONS, {"prompt": ""}, 400, "prompt"),
        (COMPLETIONS, {"prompt": []}, 400, "prompt"),
        (COMPLETIONS, {"prompt": ["a", "b"]}, 400, "prompt"),
        (COMPLETIONS, {"prompt": [1, -1]}, 400, "prompt"),
        (COMPLETIONS, {"prompt": [1, True]}, 400, "prompt"),
        (COMPLETIONS, {"prompt": [1, "x"]}, 400, "prompt"),
        (COMPLETIONS, {"prompt": {"a": 1}}, 400, "prompt"),
        (COMPLETIONS, {"prompt": "x", "max_tokens": 0}, 400, "max_tokens"),
        (COMPLETIONS, {"prompt": "x", "max_tokens": "many"}, 400, "max_tokens"),
        (COMPLETIONS, {"prompt": "x", "max_tokens": 10**9}, 400, "max_tokens"),
        (COMPLETIONS, {"prompt": "x" * 4 * 32_768, "stream": True}, 400, "prompt"),
        (COMPLETIONS, {"prompt": "x", "temperature": -1}, 400, "temperature"),
        (COMPLETIONS, {"prompt": "x", "top_p": 0}, 400, "top_p"),
        (COMPLETIONS, {"prompt": "x", "n": 0}, 400, "n"),
        (COMPLETIONS, {"prompt": "x", "n": 2}, 400, "n"),
        (COMPLETIONS, {"prompt": "x", "stream_options": {"include_usage": True}}, 400, "stream_options"),
        (CHAT, {"messages": []}, 400, "messages"),
        (CHAT, {"messages": [{"content": "x"}]}, 400, "messages[0]"),
        (CHAT, {}, 400, "messages"),
    ],
)
async def test_a_faulty_http_request_gets_an_openai_error(
    path: str, body: dict[str, Any], status: int, param: str | None
) -> None:
    bench = Bench()
    out = bench.post(path, **body)
    error = json.loads(out.body)["error"]
    assert (out.status, error["code"], error["param"]) == (status, status, param)
    assert error["type"] == ("NotFoundError" if status == 404 else "BadRequestError")
    assert error["message"]
    assert out.ends == [""]
    assert bench.clock.pending == 0


async def test_a_wrong_method_is_told_the_right_one() -> None:
    out = Bench().submit(Rpc.HTTP, CHAT, b"", "GET")
    assert (out.status, out.headers["allow"]) == (405, "POST")


@settings(derandomize=True, deadline=None)
@given(st.one_of(st.binary(max_size=60), st.sampled_from([b"{", b'{"prompt":"\xff"}', b"[" * 100_000, b"null"])))
def test_no_body_breaks_the_engine(body: bytes) -> None:
    bench = Bench()
    assert bench.submit(Rpc.HTTP, CHAT, body).status == 400
    assert bench.submit(Rpc.HTTP, COMPLETIONS, body).status == 400
    bench.submit(Rpc.GRPC, GENERATE, body)
    bench.submit(Rpc.GRPC, GRPC_CHAT, body)
    bench.clock.run()
    assert bench.engine.load().running == 0


async def test_content_parts_and_unknown_fields_are_taken() -> None:
    bench = Bench()
    parts = [{"type": "text", "text": "hello"}, {"type": "image_url", "image_url": {"url": "data:"}}]
    out = bench.post(
        CHAT, messages=[{"role": "user", "content": parts, "name": "me"}], max_tokens=1, temperature=0.5, unheard_of=[1]
    )
    bench.clock.run()
    assert out.status == 200


async def test_generate_streams_words_with_their_ids_and_ends_with_usage() -> None:
    bench = Bench()
    out = bench.grpc(GENERATE, pb.GenerateRequest(text="x" * 8, sampling=pb.SamplingParams(max_tokens=3)))
    bench.clock.run()
    messages = [pb.GenerateResponse.FromString(piece) for piece in out.pieces]
    assert out.ends == ["length"]
    assert out.status == 0
    assert [message.finish_reason for message in messages] == ["", "", "length"]
    assert all(len(message.text) == 4 and len(message.token_ids) == 1 for message in messages)
    assert [message.HasField("usage") for message in messages] == [False, False, True]
    usage = messages[-1].usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens) == (2, 3, 0)
    assert not messages[0].HasField("route")


async def test_the_ids_of_an_answer_continue_its_prompt() -> None:
    bench = Bench()
    ids = list(range(1000, 1040))
    first = bench.grpc(
        GENERATE, pb.GenerateRequest(token_ids=pb.TokenIds(ids=ids), sampling=pb.SamplingParams(max_tokens=41))
    )
    bench.clock.run()
    ids += [token for piece in first.pieces for token in pb.GenerateResponse.FromString(piece).token_ids]
    second = bench.grpc(
        GENERATE, pb.GenerateRequest(token_ids=pb.TokenIds(ids=ids), sampling=pb.SamplingParams(max_tokens=1))
    )
    bench.clock.run()
    assert pb.GenerateResponse.FromString(second.pieces[-1]).usage.cached_tokens == 80


async def test_grpc_chat_says_what_http_chat_says() -> None:
    bench = Bench()
    grpc = bench.grpc(
        GRPC_CHAT,
        pb.ChatRequest(
            messages=[pb.ChatMessage(role="user", content="hello")], sampling=pb.SamplingParams(max_tokens=5)
        ),
    )
    http = bench.post(CHAT, messages=[{"role": "user", "content": "hello"}], max_tokens=5)
    bench.clock.run()
    text = "".join(pb.ChatResponse.FromString(piece).content for piece in grpc.pieces)
    assert text == json.loads(http.body)["choices"][0]["message"]["content"]
    assert pb.ChatResponse.FromString(grpc.pieces[-1]).usage.completion_tokens == 5


@pytest.mark.parametrize(
    ("path", "body", "error"),
    [
        (GENERATE, b"\xff\xff", InvalidRequest),
        (GENERATE, b"", InvalidRequest),
        (GENERATE, pb.GenerateRequest(model="other", text="x").SerializeToString(), ModelNotFound),
        (
            GENERATE,
            pb.GenerateRequest(text="x", sampling=pb.SamplingParams(n=2)).SerializeToString(),
            NotSupported,
        ),
        (
            GENERATE,
            pb.GenerateRequest(text="x", sampling=pb.SamplingParams(temperature=float("nan"))).SerializeToString(),
            InvalidRequest,
        ),
        (GRPC_CHAT, b"", InvalidRequest),
        (GRPC_CHAT, pb.ChatRequest(messages=[pb.ChatMessage(content="x")]).SerializeToString(), InvalidRequest),
        ("/kvlane.v1.Inference/Embed", b"", NotSupported),
        ("/kvlane.v1.Inference/Unheard", b"", PathNotFound),
    ],
)
async def test_a_faulty_grpc_request_fails(path: str, body: bytes, error: type[KvlaneError]) -> None:
    bench = Bench()
    out = bench.submit(Rpc.GRPC, path, body)
    assert [type(e) for e in out.errors] == [error]
    assert bench.clock.pending == 0


async def test_all_output_of_a_step_is_written_in_one_turn_and_the_listener_follows() -> None:
    bench = Bench()
    turns: list[tuple[int, int]] = []
    bench.engine.on_step(lambda: turns.append((bench.clock.turn, sum(len(out.pieces) for out in outs))))
    outs = [bench.post(COMPLETIONS, prompt=f"{i}", max_tokens=5, stream=True) for i in range(20)]
    bench.clock.run()
    assert len({tuple(out.turns) for out in outs}) == 1
    assert [count for _, count in turns] == [20, 40, 60, 80, 100]
    assert [turn for turn, _ in turns] == outs[0].turns


async def test_steps_keep_an_absolute_schedule_though_the_loop_is_late() -> None:
    bench = Bench()

    def late() -> None:
        bench.clock.now += 0.004

    out = bench.post(COMPLETIONS, Out(bench.clock, late), prompt="x", max_tokens=50, stream=True)
    bench.clock.run()
    assert out.times == pytest.approx([100 + 0.01 * step for step in range(1, 51)])


async def test_after_a_long_stall_the_engine_goes_on_from_now() -> None:
    bench = Bench()
    stalls = iter([MAX_LAG_S + 5])

    def stall() -> None:
        bench.clock.now += next(stalls, 0)

    out = bench.post(COMPLETIONS, Out(bench.clock, stall), prompt="x", max_tokens=4, stream=True)
    bench.clock.run()
    gaps = [later - earlier for earlier, later in itertools.pairwise(out.times)]
    assert gaps == pytest.approx([MAX_LAG_S + 5.01, 0.01, 0.01])


async def test_an_idle_engine_has_no_timer() -> None:
    bench = Bench()
    assert bench.clock.pending == 0
    bench.post(COMPLETIONS, prompt="x", max_tokens=2)
    assert bench.clock.pending == 1
    bench.clock.run()
    assert bench.clock.pending == 0


async def test_requests_beyond_the_batch_wait_and_the_load_tells_both() -> None:
    bench = Bench(max_num_seqs=2)
    for index in range(5):
        bench.post(COMPLETIONS, prompt=f"{index}", max_tokens=3)
    assert bench.engine.load().waiting == 5
    bench.clock.run(bench.clock.now + 0.011)
    load = bench.engine.load()
    assert (load.running, load.waiting, load.step_ms) == (2, 3, 10)
    assert load.kv_usage > 0
    bench.clock.run()
    assert (bench.engine.load().running, bench.engine.load().waiting) == (0, 0)


async def test_an_abort_frees_slot_and_blocks_at_once_and_silences_the_stream() -> None:
    bench = Bench(max_num_seqs=1)
    first = bench.post(COMPLETIONS, prompt="x" * 400, max_tokens=100, stream=True)
    abort = bench.abort
    second = bench.post(COMPLETIONS, prompt="y", max_tokens=2, stream=True)
    bench.clock.run(bench.clock.now + 0.025)
    assert len(first.pieces) == 2
    abort()
    load = bench.engine.load()
    assert (load.running, load.waiting, load.kv_usage) == (0, 1, 0)
    bench.clock.run()
    assert len(first.pieces) == 2
    assert not first.over
    assert second.ends == ["length"]
    abort()


async def test_a_stream_may_be_aborted_by_the_output_of_another_in_the_same_step() -> None:
    bench = Bench()
    aborts: list[Abort] = []
    killer = bench.post(
        COMPLETIONS, Out(bench.clock, lambda: aborts[0]()), prompt="x", max_tokens=3, stream=True
    )  # fmt: skip
    victim = bench.post(COMPLETIONS, prompt="y", max_tokens=3, stream=True)
    aborts.append(bench.abort)
    bench.clock.run()
    assert killer.ends == ["length"]
    assert not victim.pieces
    assert not victim.over


async def test_one_seed_gives_one_answer_and_another_seed_another() -> None:
    bodies = []
    for seed in (1, 1, 2):
        bench = Bench(seed=seed)
        out = bench.post(COMPLETIONS, prompt="x", max_tokens=8)
        bench.clock.run()
        bodies.append(out.body)
    assert bodies[0] == bodies[1] != bodies[2]


async def test_a_failed_engine_fails_its_streams_its_health_and_new_requests() -> None:
    bench = Bench(fail_after_steps=3)
    await bench.engine.check_health()
    stream = bench.post(COMPLETIONS, prompt="x", max_tokens=10, stream=True)
    waiting = bench.post(COMPLETIONS, prompt="y", max_tokens=10)
    bench.clock.run()
    assert len(stream.pieces) == 3
    assert [type(e) for e in stream.errors + waiting.errors] == [ReplicaLost, ReplicaLost]
    with pytest.raises(ReplicaFailed, match="after 3 steps"):
        await bench.engine.check_health()
    late = bench.post(COMPLETIONS, prompt="x")
    assert [type(e) for e in late.errors] == [ReplicaLost]
    assert bench.engine.load().running == 0
    assert bench.clock.pending == 0


async def test_a_defect_fails_the_streams_instead_of_leaving_them_hanging(caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench()

    def broken() -> None:
        raise LookupError("oops")

    bench.engine.on_step(broken)
    out = bench.post(COMPLETIONS, prompt="x", max_tokens=10, stream=True)
    with caplog.at_level(logging.ERROR):
        bench.clock.run()
    assert "oops" in caplog.text
    assert [type(e) for e in out.errors] == [ReplicaLost]
    with pytest.raises(ReplicaFailed):
        await bench.engine.check_health()


async def test_a_death_is_told_at_once_and_before_the_streams_fail() -> None:
    bench = Bench()
    out = bench.post(COMPLETIONS, prompt="x", max_tokens=10, stream=True)
    told: list[tuple[bool, bool]] = []
    bench.engine.on_step(lambda: told.append((bench.engine.dead(), out.over)))
    assert not bench.engine.dead()
    bench.engine.fail()
    assert told == [(True, False)]
    assert out.over


async def test_closing_fails_what_is_in_flight_and_leaves_no_timer() -> None:
    bench = Bench()
    out = bench.post(COMPLETIONS, prompt="x", max_tokens=10, stream=True)
    await bench.engine.close()
    await bench.engine.close()
    assert [type(e) for e in out.errors] == [ReplicaLost]
    assert bench.clock.pending == 0


def test_an_unknown_option_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match="`max_num_seq`; did you mean `max_num_seqs`"):
        SimulatedEngine({"max_num_seq": 3}, "m")


@pytest.mark.parametrize("wrong", [{"max_num_seqs": 0}, {"seed": "x"}, {"kv_blocks": 1}, {"scheduling": "lifo"}])
def test_an_option_out_of_bounds_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        SimulatedEngine(wrong, "m")


async def test_info_tells_what_the_options_say() -> None:
    info = Bench(max_num_seqs=7).engine.info()
    assert (info.kind, info.max_num_seqs, info.kv_blocks, info.kv_block_tokens) == ("sim", 7, 25_000, 16)
    assert [(card.name, card.max_model_len) for card in info.models] == [("sim-model", 32_768)]
    assert CHAT in {route.path for route in info.routes}
    assert info.version


async def test_an_engine_that_was_not_started_says_so() -> None:
    engine = conforms(SimulatedEngine({}, "m"))
    with pytest.raises(InternalError, match="not started"):
        engine.submit(Submit(1, "r", Rpc.HTTP, "POST", COMPLETIONS, (), b'{"prompt":"x"}'), Out(VirtualClock()))


async def test_a_time_scale_of_zero_runs_as_fast_as_the_event_loop() -> None:
    engine = SimulatedEngine({"time_scale": 0}, "m")
    await engine.start()
    done = asyncio.Event()
    outs = [Out(VirtualClock()) for _ in range(10)]
    engine.on_step(lambda: done.set() if all(out.over for out in outs) else None)
    for index, out in enumerate(outs):
        body = json.dumps({"prompt": f"{index}", "max_tokens": 100, "stream": True}).encode()
        engine.submit(Submit(index, f"r{index}", Rpc.HTTP, "POST", COMPLETIONS, (), body), out)
    async with asyncio.timeout(30):
        await done.wait()
    assert all(out.ends == ["length"] and len(out.pieces) == 100 for out in outs)
    await engine.close()
