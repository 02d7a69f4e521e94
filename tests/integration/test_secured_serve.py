"""`kvlane serve` with API keys, HTTPS and mutual TLS, while keys and certificates are rotated under it."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from kvlane.client import Client, KvlaneCallError

from loadtests.processes import MODEL, engines
from router import keys
from router.app import App
from router.options import AuthOptions, Config, GrpcOptions, HttpOptions, MembershipOptions, StaticReplica
from tests.integration.ray_local import until
from tests.integration.served import Served, serving
from tests.unit.certificates import Certificate

pytestmark = pytest.mark.slow

BODY = {"model": MODEL, "prompt": "x", "max_tokens": 5}
REFUSED = "kvlane_auth_refused_total"
HANDSHAKES = "kvlane_tls_handshakes_refused_total"


@pytest.fixture(scope="module")
def addresses() -> Iterator[list[dict[str, Any]]]:
    with engines(1, {"step_base_ms": 10.0, "prefill_ms_per_token": 0.0}) as (_, found):
        yield found


class Secrets:
    """What is mounted, and what may come in its place."""

    def __init__(self, folder: Path) -> None:
        self.server, self.client = Certificate(folder, "server"), Certificate(folder, "client")
        (folder / "next").mkdir()
        self.next = Certificate(folder / "next", "server")
        self.file = folder / "keys.toml"
        self.key, entry = keys.new("team-a")
        self.next_key, self.next_entry = keys.new("team-b")
        self.file.write_text(entry)
        self.first = self.server.client()  # Trusts what is served first.

    def environment(self) -> dict[str, str]:
        return {
            "KVLANE_AUTH_KEYS_FILE": str(self.file),
            "KVLANE_HTTP_TLS_CERT_FILE": str(self.server.cert),
            "KVLANE_HTTP_TLS_KEY_FILE": str(self.server.key),
            "KVLANE_GRPC_TLS_CERT_FILE": str(self.server.cert),
            "KVLANE_GRPC_TLS_KEY_FILE": str(self.server.key),
            "KVLANE_GRPC_TLS_CLIENT_CA_FILE": str(self.client.cert),
        }


@pytest.fixture
def secrets(tmp_path: Path) -> Secrets:
    (tmp_path / "secrets").mkdir()
    return Secrets(tmp_path / "secrets")


@pytest.fixture
def served(
    tmp_path: Path, addresses: list[dict[str, Any]], secrets: Secrets, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Served]:
    for name, value in secrets.environment().items():
        monkeypatch.setenv(name, value)
    with serving(tmp_path, addresses) as found:
        yield found


def https(served: Served, context: ssl.SSLContext, key: str) -> httpx.AsyncClient:
    headers = {"authorization": f"Bearer {key}"} if key else {}
    return httpx.AsyncClient(base_url=f"https://localhost:{served.http}", verify=context, headers=headers, timeout=30)


async def status(served: Served, context: ssl.SSLContext, key: str) -> int:
    async with https(served, context, key) as client:
        return (await client.post("/v1/completions", json=BODY)).status_code


async def called(served: Served, server: bytes, own: Certificate | None, key: str) -> int:
    """How many tokens a gRPC call brings."""
    pair = (own.key.read_bytes(), own.cert.read_bytes()) if own is not None else (None, None)
    metadata = [("authorization", f"Bearer {key}")]
    options = [("grpc.use_local_subchannel_pool", 1)]
    credentials = grpc.ssl_channel_credentials(server, *pair)
    async with Client(f"localhost:{served.grpc}", tls=credentials, metadata=metadata, options=options) as client:
        deltas = [delta async for delta in client.generate(MODEL, "x", max_tokens=5, timeout_s=30)]
    return sum(len(delta.token_ids) for delta in deltas)


async def figures(served: Served) -> dict[str, float]:
    return await asyncio.to_thread(served.metrics, served.admin)


async def test_who_has_no_key_or_certificate_is_refused_counted_and_logged_without_the_secret(
    served: Served, secrets: Secrets
) -> None:
    wrong, server = keys.new("nobody")[0], secrets.server.cert.read_bytes()
    assert await status(served, secrets.first, secrets.key) == 200
    assert await status(served, secrets.first, "") == 401
    assert await status(served, secrets.first, wrong) == 401
    assert await called(served, server, secrets.client, secrets.key) == 5
    for own, key, name in ((secrets.client, wrong, "invalid_api_key"), (None, secrets.key, None)):
        with pytest.raises(KvlaneCallError) as caught:
            await called(served, server, own, key)
        assert name is None or caught.value.name == name
    metrics = await figures(served)
    assert metrics[f'{REFUSED}{{ingress="http",reason="missing"}}'] == 1
    assert metrics[f'{REFUSED}{{ingress="http",reason="unknown"}}'] == 1
    assert metrics[f'{REFUSED}{{ingress="grpc",reason="unknown"}}'] == 1
    assert metrics[f'{HANDSHAKES}{{ingress="grpc",reason="no_certificate"}}'] >= 1
    assert metrics['kvlane_tenant_requests_total{tenant="team-a"}'] == 2
    for ingress in ("http", "grpc"):
        left = metrics[f'kvlane_tls_certificate_expiry_seconds{{ingress="{ingress}"}}']
        assert 86400 < left < 2 * 86400 + 600
    log = served.log()
    assert "API key: unknown" in log
    assert "no_certificate" in log
    for secret in (secrets.key, wrong):
        assert secret not in log
        assert secret[-20:] not in log


async def test_keys_and_certificates_rotate_without_a_restart_or_a_broken_stream(
    served: Served, secrets: Secrets
) -> None:
    async def all_read(what: str, outcome: str, times: int) -> None:
        sample = f'kvlane_file_reloads_total{{outcome="{outcome}",what="{what}"}}'

        async def seen() -> bool:
            return (await figures(served)).get(sample, 0) >= times

        async with asyncio.timeout(60):
            while not await seen():
                await asyncio.sleep(0.2)

    before = served.workers()
    body = {"model": MODEL, "prompt": "x", "max_tokens": 2000, "stream": True}
    async with (
        https(served, secrets.first, secrets.key) as client,
        client.stream("POST", "/v1/completions", json=body) as answer,
    ):
        lines = answer.aiter_lines()
        assert (await anext(lines)).startswith("data: {")
        secrets.server.replace(secrets.next)
        secrets.file.write_text(secrets.next_entry)
        for what in ("keys", "http certificates", "grpc certificates"):
            await all_read(what, "ok", 2)  # By both workers.
        fresh = secrets.next.client()
        assert await status(served, fresh, secrets.next_key) == 200
        assert await status(served, fresh, secrets.key) == 401
        assert await called(served, secrets.next.cert.read_bytes(), secrets.client, secrets.next_key) == 5
        with pytest.raises(httpx.ConnectError):
            await status(served, secrets.first, secrets.next_key)
        secrets.file.write_text("[[keys]]\nname = ")
        await all_read("keys", "failed", 2)
        assert await status(served, fresh, secrets.next_key) == 200
        rest = [line async for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    assert served.workers() == before
    secrets.file.write_text(secrets.next_entry)
    await asyncio.to_thread(served.process.send_signal, 1)  # SIGHUP: new workers read all of it anew.
    await until(lambda: not before & served.workers(), "the old workers have gone")
    assert await status(served, fresh, secrets.next_key) == 200


async def test_a_router_without_supervisor_asks_for_keys_over_tls_too(secrets: Secrets) -> None:
    tls = secrets.server.options
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        replica = StaticReplica(name="r", port=nobody.getsockname()[1])
        app = App(
            Config(
                http=HttpOptions(port=0, **tls),
                grpc=GrpcOptions(port=0, **tls),
                auth=AuthOptions(keys_file=str(secrets.file)),
                membership=MembershipOptions(kind="static", replicas=(replica,)),
            )
        )
        await app.start()
        try:
            async with httpx.AsyncClient(verify=secrets.first) as client:
                url = f"https://localhost:{app.http_port}"
                assert (await client.get(f"{url}/healthz")).status_code == 200
                assert (await client.get(f"{url}/v1/models")).status_code == 401
                page = (await client.get(f"{url}/metrics")).text
                assert 'kvlane_tls_certificate_expiry_seconds{ingress="grpc"}' in page
                assert f'{REFUSED}{{ingress="http",reason="missing"}} 1.0' in page
        finally:
            await app.stop(0)
