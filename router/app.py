"""The composition root: builds one router process out of its stages, starts it, and takes it down in order.

Rule: nobody else constructs stages. `App` owns every task and server of the process.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import socket
import time
from collections.abc import Awaitable, Callable, Collection, Sequence

import msgspec

from router.admission import Admission
from router.dispatch import Dispatcher
from router.errors import ConfigError
from router.files import Followed, follow
from router.hold import Hold
from router.ingress.admin import AdminPort
from router.ingress.gate import Gate
from router.ingress.grpc import GrpcIngress
from router.ingress.http import HttpIngress
from router.lane.carriers import Carrier, SocketCarrier
from router.lane.tls import LaneTls, TlsFiles
from router.load.model import FleetModel, ReplicaModel, new_fleet
from router.membership.base import Membership
from router.observe.metrics import Metrics
from router.observe.routes import RouteLog
from router.options import Config, EngineOptions, PolicyOptions
from router.policies import registry
from router.policies.base import Policy
from router.policies.guard import Guard
from router.policies.shadow import Shadow
from router.prefix.prefixes import Prefixes
from router.receipts import Explainer
from router.replicas import Replicas
from router.types import EngineInfo
from router.wake import NoWaker, Waker

log = logging.getLogger(__name__)


class Sockets(msgspec.Struct, frozen=True):
    """What a worker listens on, shared with its siblings: bound to the configured addresses, by slot."""

    http: Sequence[Sequence[socket.socket]] = ()
    grpc: Sequence[Sequence[socket.socket]] = ()
    admin: Sequence[socket.socket] = ()
    """Its own alone."""


class App:
    """One router process."""

    def __init__(
        self,
        config: Config,
        *,
        joined: Callable[[], None] = lambda: None,
        worker: int = 0,
        sockets: Sockets | None = None,
        page: Callable[[], Awaitable[tuple[bytes, str]]] | None = None,
    ) -> None:
        """`joined` is called once the process has joined Ray. One of several workers has its number, the `sockets`
        to listen on when `listen` says so, and `page` for the metrics of all of them.

        Raises `ConfigError` for what cannot be built.
        """
        self.config = config
        self.http_port = self.grpc_port = self.admin_port = 0
        self._sockets = sockets
        rng = random.Random()
        self._metrics = Metrics(worker=worker)
        self.figures = self._metrics.snapshot
        """This process's metrics."""
        self._page = page or self._metrics.exposition
        self._routes = RouteLog(config.admin.routes) if config.admin.enabled else None
        self.prefixes = Prefixes(config.prefix, time.monotonic)
        self._admission = Admission(config.limits.max_streams)
        self.replicas = Replicas(
            f"{socket.gethostname()}:{os.getpid()}",
            _carrier(config),
            config.lane,
            required=[model_name(engine) for engine in config.engines if engine.required],
            first_output=self._metrics.first_output,
            caches=self.prefixes,
            foresee=_Foresights().of,
            held=[model_name(engine) for engine in config.engines if may_be_held(config, engine)],
        )
        self._hold = Hold(
            config.hold,
            config.limits.no_replica_wait_s,
            self.replicas,
            time.monotonic,
            self._metrics,
            [model_name(engine) for engine in config.engines if may_scale_to_zero(engine)],
            _waker(config),
        )
        policy = registry.create(config.policy.name, config.policy.options, rng)
        self.dispatcher = Dispatcher(
            self._admission,
            _guarded(policy, config.policy, self._metrics),
            config.policy.name,
            self.prefixes,
            self.replicas,
            self._hold,
            config.limits,
            self._metrics,
            time.perf_counter,
            Explainer(
                getattr(policy, "explain", None),
                self._metrics.policies,
                time.perf_counter,
                config.policy.stall_ms * 1e-3,
                for_clients=config.policy.explain,
            ),
            self._routes.record if self._routes is not None else None,
        )
        self._membership = _membership(config, joined, self._metrics.membership_failed)
        self._metrics.watch(self._admission, self.replicas, self.prefixes, self._connections)
        self._metrics.watch_held(self._hold.queues)
        self._gate = Gate(config.auth.keys_file, self._metrics.security.key_refused) if config.auth.keys_file else None
        self._admin: AdminPort | None = None
        self._http: HttpIngress | None = None
        self._grpc: GrpcIngress | None = None
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Binds the ports, unless they are shared, and begins to follow membership.

        Raises `ConfigError` for a port that cannot be bound.
        """
        config, shared = self.config, self._sockets
        self._tasks = [
            asyncio.create_task(self._membership.run(self.replicas.listed), name="membership"),
            asyncio.create_task(self.replicas.keep_alive(), name="keep alive"),
            asyncio.create_task(self.replicas.sweep(), name="sweep"),
            asyncio.create_task(self._metrics.loop_lag.watch(), name="loop lag"),
        ]
        for task in self._tasks:
            task.add_done_callback(_report)
        try:
            if self._routes is not None:
                self._admin = AdminPort(config.admin, self.replicas, metrics=self._page, routes=self._routes.page)
                if shared is None:
                    self.admin_port = await self._admin.start()
            if config.http.enabled:
                self._http = HttpIngress(
                    config.http,
                    self.dispatcher,
                    self.replicas,
                    metrics=self._page,
                    refused=self._metrics.refused,
                    handshake_refused=self._metrics.security.handshake_refused,
                    gate=self._gate,
                )
                if shared is None:
                    self.http_port = await self._http.start()
            if config.grpc.enabled:
                self._grpc = GrpcIngress(
                    config.grpc,
                    self.dispatcher,
                    self.replicas,
                    reuse_port=shared is not None,
                    refused=self._metrics.refused,
                    handshake_refused=self._metrics.security.handshake_refused,
                    gate=self._gate,
                )
                self._tasks.append(asyncio.create_task(self._publish_readiness(self._grpc), name="readiness"))
                self._tasks[-1].add_done_callback(_report)
                if shared is None:
                    self.grpc_port = await self._grpc.start()
            if shared is not None:
                await self._listen(shared, ())  # So that what cannot be used is refused before anybody relies on it.
        except (OSError, RuntimeError) as error:
            await self.stop(0)
            raise ConfigError(f"cannot listen: {error}") from error
        if followed := self._followed():
            self._tasks.append(asyncio.create_task(follow(followed), name="rotation"))
            self._tasks[-1].add_done_callback(_report)

    def _followed(self) -> list[Followed]:
        """Keys and certificates, which others may rotate while this process runs."""
        security, found = self._metrics.security, []
        if self._gate is not None:
            security.watch_tenants(self._gate.asked)
            found.append(Followed("keys", [self._gate.path], self._gate.reload, security.read_again))
        for name, ingress in (("http", self._http), ("grpc", self._grpc)):
            tls = ingress.tls if ingress is not None else None
            if tls is not None:
                security.watch_certificate(name, tls.expiry)
                found.append(Followed(f"{name} certificates", tls.paths, tls.load, security.read_again))
        return found

    async def wait_ready(self, ready: bool = True) -> None:
        """Returns once every required model has a ready replica or may be held, or else once some has none."""
        while self.replicas.readiness().ready is not ready:
            await self.replicas.wait_for_news()

    async def listen(self, slots: Collection[int]) -> None:
        """Accepts connections on these slots of the shared sockets, on no others, and on its own admin sockets."""
        shared = self._sockets
        assert shared is not None
        await self._listen(shared, slots)
        if self._admin is not None:
            await self._admin.listen(shared.admin)

    async def _listen(self, shared: Sockets, slots: Collection[int]) -> None:
        if self._http is not None:
            await self._http.listen(_of(shared.http, slots))
        if self._grpc is not None:
            await self._grpc.listen(_of(shared.grpc, slots))

    def notice(self, limit_s: float) -> None:
        """The process stops after that time: unready from now on, it still serves whoever comes, and asks clients to
        go elsewhere with their next requests."""
        for ingress in (self._http, self._grpc, self._admin):
            if ingress is not None:
                ingress.notice(limit_s)

    async def drain(self, limit_s: float) -> None:
        """Others have taken over: accepts nothing more; returns when what is connected has gone, or after that time.

        What is asked on open connections is still answered, so that no request fails only because it came now.
        """
        if self._admin is not None:
            await self._admin.listen(())
        self._forsake()
        ingresses = [ingress.last_call() for ingress in (self._http, self._grpc) if ingress is not None]
        try:
            async with asyncio.timeout(limit_s):
                await asyncio.gather(*ingresses)
        except TimeoutError:
            log.warning("streams that others did not take over go on after %.0f s and are cut", limit_s)

    async def stop(self, grace_s: float | None = None) -> None:
        """Refuses new requests, lets streams in flight end for `grace_s`, else the configured time, and closes all."""
        if grace_s is None:
            grace_s = self.config.shutdown.grace_s
        if self._grpc is not None:
            await self._grpc.set_ready(False)
        self._admission.close()
        self._forsake()
        ingresses = [ingress.stop(grace_s) for ingress in (self._http, self._grpc) if ingress is not None]
        await asyncio.gather(*ingresses)
        if self._admin is not None:
            await self._admin.stop(0)  # After them, so that the end can be watched.
        for task in self._tasks:
            task.remove_done_callback(_report)
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._hold.close()
        await self.replicas.close()

    async def hurry(self) -> None:
        """While a stop runs: cuts what is in flight, so that it soon comes to its end."""
        await asyncio.gather(*(ingress.stop(0) for ingress in (self._http, self._grpc) if ingress is not None))

    def _forsake(self) -> None:
        """Lets go of the shared sockets: while any process holds one, clients connect to it and wait for ever."""
        shared = self._sockets
        if shared is not None:
            for sock in (
                *shared.admin,
                *(each for slots in (shared.http, shared.grpc) for slot in slots for each in slot),
            ):
                sock.close()

    def _connections(self) -> dict[str, int]:
        """Clients' connections, by protocol, as far as that is known."""
        counts = {name: each.connections for name, each in (("http", self._http), ("grpc", self._grpc)) if each}
        return {name: count for name, count in counts.items() if count is not None}

    async def _publish_readiness(self, grpc: GrpcIngress) -> None:
        while True:
            await grpc.set_ready(self.replicas.readiness().ready)
            await self.replicas.wait_for_news()


