from __future__ import annotations

import asyncio
import shutil
import ssl
import time
from pathlib import Path

import httpx
import openai as openai_sdk
import pytest

from router.errors import ConfigError
from router.files import Followed
from router.ingress import arrivals
from router.options import HttpOptions
from tests.unit.certificates import Certificate
from tests.unit.http_ingress import serving as http_serving
from tests.unit.http_ingress.serving import DEADLINE_S, SSE, Client, Served, get, post, receipt, served, stream


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Certificate]:
    folder = tmp_path_factory.mktemp("tls")
    return {name: Certificate(folder, name) for name in ("server", "next", "client", "stranger")}


@pytest.fixture
def server(certificates: dict[str, Certificate], tmp_path: Path) -> Certificate:
    """The server's, in files of its own."""
    copy = Certificate.__new__(Certificate)
    copy.cert = Path(shutil.copy(certificates["server"].cert, tmp_path))
    copy.key = Path(shutil.copy(certificates["server"].key, tmp_path))
    return copy


@pytest.fixture(autouse=True)
def over_tls(server: Certificate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_serving, "TLS", server)


async def _opened(serving: Served, context: ssl.SSLContext) -> Client:
    async with asyncio.timeout(DEADLINE_S):
        return Client(
            *await asyncio.open_connection("127.0.0.1", serving.port, ssl=context, server_hostname="localhost")
        )


async def _is_turned_away(serving: Served, context: ssl.SSLContext) -> str:
    """Connects, asks, and gets no answer; returns what TLS said."""
    try:
        client = await _opened(serving, context)
        client.write(get("/healthz"))  # With TLS 1.3 a client learns of its refusal behind its own handshake.
        assert await client.rest() == b""
    except ssl.SSLError as error:
        return error.reason or ""
    return ""


async def test_httpx_and_the_openai_client_are_served_over_https(server: Certificate) -> None:
    async with (
        served(stream) as serving,
        httpx.AsyncClient(base_url=serving.url, verify=server.client()) as client,
    ):
        for _ in range(2):
            async with client.stream(
                "POST", "/v1/chat/completions", content=post().partition(b"\r\n\r\n")[2]
            ) as answer:
                assert [line async for line in answer.aiter_lines() if line][-1] == "data: [DONE]"
        assert serving.ingress.connections == 1
        async with openai_sdk.AsyncOpenAI(
            base_url=f"{serving.url}/v1",
            api_key="k",
            http_client=openai_sdk.DefaultAsyncHttpxClient(verify=server.client()),
        ) as sdk:
            assert [model.id async for model in sdk.models.list()] == ["lora-a", "tiny"]
        assert not serving.handshakes


async def test_only_http_1_1_is_agreed_on_and_nothing_below_tls_1_2(server: Certificate) -> None:
    context = ssl.create_default_context(cafile=str(server.cert))
    context.set_alpn_protocols(["h2", "http/1.1"])
    async with served() as serving:
        client = await _opened(serving, context)
        assert client.writer.get_extra_info("ssl_object").selected_alpn_protocol() == "http/1.1"
        assert client.writer.get_extra_info("ssl_object").version() == "TLSv1.3"
        await client.close()
        old = ssl.create_default_context(cafile=str(server.cert))
        old.set_ciphers("DEFAULT:@SECLEVEL=0")
        old.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED
        with pytest.warns(DeprecationWarning, match="TLSv1_1"):
            old.maximum_version = ssl.TLSVersion.TLSv1_1
        assert "ALERT" in await _is_turned_away(serving, old)
        assert serving.handshakes == [("http", "old_version")]


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_clients_without_the_right_certificate_are_refused_and_told_so(
    server: Certificate,
    certificates: dict[str, Certificate],
    version: ssl.TLSVersion,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def client(own: Certificate | None) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=str(server.cert))
        context.maximum_version = version
        if own is not None:
            context.load_cert_chain(own.cert, own.key)
        return context

    async with served(tls_client_ca_file=str(certificates["client"].cert)) as serving:
        right = await _opened(serving, client(certificates["client"]))
        right.write(get("/healthz"))
        assert (await right.answer()).status == 200
        assert "ALERT" in await _is_turned_away(serving, client(None))
        assert "ALERT" in await _is_turned_away(serving, client(certificates["stranger"]))
        assert serving.handshakes == [("http", "no_certificate"), ("http", "bad_certificate")]
        assert "refused a TLS handshake at the http port from 127.0.0.1: no_certificate" in caplog.text
        right.write(get("/healthz"))
        assert (await right.answer()).status == 200
        await right.close()


async def test_plaintext_is_answered_with_a_hint_and_garbage_with_an_end() -> None:
    async with served() as serving:
        for data, answer in ((get("/healthz"), b"HTTP/1.1 400 "), (b"\0" * 50, b""), (b"x" * 50, b"")):
            client = Client(*await asyncio.open_connection("127.0.0.1", serving.port))
            client.write(data)
            assert (await client.rest()).startswith(answer)
            await client.close()
        assert [reason for _, reason in serving.handshakes].count("plaintext") >= 1
        assert len(serving.handshakes) == 3
        assert not serving.dispatch.requests


async def test_a_handshake_that_takes_too_long_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrivals, "HANDSHAKE_S", 0.05)
    async with served() as serving:
        silent = Client(*await asyncio.open_connection("127.0.0.1", serving.port))
        try:
            assert await silent.rest() == b""
        except ConnectionError:
            pass
        await silent.close()
        await serving.until(lambda: serving.handshakes == [("http", "timeout")])


