"""The Ray Serve deployment: each engine is an application, each replica an actor with an engine and a lane server.

Job: describe the replicas to Serve (resources, health, drain), and be the class that Serve runs. Rule: Serve owns every
replica's life; nothing here starts, counts or restarts them. `EngineReplica` owns what one of them is made of.
"""

from __future__ import annotations

import hashlib
import inspect
import logging
import secrets
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec
import ray
from ray import serve
from ray.serve.schema import ApplicationStatus
from ray.util.metrics import Counter

from engine.actor_lane import ActorPipes
from engine.base import Engine
from engine.held import HeldInRouters
from engine.registration import Registration
from engine.replica import Replica
from engine.serve_autoscaling import autoscaling_config
from router import ray_private
from router.errors import ConfigError
from router.lane.tls import LaneTls, TlsFiles
from router.membership.base import DEPLOYMENT, ReplicaRecord, application_name
from router.membership.directory_client import join
from router.options import Config, EngineOptions

log = logging.getLogger(__name__)

SHUTDOWN_MARGIN_S: Final = 15.0
"""What a replica gets after its drain to close its engine."""
DRAIN_POLL_S: Final = 0.1
"""How long Serve waits before it calls the destructor; its default of 2 s would only delay the drain."""
HEALTH_TIMEOUT_S: Final = 10.0
CONSTRUCTOR_TRIES: Final = 3
"""A model that does not load three times will not load; Serve's default of 20 hides that for long."""
MAX_CALLS: Final = 1000
"""Ray's own default for concurrent calls. Requests come by lanes, which Serve does not count."""
EVERY_ADDRESS: Final = ("0.0.0.0", "::")


class EngineReplica:
    """What Serve runs: one engine, its lane server, and its entry in the directory."""

    async def __init__(self, options: EngineOptions, namespace: str) -> None:  # type: ignore[misc]
        """Serve awaits it. Raises what the engine raises where it does not start."""
        log_to_stderr()
        self._options = options
        replica_id = serve.get_replica_context().replica_id
        self._name = f"{options.name}-{replica_id.unique_id}"
        secret = secrets.token_bytes(32)
        tls = lane_tls(options)
        self._replica = Replica(self._name, make_engine(options), secret, refused=_count_refusals(self._name))
        if options.sleep_after_s:
            self._replica.sleep_when_idle(options.sleep_after_s, options.sleep_level)
        self._held = HeldInRouters()
        await self._replica.start()
        node = ray.util.get_node_ip_address()
        host = options.lane_host or node
        port = await self._replica.listen(host, options.lane_port, tls)
        self._pipes = ActorPipes(self._name, self._replica.session)
        self._pipes.open()
        self._registration = Registration(
            ReplicaRecord(
                self._name,
                node if host in EVERY_ADDRESS else host,
                port,
                secret,
                replica_id.deployment_id.app_name,
                ray.get_runtime_context().current_actor,
                tls is not None,
            ),
            namespace,
        )
        await self._registration.enter()

    async def check_health(self) -> None:
        """Serve asks every `health_check_period_s`; raises `ReplicaFailed` when the engine is dead."""
        await self._replica.check_health()

    def record_autoscaling_stats(self) -> dict[str, float]:
        """The load that Serve cannot see, since requests come by lanes and wait in routers."""
        load, batch = self._replica.load(), self._replica.engine.info().max_num_seqs
        told = {"running": float(load.running), "waiting": float(load.waiting), "batch": float(batch)}
        return told | {"asleep": float(load.asleep)} | self._held.stats(time.monotonic())

    async def __call__(self, router: str = "", held: int = 0) -> str:
        """For a plain call on the deployment's handle, which wakes an application that has no replica.

        Where there is one, that router tells it how many requests it holds. Returns the replica's name.
        """
        self._held.tell(router, held, time.monotonic())
        return self._name

    async def __del__(self) -> None:
        """Serve awaits it before it ends the process.

        The replica stays listed while its streams end: its lanes say that it drains, and a router that is still to open
        a lane hears the same in the welcome.
        """
        log.info("replica %s drains", self._name)
        cut = await self._replica.drain(self._options.drain_timeout_s)
        log.info("replica %s has drained, %d streams cut", self._name, cut)
        await self._registration.leave()
        self._pipes.close()
        await self._replica.close()


class ApplicationState(NamedTuple):
    """How far an engine's application is."""

    status: str
    """Serve's word: ``DEPLOYING``, ``RUNNING``, ``DEPLOY_FAILED``, ``UNHEALTHY``, ``DELETING`` …"""
    ready: int
    """Replicas that run."""
    message: str
    """Why it is so, several lines where a replica failed to start; empty while all is well."""


