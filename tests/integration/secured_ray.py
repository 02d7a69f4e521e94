"""Run as a program in a process that Ray's token and certificates are set for: engines on a secured cluster, and a lane
to them by each carrier. Arguments: the cluster's address, the lanes' CA, and the lanes' certificates; prints JSON.
"""

from __future__ import annotations

import asyncio
import base64
import json
import sys
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path

import ray

from router.lane.actor import ActorCarrier
from router.lane.carriers import Carrier, SocketCarrier
from router.lane.tls import LaneTls, TlsFiles
from router.membership.base import ReplicaRecord
from router.membership.ray import RayMembership
from router.options import Config, EngineOptions, LaneOptions, MembershipOptions
from router.replicas import Replicas
from tests.fakes import RecordingSink
from tests.integration.ray_local import NAMESPACE, running, until
from tests.integration.serving import FAST, MODEL, completion, deployed, within_deadline

LANE_PORT = 7100


def settings(address: str, ca: str, cert: str, key: str) -> Config:
    """One simulated replica whose lanes want certificates."""
    engine = EngineOptions(
        name=MODEL,
        kind="sim",
        args=FAST,
        num_cpus=0.1,
        lane_port=LANE_PORT,
        lane_tls_cert_file=cert,
        lane_tls_key_file=key,
        lane_tls_ca_file=ca,
    )
    return Config(membership=MembershipOptions(ray_address=address, ray_namespace=NAMESPACE), engines=(engine,))


async def ask(config: Config, ca: str, cert: str, key: str) -> dict[str, object]:
    """One stream by each carrier; what there is to be known of the replica."""
    found: dict[str, object] = {}
    records: dict[str, ReplicaRecord] = {}
    carriers: dict[str, Carrier] = {
        "socket": SocketCarrier(LaneTls("router", TlsFiles(cert, key, ca))),
        "actor": ActorCarrier(),
        "stranger": SocketCarrier(LaneTls("router", TlsFiles(ca=ca))),
        "plain": SocketCarrier(),
    }
    for name, carrier in carriers.items():
        router = Replicas("test", carrier, LaneOptions(connect_timeout_s=30.0))
        membership = RayMembership(config.membership).run(partial(_listed, router, records))
        async with running(asyncio.create_task(membership)):
            found[name] = await (_refusal(router) if name in ("stranger", "plain") else _tokens(router))
            await router.close()
    (record,) = records.values()
    found |= {"port": record.port, "tls": record.tls, "leaks": leaks([record.secret], _logs())}
    return found


def _listed(router: Replicas, records: dict[str, ReplicaRecord], members: Mapping[str, ReplicaRecord]) -> None:
    records.update(members)
    router.listed(members)


async def _tokens(router: Replicas) -> int:
    """How many came of five that were asked for."""
    await until(lambda: len(router.lanes()) == 1, "there is a lane")
    sink = RecordingSink()
    (lane,) = router.lanes()
    with lane.lease():
        await within_deadline(lane.run(completion(5), sink))
    return sink.tokens


async def _refusal(router: Replicas) -> str:
    await until(lambda: router.readiness().lanes, "the lane is refused")
    (text,) = router.readiness().lanes.values()
    return text


def _logs() -> Iterable[Path]:
    session = ray._private.worker._global_node.get_session_dir_path()
    return [path for path in Path(session, "logs").rglob("*") if path.is_file()]


def leaks(secrets: Iterable[bytes], files: Iterable[Path]) -> list[str]:
    """The files that hold a secret as it is, in hexadecimal, in base 64, or as Python writes it."""
    forms = [
        form
        for secret in secrets
        for form in (secret, secret.hex().encode(), base64.b64encode(secret), repr(secret)[2:-1].encode())
    ]
    return [str(path) for path in files if any(form in path.read_bytes() for form in forms)]


def main() -> None:
    address, ca, replica_cert, replica_key, router_cert, router_key = sys.argv[1:]
    config = settings(address, ca, replica_cert, replica_key)
    with deployed(config):
        found = asyncio.run(ask(config, ca, router_cert, router_key))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
