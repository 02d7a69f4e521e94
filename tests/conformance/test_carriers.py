"""What every carrier must do, against the same replicas in a real Ray Serve."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterator, Mapping

import msgspec
import pytest

from loadtests.certificates import Authority
from router.errors import ClientTooSlow, ReplicaLost
from router.lane.actor import ActorCarrier
from router.lane.carriers import Carrier, SocketCarrier
from router.lane.client import Lane
from router.lane.tls import LaneTls, TlsFiles
from router.membership.base import ReplicaRecord
from router.membership.ray import RayMembership
from router.options import Config, LaneOptions
from router.replicas import Replicas
from tests.fakes import RecordingSink
from tests.integration.ray_local import DEADLINE_S, cluster, running, until
from tests.integration.serving import MODEL, completion, config, deployed, within_deadline

pytestmark = [pytest.mark.ray, pytest.mark.slow]

CARRIERS = ("socket", "socket with TLS", "actor")


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with cluster() as gcs_address:
        yield gcs_address


@pytest.fixture(scope="module")
def fleet(address: str) -> Iterator[Config]:
    settings = config(address, max_num_seqs=1024, kv_blocks=200_000)
    with deployed(settings):
        yield settings


@pytest.fixture(scope="module")
def secured_fleet(address: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Config]:
    """The same with certificates on both sides, and a directory of its own."""
    authority = Authority(tmp_path_factory.mktemp("tls"))
    settings = config(address, max_num_seqs=1024, kv_blocks=200_000)
    (cert, key), replace = authority.issue("replica"), msgspec.structs.replace
    (engine,) = settings.engines
    tls = {"lane_tls_cert_file": cert, "lane_tls_key_file": key, "lane_tls_ca_file": authority.ca}
    engine = replace(engine, name="secured", served_model_name=MODEL, lane_port=7100, **tls)
    cert, key = authority.issue("router")
    settings = replace(
        settings,
        membership=replace(settings.membership, ray_namespace="kvlane-test-tls"),
        lane=LaneOptions(tls_ca_file=authority.ca, tls_cert_file=cert, tls_key_file=key),
        engines=(engine,),
    )
    with deployed(settings):
        yield settings


def carrier_of(name: str, settings: Config) -> Carrier:
    if name == "actor":
        return ActorCarrier()
    lane = settings.lane
    files = TlsFiles(lane.tls_cert_file, lane.tls_key_file, lane.tls_ca_file)
    return SocketCarrier(LaneTls("router", files) if lane.tls_ca_file else None)


class Joined:
    """A router's replicas without ingress or policy."""

    def __init__(self, carrier: str, settings: Config) -> None:
        self.settings = settings
        self.router = Replicas("test", carrier_of(carrier, settings), LaneOptions(connect_timeout_s=30.0))
        self.records: Mapping[str, ReplicaRecord] = {}

    def listed(self, records: Mapping[str, ReplicaRecord]) -> None:
        self.records = records
        self.router.listed(records)

    @property
    def lanes(self) -> list[Lane]:
        return sorted(self.router.lanes(), key=lambda lane: lane.replica)


@pytest.fixture(params=CARRIERS)
async def joined(request: pytest.FixtureRequest) -> AsyncIterator[Joined]:
    settings: Config = request.getfixturevalue("secured_fleet" if "TLS" in request.param else "fleet")
    joined = Joined(request.param, settings)
    membership = asyncio.create_task(RayMembership(settings.membership).run(joined.listed))
    async with running(membership):
        await until(lambda: len(joined.lanes) == 2, "a lane to each replica")
        try:
            yield joined
        finally:
            await joined.router.close()


async def run(lane: Lane, sink: RecordingSink, tokens: int, prompt: str = "hello") -> None:
    with lane.lease():
        await lane.run(completion(tokens, prompt), sink)


async def test_a_lane_opens_with_the_replicas_own_account_of_itself(joined: Joined) -> None:
    for lane in joined.lanes:
        assert lane.welcome is not None
        assert (lane.welcome.replica, lane.welcome.info.kind) == (lane.replica, "sim")
        assert [card.name for card in lane.welcome.info.models] == [MODEL]


async def test_a_stream_arrives_whole_and_in_order(joined: Joined) -> None:
    answers = []
    for lane in joined.lanes:
        sink = RecordingSink()
        await within_deadline(run(lane, sink, 40))
        assert sink.heads[0][0] == 200
        assert sink.tokens == 40
        events = b"".join(sink.payloads).split(b"\n\n")
        assert events[-2:] == [b"data: [DONE]", b""]
        texts = [
            msgspec.json.decode(event[6:])["choices"][0]["text"] for event in events[:-2] if b'"choices":[{' in event
        ]
        answers.append("".join(texts))
    assert answers[0] == answers[1]


