"""The whole path with real parts: official clients, router, Ray Serve, vLLM; answers equal to a bare vLLM's."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import statistics
import threading
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import grpc
import httpx
import openai
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from kvlane.client import Client, KvlaneCallError
from kvlane.v1 import inference_pb2 as pb

from engine.tiny_model import make_tiny_model
from loadtests.processes import descendants
from tests.integration.asking import CUT, ERROR_EVENT, WHOLE, ask, ask_grpc
from tests.integration.bare_vllm import bare_vllm_server
from tests.integration.ray_local import alive
from tests.integration.stack import Stack, kvlane_up
from tests.integration.vllm_fixtures import ENGINE_ARGS, MODEL

pytestmark = [pytest.mark.vllm, pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]

DEADLINE_S = 60.0
LONG = 3900
"""Tokens that nearly fill the model's context; alone on the machine they take 10 s and more."""
ABORT_DEADLINE_S = 4.0
"""For the end of what a client has left: far less than it takes to generate `LONG` tokens, so a lost abort shows."""
PLACES = 2 * ENGINE_ARGS["max_num_seqs"]
"""How many requests the two engines run at a time; more of them wait and have no token."""
REPLACED_DEADLINE_S = 180.0
BESIDE = 400
"""Tokens of the stream that runs beside bad input."""


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Stack, str]]:
    """kvlane over two vLLM replicas, and a bare vLLM with the same model and arguments; they start side by side."""
    directory = tmp_path_factory.mktemp("servers")
    model = make_tiny_model(directory / "model")
    arguments = "\n".join(f"{name} = {json.dumps(value)}" for name, value in ENGINE_ARGS.items())
    config = directory / "config.toml"
    config.write_text(
        f'[membership]\nray_address = "local"\n[[engines]]\nname = "{MODEL}"\nmodel = "{model}"\nreplicas = 2\n'
        f"health_check_period_s = 1.0\n[engines.args]\n{arguments}\n"
    )
    address: list[str] = []
    over = threading.Event()
    up = threading.Event()

    def bare() -> None:
        try:
            with bare_vllm_server(model, MODEL, ENGINE_ARGS, directory / "bare.log") as url:
                address.append(url)
                up.set()
                over.wait()
        finally:
            up.set()

    thread = threading.Thread(target=bare)
    thread.start()
    try:
        with kvlane_up(directory / "kvlane.log", "--config", str(config)) as stack:
            up.wait()
            assert address, (directory / "bare.log").read_text()[-3000:]
            yield stack, address[0]
            assert stack.stop() == 0
            log = stack.log()
            assert "Traceback" not in log, log[-5000:]
    finally:
        over.set()
        thread.join()


@pytest.fixture
def stack(servers: tuple[Stack, str]) -> Stack:
    return servers[0]


@pytest.fixture
def client(stack: Stack) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{stack.http}/v1", api_key="none", max_retries=0, timeout=DEADLINE_S) as client:
        yield client