def build_application(options: EngineOptions, *, namespace: str, anew: bool = False) -> serve.Application:
    """The Serve application of one engine; `namespace` is the directory's. Raises `ConfigError`.

    Replicas are replaced where what they are made of has changed, and with `anew` in any case.
    """
    engine_args(options)
    deployment = serve.deployment(
        EngineReplica,
        name=DEPLOYMENT,
        max_ongoing_requests=MAX_CALLS,
        max_constructor_retry_count=CONSTRUCTOR_TRIES,
        graceful_shutdown_wait_loop_s=DRAIN_POLL_S,
        graceful_shutdown_timeout_s=options.drain_timeout_s + SHUTDOWN_MARGIN_S,
        health_check_period_s=options.health_check_period_s,
        health_check_timeout_s=HEALTH_TIMEOUT_S,
        **_count(options),
        **resources(options),
        **_surge(options),
    )
    replica = msgspec.structs.replace(options, **_NOT_OF_REPLICAS)
    made_of = secrets.token_hex(8) if anew else _version(replica, namespace)
    return ray_private.with_version(deployment, made_of).bind(replica, namespace)


def deploy(config: Config) -> None:
    """Hands all engines to Serve, whose proxies stay off, and returns while they load; see `statuses`.

    Joins the running Ray cluster first. An engine whose options are those that run already is left alone, and one that
    only has another number of replicas or other autoscaling keeps its replicas. Raises `ConfigError` before anything is
    changed, and `ConnectionError` where no cluster runs.
    """
    ray_private.check_version()
    names = [options.name for options in config.engines]
    if len(set(names)) < len(names):
        raise ConfigError(f"two engines have one name: {', '.join(sorted(names))}", param="engines")
    _targets(config, {})
    join(config.membership)
    serve.start(proxy_location="Disabled")
    if targets := _targets(config, statuses()):
        serve.run_many(targets, wait_for_applications_running=False)


def _targets(config: Config, running: Mapping[str, ApplicationState]) -> list[serve.RunTarget]:
    """What Serve shall run. What failed there is tried again, though nothing about it has changed."""
    targets = []
    for options in config.engines:
        name = application_name(options.name)
        failed = name in running and running[name].status == "DEPLOY_FAILED"
        application = build_application(options, namespace=config.membership.ray_namespace, anew=failed)
        targets.append(serve.RunTarget(application, name=name, route_prefix=None))
    return targets


def statuses() -> dict[str, ApplicationState]:
    """The state of every engine's application, by the application's name. Blocks for one call to Serve."""
    found = {}
    for name, application in serve.status().applications.items():
        deployment = application.deployments.get(DEPLOYMENT)
        if name.startswith(application_name("")):
            ready = deployment.replica_states.get("RUNNING", 0) if deployment else 0
            message = (deployment.message if deployment else "") or application.message
            found[name] = ApplicationState(ApplicationStatus(application.status).value, ready, message)
    return found


def undeploy(names: Iterable[str]) -> None:
    """Removes the applications of these engines, side by side; returns when their replicas have drained and ended."""
    applications = [application_name(name) for name in names]
    with ThreadPoolExecutor(max(1, len(applications)), "undeploy") as threads:
        list(threads.map(serve.delete, applications))


def resources(options: EngineOptions) -> dict[str, Any]:
    """Serve's options for what one replica needs of the cluster.

    Without GPUs the replica and its workers are processes of one node. With GPUs and several workers each worker is an
    actor in a bundle of its own, and the first bundle is the replica's, which itself holds no GPU.
    """
    env = dict(options.env)
    actor: dict[str, Any] = {"runtime_env": {"env_vars": env}}
    workers = options.tensor_parallel_size
    if not _workers_are_actors(options):
        return {"ray_actor_options": {**actor, "num_cpus": options.num_cpus * workers, "num_gpus": options.num_gpus}}
    if options.num_gpus < 1:
        env.setdefault("VLLM_RAY_PER_WORKER_GPUS", str(options.num_gpus))
    bundles = [{"GPU": options.num_gpus} for _ in range(workers)]
    if options.num_cpus:
        bundles.insert(0, {"CPU": options.num_cpus})  # Ray refuses empty bundles.
    return {
        "ray_actor_options": {**actor, "num_cpus": options.num_cpus},
        "placement_group_bundles": bundles,
        # Near each other where that is possible; more workers than a node has GPUs are possible too.
        "placement_group_strategy": "PACK",
    }