def _of(sockets: Sequence[Sequence[socket.socket]], slots: Collection[int]) -> list[socket.socket]:
    return [sock for slot in slots if slot < len(sockets) for sock in sockets[slot]]


def model_name(engine: EngineOptions) -> str:
    """The name that clients ask for."""
    return engine.served_model_name or engine.name


def may_scale_to_zero(engine: EngineOptions) -> bool:
    """Whether there may be no replica of the engine only because nobody asked for it."""
    return engine.autoscaling is not None and engine.autoscaling.min_replicas == 0


def may_be_held(config: Config, engine: EngineOptions) -> bool:
    """Whether requests for the engine's model wait for its first replica, so that it is served even at zero."""
    return config.hold.enabled == "always" or (config.hold.enabled == "auto" and may_scale_to_zero(engine))


class _Foresights:
    """The load model of each engine that comes up: replicas of one model learn together."""

    def __init__(self) -> None:
        self._fleets: dict[str, FleetModel] = {}

    def of(self, info: EngineInfo) -> ReplicaModel:
        """For a lane that opened."""
        base = next((card.name for card in info.models if not card.parent), "")
        return self._fleets.setdefault(base, new_fleet()).foresight()


def _guarded(policy: Policy, options: PolicyOptions, metrics: Metrics) -> Policy:
    """The policy and its shadow, each behind a guard and with its own chance. Raises `ConfigError`."""
    fallback = registry.create("least-queue", {}, random.Random())

    def guard(policy: Policy, name: str) -> Guard:
        return Guard(policy, name, fallback, metrics.policies, time.perf_counter, options.stall_ms * 1e-3)

    live = guard(policy, options.name)
    if not options.shadow:
        return live
    shadow = registry.create(options.shadow, options.shadow_options, random.Random(), registry.SHADOW)
    return Shadow(live, guard(shadow, f"{options.shadow} (shadow)"), metrics.policies)