def eventually(condition: Callable[[], bool], deadline_s: float = DEADLINE_S) -> float:
    """Waits until it holds; returns for how many seconds."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < deadline_s
        time.sleep(0.002)
    return time.monotonic() - began


# -- acceptance: the official client, and answers equal to a bare vLLM's

MESSAGES = [{"role": "system", "content": "You are terse."}, {"role": "user", "content": "Tell me a story."}]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather somewhere.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "maxLength": 5}},
                "required": ["city"],
            },
        },
    }
]
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 5}, "old": {"type": "boolean"}},
    "required": ["name", "old"],
    "additionalProperties": False,
}
CHAT: dict[str, dict[str, Any]] = {
    "plain": {},
    "logprobs": {"logprobs": True, "top_logprobs": 3},
    "n2": {"n": 2},
    "n2-sampled": {"n": 2, "temperature": 0.8, "seed": 7},
    "stop": {"stop": ["e"]},
    "tools-offered": {"tools": TOOLS, "tool_choice": "none"},
    "tool-forced": {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "weather"}}},
    "json-schema": {
        "response_format": {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}},
        "max_tokens": 64,
    },
    "regex": {"structured_outputs": {"regex": "[a-c]{4}"}},
    "choice": {"structured_outputs": {"choice": ["red", "green"]}},
    "bias": {"logit_bias": {"40": 5.0}, "frequency_penalty": 0.5, "presence_penalty": 0.1},
    "too-long": {"messages": [{"role": "user", "content": "word " * 9000}]},
    "bad-temperature": {"temperature": -1},
    "bad-n": {"n": 0},
    "bad-type": {"max_tokens": "many"},
    "bad-role-type": {"messages": "hello"},
    "no-messages": {"messages": []},
}
COMPLETIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "token-ids": {"prompt": [5, 6, 7, 8, 9, 10]},
    "several-prompts": {"prompt": ["one two", "three four five"]},
    "echo": {"echo": True},
    "logprobs": {"logprobs": 2},
    "n2": {"n": 2},
    "empty-prompt": {"prompt": ""},
    "token-out-of-vocabulary": {"prompt": [1, 99999999]},
}
OTHER: dict[str, tuple[str, str, dict[str, Any]]] = {
    "tokenize": ("POST", "/tokenize", {"prompt": "hello world"}),
    "detokenize": ("POST", "/detokenize", {"tokens": [5, 6, 7]}),
    "responses": ("POST", "/v1/responses", {"input": "hello", "max_output_tokens": 8, "temperature": 0}),
    "messages": ("POST", "/v1/messages", {"messages": MESSAGES[1:], "max_tokens": 8, "temperature": 0}),
}


@pytest.mark.parametrize("case", CHAT)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_chat_answers_equal_those_of_a_bare_vllm(servers: tuple[Stack, str], case: str, stream: bool) -> None:
    body = {"messages": MESSAGES, "temperature": 0, "max_tokens": 12} | CHAT[case]
    compare(servers, "POST", "/v1/chat/completions", body, stream)


@pytest.mark.parametrize("case", COMPLETIONS)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_completions_equal_those_of_a_bare_vllm(servers: tuple[Stack, str], case: str, stream: bool) -> None:
    body = {"prompt": "Once upon a time", "temperature": 0, "max_tokens": 12} | COMPLETIONS[case]
    compare(servers, "POST", "/v1/completions", body, stream)


@pytest.mark.parametrize("case", OTHER)
def test_other_endpoints_answer_as_a_bare_vllm_does(servers: tuple[Stack, str], case: str) -> None:
    method, path, body = OTHER[case]
    compare(servers, method, path, body, stream=False)


def test_embeddings_of_a_generative_model_fail_with_the_status_of_a_bare_vllm(servers: tuple[Stack, str]) -> None:
    stack, bare = servers
    body = {"model": MODEL, "input": "hello"}
    ours, theirs = (httpx.post(f"{url}/v1/embeddings", json=body, timeout=DEADLINE_S) for url in (stack.http, bare))
    assert (ours.status_code, theirs.status_code) == (404, 404)
    assert ours.json()["error"]["type"] == "NotFoundError"  # a bare vLLM has no such path, and says so in another shape


def compare(servers: tuple[Stack, str], method: str, path: str, body: dict[str, Any], stream: bool) -> None:
    stack, bare = servers
    body = {"model": MODEL} | body
    if stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    ours, theirs = (httpx.request(method, url + path, json=body, timeout=DEADLINE_S) for url in (stack.http, bare))
    assert ours.status_code == theirs.status_code, (ours.text, theirs.text)
    assert ours.headers["content-type"] == theirs.headers["content-type"]
    assert parsed(ours) == parsed(theirs)
    assert ours.headers["x-kvlane-route"].startswith("replica=")


def parsed(response: httpx.Response) -> Any:
    """The answer without what differs between two calls: ids, times, and how many tokens share an event."""
    if not response.headers["content-type"].startswith("text/event-stream"):
        return stable(response.json())
    blocks = response.text.split("\n\n")
    assert blocks[-2:] == ["data: [DONE]", ""]
    events = [json.loads(block.removeprefix("data: ")) for block in blocks[:-2]]
    choices: dict[int, dict[str, Any]] = {}
    for event in events:
        for choice in event.get("choices", ()):
            merge(choices.setdefault(choice["index"], {}), choice)
    return {
        "choices": choices,
        "shapes": {shape(event) for event in events},
        "others": [stable(event) for event in events if not event.get("choices")],
    }


def merge(whole: dict[str, Any], part: dict[str, Any]) -> None:
    """Joins what a choice's events add up to: texts and lists grow, the rest is the last that was said."""
    for key, value in part.items():
        if isinstance(value, dict):
            if not isinstance(whole.get(key), dict):
                whole[key] = {}
            merge(whole[key], value)
        elif isinstance(value, str | list) and isinstance(whole.get(key), str | list):
            whole[key] = whole[key] + value
        elif value is not None or key not in whole:
            whole[key] = stable(value)


