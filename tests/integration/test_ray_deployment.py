"""Engine replicas in real Ray Serve, with the simulated engine: deploy, lanes, loss, redeploy, removal."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable, Iterator, Mapping

import msgspec
import pytest

from engine import deployment
from engine.actor_lane import ActorPipes
from router import ray_private
from router.errors import ConfigError
from router.lane import frames, pipes
from router.lane.actor import ActorCarrier
from router.lane.carriers import Carrier, SocketCarrier
from router.membership.base import ReplicaRecord
from router.membership.ray import RayMembership
from router.options import Config, EngineOptions, MembershipOptions
from tests.integration.ray_local import DEADLINE_S, NAMESPACE, alive, cluster, running, until, wait_until

pytestmark = [pytest.mark.ray, pytest.mark.slow]

ENGINE = EngineOptions(
    name="sim",
    kind="sim",
    replicas=2,
    num_cpus=0.1,
    lane_host="127.0.0.1",
    drain_timeout_s=5.0,
    health_check_period_s=0.5,
)
APPLICATION = "kvlane-sim"
CONFIG = Config(membership=MembershipOptions(ray_namespace=NAMESPACE), engines=(ENGINE,))
CARRIERS: dict[str, Callable[[], Carrier]] = {"socket": SocketCarrier, "actor": ActorCarrier}


@pytest.fixture(scope="module", autouse=True)
def replicas() -> Iterator[None]:
    """A cluster with two replicas."""
    with cluster():
        deployment.deploy(CONFIG)
        wait_until(
            lambda: deployment.statuses().get(APPLICATION) == ("RUNNING", 2, ""), "two replicas of the engine run"
        )
        yield


class Members:
    """The replicas that membership reports, and how few there ever were."""

    def __init__(self) -> None:
        self.now: Mapping[str, ReplicaRecord] = {}
        self.fewest = 1000

    def __call__(self, members: Mapping[str, ReplicaRecord]) -> None:
        self.now = dict(members)
        self.fewest = min(self.fewest, len(members))


@pytest.fixture
async def members() -> AsyncIterator[Members]:
    seen = Members()
    async with running(asyncio.create_task(RayMembership(CONFIG.membership).run(seen))):
        await until(lambda: len(seen.now) == 2, "both replicas are reported")
        seen.fewest = 2
        yield seen


class Lane(asyncio.Protocol):
    """A router's lane reduced to frames."""

    def __init__(self, secret: bytes) -> None:
        self.secret = secret
        self.received: asyncio.Queue[frames.DownFrame | None] = asyncio.Queue()
        self._splitter = frames.FrameSplitter(frames.MAX_FRAME_BYTES)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: asyncio.Transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        for body in self._splitter.feed(data):
            frame = frames.decode_down(body)
            if isinstance(frame, frames.Challenge):
                proof = frames.prove(self.secret, frame.nonce, "test")
                self.send(frames.Hello(frames.VERSION, proof, "test"))
            else:
                self.received.put_nowait(frame)

    def connection_lost(self, exc: Exception | None) -> None:
        self.received.put_nowait(None)

    def send(self, frame: frames.Frame) -> None:
        self.transport.write(frames.encode(frame))

    async def next(self, kind: type[frames.DownFrame] | None) -> frames.DownFrame | None:
        """The next frame of that kind, or with None the end; what comes before it is skipped."""
        async with asyncio.timeout(DEADLINE_S):
            while True:
                frame = await self.received.get()
                if kind is None and frame is None:
                    return None
                assert frame is not None, "the lane ended"
                if kind is not None and isinstance(frame, kind):
                    return frame


async def open_lane(record: ReplicaRecord, carrier: Carrier, secret: bytes | None = None) -> Lane:
    lane = Lane(record.secret if secret is None else secret)
    await asyncio.wait_for(carrier.connect(record, lambda: lane), DEADLINE_S)
    return lane


def pid_of(actor: object) -> int:
    """Runs inside a replica's actor."""
    return os.getpid()


def fail_engine(actor: object, replica: str) -> None:
    """Runs inside a replica's actor, whose sessions lead to the replica."""
    hosted = pipes.HOSTED[replica]
    assert isinstance(hosted, ActorPipes)
    engine = hosted.session.__self__.engine  # type: ignore[attr-defined]
    hosted.home.call_soon_threadsafe(engine.fail)


async def test_the_directory_lists_both_replicas_with_address_secret_and_actor(members: Members) -> None:
    for name, record in members.now.items():
        assert name.startswith("sim-")
        assert (record.host, record.application, len(record.secret)) == ("127.0.0.1", APPLICATION, 32)
    one, two = members.now.values()
    assert one.port != two.port
    assert one.secret != two.secret
    pids = [await ray_private.call(record.actor, pid_of) for record in (one, two)]
    assert pids[0] != pids[1]
    assert all(map(alive, pids))


