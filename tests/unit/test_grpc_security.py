"""API keys and TLS of the gRPC ingress, on both edges, with grpc's own clients."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]
from grpc_health.v1 import health_pb2, health_pb2_grpc
from kvlane.v1 import inference_pb2 as pb

from router import keys
from tests.unit import grpc_serving
from tests.unit.certificates import Certificate
from tests.unit.grpc_serving import PROMPT, SERVICE, Served, generate_on, hangs, says, serving, trailers, until, within
from tests.unit.h2_peer import HEADERS, peer
from tests.unit.locked import Locked


@pytest.fixture(params=["h2", "aio"], autouse=True)
def edge(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(grpc_serving, "EDGE", request.param)
    which: str = request.param
    return which


@pytest.fixture
def locked(tmp_path: Path) -> Locked:
    return Locked(tmp_path)


def bearer(key: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {key}"),)


async def _models(served: Served, **call: Any) -> list[str]:
    method = served.channel.unary_unary(f"{SERVICE}Models", response_deserializer=pb.ModelsResponse.FromString)
    return [model.name for model in (await method(b"", **call)).models]


async def test_a_call_without_a_valid_key_is_refused_before_its_message_is_read(
    locked: Locked, caplog: pytest.LogCaptureFixture
) -> None:
    wrong = keys.new("nobody")[0]
    large = pb.GenerateRequest(model="tiny", text="x" * 4_000_000).SerializeToString()
    async with serving(says("a"), gate=locked.gate) as served:
        for metadata in ((), bearer(wrong), (("x-api-key", "mine"),)):
            for method, body in (("Generate", PROMPT.SerializeToString()), ("Models", b""), ("Generate", large)):
                error = await served.error(method, body, metadata=metadata, timeout=10)
                assert error.code() is grpc.StatusCode.UNAUTHENTICATED
                assert trailers(error)["kvlane-error"] == "invalid_api_key"
                status = status_pb2.Status.FromString(trailers(error)["grpc-status-details-bin"])
                info = error_details_pb2.ErrorInfo()
                assert status.details[0].Unpack(info)
                assert info.reason == "INVALID_API_KEY"
        assert not served.dispatch.requests
        assert served.refused == [("grpc", "invalid_api_key")] * 9
        assert [reason for _, reason in locked.refused] == ["missing"] * 3 + ["unknown"] * 3 + ["malformed"] * 3
        assert wrong not in caplog.text


async def test_the_key_lets_in_and_goes_no_further(locked: Locked) -> None:
    async with serving(says("a"), gate=locked.gate) as served:
        for metadata in (bearer(locked.all), (("x-api-key", locked.all),)):
            assert [each.text async for each in served.generate(metadata=metadata, timeout=10)] == ["", "a"]
        for request in served.dispatch.requests:
            assert request.tenant == "admin"
            assert locked.all not in repr(request)


async def test_a_key_is_for_its_models_alone_and_sees_no_others(locked: Locked) -> None:
    mine = bearer(locked.tiny)
    routing = pb.RoutingParams(lora="lora-a")
    async with serving(says("a"), gate=locked.gate) as served:
        for request in (
            pb.GenerateRequest(model="lora-a", text="x"),
            pb.GenerateRequest(model="tiny", text="x", routing=routing),
            pb.GenerateRequest(model="lora-a", text="x" * 1_000_000),
        ):
            error = await served.error("Generate", request.SerializeToString(), metadata=mine, timeout=10)
            assert error.code() is grpc.StatusCode.PERMISSION_DENIED
            assert trailers(error)["kvlane-error"] == "model_forbidden"
        assert locked.refused == [("grpc", "model")] * 3
        assert not served.dispatch.requests
        assert [each.text async for each in served.generate(metadata=mine, timeout=10)] == ["", "a"]
        assert await _models(served, metadata=mine, timeout=10) == ["tiny"]
        assert await _models(served, metadata=bearer(locked.all), timeout=10) == ["lora-a", "tiny"]


async def test_health_needs_no_key(locked: Locked) -> None:
    async with serving(says("a"), gate=locked.gate) as served:
        await served.ingress.set_ready(True)
        stub = health_pb2_grpc.HealthStub(served.channel)
        answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=10)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Certificate]:
    folder = tmp_path_factory.mktemp("tls")
    return {name: Certificate(folder, name) for name in ("server", "next", "client", "stranger")}


async def _ask(served: Served, trusted: Certificate | bytes, own: Certificate | None = None) -> list[str]:
    roots = trusted if isinstance(trusted, bytes) else trusted.cert.read_bytes()
    pair = (own.key.read_bytes(), own.cert.read_bytes()) if own is not None else (None, None)
    options = [("grpc.use_local_subchannel_pool", 1)]
    target = served.target.replace("127.0.0.1", "localhost")
    async with grpc.aio.secure_channel(target, grpc.ssl_channel_credentials(roots, *pair), options) as channel:
        return [each.text async for each in generate_on(channel)(PROMPT, timeout=10)]


async def test_clients_without_the_right_certificate_are_refused(
    certificates: dict[str, Certificate], edge: str, caplog: pytest.LogCaptureFixture
) -> None:
    server, client = certificates["server"], certificates["client"]
    async with serving(says("a"), **server.options, tls_client_ca_file=str(client.cert)) as served:
        assert await _ask(served, server, client) == ["", "a"]
        for own in (None, certificates["stranger"]):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await _ask(served, server, own)
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert len(served.dispatch.requests) == 1
        if edge == "h2":
            assert {reason for _, reason in served.handshakes} == {"no_certificate", "bad_certificate"}
            assert "refused a TLS handshake at the grpc port from 127.0.0.1: no_certificate" in caplog.text


async def test_new_certificates_are_served_and_open_streams_go_on(
    certificates: dict[str, Certificate], tmp_path: Path
) -> None:
    mine = Certificate.__new__(Certificate)
    for name in ("cert", "key"):
        setattr(mine, name, Path(shutil.copy(getattr(certificates["server"], name), tmp_path)))
    old = certificates["server"].cert.read_bytes()
    async with serving(hangs("a"), **mine.options) as served:
        target = served.target.replace("127.0.0.1", "localhost")
        options = [("grpc.use_local_subchannel_pool", 1)]
        async with grpc.aio.secure_channel(target, grpc.ssl_channel_credentials(old), options) as channel:
            streaming = generate_on(channel)(PROMPT, timeout=30)
            assert [(await within(streaming.read())).text for _ in range(2)] == ["", "a"]
            mine.replace(certificates["next"])
            assert served.ingress.tls is not None
            served.ingress.tls.load()
            served.dispatch.script = says("b")
            assert await _ask(served, certificates["next"]) == ["", "b"]
            with pytest.raises(grpc.aio.AioRpcError):
                await _ask(served, old)
            assert [each.text async for each in generate_on(channel)(PROMPT, timeout=10)] == ["", "b"]
            assert not streaming.done()
            streaming.cancel()
            await within(served.dispatch.cancelled.wait())
    await until(lambda: len(asyncio.all_tasks()) == 1)


@pytest.mark.parametrize("spoilt", ["{} ", "{}\n", "{}\0"])
async def test_a_key_in_a_malformed_header_is_not_logged(
    locked: Locked, edge: str, spoilt: str, caplog: pytest.LogCaptureFixture
) -> None:
    if edge != "h2":
        pytest.skip("grpc's own server logs nothing of the kind")
    caplog.set_level("DEBUG", logger="router")
    async with serving(says("a"), gate=locked.gate) as served, peer(served) as client:
        client.call(1, headers=(*HEADERS, ("authorization", spoilt.format(f"Bearer {locked.all}"))))
        answer = await client.answer(1)
        assert answer.status == grpc.StatusCode.INTERNAL.value[0]
        assert locked.all[-20:] not in answer.headers["grpc-message"]
    assert "broke the protocol" in caplog.text
    assert locked.all[-20:] not in caplog.text