def shape(event: dict[str, Any]) -> str:
    """The fields of an event and its choices, in their order."""
    return json.dumps(
        [list(event), [[list(choice), list(choice.get("delta", ()))] for choice in event.get("choices", ())]]
    )


def stable(value: Any) -> Any:
    if isinstance(value, dict):
        volatile = {"id", "created", "created_at", "completed_at", "request_id", "item_id", "system_fingerprint"}
        return {key: stable(item) for key, item in value.items() if key not in volatile}
    if isinstance(value, list):
        return [stable(item) for item in value]
    return value


def test_the_official_client_streams_a_chat_with_usage(client: openai.OpenAI) -> None:
    with client.chat.completions.create(
        model=MODEL,
        messages=MESSAGES,  # type: ignore[arg-type]
        max_tokens=16,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    ) as stream:
        chunks = list(stream)
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 16
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


def test_the_official_client_gets_tools_logprobs_and_choices(client: openai.OpenAI) -> None:
    forced = client.chat.completions.create(
        model=MODEL,
        messages=MESSAGES,  # type: ignore[arg-type]
        tools=TOOLS,  # type: ignore[arg-type]
        tool_choice={"type": "function", "function": {"name": "weather"}},
        max_tokens=200,
    )
    (call,) = forced.choices[0].message.tool_calls or ()
    assert call.type == "function"
    assert call.function.name == "weather"
    assert json.loads(call.function.arguments) is not None
    answer = client.chat.completions.create(
        model=MODEL,
        messages=MESSAGES,  # type: ignore[arg-type]
        n=2,
        logprobs=True,
        top_logprobs=2,
        max_tokens=4,
        extra_body={"ignore_eos": True},
    )
    assert len(answer.choices) == 2
    assert answer.choices[1].logprobs is not None
    assert len(answer.choices[1].logprobs.content or []) == 4


def test_the_official_client_gets_text_completions_and_the_model_list(client: openai.OpenAI) -> None:
    whole = client.completions.create(model=MODEL, prompt="Once", max_tokens=5, temperature=0)
    with client.completions.create(model=MODEL, prompt="Once", max_tokens=5, temperature=0, stream=True) as stream:
        assert "".join(chunk.choices[0].text for chunk in stream) == whole.choices[0].text
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL


def test_the_official_client_raises_its_own_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.completions.create(model="nobody", prompt="x")
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model=MODEL, input="x")
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model=MODEL, prompt="x", temperature=-3)


def test_structured_output_keeps_to_its_schema(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL,
        messages=MESSAGES,  # type: ignore[arg-type]
        max_tokens=100,
        temperature=0,
        response_format={"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}},
    )
    value = json.loads(answer.choices[0].message.content or "")
    assert set(value) == {"name", "old"}


# -- acceptance: gRPC


def post(stack: Stack, path: str, body: dict[str, Any]) -> Any:
    return httpx.post(stack.http + path, json=body, timeout=DEADLINE_S).json()


async def test_a_grpc_client_streams_generate_and_chat(stack: Stack) -> None:
    async with Client(stack.grpc) as client:
        deltas = [d async for d in client.generate(MODEL, "Once upon", max_tokens=8, temperature=0, ignore_eos=True)]
        assert deltas[0].route is not None
        assert deltas[0].route.replica
        assert sum(len(d.token_ids) for d in deltas) == 8
        assert deltas[-1].usage is not None
        assert deltas[-1].usage.completion_tokens == 8
        texts = {"".join([d.text async for d in client.generate(MODEL, "Once upon", max_tokens=8, temperature=0)])}
        body = {"model": MODEL, "prompt": "Once upon", "max_tokens": 8, "temperature": 0}
        http = await asyncio.to_thread(post, stack, "/v1/completions", body)
        assert texts == {http["choices"][0]["text"]}
        chat = [d async for d in client.chat(MODEL, [{"role": "user", "content": "Hi"}], max_tokens=6, temperature=0)]
        body = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 6, "temperature": 0}
        http = await asyncio.to_thread(post, stack, "/v1/chat/completions", body)
        assert "".join(d.text for d in chat) == http["choices"][0]["message"]["content"]
        assert [model.name for model in await client.models()] == [MODEL]