def engine_args(options: EngineOptions) -> dict[str, Any]:
    """The engine's arguments, with those that follow from the resources. Raises `ConfigError` for a contradiction."""
    args = dict(options.args)
    workers = options.tensor_parallel_size
    if options.kind != "vllm":
        if workers > 1:
            raise ConfigError("only the engine vllm runs tensor-parallel", param="tensor_parallel_size")
        from engine.simulated import parse_options  # imported here so that vLLM's replicas do without it

        parse_options(args)
        return args
    if args.setdefault("tensor_parallel_size", workers) != workers:
        raise ConfigError(
            f"engine {options.name!r}: set tensor_parallel_size beside args, where its resources follow from it",
            param="tensor_parallel_size",
        )
    if _workers_are_actors(options):
        args.setdefault("distributed_executor_backend", "ray")
    if workers == 1:
        del args["tensor_parallel_size"]
    if options.sleep_after_s and options.num_gpus and args.setdefault("enable_sleep_mode", True) is not True:
        raise ConfigError(
            f"engine {options.name!r}: sleep_after_s needs vLLM's argument enable_sleep_mode, which args turn off",
            param="sleep_after_s",
        )
    return args


def make_engine(options: EngineOptions) -> Engine:
    """The engine that the options ask for, not started. Imports only that engine. Raises `ConfigError`."""
    name = options.served_model_name or options.name
    args = engine_args(options)
    if options.kind == "sim":
        from engine.simulated import SimulatedEngine

        return SimulatedEngine(args, name)
    from engine.vllm import VllmEngine

    return VllmEngine(options.model or _tiny_model(), name, args, fast_rendering=options.fast_rendering)


def lane_tls(options: EngineOptions) -> LaneTls | None:
    """TLS for the engine's lanes where its options ask for it. Raises `ConfigError` for files that cannot be used."""
    if not options.lane_tls_cert_file:
        return None
    files = TlsFiles(
        options.lane_tls_cert_file, options.lane_tls_key_file, options.lane_tls_ca_file, "engines.lane_tls_"
    )
    return LaneTls("replica", files)


def _count_refusals(replica: str) -> Callable[[str], None]:
    """Counts refused lanes in a metric that each Ray node's own endpoint shows."""
    counter = Counter("kvlane_lanes_refused", "Lanes that a replica refused, by cause.", tag_keys=("replica", "code"))
    return lambda code: counter.inc(tags={"replica": replica, "code": code})


def log_to_stderr() -> None:
    """Ray keeps what a replica writes to stderr, and sets up no logging but its own."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    for package in ("engine", "router"):
        logger = logging.getLogger(package)
        if not logger.handlers:
            logger.addHandler(handler)
            logger.setLevel(logging.INFO)


_NOT_OF_REPLICAS: Final[dict[str, Any]] = {
    name: getattr(EngineOptions(), name)
    for name in ("replicas", "autoscaling", "required", "surge", "health_check_period_s")
}
"""Options that Serve or routers use and replicas do not, with their defaults."""


def _version(replica: EngineOptions, namespace: str) -> str:
    """Changes with what a replica is made of. Serve itself watches over the resources."""
    made_of = msgspec.json.encode([msgspec.to_builtins(replica), namespace, version("kvlane")], order="deterministic")
    return hashlib.sha256(made_of).hexdigest()[:16]


def _count(options: EngineOptions) -> dict[str, Any]:
    if options.autoscaling is None:
        return {"num_replicas": options.replicas}
    return {"autoscaling_config": autoscaling_config(options)}


def _surge(options: EngineOptions) -> dict[str, Any]:
    """On a redeploy one replica more than wanted, so that each old one stays until a new one is ready.

    Serve's default, and the only way in older versions, is to stop an old replica while its successor loads: there is
    one ready replica less meanwhile. With GPUs it stays so unless the options say otherwise, since a cluster seldom has
    spare ones, and the new replica would wait for ever.
    """
    known = "max_surge_percent" in inspect.signature(serve.deployment).parameters
    wanted = options.surge == "always" or (options.surge == "auto" and not options.num_gpus)
    return {"max_surge_percent": 1} if known and wanted else {}


def _workers_are_actors(options: EngineOptions) -> bool:
    return options.tensor_parallel_size > 1 and options.num_gpus > 0


def _tiny_model() -> str:
    from engine.tiny_model import make_tiny_model

    return str(make_tiny_model(Path(tempfile.gettempdir()) / "kvlane"))
