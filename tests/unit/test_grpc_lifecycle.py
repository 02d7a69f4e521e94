"""The gRPC ingress's limits and life: cancels, deadlines, slow clients, health, reflection, TLS, shutdown."""

from __future__ import annotations

import asyncio
import socket
import subprocess
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2
from hyperframe.frame import PingFrame
from kvlane.v1 import inference_pb2 as pb

from router import errors
from router.errors import KvlaneError, ReplicaLost
from router.ingress import grpc_aio
from router.ingress.grpc import GrpcIngress
from router.ingress.grpc_aio import AioSink
from router.ingress.h2_call import H2Sink
from router.options import GrpcOptions
from router.types import Request, Sink
from tests.unit import grpc_serving
from tests.unit.grpc_serving import (
    PROMPT,
    SERVICE,
    FakeDispatch,
    FakeFleet,
    Script,
    Served,
    fails,
    generate_on,
    hangs,
    message,
    receipt,
    says,
    serving,
    trailers,
    until,
    within,
)
from tests.unit.h2_peer import peer

CALM = 11
"""ENHANCE_YOUR_CALM."""

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(params=["h2", "aio"], autouse=True)
def edge(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every test holds on both edges."""
    monkeypatch.setattr(grpc_serving, "EDGE", request.param)
    return str(request.param)


async def test_a_message_over_the_limit_is_refused_and_one_within_passes() -> None:
    async with serving(says("a"), max_message_bytes=100_000) as served:
        over = pb.GenerateRequest(model="tiny", text="x" * 100_000)
        assert (await served.error("Generate", over.SerializeToString())).code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        within_limit = pb.GenerateRequest(model="tiny", text="x" * 99_000)
        assert [response.text async for response in served.generate(within_limit)] == ["", "a"]
    assert len(served.dispatch.requests) == 1


async def test_the_deadline_ends_the_call_and_cancels_the_request() -> None:
    async with serving(hangs("a")) as served:
        seen = await served.error("Generate", PROMPT.SerializeToString(), timeout=0.2)
        assert seen.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await within(served.dispatch.cancelled.wait())


async def test_a_cancel_before_the_first_token_cancels_the_request() -> None:
    async with serving(hangs()) as served:
        call = served.generate()
        await within(served.dispatch.running.wait())
        call.cancel()
        await within(served.dispatch.cancelled.wait())


async def test_a_cancel_in_mid_stream_cancels_the_request() -> None:
    async with serving(hangs("a")) as served:
        call = served.generate()
        assert [(await within(call.read())).text for _ in range(2)] == ["", "a"]
        call.cancel()
        await within(served.dispatch.cancelled.wait())


async def test_a_cancel_of_a_unary_call_cancels_the_request() -> None:
    async with serving(hangs()) as served:
        call = asyncio.ensure_future(served.embed("text"))
        await within(served.dispatch.running.wait())
        call.cancel()
        await within(served.dispatch.cancelled.wait())
        await asyncio.wait([call])


async def test_a_cancel_while_a_write_waits_for_the_client_cancels_the_request() -> None:
    async with serving(hangs("x" * (16 << 20)), stream_buffer_bytes=64 << 20) as served:
        call = served.generate()
        assert (await within(call.read())).route.replica  # The large message's write comes next, and is not read.
        call.cancel()
        await within(served.dispatch.cancelled.wait())


async def test_a_closed_connection_cancels_the_request() -> None:
    async with serving(hangs("a")) as served:
        async with grpc.aio.insecure_channel(served.target) as other:
            call = generate_on(other)(PROMPT)
            await within(call.read())
        await within(served.dispatch.cancelled.wait())


async def test_pings_without_end_are_too_many() -> None:
    async with serving(says("a")) as served, peer(served) as client:
        for number in range(20):
            client.send(PingFrame(0, opaque_data=bytes([number] * 8)))
        assert await client.end() in (
            CALM,
            None,
        )  # grpc's core closes with pings unread, which may cost its last words.


async def test_no_task_is_left_after_calls_of_every_end() -> None:
    before = asyncio.all_tasks()
    async with serving(hangs("a")) as served:
        for script in (says("a"), fails(ReplicaLost("gone"), "a"), fails(ZeroDivisionError()), hangs("a")):
            served.dispatch.script = script
            call = served.generate()
            await within(asyncio.wait([asyncio.ensure_future(call.read())]))
            call.cancel()
    assert {task for task in asyncio.all_tasks() if "pump" in repr(task)} <= before
    assert not served.ingress._service.calls


async def test_a_slow_client_is_cut_off_and_others_go_on() -> None:
    async def script(request: Request, sink: Sink) -> None:
        sink.routed(receipt(request))
        if request.session_id == "quick":
            await served.dispatch.failed.wait()
            sink.data(message("still here"), 1)
            return
        while True:
            sink.data(message("x" * 65536), 1)
            await asyncio.sleep(0)

    async with serving(script, stream_buffer_bytes=1 << 20) as served:
        slow = served.generate()
        await within(served.dispatch.running.wait())
        async with grpc.aio.insecure_channel(served.target) as other:
            quick = generate_on(other)(PROMPT, metadata=(("x-session-id", "quick"),))
            assert [(await within(quick.read())).text for _ in range(2)] == ["", "still here"]
            assert await within(quick.code()) is grpc.StatusCode.OK
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in slow:
                pass
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert trailers(caught.value)["kvlane-error"] == "client_too_slow"


@pytest.mark.parametrize("method", ["Generate", "Chat", "Embed", "Models"])
async def test_a_call_that_sends_no_request_is_ended(method: str) -> None:
    async with serving(says("a"), request_timeout_s=0.05) as served:
        call: Any = served.channel.stream_stream(SERVICE + method)()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await within(call.read())
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert trailers(caught.value)["kvlane-error"] == "request_timeout"
        await until(lambda: not served.ingress._service.calls)
        assert [response.text async for response in served.generate()] == ["", "a"]
    assert served.refused == [("grpc", "request_timeout")]


async def test_a_call_that_has_sent_no_request_does_not_hold_a_stop_up() -> None:
    async with serving(says("a")) as served:
        call: Any = served.channel.stream_stream(f"{SERVICE}Generate")()
        reading = asyncio.ensure_future(call.read())
        await until(lambda: bool(served.ingress._service.reading))
        await within(served.ingress.stop(600))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await within(reading)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert trailers(caught.value)["kvlane-error"] == "shutting_down"


def _much(error: KvlaneError | None) -> Script:
    """More than any window of HTTP/2 takes, at once, and the end."""

    async def script(request: Request, sink: Sink) -> None:
        sink.routed(receipt(request))
        for _ in range(3):
            sink.data(message("x" * (8 << 20)), 1)
        if error is not None:
            raise error

    return script


@pytest.mark.parametrize("error", [None, ReplicaLost("gone")], ids=["whole", "failed"])
async def test_a_client_that_never_reads_an_ended_stream_is_given_up(
    error: KvlaneError | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grpc_aio, "STATUS_S", 0.05)
    async with serving(_much(error), stream_buffer_bytes=64 << 20, read_timeout_s=0.05) as served:
        slow = served.generate()
        await within(served.dispatch.running.wait())
        await until(lambda: not served.ingress._service.calls)
        # Its status waits behind what it has not read.
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in slow:
                pass
        expected = "client_too_slow" if error is None else error.name
        assert trailers(caught.value)["kvlane-error"] == expected


async def test_a_stream_that_fails_while_it_opens_still_gets_its_status() -> None:
    async def script(request: Request, sink: Sink) -> None:
        while True:
            sink.data(message("x" * (8 << 20)), 1)
            await asyncio.sleep(0)

    async with serving(script, stream_buffer_bytes=1 << 20) as served:
        seen = await within(served.error("Generate", PROMPT.SerializeToString()))
        assert seen.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert trailers(seen)["kvlane-error"] == "client_too_slow"


async def test_a_client_that_is_too_slow_leaves_nothing_behind_and_holds_no_stop_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def script(request: Request, sink: Sink) -> None:
        assert isinstance(sink, AioSink | H2Sink)
        waiting = sink._messages if isinstance(sink, AioSink) else sink._output._messages
        while True:
            sink.data(message("x" * (8 << 20)), 1)
            await until(lambda: not waiting)  # It is being written.

    monkeypatch.setattr(grpc_aio, "STATUS_S", 0.05)
    async with serving(script, stream_buffer_bytes=1 << 20) as served:
        slow = served.generate()
        await within(served.dispatch.failed.wait())
        await until(lambda: not served.ingress._service.calls)
        assert not [task for task in asyncio.all_tasks() if "pump" in repr(task)]
        await within(served.ingress.stop(600))
        slow.cancel()


async def test_one_message_larger_than_the_buffer_passes() -> None:
    async with serving(says("x" * 100_000), stream_buffer_bytes=1000) as served:
        responses = [response async for response in served.generate()]
    assert len(responses[1].text) == 100_000


async def test_two_hundred_concurrent_streams_are_whole() -> None:
    async def script(request: Request, sink: Sink) -> None:
        await says(*[f"{request.request_id}-{number}" for number in range(10)])(request, sink)

    async def read(served: Served, request_id: str) -> list[str]:
        call = served.generate(metadata=(("x-request-id", request_id),))
        return [response.text async for response in call]

    async with serving(script) as served:
        answers = await within(asyncio.gather(*(read(served, str(number)) for number in range(200))), 30)
    assert answers == [["", *[f"{number}-{each}" for each in range(10)]] for number in range(200)]


async def test_health_follows_readiness() -> None:
    async with serving(says("a")) as served:
        health: Any = health_pb2_grpc.HealthStub(served.channel)
        for ready, status in ((None, 2), (True, 1), (False, 2)):
            if ready is not None:
                await served.ingress.set_ready(ready)
            for service in ("", "kvlane.v1.Inference"):
                assert (await health.Check(health_pb2.HealthCheckRequest(service=service))).status == status
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await health.Check(health_pb2.HealthCheckRequest(service="other"))
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_a_watch_sees_each_change_and_the_stop() -> None:
    async with serving(says("a")) as served:
        health: Any = health_pb2_grpc.HealthStub(served.channel)
        watch = health.Watch(health_pb2.HealthCheckRequest(service="kvlane.v1.Inference"))
        assert (await within(watch.read())).status == health_pb2.HealthCheckResponse.NOT_SERVING
        await served.ingress.set_ready(True)
        assert (await within(watch.read())).status == health_pb2.HealthCheckResponse.SERVING
        stopping = asyncio.create_task(served.ingress.stop(60))
        assert (await within(watch.read())).status == health_pb2.HealthCheckResponse.NOT_SERVING
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await within(watch.read())
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        await within(stopping)


@pytest.mark.parametrize("compression", [grpc.Compression.Gzip, grpc.Compression.Deflate])
async def test_compressed_requests_are_read(compression: grpc.Compression) -> None:
    request = pb.GenerateRequest(model="tiny", text="word " * 50_000)
    async with serving(says("a")) as served:
        assert [each.text async for each in served.generate(request, compression=compression)] == ["", "a"]
    assert served.dispatch.requests[0].body == request.SerializeToString()


async def test_a_large_request_passes() -> None:
    request = pb.GenerateRequest(model="tiny", text="x" * (20 << 20))
    async with serving(says("a")) as served:
        assert [each.text async for each in served.generate(request)] == ["", "a"]
    assert served.dispatch.requests[0].body == request.SerializeToString()


async def test_binary_metadata_is_no_fault() -> None:
    metadata = (("some-bin", b"\0\xff\n"), ("x-session-id", "s"))
    async with serving(says("a")) as served:
        assert [each.text async for each in served.generate(metadata=metadata)] == ["", "a"]
    assert served.dispatch.requests[0].session_id == "s"


async def test_one_connection_serves_many_calls_one_after_the_other() -> None:
    async with serving(says("a")) as served:
        for number in range(300):
            served.dispatch.script = says(str(number))
            assert [each.text async for each in served.generate()] == ["", str(number)]


async def test_an_ipv6_address_is_served() -> None:
    ingress = GrpcIngress(GrpcOptions(host="::1", port=0, edge=grpc_serving.EDGE), FakeDispatch(says("a")), FakeFleet())
    port = await ingress.start()
    try:
        async with grpc.aio.insecure_channel(f"[::1]:{port}") as channel:
            assert [each.text async for each in generate_on(channel)(PROMPT, timeout=10)] == ["", "a"]
    finally:
        await ingress.stop(0)


async def _reflected(served: Served, version: str = "v1alpha") -> list[str]:
    channel: Any = served.channel
    method = channel.stream_stream(
        f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
        request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
        response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
    )
    call = method(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
    response = await within(call.read())
    return [service.name for service in response.list_services_response.service]


async def test_reflection_lists_the_services_and_can_be_turned_off() -> None:
    async with serving(says("a")) as served:
        for version in ("v1alpha", "v1"):
            assert {"kvlane.v1.Inference", "grpc.health.v1.Health"} <= set(await _reflected(served, version))
    async with serving(says("a"), reflection=False) as served:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await _reflected(served)
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_stop_lets_a_call_finish_within_the_grace() -> None:
    go_on = asyncio.Event()

    async def script(request: Request, sink: Sink) -> None:
        sink.data(message("a"), 1)
        await go_on.wait()
        sink.data(message("b"), 1)

    async with serving(script) as served:
        health: Any = health_pb2_grpc.HealthStub(served.channel)
        watch = health.Watch(health_pb2.HealthCheckRequest())  # Never ends by itself: must not hold the stop up.
        assert (await within(watch.read())).status == health_pb2.HealthCheckResponse.NOT_SERVING
        call = served.generate()
        assert (await within(call.read())).text == "a"
        stopping = asyncio.create_task(served.ingress.stop(60))
        go_on.set()
        assert (await within(call.read())).text == "b"
        assert await within(call.code()) is grpc.StatusCode.OK
        await within(stopping)


async def test_stop_waits_for_a_client_that_still_reads_an_ended_stream() -> None:
    async with serving(says("x" * (4 << 20)), stream_buffer_bytes=8 << 20) as served:
        call = served.generate()
        assert (await within(call.read())).route.replica
        stopping = asyncio.create_task(served.ingress.stop(60))
        assert len((await within(call.read())).text) == 4 << 20
        assert await within(call.code()) is grpc.StatusCode.OK
        await within(stopping)


async def test_stop_ends_what_outlives_the_grace_with_unavailable() -> None:
    async with serving(hangs("a")) as served:
        call = served.generate()
        assert [(await within(call.read())).text for _ in range(2)] == ["", "a"]
        await within(served.ingress.stop(0.01))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await within(call.read())
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert trailers(caught.value)["kvlane-error"] == "shutting_down"
        assert served.dispatch.cancelled.is_set()


async def test_two_servers_share_a_port_only_when_told_to() -> None:
    def ingress(port: int, *, reuse_port: bool) -> GrpcIngress:
        options = GrpcOptions(port=port, edge=grpc_serving.EDGE)
        return GrpcIngress(options, FakeDispatch(says()), FakeFleet(), reuse_port=reuse_port)

    first = ingress(0, reuse_port=True)
    port = await first.start()
    second = ingress(port, reuse_port=True)
    assert await second.start() == port
    with pytest.raises(errors.ConfigError, match="cannot listen"):
        await ingress(port, reuse_port=False).start()
    await second.stop(0)
    await first.stop(0)


async def test_a_port_in_use_is_a_config_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        options = GrpcOptions(port=taken.getsockname()[1], edge=grpc_serving.EDGE)
        with pytest.raises(errors.ConfigError, match="cannot listen"):
            await GrpcIngress(options, FakeDispatch(says()), FakeFleet()).start()


def openssl(*arguments: str) -> None:
    subprocess.run(["openssl", *arguments], check=True, capture_output=True, timeout=30)


@pytest.fixture(scope="module")
def pems(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A self-signed certificate for a server at localhost, and one for a client."""
    directory = tmp_path_factory.mktemp("tls")
    for name in ("server", "client"):
        key, cert = str(directory / f"{name}.key"), str(directory / f"{name}.pem")
        new = ["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
        openssl(*new, "-subj", f"/CN={name}", "-addext", "subjectAltName=DNS:localhost", "-keyout", key, "-out", cert)
    openssl(
        "ec", "-in", f"{directory}/server.key", "-aes256", "-passout", "pass:word", "-out", f"{directory}/encrypted.key"
    )
    (directory / "garbage.pem").write_text("this is no PEM")
    return directory


async def _asked_over_tls(served: Served, pems: Path, *, client: str = "") -> list[str]:
    key, chain = ((pems / f"{client}{end}").read_bytes() if client else None for end in (".key", ".pem"))
    credentials = grpc.ssl_channel_credentials((pems / "server.pem").read_bytes(), key, chain)
    target = served.target.replace("127.0.0.1", "localhost")
    async with grpc.aio.secure_channel(target, credentials) as channel:
        return [response.text async for response in generate_on(channel)(PROMPT, timeout=10)]


async def test_tls_serves_clients_that_trust_its_certificate(pems: Path) -> None:
    files = {"tls_cert_file": str(pems / "server.pem"), "tls_key_file": str(pems / "server.key")}
    async with serving(says("a"), **files) as served:
        assert await _asked_over_tls(served, pems) == ["", "a"]
        seen = await served.error("Generate", PROMPT.SerializeToString(), timeout=5)  # Without TLS.
        assert seen.code() is grpc.StatusCode.UNAVAILABLE
        assert len(served.dispatch.requests) == 1


async def test_mutual_tls_refuses_clients_without_a_certificate(pems: Path) -> None:
    files = {
        "tls_cert_file": str(pems / "server.pem"),
        "tls_key_file": str(pems / "server.key"),
        "tls_client_ca_file": str(pems / "client.pem"),
    }
    async with serving(says("a"), **files) as served:
        assert await _asked_over_tls(served, pems, client="client") == ["", "a"]
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await _asked_over_tls(served, pems)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize(
    ("cert", "key", "ca", "text"),
    [
        ("absent.pem", "server.key", "", "tls_cert_file: cannot read"),
        ("server.pem", "absent.key", "", "tls_key_file: cannot read"),
        ("server.pem", "server.key", "absent.pem", "tls_client_ca_file: cannot read"),
        ("server.pem", "", "", "go together"),
        ("", "server.key", "", "go together"),
        ("", "", "client.pem", "needs"),
        ("garbage.pem", "server.key", "", "TLS"),
        ("server.pem", "garbage.pem", "", "TLS"),
        ("server.pem", "client.key", "", "TLS"),
        ("server.pem", "encrypted.key", "", "TLS"),
        ("server.pem", "server.key", "garbage.pem", "TLS"),
    ],
)
async def test_tls_files_that_cannot_be_used_stop_the_start(
    pems: Path, cert: str, key: str, ca: str, text: str
) -> None:
    cert, key, ca = (str(pems / file) if file else "" for file in (cert, key, ca))
    options = GrpcOptions(port=0, edge=grpc_serving.EDGE, tls_cert_file=cert, tls_key_file=key, tls_client_ca_file=ca)
    with pytest.raises(errors.ConfigError, match=text):
        await GrpcIngress(options, FakeDispatch(says()), FakeFleet()).start()
