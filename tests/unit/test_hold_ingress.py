"""Clients of a model that is scaled to zero: a whole router, real clients, and replicas that come up late."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import re
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, Literal

import grpc
import grpc.aio
import httpx
import msgspec
import openai
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from kvlane.client import Client, Delta, KvlaneCallError
from kvlane.v1 import inference_pb2 as pb

from engine.base import StreamOut
from engine.replica import Replica
from router import keys
from router.app import App, may_be_held
from router.errors import ReplicaLost
from router.ingress.http import HttpIngress
from router.lane.frames import Submit
from router.options import (
    AuthOptions,
    Config,
    EngineOptions,
    GrpcOptions,
    HoldOptions,
    HttpOptions,
    LaneOptions,
    LimitOptions,
    MembershipOptions,
    StaticReplica,
)
from router.types import Rpc
from tests.fakes import DEADLINE_S, SECRET, ScriptedEngine, eventually
from tests.unit.certificates import Certificate

SSE = (("content-type", "text/event-stream; charset=utf-8"),)
COMMENT = b": waiting for a replica\n\n"
TOLD = re.compile(rb"(?m)^:[^\n]*\n\n")
CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "stream": True}


def chunk(word: str) -> bytes:
    delta = {"index": 0, "delta": {"content": word}, "finish_reason": None}
    event = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [delta]}
    return b"data: %b\n\n" % json.dumps(event).encode()


def answer(call: Submit, out: StreamOut) -> None:
    """Two words and the end, over either protocol."""
    if call.rpc == Rpc.GRPC:
        out.data(pb.GenerateResponse(text="one").SerializeToString(), 1)
        out.data(pb.GenerateResponse(text="two", finish_reason="stop").SerializeToString(), 1)
    elif json.loads(call.body).get("stream"):
        out.head(200, SSE)
        for word in ("one", "two"):
            out.data(chunk(word), 1)
        out.data(b"data: [DONE]\n\n", 0)
    else:
        body = b'{"choices":[]}'
        out.head(200, (("content-type", "application/json"), ("content-length", str(len(body)))))
        out.data(body, 2)
    out.end("stop")


def refuse(call: Submit, out: StreamOut) -> None:
    """As vLLM refuses a request that it cannot serve."""
    body = b'{"error":{"message":"too long","type":"BadRequestError","param":null,"code":400}}'
    out.head(400, (("content-type", "application/json"), ("content-length", str(len(body)))))
    out.data(body, 0)
    out.end("stop")


class Site:
    """A router whose one model has no replica until `scale_up`."""

    app: App

    def __init__(self, folder: Path, **options: Any) -> None:
        secret = folder / "secret"
        secret.write_bytes(SECRET)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        replica = StaticReplica(name="a", port=self._port, secret_file=str(secret))
        defaults: dict[str, Any] = {
            "http": HttpOptions(port=0),
            "grpc": GrpcOptions(port=0),
            "lane": LaneOptions(reconnect_min_s=0.01, reconnect_max_s=0.05),
            "membership": MembershipOptions(kind="static", replicas=(replica,)),
            "hold": HoldOptions(enabled="always"),
            "engines": (EngineOptions(name="m"),),
        }
        self.config = Config(**(defaults | options))
        self.engine = ScriptedEngine()
        self.engine.respond = answer
        self._replica: Replica | None = None

    async def scale_up(self) -> ScriptedEngine:
        replica = self._replica = Replica("a", self.engine, SECRET)
        await replica.start()
        await replica.listen("127.0.0.1", self._port)
        return self.engine

    async def scale_down(self) -> None:
        if self._replica is not None:
            await self._replica.close()
            self._replica = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.app.http_port}"

    def waiting(self) -> int:
        return len(self.app._hold.queues.get("m", ()))

    async def until_waiting(self, count: int) -> None:
        await eventually(lambda: self.waiting() == count)

    def grpc_connection(self) -> Any:
        """The one that is open."""
        edge: Any = self.app._grpc and self.app._grpc._edge
        (connection,) = edge._connections
        return connection

    async def metrics(self) -> str:
        async with httpx.AsyncClient() as client:
            return (await client.get(f"{self.url}/metrics")).text


@asynccontextmanager
async def site(folder: Path, **options: Any) -> AsyncIterator[Site]:
    found = Site(folder, **options)
    app = found.app = App(found.config)
    await app.start()
    try:
        async with asyncio.timeout(DEADLINE_S):
            await app.wait_ready()
        yield found
    finally:
        await app.stop(0)
        await found.scale_down()


@asynccontextmanager
async def raw(port: int, body: dict[str, Any], *lines: str) -> AsyncIterator[asyncio.StreamReader]:
    """A chat asked for over a connection of its own, unread."""
    content = json.dumps(body).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = ["POST /v1/chat/completions HTTP/1.1", "host: x", f"content-length: {len(content)}", *lines]
    writer.write("\r\n".join([*head, "", ""]).encode() + content)
    try:
        yield reader
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def read_until(reader: asyncio.StreamReader, end: bytes) -> bytes:
    async with asyncio.timeout(DEADLINE_S):
        return await reader.readuntil(end)


def body_of(answer: bytes) -> bytes:
    """What a chunked answer says, its framing undone."""
    rest, found = answer.partition(b"\r\n\r\n")[2], b""
    while size := int(rest.partition(b"\r\n")[0], 16):
        rest = rest.partition(b"\r\n")[2]
        found += rest[:size]
        rest = rest[size + 2 :]
    return found


async def in_order(count: int, ask: Callable[[int], Any], site: Site) -> list[asyncio.Task[Any]]:
    """So many requests, each sent once the one before it waits."""
    tasks = []
    for number in range(count):
        tasks.append(asyncio.create_task(ask(number)))
        await site.until_waiting(number + 1)
    return tasks


async def all_of(tasks: list[asyncio.Task[Any]]) -> list[Any]:
    async with asyncio.timeout(3 * DEADLINE_S):
        return await asyncio.gather(*tasks)


class Scaling(msgspec.Struct, frozen=True):
    min_replicas: int


class ScaledEngine(EngineOptions, frozen=True):
    autoscaling: Any = None


@pytest.mark.parametrize(("enabled", "held"), [("auto", {"zero"}), ("always", {"zero", "one", "fixed"}), ("never", ())])
def test_models_that_may_scale_to_zero_are_held_unless_it_is_told_otherwise(
    enabled: Literal["auto", "always", "never"], held: set[str]
) -> None:
    engines = [
        ScaledEngine(name="zero", autoscaling=Scaling(0)),
        ScaledEngine(name="one", autoscaling=Scaling(1)),
        ScaledEngine(name="fixed"),
    ]
    config = Config(hold=HoldOptions(enabled=enabled))
    assert {engine.name for engine in engines if may_be_held(config, engine)} == set(held)


async def test_a_model_at_zero_is_ready_listed_and_explained(tmp_path: Path) -> None:
    async with site(tmp_path) as there, httpx.AsyncClient(base_url=there.url) as client:
        ready = await client.get("/readyz")
        assert (ready.status_code, ready.json()["held"]) == (200, {"m": "scaled to zero, requests are held"})
        assert [one["id"] for one in (await client.get("/v1/models")).json()["data"]] == ["m"]
        unknown = await client.post("/v1/chat/completions", json=CHAT | {"model": "other"})
        assert (unknown.status_code, unknown.json()["error"]["type"]) == (404, "NotFoundError")
        assert there.waiting() == 0


@pytest.mark.slow
async def test_200_http_requests_sent_at_zero_all_complete_in_their_order(tmp_path: Path) -> None:
    async with site(tmp_path) as there, AsyncExitStack() as clients:
        # A client takes ever longer to make one more connection.
        some = [await clients.enter_async_context(httpx.AsyncClient(verify=False, timeout=60)) for _ in range(10)]

        async def ask(number: int) -> httpx.Response:
            body = CHAT | {"stream": number % 2 == 0}
            headers = {"x-request-id": f"r{number}"}
            return await some[number % 10].post(f"{there.url}/v1/chat/completions", json=body, headers=headers)

        tasks = await in_order(200, ask, there)
        engine = await there.scale_up()
        answers = await all_of(tasks)
        assert [each.status_code for each in answers] == [200] * 200
        assert [call.request_id for call in engine.calls] == [f"r{number}" for number in range(200)]
        assert {each.text for each in answers[::2]} == {(chunk("one") + chunk("two")).decode() + "data: [DONE]\n\n"}
        metrics = await there.metrics()
        assert 'kvlane_held_total{model="m",outcome="released"} 200' in metrics
        assert 'kvlane_held_requests{model="m"} 0' in metrics
        assert "kvlane_held_seconds_count 200" in metrics


@pytest.mark.slow
async def test_200_grpc_calls_sent_at_zero_all_complete_in_their_order(tmp_path: Path) -> None:
    async with site(tmp_path) as there, Client(f"127.0.0.1:{there.app.grpc_port}") as client:

        async def ask(number: int) -> list[Delta]:
            return [delta async for delta in client.generate("m", f"p{number}", timeout_s=60)]

        tasks = await in_order(200, ask, there)
        engine = await there.scale_up()
        answers = await all_of(tasks)
        assert {"".join(delta.text for delta in deltas) for deltas in answers} == {"onetwo"}
        asked = [pb.GenerateRequest.FromString(bytes(call.body)).text for call in engine.calls]
        assert asked == [f"p{number}" for number in range(200)]


async def test_a_quick_start_gives_the_very_bytes_of_an_answer_that_never_waited(tmp_path: Path) -> None:
    def plain(answer: bytes) -> bytes:
        return re.sub(rb"date: [^\r]*", b"date", answer)

    async with site(tmp_path) as there:
        async with raw(there.app.http_port, CHAT, "x-request-id: r1") as reader:
            await there.until_waiting(1)
            await there.scale_up()
            held = await read_until(reader, b"\r\n0\r\n\r\n")
        async with raw(there.app.http_port, CHAT, "x-request-id: r1") as reader:
            assert plain(await read_until(reader, b"\r\n0\r\n\r\n")) == plain(held)


NO_BRIDGE = LimitOptions(no_replica_wait_s=0.0)
SHORT = HoldOptions(enabled="always", comment_interval_s=0.05)


async def test_a_stream_that_waits_long_gets_comments_that_no_client_notices(tmp_path: Path) -> None:
    async with site(tmp_path, hold=SHORT) as there:
        client = openai.AsyncOpenAI(base_url=f"{there.url}/v1", api_key="none", max_retries=0)
        async with client, raw(there.app.http_port, CHAT) as reader:

            async def words() -> list[str | None]:
                stream = await client.chat.completions.create(
                    model="m", messages=[{"role": "user", "content": "hi"}], stream=True
                )
                return [event.choices[0].delta.content async for event in stream]

            asked = asyncio.create_task(words())
            await there.until_waiting(2)
            seen = b"".join([await read_until(reader, COMMENT) for _ in range(3)])
            assert not asked.done()
            engine = await there.scale_up()
            assert await asyncio.wait_for(asked, DEADLINE_S) == ["one", "two"]
            seen += await read_until(reader, b"\r\n0\r\n\r\n")
        head = seen.partition(b"\r\n\r\n")[0].split(b"\r\n")
        assert head[0] == b"HTTP/1.1 200 OK"
        assert b"content-type: text/event-stream; charset=utf-8" in head
        told, _, said = body_of(seen).rpartition(b": x-kvlane-route: replica=a;")
        assert told == COMMENT * told.count(COMMENT)
        assert said.partition(b"\n\n")[2] == chunk("one") + chunk("two") + b"data: [DONE]\n\n"
        assert len(engine.calls) == 2


async def test_a_large_streamed_request_gets_comments_too_and_what_is_no_stream_gets_none(tmp_path: Path) -> None:
    large = CHAT | {"messages": [{"role": "user", "content": "word " * 100_000}]}
    async with site(tmp_path, hold=SHORT) as there, httpx.AsyncClient(timeout=60) as client:
        whole = [{"stream": False}, {"stream": "true"}]
        asked = [client.post(f"{there.url}/v1/chat/completions", json=CHAT | each) for each in whole]
        asked.append(client.post(f"{there.url}/v1/embeddings", json={"model": "m", "input": "x", "stream": True}))
        tasks = [asyncio.create_task(each) for each in asked]
        await there.until_waiting(3)
        async with raw(there.app.http_port, large) as reader:
            for _ in range(3):
                await read_until(reader, COMMENT)
        there.engine.respond = refuse
        await there.scale_up()
        assert [(await task).status_code for task in tasks] == [400] * 3


async def test_what_a_replica_refuses_after_comments_is_an_error_event(tmp_path: Path) -> None:
    async with site(tmp_path, hold=SHORT) as there:
        there.engine.respond = refuse
        client = openai.AsyncOpenAI(base_url=f"{there.url}/v1", api_key="none", max_retries=0)
        async with client, raw(there.app.http_port, CHAT) as reader:
            stream = asyncio.create_task(client.chat.completions.create(**CHAT))
            seen = await read_until(reader, COMMENT)
            events = await asyncio.wait_for(stream, DEADLINE_S)
            await there.scale_up()
            with pytest.raises(openai.APIError, match="too long"):
                await anext(aiter(events))
            seen += await read_until(reader, b"\r\n0\r\n\r\n")
        data = TOLD.sub(b"", body_of(seen))
        assert data == (
            b'data: {"error":{"message":"too long","type":"BadRequestError","param":null,"code":400}}\n\n'
            b"data: [DONE]\n\n"
        )


async def test_a_stream_that_has_comments_alone_may_still_go_to_another_replica(tmp_path: Path) -> None:
    async with site(tmp_path, hold=SHORT) as there:
        there.engine.respond = None
        async with raw(there.app.http_port, CHAT) as reader:
            seen = await read_until(reader, COMMENT)
            await there.scale_up()
            await eventually(lambda: bool(there.engine.outs))
            there.engine.outs[0].head(400, (("content-type", "application/json"),))
            await there.scale_down()
            await there.until_waiting(1)
            seen += await read_until(reader, COMMENT)
            there.engine.respond = answer
            await there.app.replicas.close()  # The same replica is not asked twice: this one has another name.
            record = next(iter(there.app._membership._records.values()))  # type: ignore[attr-defined]
            other = type(record)("b", record.host, record.port, record.secret)
            await there.scale_up()
            there.app.replicas.listed({"b": other})
            seen += await read_until(reader, b"\r\n0\r\n\r\n")
        assert TOLD.sub(b"", body_of(seen)) == chunk("one") + chunk("two") + b"data: [DONE]\n\n"


async def test_a_stream_whose_waiting_ends_badly_after_comments_gets_an_error_event(tmp_path: Path) -> None:
    hold = HoldOptions(enabled="always", comment_interval_s=0.05, timeout_s=0.3)
    async with site(tmp_path, hold=hold, limits=NO_BRIDGE) as there:
        async with raw(there.app.http_port, CHAT) as reader:
            body = body_of(await read_until(reader, b"\r\n0\r\n\r\n"))
        error, done, rest = TOLD.sub(b"", body).split(b"\n\n")
        assert (json.loads(error.removeprefix(b"data: "))["error"]["code"], done, rest) == (503, b"data: [DONE]", b"")


@pytest.mark.parametrize("stream", [False, True])
async def test_without_comments_what_expires_and_what_is_over_the_bounds_gets_503_and_retry_after(
    tmp_path: Path, stream: bool
) -> None:
    hold = HoldOptions(enabled="always", timeout_s=60.0, max_requests=1)
    async with (
        site(tmp_path, hold=hold, limits=NO_BRIDGE) as there,
        httpx.AsyncClient(base_url=there.url) as client,
    ):
        asked = asyncio.create_task(client.post("/v1/chat/completions", json=CHAT | {"stream": stream}))
        await there.until_waiting(1)
        refused = await client.post("/v1/chat/completions", json=CHAT)
        assert (refused.headers["x-kvlane-error"], refused.headers["retry-after"]) == ("hold_full", "5")
        there.app._hold._clock = lambda: time.monotonic() + 60.0
        there.app.replicas.changed()
        expired = await asked
        assert (expired.headers["x-kvlane-error"], expired.headers["retry-after"]) == ("no_replica", "5")
        for each in (refused, expired):
            assert (each.status_code, each.json()["error"]["type"]) == (503, "ServiceUnavailableError")


async def test_grpc_calls_over_the_bounds_are_unavailable_and_told_when_to_come_again(tmp_path: Path) -> None:
    hold = HoldOptions(enabled="always", max_requests=1)
    async with site(tmp_path, hold=hold) as there, Client(f"127.0.0.1:{there.app.grpc_port}") as client:
        first = client.generate("m", "p")
        reading = asyncio.create_task(anext(first))
        await there.until_waiting(1)
        with pytest.raises(KvlaneCallError) as caught:
            await anext(client.generate("m", "p"))
        error = caught.value
        assert (error.status, error.name, error.retryable) == (grpc.StatusCode.UNAVAILABLE, "hold_full", True)
        first.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        await there.until_waiting(0)


async def test_a_client_that_goes_frees_its_place_at_once(tmp_path: Path) -> None:
    async with site(tmp_path) as there:
        async with raw(there.app.http_port, CHAT):
            await there.until_waiting(1)
        await there.until_waiting(0)
        assert 'kvlane_held_total{model="m",outcome="gave_up"} 1' in await there.metrics()
        assert there.app._admission.in_flight == 0


@pytest.mark.slow
async def test_held_streams_outlive_every_idle_limit_of_ours(tmp_path: Path) -> None:
    http = HttpOptions(port=0, header_timeout_s=0.1, body_timeout_s=0.1, idle_timeout_s=0.1)
    edge = GrpcOptions(
        port=0,
        request_timeout_s=0.2,
        read_timeout_s=0.2,
        idle_timeout_s=0.2,
        keepalive_time_s=0.2,
        keepalive_timeout_s=5.0,
    )
    hold = HoldOptions(enabled="always", comment_interval_s=0.4)
    async with (
        site(tmp_path, http=http, grpc=edge, hold=hold) as there,
        Client(f"127.0.0.1:{there.app.grpc_port}") as client,
        httpx.AsyncClient(timeout=60) as silent,
        raw(there.app.http_port, CHAT) as reader,
    ):

        async def call() -> str:
            return "".join([delta.text async for delta in client.generate("m", "p")])

        asked = asyncio.create_task(call())
        posted = asyncio.create_task(silent.post(f"{there.url}/v1/chat/completions", json=CHAT | {"stream": False}))
        await there.until_waiting(3)
        for _ in range(4):  # Three sweeps of each edge, at least.
            await read_until(reader, COMMENT)
        await there.scale_up()
        assert await asyncio.wait_for(asked, DEADLINE_S) == "onetwo"
        assert (await asyncio.wait_for(posted, DEADLINE_S)).status_code == 200
        assert (await read_until(reader, b"\r\n0\r\n\r\n")).count(b"data: ") == 3


async def test_a_grpc_stream_that_waits_long_gets_empty_messages_which_our_client_passes_over(tmp_path: Path) -> None:
    async with site(tmp_path, hold=SHORT) as there:
        target = f"127.0.0.1:{there.app.grpc_port}"
        async with Client(target) as client, grpc.aio.insecure_channel(target) as channel:
            generate = channel.unary_stream("/kvlane.v1.Inference/Generate")
            bare = generate(pb.GenerateRequest(model="m", text="p").SerializeToString())

            async def call() -> list[Delta]:
                return [delta async for delta in client.generate("m", "p")]

            asked = asyncio.create_task(call())
            messages = aiter(bare)
            async with asyncio.timeout(DEADLINE_S):
                assert [await anext(messages) for _ in range(3)] == [b""] * 3
            await there.scale_up()
            first, *rest = await asyncio.wait_for(asked, DEADLINE_S)
            assert first.route is not None
            assert [delta.text for delta in rest] == ["one", "two"]
            left = [pb.GenerateResponse.FromString(message) async for message in messages if message]
            assert left[0].route.replica == "a"
            assert [each.text for each in left[1:]] == ["one", "two"]


@pytest.mark.parametrize("comments", [False, True])
async def test_a_router_that_stops_ends_what_is_held_with_a_retryable_error(tmp_path: Path, comments: bool) -> None:
    hold = HoldOptions(enabled="always", comment_interval_s=0.05 if comments else 0.0)
    async with (
        site(tmp_path, hold=hold) as there,
        Client(f"127.0.0.1:{there.app.grpc_port}") as client,
        raw(there.app.http_port, CHAT) as reader,
        raw(there.app.http_port, CHAT | {"stream": False}) as whole,
    ):
        call = asyncio.create_task(anext(client.generate("m", "p")))
        await there.until_waiting(3)
        if comments:
            await read_until(reader, COMMENT)
        await there.app.stop(0.2)
        with pytest.raises(KvlaneCallError) as caught:
            await call
        error = caught.value
        assert (error.status, error.name, error.retryable) == (grpc.StatusCode.UNAVAILABLE, "shutting_down", True)
        said = await asyncio.wait_for(reader.read(), DEADLINE_S)
        if comments:
            assert b'"code":503' in said
            assert said.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
        else:
            assert said.startswith(b"HTTP/1.1 503 ")
        assert (await asyncio.wait_for(whole.read(), DEADLINE_S)).startswith(b"HTTP/1.1 503 ")
        assert there.waiting() == there.app._admission.in_flight == 0


async def test_a_path_that_no_replica_has_told_of_yet_is_the_first_ones_to_judge(tmp_path: Path) -> None:
    async with site(tmp_path) as there, httpx.AsyncClient(base_url=there.url, timeout=60) as client:
        assert (await client.post("/nowhere", json=CHAT)).status_code == 404
        asked = asyncio.create_task(client.post("/v1/completions", json={"model": "m", "prompt": "x"}))
        await there.until_waiting(1)
        await there.scale_up()
        assert (await asked).status_code == 200


async def test_a_replica_that_fails_after_comments_breaks_the_stream_with_an_event(tmp_path: Path) -> None:
    async with site(tmp_path, hold=SHORT) as there:
        there.engine.respond = lambda call, out: out.fail(ReplicaLost("gone"))
        async with raw(there.app.http_port, CHAT) as reader:
            seen = await read_until(reader, COMMENT)
            await there.scale_up()
            seen += await read_until(reader, b"\r\n0\r\n\r\n")
        error, done, _ = TOLD.sub(b"", body_of(seen)).split(b"\n\n")
        assert (json.loads(error.removeprefix(b"data: "))["error"]["code"], done) == (502, b"data: [DONE]")


@pytest.mark.slow
@pytest.mark.parametrize("replaced", [False, True])
async def test_held_clients_with_keys_over_tls_are_served_by_a_router_that_goes_away(
    tmp_path: Path, replaced: bool
) -> None:
    server, (key, entry) = Certificate(tmp_path, "server"), keys.new("team", ["m"])
    (tmp_path / "keys.toml").write_text(entry)
    options: dict[str, Any] = {
        "http": HttpOptions(port=0, **server.options),
        "grpc": GrpcOptions(port=0, **server.options),
        "auth": AuthOptions(str(tmp_path / "keys.toml")),
        "hold": HoldOptions(enabled="always", comment_interval_s=0.05),
    }
    credentials = grpc.ssl_channel_credentials(server.cert.read_bytes())
    headers = {"authorization": f"Bearer {key}"}
    async with (
        site(tmp_path, **options) as there,
        httpx.AsyncClient(verify=server.client(), headers=headers, timeout=DEADLINE_S) as http,
        grpc.aio.secure_channel(f"localhost:{there.app.grpc_port}", credentials) as channel,
    ):
        generate = channel.unary_stream("/kvlane.v1.Inference/Generate")
        prompt = pb.GenerateRequest(model="m", text="p").SerializeToString()

        def ask_http(number: int) -> Any:
            url = f"https://localhost:{there.app.http_port}/v1/chat/completions"
            return http.post(url, json=CHAT | {"stream": bool(number % 2)})

        async def ask_grpc(_: int) -> list[str]:
            call = generate(prompt, metadata=tuple(headers.items()))
            return [told.text async for each in call if (told := pb.GenerateResponse.FromString(each)).text]

        answers = await in_order(4, ask_http, there)
        before = len(answers)
        calls = [asyncio.create_task(ask_grpc(number)) for number in range(4)]
        await there.until_waiting(before + len(calls))
        connection = there.grpc_connection()
        if replaced:
            leaving = asyncio.create_task(there.app.drain(DEADLINE_S))
        else:
            there.app.notice(0.2)
            await eventually(lambda: connection._tell_at == math.inf)  # It was told half-way.
            leaving = asyncio.create_task(there.app.stop(DEADLINE_S))
        await eventually(lambda: connection._draining)
        assert there.waiting() == before + len(calls)
        await there.scale_up()
        assert [reply.status_code for reply in await all_of(answers)] == [200] * before
        assert await all_of(calls) == [["one", "two"]] * len(calls)
        await http.aclose()
        await asyncio.wait_for(leaving, DEADLINE_S)
        assert there.waiting() == there.app._admission.in_flight == 0


async def test_grpc_health_says_ready_however_late_its_port_is_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = HttpIngress.start

    async def start_late(ingress: HttpIngress) -> int:
        await eventually(
            lambda: all(lane.account for lane in found.app.replicas.lanes()) and found.app.replicas.lanes()
        )
        await asyncio.sleep(0)  # What was told of them was heard.
        return await start(ingress)

    monkeypatch.setattr(HttpIngress, "start", start_late)
    found = Site(tmp_path)
    await found.scale_up()
    app = found.app = App(found.config)
    await app.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{app.grpc_port}") as channel, asyncio.timeout(DEADLINE_S):
            health = health_pb2_grpc.HealthStub(channel)
            while (
                await health.Check(health_pb2.HealthCheckRequest())
            ).status != health_pb2.HealthCheckResponse.SERVING:
                await asyncio.sleep(0.01)
    finally:
        await app.stop(0)
        await found.scale_down()
