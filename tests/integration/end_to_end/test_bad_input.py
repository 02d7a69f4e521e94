"""Bad input on the real servers: the right status, one line in the log, and another stream goes on meanwhile."""

from __future__ import annotations

import json
import socket
import uuid
from contextlib import ExitStack

import grpc
import httpx
import pytest
from kvlane.v1 import inference_pb2 as pb

from tests.integration.end_to_end.sending import DEADLINE_S, eventually, long_body, post_raw
from tests.integration.stack import Stack
from tests.integration.vllm_fixtures import MODEL

pytestmark = [pytest.mark.vllm, pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]

BESIDE = 400
"""Tokens of the stream that runs beside bad input."""


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