def _carrier(config: Config) -> Carrier:
    lane = config.lane
    if lane.carrier == "socket":
        files = TlsFiles(lane.tls_cert_file, lane.tls_key_file, lane.tls_ca_file)
        return SocketCarrier(LaneTls("router", files, lane.tls_server_name) if lane.tls_ca_file else None)
    if config.membership.kind != "ray":
        raise ConfigError("lane.carrier: 'actor' needs membership.kind = 'ray'")
    from router.lane.actor import ActorCarrier  # Ray is imported only where it is used: it takes a second

    return ActorCarrier()


def _membership(config: Config, joined: Callable[[], None], failed: Callable[[str], None]) -> Membership:
    if config.membership.kind == "static":
        from router.membership.static import StaticMembership

        return StaticMembership(config.membership)
    from router.membership.ray import RayMembership

    return RayMembership(config.membership, joined, failed=failed)


def _waker(config: Config) -> Waker:
    """Who starts replicas of engines that scale, and tells their autoscaler how many requests are held."""
    engines = [engine for engine in config.engines if engine.autoscaling is not None]
    if not engines or config.membership.kind != "ray":
        return NoWaker()
    from router.membership.waker import RayWaker

    return RayWaker(engines)


def _report(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.critical("%s failed; this process goes on without it", task.get_name(), exc_info=error)
