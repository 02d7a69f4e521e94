"""Who gets no lane is counted and logged on both sides, and secrets show nowhere; ports that firewalls can name."""

from __future__ import annotations

import asyncio
import base64
import copy
import logging
import os
import pickle
import socket
from collections.abc import Callable
from pathlib import Path

import httpx
import msgspec
import pytest

from engine.deployment import lane_tls
from engine.lane_port import LanePort
from engine.refusals import Refusals
from engine.replica import Replica
from router.app import App
from router.config import load
from router.errors import ConfigError
from router.lane import frames
from router.lane.client import Lane
from router.lane.troubles import KINDS
from router.membership.base import ReplicaRecord
from router.membership.directory import Listing
from router.options import (
    LANE_PORTS,
    AdminOptions,
    Config,
    EngineOptions,
    GrpcOptions,
    HttpOptions,
    LaneOptions,
    MembershipOptions,
    StaticReplica,
)
from tests.fakes import Fleet, ScriptedEngine, eventually, make_request

RECORD = ReplicaRecord("a", "10.0.0.1", 7100, b"0123456789 a secret", "kvlane-a")


def forms(secret: bytes) -> list[str]:
    """How a secret could show in text."""
    return [secret.hex(), base64.b64encode(secret).decode(), repr(secret)[2:-1], str(list(secret))]


class TestRecord:
    @pytest.mark.parametrize("show", [repr, str, "{}".format, lambda record: repr(Listing("e", 1, {"a": record}))])
    def test_it_shows_without_its_secret(self, show: Callable[[ReplicaRecord], str]) -> None:
        assert "10.0.0.1:7100" in show(RECORD)
        assert not any(form in show(RECORD) for form in forms(RECORD.secret))
        assert "secret" not in repr(RECORD.__rich_repr__())

    @pytest.mark.parametrize("tls", [False, True])
    def test_it_travels_whole(self, tls: bool) -> None:
        record = msgspec.structs.replace(RECORD, tls=tls)
        assert pickle.loads(pickle.dumps(record)) == record == copy.copy(record)

    def test_what_older_versions_do_not_know_is_left_out_where_it_is_the_default(self) -> None:
        _, values = RECORD.__reduce__()
        assert values == ("a", "10.0.0.1", 7100, RECORD.secret, "kvlane-a")


async def test_a_wrong_secret_is_counted_and_told_on_both_sides(caplog: pytest.LogCaptureFixture) -> None:
    fleet = Fleet()
    try:
        await fleet.add("a", secret=b"guessed")
        await eventually(lambda: fleet.router.troubles.counts["secret"] >= 2)
        assert fleet.replicas["a"].refusals.counts["secret"] >= 2
        assert "refused the lane (secret)" in fleet.router.readiness().lanes["a"]
        assert "lane from 127.0.0.1 refused: the router does not know this replica's secret" in caplog.text
        fleet.list({})
        await eventually(lambda: fleet.router.readiness().lanes == {})
    finally:
        await fleet.close()


@pytest.mark.parametrize(
    ("said", "code"),
    [
        (b"\x16\x03\x01\x02\x00" + b"x" * 512, "tls"),
        (frames.encode(frames.Ping(1)), "protocol"),
        (frames.encode(frames.Hello(frames.VERSION + 1, b"", "new")), "version"),
        (frames.encode(frames.Hello(frames.VERSION, b"", "nobody")), "secret"),
        (frames.encode(frames.Hello(frames.VERSION, b"x" * 32, "nobody")), "secret"),
    ],
)
async def test_whoever_knocks_without_the_secret_is_counted_by_cause(said: bytes, code: str) -> None:
    counted: list[str] = []
    replica = Replica("a", ScriptedEngine(), os.urandom(32), refused=counted.append)
    port = await replica.listen("127.0.0.1")
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(said)
    await asyncio.wait_for(reader.read(), 10)
    assert (counted, dict(replica.refusals.counts)) == ([code], {code: 1})
    writer.close()
    await replica.close()