async def test_handshakes_under_way_count_as_connections() -> None:
    async with served(max_connections=5) as serving:
        silent = [Client(*await asyncio.open_connection("127.0.0.1", serving.port)) for _ in range(5)]
        await serving.until(lambda: serving.ingress._reception.present == 5)
        with pytest.raises(ConnectionError):
            await serving.connect()
        assert serving.handshakes == [("http", "too_many")]
        await silent.pop().close()
        await serving.until(lambda: serving.ingress._reception.present == 4)
        assert (await serving.say(get("/healthz"))).status == 200
        for client in silent:
            await client.close()
        await serving.until(lambda: serving.ingress._reception.present == 0)


async def test_a_stop_waits_for_no_handshake_and_a_last_call_for_all() -> None:
    async with served() as serving:
        silent = Client(*await asyncio.open_connection("127.0.0.1", serving.port))
        await serving.until(lambda: serving.ingress._reception.present == 1)
        ending = asyncio.create_task(serving.ingress.last_call())
        for _ in range(5):
            await asyncio.sleep(0)
        assert not ending.done()
        async with asyncio.timeout(DEADLINE_S):
            await serving.ingress.stop(5 * DEADLINE_S)
            await ending
        await silent.close()


async def test_new_certificates_are_served_and_open_connections_go_on(
    server: Certificate, certificates: dict[str, Certificate]
) -> None:
    told: list[tuple[str, str]] = []
    release = asyncio.Event()

    async def slow(request, sink):  # type: ignore[no-untyped-def]
        sink.routed(receipt(request))
        sink.head(200, SSE)
        sink.data(b"data: one\n\n", 1)
        await release.wait()
        sink.data(b"data: two\n\n", 1)

    async with served(slow) as serving:
        tls = serving.ingress.tls
        assert tls is not None
        files = Followed("http certificates", tls.paths, tls.load, lambda what, outcome: told.append((what, outcome)))
        trusting = ssl.create_default_context(cafile=str(server.cert))
        streaming = await _opened(serving, trusting)
        streaming.write(post())
        await streaming.head()
        assert await streaming.chunk() == b"data: one\n\n"
        files.look()
        assert told == []
        server.replace(certificates["next"])
        files.look()
        assert told == [("http certificates", "ok")]
        fresh = await _opened(serving, certificates["next"].client())
        fresh.write(get("/healthz"))
        assert (await fresh.answer()).status == 200
        await fresh.close()
        with pytest.raises(ssl.SSLCertVerificationError):
            await _opened(serving, trusting)
        server.key.write_text("half of a ")
        files.look()
        files.look()
        assert told == [("http certificates", "ok"), ("http certificates", "failed")]
        fresh = await _opened(serving, certificates["next"].client())
        await fresh.close()
        server.replace(certificates["server"])
        files.look()
        assert told[-1] == ("http certificates", "ok")
        await (await _opened(serving, trusting)).close()
        release.set()
        assert await streaming.chunk() == b"data: two\n\n"
        await streaming.close()


async def test_a_ca_that_was_taken_away_vouches_for_nobody_not_even_in_a_session_from_before(
    certificates: dict[str, Certificate], tmp_path: Path
) -> None:
    ca = tmp_path / "ca.pem"
    shutil.copy(certificates["client"].cert, ca)
    context = ssl.create_default_context(cafile=str(certificates["server"].cert))
    context.load_cert_chain(certificates["client"].cert, certificates["client"].key)
    async with served(tls_client_ca_file=str(ca)) as serving:
        url = f"https://localhost:{serving.port}/healthz"
        async with httpx.AsyncClient(verify=context) as client:
            assert (await client.get(url)).status_code == 200
        shutil.copy(certificates["stranger"].cert, ca)
        assert serving.ingress.tls is not None
        serving.ingress.tls.load()
        async with httpx.AsyncClient(verify=context) as client:
            with pytest.raises((httpx.TransportError, ssl.SSLError)):
                await client.get(url)
        assert serving.handshakes == [("http", "bad_certificate")]


async def test_it_knows_when_its_certificate_expires(tmp_path: Path) -> None:
    for days in (1, 365 * 40):  # Beyond 2049 X.509 writes the time in another way.
        brief = Certificate(tmp_path, f"days-{days}", days)
        async with served(**brief.options) as serving:
            assert serving.ingress.tls is not None
            assert serving.ingress.tls.expiry() - time.time() == pytest.approx(days * 86400, abs=600)


async def test_files_that_cannot_be_used_are_refused_by_the_option_at_fault(server: Certificate) -> None:
    for options, text in (
        ({"tls_cert_file": "/absent"}, r"http\.tls_cert_file and http\.tls_key_file go together"),
        ({"tls_cert_file": "/absent", "tls_key_file": "/absent"}, r"http\.tls_cert_file: cannot read /absent"),
        ({**server.options, "tls_client_ca_file": str(server.key)}, "holds no certificate"),
        ({"tls_client_ca_file": str(server.cert)}, "needs"),
    ):
        with pytest.raises(ConfigError, match=text):
            async with served(**{"tls_cert_file": "", "tls_key_file": "", **options}):
                pass
    assert HttpOptions().tls_cert_file == ""