async def test_all_output_of_a_step_shares_a_frame(joined: Joined) -> None:
    (lane, _) = joined.lanes
    before = lane.steps
    sinks = [RecordingSink() for _ in range(20)]
    await within_deadline(asyncio.gather(*(run(lane, sink, 50) for sink in sinks)))
    assert sum(sink.tokens for sink in sinks) == 1000
    assert lane.steps - before < 500  # about 50 steps; more where the machine was too busy to keep them together


async def test_an_abort_reaches_the_engine_and_no_other_stream(joined: Joined) -> None:
    (lane, _) = joined.lanes
    gone, kept = RecordingSink(), RecordingSink()
    aborted = asyncio.create_task(run(lane, gone, 30_000))
    going_on = asyncio.create_task(run(lane, kept, 300))
    await within_deadline(gone.got_data.wait())
    aborted.cancel()
    await asyncio.wait([aborted])
    await within_deadline(going_on)
    assert kept.tokens == 300
    await until(lambda: lane.account.load.running + lane.account.load.waiting == 0, "the engine is idle")
    assert (lane.streams, lane.account.view().leases) == (0, 0)


async def test_a_sink_that_fails_ends_its_own_stream_only(joined: Joined) -> None:
    (lane, _) = joined.lanes
    bad, good = RecordingSink(), RecordingSink()
    bad.error = ClientTooSlow("not read")
    failing = asyncio.create_task(run(lane, bad, 30_000))
    await within_deadline(run(lane, good, 100))
    with pytest.raises(ClientTooSlow):
        await within_deadline(failing)
    assert good.tokens == 100
    await until(lambda: lane.account.load.running + lane.account.load.waiting == 0, "the engine is idle")


async def test_large_bodies_go_up_whole(joined: Joined) -> None:
    (lane, _) = joined.lanes
    sink = RecordingSink()
    await within_deadline(run(lane, sink, 1, prompt="long " * 2_000_000))
    status, _ = sink.heads[0]
    assert status == 400, "the engine read all of it and found it too long"
    assert b"context length" in b"".join(sink.payloads) or b"maximum" in b"".join(sink.payloads)


async def test_a_wrong_secret_is_refused(joined: Joined, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    (name, record), *_ = joined.records.items()
    intruder = Replicas("intruder", joined.router.carrier, LaneOptions())
    intruder.listed({name: msgspec.structs.replace(record, secret=os.urandom(32))})
    await until(lambda: "refused the lane (secret)" in caplog.text, "the replica refuses")
    assert intruder.lanes() == ()
    await intruder.close()
    assert len(joined.lanes) == 2


async def test_closing_a_lane_fails_its_streams_and_frees_the_engine(joined: Joined) -> None:
    (lane, other) = joined.lanes
    second = Replicas("second", joined.router.carrier, LaneOptions(connect_timeout_s=30.0))
    second.listed({name: record for name, record in joined.records.items() if name == lane.replica})
    await until(lambda: len(second.lanes()) == 1, "a second router's lane")
    sink = RecordingSink()
    task = asyncio.create_task(run(second.lanes()[0], sink, 30_000))
    await within_deadline(sink.got_data.wait())
    await until(lambda: lane.account.load.running == 1, "the first router sees the second's load")
    await second.close()
    with pytest.raises(ReplicaLost):
        await within_deadline(task)
    await until(lambda: lane.account.load.running + lane.account.load.waiting == 0, "the engine is idle")
    assert other.account.load.running == 0


async def test_a_silent_lane_is_kept_alive_by_pings(joined: Joined) -> None:
    (lane, _) = joined.lanes
    for _ in range(5):
        lane.tick(1.0, 2.5)
        lane.tick(1.0, 2.5)
        await until(lambda: lane._heard, "the replica answered the ping")
    assert lane in joined.lanes


@pytest.mark.timeout(2 * DEADLINE_S)
async def test_a_thousand_streams_run_to_their_end(joined: Joined) -> None:
    lanes = joined.lanes
    sinks = [RecordingSink() for _ in range(1000)]
    runs = [run(lanes[i % 2], sink, 20, prompt=f"stream {i}") for i, sink in enumerate(sinks)]
    await within_deadline(asyncio.gather(*runs))
    assert all(sink.tokens == 20 and sink.payloads[-1].endswith(b"data: [DONE]\n\n") for sink in sinks)
    assert all((lane.streams, lane.account.view().leases) == (0, 0) for lane in lanes)