async def test_whoever_says_nothing_is_counted_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.replica.HANDSHAKE_TIMEOUT_S", 0.05)
    replica = Replica("a", ScriptedEngine(), os.urandom(32))
    port = await replica.listen("127.0.0.1")
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    await eventually(lambda: replica.refusals.counts["silent"] == 1)
    writer.close()
    await replica.close()


def test_a_flood_of_refusals_is_one_line_a_second(caplog: pytest.LogCaptureFixture) -> None:
    now = 0.0
    refusals = Refusals("a", clock=lambda: now)
    for _ in range(1000):
        refusals.add("secret", ("10.0.0.9", 1), "no")
    refusals.add("tls", None, "no certificate")
    now = 1.5
    refusals.add("secret", ("10.0.0.9", 1), "no")
    assert [record.message for record in caplog.records] == [
        "replica a: lane from 10.0.0.9 refused: no",
        "replica a: lane from a router refused: no certificate",
        "replica a: lane from 10.0.0.9 refused: no (and 999 more since the last such line)",
    ]
    assert refusals.counts == {"secret": 1001, "tls": 1}


async def test_no_secret_shows_in_logs_metrics_or_debug_pages(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    right, wrong = os.urandom(32), os.urandom(32)
    (tmp_path / "right").write_bytes(right.hex().encode())
    (tmp_path / "wrong").write_bytes(wrong.hex().encode())
    replica = Replica("a", ScriptedEngine(), right.hex().encode())
    port = await replica.listen("127.0.0.1")
    known = tuple(StaticReplica(name=n, port=port, secret_file=str(tmp_path / n)) for n in ("right", "wrong"))
    config = Config(
        http=HttpOptions(port=0),
        grpc=GrpcOptions(enabled=False),
        lane=LaneOptions(reconnect_min_s=0.01, reconnect_max_s=0.05),
        membership=MembershipOptions(kind="static", replicas=known),
        admin=AdminOptions(enabled=True, port=0),
    )
    app = App(config)
    await app.start()
    try:
        await eventually(lambda: app.replicas.ready("m") and app.replicas.troubles.counts["secret"] >= 2)
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{app.admin_port}") as client:
            pages = [(await client.get(path)).text for path in ("/metrics", "/readyz", "/debug/routes")]
    finally:
        await app.stop(0)
        await replica.close()
    assert any('kvlane_lane_failures_total{kind="secret"} ' in page for page in pages)
    assert "refused the lane (secret)" in pages[1]
    text = "\n".join([*pages, caplog.text, repr(config), *map(repr, app.replicas._members.values())])
    for secret in (right.hex().encode(), wrong.hex().encode()):
        assert not any(form in text for form in (secret.decode(), *forms(secret)))


async def test_a_lane_that_this_side_closes_is_no_trouble() -> None:
    fleet = Fleet()
    await fleet.add("a")
    await fleet.until(lambda: fleet.ready() == 1)
    fleet.list({})
    await fleet.close()
    assert set(fleet.router.troubles.counts) == set(KINDS)
    assert not sum(fleet.router.troubles.counts.values())


async def test_a_replica_that_goes_away_unasked_is_counted_as_lost_then_unreachable() -> None:
    fleet = Fleet()
    await fleet.add("a")
    await fleet.until(lambda: fleet.ready() == 1)
    await fleet.replicas["a"].close()
    await eventually(lambda: fleet.router.troubles.counts["unreachable"] >= 1)
    assert fleet.router.troubles.counts["lost"] == 1
    assert "refused" in fleet.router.readiness().lanes["a"].lower()
    assert "127.0.0.1" not in fleet.router.readiness().lanes["a"], "whoever asks sees no address"
    await fleet.close()


async def test_a_lane_says_whether_it_heard_anything() -> None:
    class Nobody:
        def __getattr__(self, name: str) -> Callable[..., None]:
            return lambda *_: None

    lane = Lane("a", b"", "r", Nobody())  # type: ignore[arg-type]
    assert lane.silent
    lane.data_received(frames.encode(frames.Challenge(frames.VERSION, b"n")))
    assert not lane.silent
    with pytest.raises(Exception, match="no lane"):
        await lane.run(make_request(), object())  # type: ignore[arg-type]


class TestPorts:
    """`engines.lane_port`."""

    @staticmethod
    def port() -> LanePort:
        return LanePort(asyncio.Protocol, lambda code, peer, message: None)

    async def test_replicas_of_one_address_take_one_after_the_other(self) -> None:
        first = _row(3)
        ports = [self.port() for _ in range(3)]
        assert [await port.open("127.0.0.1", first) for port in ports] == [first, first + 1, first + 2]
        await ports[1].close()
        again = self.port()
        assert await again.open("127.0.0.1", first) == first + 1
        for port in (*ports, again):
            await port.close()

    async def test_none_that_is_free_is_said_with_the_range(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("engine.lane_port.LANE_PORTS", 2)
        first = _row(2)
        ports = [self.port() for _ in range(2)]
        for port in ports:
            await port.open("127.0.0.1", first)
        with pytest.raises(ConfigError, match=f"engines.lane_port: none of {first} to {first + 1} is free"):
            await self.port().open("127.0.0.1", first)
        for port in ports:
            await port.close()

    async def test_an_address_that_is_not_ours_is_no_matter_of_ports(self) -> None:
        with pytest.raises(OSError, match="assign"):
            await self.port().open("192.0.2.200", 7100)


def _row(count: int) -> int:
    """The first of so many ports in a row that are free now."""
    for first in range(20000, 30000, 100):
        socks = [socket.socket() for _ in range(count)]
        try:
            for offset, sock in enumerate(socks):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                sock.bind(("127.0.0.1", first + offset))
        except OSError:
            continue
        else:
            return first
        finally:
            for sock in socks:
                sock.close()
    raise AssertionError("no ports")


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("lane.tls_cert_file = 'c'\nlane.tls_key_file = 'k'", "lane.tls_ca_file: missing"),
        ("lane.tls_server_name = 'n'", "lane.tls_ca_file: missing"),
        ("lane = {tls_ca_file = 'a', tls_cert_file = 'c'}", "lane.tls_key_file: missing"),
        ("lane = {tls_ca_file = 'a', tls_key_file = 'k'}", "lane.tls_cert_file: missing"),
        ("lane = {tls_ca_file = 'a', carrier = 'actor'}", "lane.tls_ca_file: lane.carrier 'actor'"),
        ("engines = [{lane_tls_cert_file = 'c'}]", "engines.0.lane_tls_key_file: missing"),
        ("engines = [{lane_tls_ca_file = 'c'}]", "engines.0.lane_tls_cert_file: missing"),
        (f"engines = [{{lane_port = {65536 - LANE_PORTS + 1}}}]", "engines.0.lane_port"),
    ],
)
def test_options_that_do_not_go_together_are_refused(tmp_path: Path, text: str, field: str) -> None:
    path = tmp_path / "c.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(str(path), env={})
    assert caught.value.message.startswith(field)


def test_options_that_go_together_are_taken(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text(f"lane.tls_ca_file = 'a'\nengines = [{{lane_port = {65536 - LANE_PORTS}}}]")
    assert load(str(path), env={}).engines[0].lane_port == 65472


def test_an_engines_files_that_cannot_be_used_stop_its_replicas() -> None:
    assert lane_tls(EngineOptions()) is None
    with pytest.raises(ConfigError, match="cert_file: cannot read"):
        lane_tls(EngineOptions(lane_tls_cert_file="/absent", lane_tls_key_file="/absent"))


def test_a_routers_files_that_cannot_be_used_stop_its_start(tmp_path: Path) -> None:
    static = MembershipOptions(kind="static", replicas=(StaticReplica(name="a", port=1),))
    with pytest.raises(ConfigError, match="ca_file: cannot read"):
        App(Config(lane=LaneOptions(tls_ca_file=str(tmp_path / "absent")), membership=static))