@pytest.mark.parametrize("carrier", CARRIERS)
async def test_a_lane_opens_and_answers_pings(members: Members, carrier: str) -> None:
    for record in members.now.values():
        lane = await open_lane(record, CARRIERS[carrier]())
        welcome = await lane.next(frames.Welcome)
        assert isinstance(welcome, frames.Welcome)
        assert (welcome.replica, welcome.info.kind, welcome.info.models[0].name) == (record.replica, "sim", "sim")
        for nonce in range(5):
            lane.send(frames.Ping(nonce))
            assert await lane.next(frames.Pong) == frames.Pong(nonce)
        lane.transport.close()
        await lane.next(None)


@pytest.mark.parametrize("carrier", CARRIERS)
async def test_a_router_without_the_secret_gets_no_lane(members: Members, carrier: str) -> None:
    record = next(iter(members.now.values()))
    lane = await open_lane(record, CARRIERS[carrier](), secret=b"guessed")
    refused = await lane.next(frames.Refused)
    assert isinstance(refused, frames.Refused)
    assert refused.code == "secret"
    await lane.next(None)


@pytest.mark.parametrize("carrier", CARRIERS)
async def test_a_killed_replica_loses_its_lanes_and_is_replaced(members: Members, carrier: str) -> None:
    killed = next(iter(members.now.values()))
    lane = await open_lane(killed, CARRIERS[carrier]())
    await lane.next(frames.Welcome)
    os.kill(await ray_private.call(killed.actor, pid_of), signal.SIGKILL)
    await lane.next(None)
    await until(lambda: killed.replica not in members.now, "the dead replica is not listed any more")
    await until(lambda: len(members.now) == 2, "Serve's replacement is listed")


async def test_a_replica_whose_engine_died_is_replaced(members: Members) -> None:
    sick = next(iter(members.now.values()))
    pid = await ray_private.call(sick.actor, pid_of)
    await ray_private.call(sick.actor, fail_engine, sick.replica)
    await until(lambda: not alive(pid), "Serve ended the replica")
    await until(lambda: len(members.now) == 2 and sick.replica not in members.now, "its replacement is listed")


@pytest.mark.parametrize("carrier", CARRIERS)
async def test_a_redeploy_lists_the_new_replicas_first_and_drains_the_old_ones(members: Members, carrier: str) -> None:
    old = members.now
    lanes = [await open_lane(record, CARRIERS[carrier]()) for record in old.values()]
    for lane in lanes:
        await lane.next(frames.Welcome)
    # A replica that is listed and that Serve does not call ready yet would be stopped at once.
    await until(lambda: deployment.statuses()[APPLICATION] == ("RUNNING", 2, ""), "Serve calls both ready")
    changed = msgspec.structs.replace(ENGINE, env={"KVLANE_TEST_VERSION": carrier})
    await asyncio.to_thread(deployment.deploy, msgspec.structs.replace(CONFIG, engines=(changed,)))
    for lane in lanes:
        assert await lane.next(frames.Draining) == frames.Draining(ENGINE.drain_timeout_s)
        await lane.next(None)
    await until(lambda: len(members.now) == 2 and not set(members.now) & set(old), "only the new ones are listed")
    assert members.fewest == 2


async def test_a_config_that_contradicts_itself_changes_nothing(members: Members) -> None:
    before = members.now
    twice = msgspec.structs.replace(CONFIG, engines=(ENGINE, ENGINE))
    with pytest.raises(ConfigError, match="one name"):
        deployment.deploy(twice)
    assert deployment.statuses()[APPLICATION].ready == 2
    assert members.now == before


async def test_unknown_engine_arguments_are_refused_before_anything_is_deployed(members: Members) -> None:
    broken = msgspec.structs.replace(ENGINE, name="broken", args={"step_bas_ms": 1})
    with pytest.raises(ConfigError, match="step_base_ms"):
        deployment.deploy(msgspec.structs.replace(CONFIG, engines=(broken,)))
    assert "kvlane-broken" not in deployment.statuses()


async def test_an_engine_that_does_not_start_is_reported_with_its_reason(members: Members) -> None:
    # An address that is not this machine's: nothing tells so before the replica starts.
    broken = msgspec.structs.replace(ENGINE, name="broken", replicas=1, lane_host="203.0.113.1")
    await asyncio.to_thread(deployment.deploy, msgspec.structs.replace(CONFIG, engines=(broken,)))
    status = deployment.statuses
    async with asyncio.timeout(DEADLINE_S):
        while (state := (await asyncio.to_thread(status))["kvlane-broken"]).status != "DEPLOY_FAILED":
            await asyncio.sleep(0.2)
    assert state.ready == 0
    assert "203.0.113.1" in state.message
    await asyncio.to_thread(deployment.undeploy, ["broken"])
    assert "kvlane-broken" not in deployment.statuses()


async def test_an_engine_that_is_removed_leaves_neither_entry_nor_process(members: Members) -> None:
    pids = [await ray_private.call(record.actor, pid_of) for record in members.now.values()]
    await asyncio.to_thread(deployment.undeploy, ["sim"])
    assert APPLICATION not in deployment.statuses()
    await until(lambda: not members.now, "no replica is listed")
    await until(lambda: not any(map(alive, pids)), "the replicas' processes have ended")