def test_a_plain_grpc_client_finds_health_and_reflection(stack: Stack) -> None:
    with grpc.insecure_channel(stack.grpc) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for service in ("", "kvlane.v1.Inference"):
            answer = health.Check(health_pb2.HealthCheckRequest(service=service), timeout=DEADLINE_S)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
        asked = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
        (listed,) = reflection.ServerReflectionInfo(asked, timeout=DEADLINE_S)
        assert "kvlane.v1.Inference" in [service.name for service in listed.list_services_response.service]
        generate = channel.unary_stream(
            "/kvlane.v1.Inference/Generate",
            request_serializer=pb.GenerateRequest.SerializeToString,
            response_deserializer=pb.GenerateResponse.FromString,
        )
        request = pb.GenerateRequest(model=MODEL, text="Hi", sampling=pb.SamplingParams(max_tokens=4, ignore_eos=True))
        messages = list(generate(request, timeout=DEADLINE_S))
        assert messages[0].route.replica
        assert messages[-1].usage.completion_tokens == 4


@pytest.mark.parametrize("timeout_s", [0.05, 0.5])
async def test_a_deadline_on_a_long_generation_ends_it_in_the_engine(stack: Stack, timeout_s: float) -> None:
    took, seen = [], 0

    async def generate(rpc: Client) -> None:
        async for _ in rpc.generate(MODEL, "Once", max_tokens=LONG, ignore_eos=True, timeout_s=timeout_s):
            pass

    async with Client(stack.grpc) as rpc:
        for _ in range(20):
            call = asyncio.create_task(generate(rpc))
            await asyncio.to_thread(eventually, lambda call=call: call.done() or stack.holds(1))
            seen += not call.done()
            with pytest.raises(KvlaneCallError) as caught:
                await call
            assert caught.value.status is grpc.StatusCode.DEADLINE_EXCEEDED
            took.append(await asyncio.to_thread(eventually, stack.idle, ABORT_DEADLINE_S))
    # On a busy machine it may pass before the engine has begun: the shorter one often, the longer one hardly ever.
    assert seen >= (15 if timeout_s > 0.1 else 1)
    print(
        f"idle after a deadline of {timeout_s * 1000:.0f} ms: median {statistics.median(took) * 1000:.0f} ms "
        f"of {len(took)}, {seen} of them seen in the engine before"
    )


# -- acceptance: disconnects in three phases on both protocols


def long_body(stream: bool, tokens: int = LONG) -> bytes:
    body = {"model": MODEL, "prompt": "Once", "max_tokens": tokens, "ignore_eos": True, "stream": stream}
    if stream:
        body["stream_options"] = {"include_usage": True}
    return json.dumps(body).encode()


def post_raw(stack: Stack, body: bytes) -> socket.socket:
    host, _, port = stack.http.removeprefix("http://").rpartition(":")
    connection = socket.create_connection((host, int(port)), timeout=DEADLINE_S)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    connection.sendall(head.encode() + b"\r\n\r\n" + body)
    return connection


@contextmanager
def beside(stack: Stack, phase: str) -> Iterator[int]:
    """What runs beside the request that is left; yields how many. For the phase before the first token the engines are
    full, so that it waits in an engine which goes on.
    """
    count = 0
    with ExitStack() as held:
        # However they are routed: one engine may be full before the other is.
        while phase == "before the first token" and stack.metric("kvlane_replica_running") < PLACES:
            assert count < 2 * PLACES, "the engines do not fill"
            held.enter_context(post_raw(stack, long_body(stream=False)))
            count += 1
            eventually(lambda count=count: stack.holds(count))  # type: ignore[misc]
        yield count
        assert stack.holds(count), "the engines were not full all the time"
    eventually(stack.idle, ABORT_DEADLINE_S)


@pytest.mark.parametrize("phase", ["before the first token", "mid-stream", "not streamed"])
def test_an_http_disconnect_reaches_the_engine(stack: Stack, phase: str) -> None:
    took = []
    with beside(stack, phase) as others:
        for _ in range(20):
            before = stack.metric("kvlane_requests_total")
            with post_raw(stack, long_body(phase != "not streamed")) as connection:
                if phase == "mid-stream":
                    assert connection.recv(1 << 16).startswith(b"HTTP/1.1 200")
                    connection.recv(1 << 16)
                eventually(lambda: stack.holds(others + 1))
                if phase != "mid-stream":
                    connection.setblocking(False)
                    with pytest.raises(BlockingIOError):
                        connection.recv(1)
            took.append(eventually(lambda: stack.holds(others), ABORT_DEADLINE_S))
            eventually(lambda before=before: stack.metric("kvlane_requests_total") == before + 1)  # type: ignore[misc]
    print(f"gone after an HTTP disconnect {phase}: median {statistics.median(took) * 1000:.0f} ms of {len(took)}")
    cancelled = re.search(
        r'kvlane_requests_total\{outcome="cancelled",rpc="http"\} (\d+)', httpx.get(f"{stack.http}/metrics").text
    )
    assert cancelled is not None
    assert int(cancelled[1]) >= 20


