"""TLS on socket lanes, over real sockets: who gets a lane, who is told why not, and new certificates."""

from __future__ import annotations

import asyncio
import inspect
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import uvloop

from engine.replica import Replica
from loadtests.certificates import Authority, Pair
from router.errors import ConfigError
from router.lane import tls as lane_tls
from router.lane.carriers import SocketCarrier
from router.lane.tls import LaneTls, TlsFiles
from router.membership.base import ReplicaRecord
from router.options import LaneOptions
from router.replicas import Replicas
from tests.fakes import SECRET, RecordingSink, ScriptedEngine, eventually, make_request


def on_both_loops(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Routers run on uvloop; a replica takes the loop that Ray Serve gives it."""

    def run(new_loop: Callable[[], asyncio.AbstractEventLoop], **fixtures: Any) -> None:
        with asyncio.Runner(loop_factory=new_loop) as runner:
            runner.run(test(**fixtures))

    loop = inspect.Parameter("new_loop", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    run.__signature__ = inspect.Signature([loop, *inspect.signature(test).parameters.values()])  # type: ignore[attr-defined]
    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return pytest.mark.parametrize("new_loop", [uvloop.new_event_loop, asyncio.new_event_loop])(run)


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return Pki(tmp_path_factory.mktemp("tls"))


class Pki:
    """The lanes' own CA, and another one."""

    def __init__(self, directory: Path) -> None:
        self.authority, self.other = Authority(directory / "ours"), Authority(directory / "theirs", "others")
        self.replica, self.router = self.authority.issue("replica"), self.authority.issue("router")
        self.expired = self.authority.issue("expired", days=-1)
        self.foreign = self.other.issue("foreign")

    def of_replica(self, pair: Pair | None = None, *, asks: bool = False) -> LaneTls:
        cert, key = pair or self.replica
        return LaneTls("replica", TlsFiles(cert, key, self.authority.ca if asks else ""))

    def of_router(self, pair: Pair | None = None, ca: str = "", name: str = "") -> LaneTls:
        cert, key = pair or ("", "")
        return LaneTls("router", TlsFiles(cert, key, ca or self.authority.ca), name)


class Two:
    """One replica and one router."""

    def __init__(self, replica: Replica, engine: ScriptedEngine, router: Replicas, record: ReplicaRecord) -> None:
        self.replica, self.engine, self.router, self.record = replica, engine, router, record

    @property
    def ready(self) -> bool:
        return len(self.router.lanes()) == 1

    async def streams(self) -> None:
        """A stream runs whole."""
        sink = RecordingSink()
        self.engine.submitted.clear()
        with self.router.lease("a") as lane:
            task = asyncio.create_task(lane.run(make_request(), sink))
            await asyncio.wait_for(self.engine.submitted.wait(), 10)
            payload = b"x" * 3_000_000  # Of many TLS records.
            self.engine.outs[-1].data(payload, 1)
            self.engine.outs[-1].end("stop")
            await asyncio.wait_for(task, 10)
        assert b"".join(sink.payloads) == payload

    async def in_trouble(self, kind: str, *words: str) -> None:
        """There is no lane, for that reason, and it is tried again."""
        await eventually(lambda: self.router.troubles.counts[kind] >= 2)
        assert not self.ready
        text = self.router.readiness().lanes["a"]
        assert all(word in text for word in words), text


@asynccontextmanager
async def two(
    replica_tls: LaneTls | None, router_tls: LaneTls | None, *, told: bool = False, timeout_s: float = 5.0
) -> AsyncIterator[Two]:
    """`told` is what membership says of the replica's TLS."""
    engine = ScriptedEngine()
    replica = Replica("a", engine, SECRET)
    await replica.start()
    port = await replica.listen("127.0.0.1", 0, replica_tls)
    options = LaneOptions(reconnect_min_s=0.01, reconnect_max_s=0.05, connect_timeout_s=timeout_s)
    router = Replicas("test", SocketCarrier(router_tls), options)
    record = ReplicaRecord("a", "127.0.0.1", port, SECRET, tls=told)
    router.listed({"a": record})
    try:
        yield Two(replica, engine, router, record)
    finally:
        await router.close()
        await replica.close()


@on_both_loops
async def test_a_lane_with_a_certificate_on_each_side_carries_streams(pki: Pki) -> None:
    async with two(pki.of_replica(asks=True), pki.of_router(pki.router)) as pair:
        await eventually(lambda: pair.ready)
        await pair.streams()
        transport = pair.router.lanes()[0]._transport
        assert transport is not None
        assert transport.get_extra_info("cipher")[1] == "TLSv1.3"
        assert pair.router.readiness().lanes == {}
        assert not pair.replica.refusals.counts


@on_both_loops
async def test_a_router_needs_no_certificate_where_none_is_asked_for(pki: Pki) -> None:
    async with two(pki.of_replica(), pki.of_router(), told=True) as pair:
        await eventually(lambda: pair.ready)
        await pair.streams()


@on_both_loops
async def test_a_router_without_a_certificate_is_refused_and_counted(
    pki: Pki, caplog: pytest.LogCaptureFixture
) -> None:
    async with two(pki.of_replica(asks=True), pki.of_router()) as pair:
        await pair.in_trouble("tls", "refused the lane (tls)")
        await eventually(lambda: pair.replica.refusals.counts["tls"] >= 2)
        assert "lane from 127.0.0.1 refused: it showed no certificate" in caplog.text
        assert "Traceback" not in caplog.text


@on_both_loops
async def test_a_routers_certificate_of_another_ca_is_refused(pki: Pki, caplog: pytest.LogCaptureFixture) -> None:
    async with two(pki.of_replica(asks=True), pki.of_router(pki.foreign)) as pair:
        await pair.in_trouble("tls", "refused the lane (tls)")
        assert "its certificate does not hold" in caplog.text


@on_both_loops
async def test_a_replicas_certificate_of_another_ca_is_refused(pki: Pki) -> None:
    async with two(pki.of_replica(pki.foreign), pki.of_router()) as pair:
        await pair.in_trouble("tls", "its certificate does not hold: unable to get local issuer certificate")
        await eventually(lambda: pair.replica.refusals.counts["tls"] >= 2)


@on_both_loops
async def test_a_certificate_that_has_run_out_is_refused(pki: Pki) -> None:
    async with two(pki.of_replica(pki.expired), pki.of_router()) as pair:
        await pair.in_trouble("tls", "certificate has expired")


@on_both_loops
async def test_names_are_looked_at_where_one_is_asked_for(pki: Pki) -> None:
    async with two(pki.of_replica(), pki.of_router(name="replica")) as pair:
        await eventually(lambda: pair.ready)
    async with two(pki.of_replica(), pki.of_router(name="somebody.else")) as pair:
        await pair.in_trouble("tls", "its certificate does not hold", "somebody.else")


@on_both_loops
async def test_a_router_with_tls_is_told_of_a_replica_without(pki: Pki, caplog: pytest.LogCaptureFixture) -> None:
    async with two(None, pki.of_router()) as pair:
        await pair.in_trouble("tls", "lane refused: it does not speak TLS")
        await eventually(lambda: pair.replica.refusals.counts["tls"] >= 1)
        assert "the router speaks TLS, and this replica has no engines.lane_tls_cert_file" in caplog.text


@on_both_loops
async def test_a_router_without_tls_knows_from_membership_that_the_replica_has_it(pki: Pki) -> None:
    async with two(pki.of_replica(), None, told=True) as pair:
        await pair.in_trouble("tls", "it speaks TLS, and this router has no lane.tls_ca_file")


@on_both_loops
async def test_a_router_without_tls_that_knows_nothing_does_not_hang(pki: Pki) -> None:
    async with two(pki.of_replica(), None, timeout_s=0.2) as pair:
        await pair.in_trouble("timeout", "said nothing", "lane.tls_ca_file")
        await eventually(lambda: pair.replica.refusals.counts["tls"] >= 1)


@on_both_loops
async def test_a_peer_that_never_shakes_hands_does_not_hold_up_a_router() -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        options = LaneOptions(reconnect_min_s=0.01, reconnect_max_s=0.05, connect_timeout_s=0.2)
        router = Replicas("test", SocketCarrier(_trusting_nobody()), options)
        router.listed({"a": ReplicaRecord("a", "127.0.0.1", mute.getsockname()[1], SECRET)})
        await eventually(lambda: router.troubles.counts["timeout"] >= 2)
        await router.close()


def _trusting_nobody() -> LaneTls:
    return LaneTls("router", TlsFiles())


@on_both_loops
async def test_who_speaks_no_lane_protocol_behind_tls_is_refused(pki: Pki) -> None:
    async with two(pki.of_replica(), pki.of_router()) as pair:
        await eventually(lambda: pair.ready)
        reader, writer = await asyncio.open_connection("127.0.0.1", pair.record.port, ssl=pki.of_router().context())
        writer.write(b"GET / HTTP/1.1\r\n\r\n")
        assert b"protocol" in await asyncio.wait_for(reader.read(), 10)
        assert pair.replica.refusals.counts["protocol"] == 1
        writer.close()
        assert pair.ready


@on_both_loops
async def test_handshakes_at_once_are_bounded(pki: Pki, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.lane_port.HANDSHAKES", 2)
    async with two(pki.of_replica(), None, told=True) as pair:
        mute = [await asyncio.open_connection("127.0.0.1", pair.record.port) for _ in range(3)]
        await eventually(lambda: pair.replica.refusals.counts["busy"] == 1)
        for _, writer in mute:
            writer.close()


@on_both_loops
async def test_a_replica_that_closes_ends_handshakes_under_way(pki: Pki) -> None:
    async with two(pki.of_replica(), None, told=True) as pair:
        reader, writer = await asyncio.open_connection("127.0.0.1", pair.record.port)
        await asyncio.wait_for(pair.replica.close(), 5)
        assert await _gone(reader)
        writer.close()


async def _gone(reader: asyncio.StreamReader) -> bool:
    try:
        return await asyncio.wait_for(reader.read(), 5) == b""
    except ConnectionError:
        return True


class TestRotation:
    """New connections use the files as they are now."""

    @pytest.fixture
    def mine(self, tmp_path: Path) -> Pki:
        return Pki(tmp_path)

    async def test_a_new_certificate_is_shown_to_new_lanes_and_old_ones_stay(self, mine: Pki) -> None:
        serving = mine.of_replica(asks=True)
        async with two(serving, mine.of_router(mine.router)) as pair:
            await eventually(lambda: pair.ready)
            lane = pair.router.lanes()[0]
            first = _shown(lane._transport)
            mine.authority.issue("replica")
            second = Replicas("second", SocketCarrier(mine.of_router(mine.router)), pair.router.options)
            second.listed({"a": pair.record})
            await eventually(lambda: len(second.lanes()) == 1)
            assert _shown(second.lanes()[0]._transport) != first
            assert pair.router.lanes()[0] is lane
            await pair.streams()
            await second.close()

    async def test_a_replaced_ca_moves_both_sides(self, mine: Pki) -> None:
        serving, asking = mine.of_replica(asks=True), mine.of_router(mine.router)
        async with two(serving, asking) as pair:
            await eventually(lambda: pair.ready)
            new = Authority(Path(mine.authority.ca).parent)
            new.issue("replica")
            new.issue("router")
            pair.router.lanes()[0].close()
            await eventually(lambda: pair.ready)
            await pair.streams()

    def test_files_that_do_not_fit_together_change_nothing(self, mine: Pki, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level("INFO")
        serving = mine.of_replica()
        good, key = serving.context(), Path(mine.replica.key)
        old = key.read_bytes()
        key.write_bytes(Path(mine.router.key).read_bytes())
        assert serving.context() is good
        assert serving.context() is good
        assert caplog.text.count("the new files are not used") == 1, "it is said once"
        assert old.decode() not in caplog.text
        key.write_bytes(old)
        assert serving.context() is not good

    def test_files_that_are_gone_change_nothing(self, mine: Pki) -> None:
        serving = mine.of_replica()
        good = serving.context()
        Path(mine.replica.cert).unlink()
        assert serving.context() is good


def _shown(transport: asyncio.Transport | None) -> bytes:
    assert transport is not None
    shown: bytes = transport.get_extra_info("ssl_object").getpeercert(binary_form=True)
    return shown


@pytest.mark.parametrize(
    ("files", "text"),
    [
        (lambda pki: TlsFiles("/absent.pem", pki.router.key, pki.authority.ca), "lane.tls_cert_file: cannot read"),
        (lambda pki: TlsFiles(pki.router.cert, "/absent.key", pki.authority.ca), "lane.tls_key_file: cannot read"),
        (lambda pki: TlsFiles("", "", "/absent.pem"), "lane.tls_ca_file: cannot read"),
        (lambda pki: TlsFiles(pki.router.cert, pki.replica.key, pki.authority.ca), "key values mismatch"),
        (lambda pki: TlsFiles(pki.router.key, pki.router.key, pki.authority.ca), "no certificate chain with its key"),
        (lambda pki: TlsFiles("", "", pki.router.key), "lane.tls_ca_file: .* holds no certificate"),
        (lambda pki: TlsFiles("", "", str(Path(pki.router.key).parent)), "lane.tls_ca_file: cannot read"),
    ],
)
def test_files_that_cannot_be_used_are_refused_by_their_option(
    pki: Pki, files: Callable[[Pki], TlsFiles], text: str
) -> None:
    with pytest.raises(ConfigError, match=text):
        LaneTls("router", files(pki))


@pytest.mark.parametrize("error", [ssl.SSLError("?"), ConnectionResetError(104, "reset"), TimeoutError()])
def test_whatever_fails_is_one_line(error: Exception) -> None:
    assert lane_tls.explain(error).strip()
    assert "\n" not in lane_tls.explain(error)