@pytest.mark.parametrize("phase", ["before the first token", "mid-stream"])
async def test_a_grpc_cancel_reaches_the_engine(stack: Stack, phase: str) -> None:
    took = []
    with beside(stack, phase) as others:
        async with Client(stack.grpc) as client:
            for _ in range(20):
                call = client.generate(MODEL, "Once", max_tokens=LONG, ignore_eos=True)
                async with call:
                    reading = asyncio.ensure_future(read(call, 3 if phase == "mid-stream" else 1))
                    if phase == "mid-stream":
                        await reading
                    await asyncio.to_thread(eventually, lambda: stack.holds(others + 1))
                    assert reading.done() == (phase == "mid-stream")
                    reading.cancel()
                    await asyncio.gather(reading, return_exceptions=True)
                took.append(await asyncio.to_thread(eventually, lambda: stack.holds(others), ABORT_DEADLINE_S))
    print(f"gone after a gRPC cancel {phase}: median {statistics.median(took) * 1000:.0f} ms of {len(took)}")


async def read(call: AsyncIterator[object], count: int) -> None:
    """Reads so many messages of a stream."""
    for _ in range(count):
        await anext(call)


# -- acceptance: bad input on the real servers, while another stream goes on


class Untouched:
    """A long stream that must end whole, whatever others send meanwhile."""

    def __init__(self, stack: Stack) -> None:
        self._connection = post_raw(stack, long_body(stream=True, tokens=BESIDE))
        self._read = self._connection.recv(1 << 16)
        assert self._read.startswith(b"HTTP/1.1 200")

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None:
        with self._connection:
            while not self._read.endswith(b"0\r\n\r\n"):
                data = self._connection.recv(1 << 16)
                assert data, "the other stream was cut"
                self._read += data
        assert f'"completion_tokens":{BESIDE}'.encode() in self._read
        assert b"data: [DONE]" in self._read


CHAT_PATH = "/v1/chat/completions"
JSON_HEADERS = {"content-type": "application/json"}
BAD_HTTP: dict[str, tuple[str, str, bytes, dict[str, str], int]] = {
    "broken JSON": ("POST", CHAT_PATH, b'{"model": "tiny", ', JSON_HEADERS, 400),
    "body not an object": ("POST", CHAT_PATH, b"[1]", JSON_HEADERS, 400),
    "wrong type of model": ("POST", CHAT_PATH, b'{"model": 5, "messages": []}', JSON_HEADERS, 400),
    "wrong type of messages": ("POST", CHAT_PATH, b'{"model": "tiny", "messages": 5}', JSON_HEADERS, 400),
    "missing model": ("POST", CHAT_PATH, b'{"messages": []}', JSON_HEADERS, 400),
    "unknown model": ("POST", CHAT_PATH, b'{"model": "nobody", "messages": []}', JSON_HEADERS, 404),
    "empty prompt": ("POST", "/v1/completions", b'{"model": "tiny", "prompt": ""}', JSON_HEADERS, 400),
    "over-long prompt": (
        "POST",
        "/v1/completions",
        json.dumps({"model": MODEL, "prompt": "word " * 9000}).encode(),
        JSON_HEADERS,
        400,
    ),
    "body over the limit": ("POST", CHAT_PATH, b" " * ((32 << 20) + 1), JSON_HEADERS, 413),
    "unknown path": ("POST", "/v1/nothing", b"{}", JSON_HEADERS, 404),
    "path outside": ("GET", "/admin", b"", {}, 404),
    "unknown method": ("DELETE", CHAT_PATH, b"", {}, 405),
    "sampling out of range": (
        "POST",
        "/v1/completions",
        b'{"model": "tiny", "prompt": "x", "top_p": 7}',
        JSON_HEADERS,
        400,
    ),
    "invalid UTF-8": ("POST", CHAT_PATH, b'{"model": "tiny\xff"}', JSON_HEADERS, 400),
    "oversized header": ("GET", "/v1/models", b"", {"x-big": "a" * 70_000}, 431),
}


@pytest.mark.parametrize("case", BAD_HTTP)
def test_bad_http_input_gets_the_right_status_and_disturbs_nobody(stack: Stack, case: str) -> None:
    method, path, body, headers, status = BAD_HTTP[case]
    with Untouched(stack):
        try:
            response = httpx.request(method, stack.http + path, content=body, headers=headers, timeout=DEADLINE_S)
        except (httpx.WriteError, httpx.ReadError):
            assert case == "body over the limit", "the connection was cut before the answer could be read"
            response = _early_answer(stack, path, len(body))
        assert response.status_code == status, response.text
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["code"] == status
        assert error["message"]


def _early_answer(stack: Stack, path: str, length: int) -> httpx.Response:
    """The answer to the head alone of a request whose body is not wanted."""
    host, _, port = stack.http.removeprefix("http://").rpartition(":")
    with socket.create_connection((host, int(port)), timeout=DEADLINE_S) as connection:
        connection.sendall(f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n".encode())
        data = b""
        while piece := connection.recv(1 << 16):
            data += piece
    head, _, body = data.partition(b"\r\n\r\n")
    return httpx.Response(int(head.split()[1]), content=body)


def test_a_half_sent_request_is_ended_with_408(stack: Stack) -> None:
    host, _, port = stack.http.removeprefix("http://").rpartition(":")
    with socket.create_connection((host, int(port)), timeout=DEADLINE_S) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Le")
        answer = b""
        while piece := connection.recv(1 << 16):
            answer += piece
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == 408


S = grpc.StatusCode
BAD_GRPC: dict[str, tuple[str, bytes, grpc.StatusCode]] = {
    "invalid proto": ("Generate", b"\xff\xff\xff", S.INVALID_ARGUMENT),
    "invalid UTF-8": ("Generate", b"\x0a\x02\xff\xfe", S.INVALID_ARGUMENT),
    "missing model": ("Generate", pb.GenerateRequest(text="x").SerializeToString(), S.INVALID_ARGUMENT),
    "unknown model": ("Generate", pb.GenerateRequest(model="nobody", text="x").SerializeToString(), S.NOT_FOUND),
    "empty prompt": ("Generate", pb.GenerateRequest(model=MODEL, text="").SerializeToString(), S.INVALID_ARGUMENT),
    "over-long prompt": (
        "Generate",
        pb.GenerateRequest(model=MODEL, text="word " * 9000).SerializeToString(),
        S.INVALID_ARGUMENT,
    ),
    "no messages": ("Chat", pb.ChatRequest(model=MODEL).SerializeToString(), S.INVALID_ARGUMENT),
    "sampling out of range": (
        "Generate",
        pb.GenerateRequest(model=MODEL, text="x", sampling=pb.SamplingParams(top_p=7)).SerializeToString(),
        S.INVALID_ARGUMENT,
    ),
    "unknown LoRA": (
        "Generate",
        pb.GenerateRequest(model=MODEL, text="x", routing=pb.RoutingParams(lora="none")).SerializeToString(),
        S.NOT_FOUND,
    ),
    "embedding of a generative model": (
        "Embed",
        pb.EmbedRequest(model=MODEL, texts=["x"]).SerializeToString(),
        S.UNIMPLEMENTED,
    ),
    "unknown method": ("Nothing", b"", S.UNIMPLEMENTED),
    "message over the limit": ("Generate", bytes((32 << 20) + 1), S.RESOURCE_EXHAUSTED),
}


@pytest.mark.parametrize("case", BAD_GRPC)
def test_bad_grpc_input_gets_the_right_status_and_disturbs_nobody(stack: Stack, case: str) -> None:
    method, body, status = BAD_GRPC[case]
    with Untouched(stack), grpc.insecure_channel(stack.grpc) as channel:
        call = channel.unary_stream(f"/kvlane.v1.Inference/{method}")
        with pytest.raises(grpc.RpcError) as caught:
            list(call(body, timeout=DEADLINE_S))
    assert caught.value.code() is status
    assert caught.value.details()


def test_oversized_metadata_is_refused_and_disturbs_nobody(stack: Stack) -> None:
    request = pb.GenerateRequest(model=MODEL, text="x").SerializeToString()
    with Untouched(stack), grpc.insecure_channel(stack.grpc) as channel:
        call = channel.unary_stream("/kvlane.v1.Inference/Generate")
        with pytest.raises(grpc.RpcError) as caught:
            list(call(request, metadata=(("x-big", "a" * 40_000),), timeout=DEADLINE_S))
    assert caught.value.code() is S.RESOURCE_EXHAUSTED
    assert "metadata is too large" in str(caught.value.details())


def test_metadata_beyond_all_measure_costs_its_own_connection_alone(stack: Stack) -> None:
    request = pb.GenerateRequest(model=MODEL, text="x").SerializeToString()
    with Untouched(stack), grpc.insecure_channel(stack.grpc) as channel:
        call = channel.unary_stream("/kvlane.v1.Inference/Generate")
        with pytest.raises(grpc.RpcError, match="header block of too many bytes"):
            list(call(request, metadata=(("x-big", "a" * 200_000),), timeout=DEADLINE_S))


def test_a_half_sent_http2_preface_disturbs_nobody(stack: Stack) -> None:
    host, _, port = stack.grpc.rpartition(":")
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    with ExitStack() as stalled:
        for sent in range(len(preface)):
            connection = stalled.enter_context(socket.create_connection((host, int(port)), timeout=DEADLINE_S))
            connection.sendall(preface[:sent])
        request = pb.GenerateRequest(model=MODEL, text="x", sampling=pb.SamplingParams(max_tokens=4, ignore_eos=True))
        with Untouched(stack), grpc.insecure_channel(stack.grpc) as channel:
            call = channel.unary_stream("/kvlane.v1.Inference/Generate")
            answer = list(call(request.SerializeToString(), timeout=DEADLINE_S))
    assert pb.GenerateResponse.FromString(answer[-1]).usage.completion_tokens == 4


LOGGED: dict[str, tuple[str, bytes]] = {
    "HTTP 400": (CHAT_PATH, b'{"model": "tiny", '),
    "HTTP 400 by the engine": ("/v1/completions", b'{"model": "tiny", "prompt": "x", "top_p": 7}'),
    "HTTP 404": (CHAT_PATH, b'{"model": "nobody", "messages": []}'),
    "gRPC INVALID_ARGUMENT": ("", pb.GenerateRequest(text="x").SerializeToString()),
    "gRPC INVALID_ARGUMENT by the engine": (
        "",
        pb.GenerateRequest(model=MODEL, text="x", sampling=pb.SamplingParams(top_p=7)).SerializeToString(),
    ),
}


@pytest.mark.parametrize("case", LOGGED)
def test_a_bad_request_leaves_one_line_in_the_log(stack: Stack, case: str) -> None:
    path, body = LOGGED[case]
    name = uuid.uuid4().hex
    if path:
        headers = JSON_HEADERS | {"x-request-id": name}
        assert httpx.post(stack.http + path, content=body, headers=headers, timeout=DEADLINE_S).status_code >= 400
    else:
        with grpc.insecure_channel(stack.grpc) as channel:
            call = channel.unary_stream("/kvlane.v1.Inference/Generate")
            with pytest.raises(grpc.RpcError):
                list(call(body, metadata=(("x-request-id", name),), timeout=DEADLINE_S))
    eventually(lambda: name in stack.log())
    assert len([line for line in stack.log().splitlines() if name in line]) == 1


def test_five_hundred_idle_connections_harm_nobody(stack: Stack) -> None:
    host, _, port = stack.http.removeprefix("http://").rpartition(":")
    idle = [socket.create_connection((host, int(port)), timeout=DEADLINE_S) for _ in range(500)]
    try:
        body = {"model": MODEL, "prompt": "x", "max_tokens": 2}
        assert httpx.post(f"{stack.http}/v1/completions", json=body, timeout=DEADLINE_S).status_code == 200
    finally:
        for connection in idle:
            connection.close()


def test_both_replicas_serve_and_the_router_is_ready(stack: Stack) -> None:
    assert httpx.get(f"{stack.http}/readyz").json()["models"] == {MODEL: 2}
    routes = set()
    for i in range(40):
        body = {"model": MODEL, "prompt": f"{i} x", "max_tokens": 1}
        answer = httpx.post(f"{stack.http}/v1/completions", json=body, timeout=DEADLINE_S)
        routes.add(answer.headers["x-kvlane-route"].split(";")[0])
        if len(routes) == 2:
            break
    assert len(routes) == 2


def test_nothing_is_left_in_router_lanes_or_engines(stack: Stack) -> None:
    eventually(stack.idle)


def test_no_replica_has_logged_a_traceback(stack: Stack) -> None:
    logs = stack.replica_logs()
    assert any("replica" in name for name in logs), sorted(logs)
    assert "Traceback" not in stack.log()
    traces = {name: text[text.index("Traceback") :][:3000] for name, text in logs.items() if "Traceback" in text}
    assert not traces, "\n".join(f"{name}: {text}" for name, text in traces.items())


# -- acceptance: the death of a replica under load; the last test, for the dead one's end is in the logs


async def test_requests_outlive_a_killed_replica_and_its_replacement_takes_traffic(stack: Stack) -> None:
    victim = stack.replicas()[0]
    children = descendants(victim)
    tokens = 400
    async with httpx.AsyncClient(timeout=REPLACED_DEADLINE_S) as http, Client(stack.grpc) as rpc:
        before = {(await ask(http, stack.http, MODEL, 1, stream=True))[0] for _ in range(20)}
        assert len(before) == 2
        await asyncio.to_thread(eventually, stack.idle)
        begun = stack.metric("kvlane_first_output_seconds_count")
        # In this order: half of each engine's places go to gRPC streams, the other half to HTTP streams.
        streams = [asyncio.create_task(ask_grpc(rpc, MODEL, tokens)) for _ in range(PLACES // 2)]
        await asyncio.to_thread(eventually, lambda: stack.holds(PLACES // 2))
        streams += [asyncio.create_task(ask(http, stack.http, MODEL, tokens, stream=True)) for _ in range(12)]
        await asyncio.to_thread(eventually, lambda: stack.holds(PLACES // 2 + 12))
        streams += [asyncio.create_task(ask_grpc(rpc, MODEL, tokens)) for _ in range(4)]
        wholes = [asyncio.create_task(ask(http, stack.http, MODEL, tokens, stream=False)) for _ in range(8)]
        count = len(streams) + len(wholes)
        await asyncio.to_thread(
            eventually, lambda: stack.holds(count) and stack.metric("kvlane_replica_running") == PLACES
        )
        await asyncio.to_thread(eventually, lambda: stack.metric("kvlane_first_output_seconds_count") == begun + PLACES)
        os.kill(victim, signal.SIGKILL)
        results = await asyncio.wait_for(asyncio.gather(*streams, *wholes), REPLACED_DEADLINE_S)
        outcomes = Counter(outcome for _, outcome in results)
        print(outcomes)
        assert set(outcomes) == {WHOLE, ERROR_EVENT, CUT}
        assert outcomes[ERROR_EVENT] + outcomes[CUT] <= PLACES // 2, "only streams that the dead replica had begun"
        assert {outcome for _, outcome in results[len(streams) :]} == {WHOLE}
        await asyncio.to_thread(eventually, lambda: not any(map(alive, [victim, *children])))

        async with asyncio.timeout(REPLACED_DEADLINE_S):
            new: set[str] = set()
            while not new:
                replica, outcome = await ask(http, stack.http, MODEL, 2, stream=True)
                assert outcome == WHOLE
                new = {replica} - before
            while (await ask_grpc(rpc, MODEL, 2)) != (*new, WHOLE):
                pass
        assert (await http.get(f"{stack.http}/readyz")).json()["models"] == {MODEL: 2}
    await asyncio.to_thread(eventually, stack.idle)


# -- acceptance: replicas that Serve takes away or replaces, under load


async def test_no_request_fails_while_a_replica_goes_and_the_other_is_replaced(stack: Stack) -> None:
    over = asyncio.Event()
    async with httpx.AsyncClient(timeout=REPLACED_DEADLINE_S) as http, Client(stack.grpc) as rpc:

        async def client(number: int) -> list[tuple[str, str]]:
            ends = []
            while not over.is_set():
                if number % 3:
                    ends.append(await ask(http, stack.http, MODEL, 150, stream=number % 3 == 1))
                else:
                    ends.append(await ask_grpc(rpc, MODEL, 150))
            return ends

        clients = [asyncio.create_task(client(number)) for number in range(6)]
        try:
            await asyncio.to_thread(stack.deploy, replicas=1)
            await asyncio.to_thread(eventually, lambda: stack.metric("kvlane_replicas_ready") == 1)
            (left,) = {(await ask(http, stack.http, MODEL, 2, stream=True))[0] for _ in range(8)}
            await asyncio.to_thread(stack.deploy, replicas=1, env={"KVLANE_TEST": "1"})
            await asyncio.to_thread(eventually, lambda: stack.metric("kvlane_replicas_ready") == 1)
            (new,) = {(await ask(http, stack.http, MODEL, 2, stream=True))[0] for _ in range(8)}
        finally:
            over.set()
            ends = [end for each in await asyncio.gather(*clients) for end in each]
    assert new != left
    assert {replica for replica, _ in ends} > {left, new}
    assert {outcome for _, outcome in ends} == {WHOLE}
    print(f"{len(ends)} requests whole")
