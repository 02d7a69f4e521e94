"""Rules on kvlane's own configuration, as containers get it, and on what must go with it."""

from __future__ import annotations

import math
import re
import tempfile
import tomllib
from collections.abc import Iterator, Mapping
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import msgspec

from k8s.check.objects import Container, Finding, Object, Objects, Pod, dig
from router import HEAD_LIMIT, config
from router.errors import ConfigError
from router.membership import node_address

MARGIN_S = 15.0
"""What a router may take to end after its last stream: the Ray node leaves, metrics are told."""
LOAD_BALANCER_IDLE_S = 600.0
"""Google's load balancers close an idle connection after this time, which cannot be set."""
GCS_PORT = 6379
NODE_PORTS = {name: str(port) for name, port in node_address.PORTS.items()}
"""Of a router's own Ray node (`membership.join`). All nodes have the same, so that one policy can name them."""
RAY_DRAIN = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"
"""How long `ray start` waits for its node's replicas after SIGTERM."""
RAY_DRAIN_S = 30.0
"""Unless that says otherwise."""
LANE_PORTS = 64
"""As many as `engines.lane_port` tries."""
_DEFAULTS = {
    "shutdown.notice_s": 5.0,
    "shutdown.grace_s": 30.0,
    "http.idle_timeout_s": 620.0,
    "hold.enabled": "auto",
    "hold.timeout_s": 600.0,
}
_CONFIG = re.compile(r"--config[ =](\S+)")
_GPU = "nvidia.com/gpu"


class Settings(NamedTuple):
    """The configuration that a container starts with."""

    container: Container
    source: Object
    """The ConfigMap."""
    key: str
    tree: Mapping[str, Any]
    """As TOML has it, defaults and variables included where the whole is right."""
    problems: tuple[str, ...]

    def at(self, path: str) -> Any:
        return dig(self.tree, path, _DEFAULTS.get(path))

    def finding(self, field: str, message: str) -> Finding:
        return self.source.finding(f"{self.key}: {field}", message)

    @property
    def engines(self) -> list[Mapping[str, Any]]:
        return list(self.tree.get("engines") or ())

    @property
    def exit_s(self) -> float:
        """From SIGTERM until the last stream may have ended."""
        return float(self.at("shutdown.notice_s")) + float(self.at("shutdown.grace_s"))

    @property
    def held_s(self) -> float:
        """For how long requests may wait for a model's first replica."""
        mode, models = self.at("hold.enabled"), [dig(each, "autoscaling.min_replicas") for each in self.engines]
        return float(self.at("hold.timeout_s")) if mode == "always" or (mode == "auto" and 0 in models) else 0.0


@lru_cache(maxsize=1)
def of(objects: Objects) -> list[Settings]:
    """The settings of every container that reads a configuration."""
    found = [_settings(container, objects) for pod in objects.pods for container in pod.containers]
    return [each for each in found if each is not None]


def _settings(container: Container, objects: Objects) -> Settings | None:
    match = _CONFIG.search(" ".join(container.words))
    if match is None:
        return None
    path = PurePosixPath(match[1])
    volume = container.pod.volumes.get(container.mounts.get(str(path.parent), ""), {})
    source = objects.find("ConfigMap", dig(volume, "configMap.name", ""))
    text = dig(source.raw, "data", {}).get(path.name) if source else None
    if source is None or text is None:
        return Settings(container, container.pod.owner, str(path), {}, ("no ConfigMap mounted there has this file",))
    env = {name: value for name, value in container.env.items() if name.startswith(config.PREFIX)}
    return Settings(container, source, path.name, *_read(text, env))


def _read(text: str, env: Mapping[str, str]) -> tuple[Mapping[str, Any], tuple[str, ...]]:
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory, "kvlane.toml")
        file.write_text(text)
        try:
            return msgspec.to_builtins(config.load(str(file), env=env)), ()
        except ConfigError as error:
            problems = tuple(line.replace(str(file), "the file") for line in error.message.splitlines())
    try:
        return tomllib.loads(text), problems
    except tomllib.TOMLDecodeError:
        return {}, problems


def check(objects: Objects) -> Iterator[Finding]:
    """What is wrong with configurations, and with what does not fit them."""
    for settings in of(objects):
        for problem in settings.problems:
            field, _, words = problem.partition(": ")
            yield settings.finding(field, words or "refused")
        if settings.container in objects.routers and settings.tree:
            yield from _addresses(settings)
            yield from _grace(settings)
            yield from _processors(settings)
            yield from _membership(settings, objects)
            yield from _idle(settings, objects)
            yield from _files(settings, objects)
        for cluster in objects.clusters if settings.tree else ():
            yield from _engines(settings, cluster)
    for cluster in objects.clusters:
        yield from _ray(cluster)


def _addresses(settings: Settings) -> Iterator[Finding]:
    router, defaults = settings.container, {"http": 8000, "grpc": 9000}
    for ingress, default in defaults.items():
        if settings.at(f"{ingress}.enabled") is False:
            continue
        port = settings.at(f"{ingress}.port") or default
        if router.ports.get(ingress) != port:
            yield router.finding("ports", f"{ingress} is {router.ports.get(ingress)}, and the router listens on {port}")
        host = settings.at(f"{ingress}.host")
        if host in (None, "127.0.0.1", "localhost", "::1"):
            yield settings.finding(f"{ingress}.host", "is loopback: nobody outside the pod gets there")
    probed = settings.at("http.tls_client_ca_file")  # Nobody who probes has a client's certificate for the other port.
    if settings.at("admin.enabled") and settings.at("admin.host") not in (None, "127.0.0.1") and not probed:
        yield settings.finding("admin.host", "must be 127.0.0.1: the port has no authentication")
    yield from _probes(settings)


def _probes(settings: Settings) -> Iterator[Finding]:
    """They speak what the port speaks."""
    router = settings.container
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        asked = dig(router.raw, f"{probe}.httpGet") or {}
        if asked.get("port") != "http":
            continue
        if settings.at("http.tls_client_ca_file"):
            yield router.finding(f"{probe}.httpGet.port", "asks for a certificate, which kubelet has not: probe admin")
        elif (scheme := "HTTPS" if settings.at("http.tls_cert_file") else "HTTP") != asked.get("scheme", "HTTP"):
            yield router.finding(f"{probe}.httpGet.scheme", f"must be {scheme}, which the port speaks")


def _grace(settings: Settings) -> Iterator[Finding]:
    router = settings.container
    grace = float(router.pod.spec.get("terminationGracePeriodSeconds", 30))
    hook = _hook_s(router)
    least = hook + settings.exit_s + MARGIN_S
    if grace < least:
        what = f"{hook:g} s preStop + " if hook else ""
        yield router.pod.finding(
            "terminationGracePeriodSeconds",
            f"{grace:g} cuts streams: {what}shutdown.notice_s + shutdown.grace_s + {MARGIN_S:g} is {least:g}",
        )


def _hook_s(container: Container) -> float:
    """How long the preStop hook waits, as far as one can see that."""
    if (seconds := dig(container.raw, "lifecycle.preStop.sleep.seconds")) is not None:
        return float(seconds)
    words = " ".join(dig(container.raw, "lifecycle.preStop.exec.command") or ())
    return sum(float(each) for each in re.findall(r"sleep (\d+)", words))


def _processors(settings: Settings) -> Iterator[Finding]:
    asked, workers = cpus(dig(settings.container.raw, "resources.limits.cpu", "0")), int(settings.at("workers") or 1)
    if asked < workers:
        yield settings.container.finding("resources.limits.cpu", f"{asked:g} for {workers} workers: each wants one")


def _membership(settings: Settings, objects: Objects) -> Iterator[Finding]:
    if settings.at("membership.kind") == "static" or not objects.clusters:
        return
    cluster, router = objects.clusters[0], settings.container
    address, wanted = settings.at("membership.ray_address"), f"{cluster.name}-head-svc:{GCS_PORT}"
    if address != wanted:
        yield settings.finding(
            "membership.ray_address", f"{address!r} must be {wanted!r}, KubeRay's Service of {cluster.label}"
        )
    if not settings.at("membership.join"):
        yield settings.finding("membership.join", "must be true: the container has no Ray node beside it")
    if HEAD_LIMIT in router.env:
        yield router.finding("env", f"{HEAD_LIMIT} must not be set: the router sets a day, and less cuts streams")
    if router.env.get("RAY_AUTH_MODE") != cluster.at("spec.authOptions.mode"):
        yield router.finding(
            "env", f"RAY_AUTH_MODE must be {cluster.at('spec.authOptions.mode')!r}, as in {cluster.label}"
        )


def _files(settings: Settings, objects: Objects) -> Iterator[Finding]:
    """A file that the configuration names is in a directory that is mounted where it is read."""
    engines = [pod for pod in objects.pods if pod.owner.kind == "RayCluster" and "workerGroupSpecs" in pod.path]
    for part in ("http", "grpc", "lane", "auth"):
        yield from _mounted(settings, part, settings.tree.get(part) or {}, [settings.container])
    for at, engine in enumerate(settings.engines):
        yield from _mounted(settings, f"engines.{at}", engine, [pod.containers[0] for pod in engines])


def _mounted(settings: Settings, field: str, part: Mapping[str, Any], where: list[Container]) -> Iterator[Finding]:
    for name, value in part.items():
        directory = str(PurePosixPath(str(value)).parent)
        for container in where if name.endswith("_file") and value else ():
            if directory not in container.mounts:
                yield settings.finding(
                    f"{field}.{name}", f"{container.pod.owner.label} has nothing mounted at {directory}"
                )


def _idle(settings: Settings, objects: Objects) -> Iterator[Finding]:
    idle = float(settings.at("http.idle_timeout_s"))
    if objects.of("Ingress", "Gateway") and idle <= LOAD_BALANCER_IDLE_S:
        yield settings.finding(
            "http.idle_timeout_s",
            f"{idle:g} must be above {LOAD_BALANCER_IDLE_S:g}: the load balancer must close idle connections first",
        )


def _engines(settings: Settings, cluster: Object) -> Iterator[Finding]:
    groups = [(group, _resources(group)) for group in cluster.at("spec.workerGroupSpecs") or ()]
    wanted = room = 0.0
    for at, engine in enumerate(settings.engines):
        gpus = float(engine.get("num_gpus", 0)) * (workers := int(engine.get("tensor_parallel_size", 1)))
        scaling = engine.get("autoscaling") or {}
        wanted += gpus * int(scaling.get("max_replicas", engine.get("replicas", 1)))
        processors = float(engine.get("num_cpus", 1)) * (1 if gpus and workers > 1 else workers)
        if not any(has.get(_GPU, 0) >= gpus and has["cpu"] >= processors for _, has in groups):
            yield settings.finding(
                f"engines.{at}",
                f"no worker group of {cluster.label} has pods with {processors:g} CPUs and {gpus:g} GPUs",
            )
        yield from _drain(settings, at, engine, cluster)
    room = sum(int(group.get("maxReplicas", 0)) * has.get(_GPU, 0) for group, has in groups)
    if wanted > room:
        yield cluster.finding("spec.workerGroupSpecs", f"{room:g} GPUs at most, and engines may want {wanted:g}")


def _drain(settings: Settings, at: int, engine: Mapping[str, Any], cluster: Object) -> Iterator[Finding]:
    drain = float(engine.get("drain_timeout_s", 3600))
    for place, group in enumerate(cluster.at("spec.workerGroupSpecs") or ()):
        pod = Pod(cluster, f"spec.workerGroupSpecs.{place}.template", group.get("template") or {})
        for container in pod.containers[:1]:
            for name, default in (("DRAIN_S", math.inf), (RAY_DRAIN, RAY_DRAIN_S)):
                if (given := float(container.env.get(name, default))) <= drain:
                    yield container.finding(
                        "env", f"{name} is {given:g}, not above engines.{at}.drain_timeout_s = {drain:g}"
                    )
        grace = float(dig(group, "template.spec.terminationGracePeriodSeconds", 30))
        if grace < drain + MARGIN_S:
            yield cluster.finding(
                f"spec.workerGroupSpecs.{place}.template.spec.terminationGracePeriodSeconds",
                f"{grace:g} is below engines.{at}.drain_timeout_s + {MARGIN_S:g} = {drain + MARGIN_S:g}",
            )


def _resources(group: Mapping[str, Any]) -> dict[str, float]:
    limits = dig(group, "template.spec.containers.0.resources.limits") or {}
    return {"cpu": cpus(limits.get("cpu", "0")), _GPU: float(limits.get(_GPU, 0))}


def _ray(cluster: Object) -> Iterator[Finding]:
    installed = version("ray")
    if cluster.at("spec.rayVersion") != installed:
        yield cluster.finding(
            "spec.rayVersion", f"{cluster.at('spec.rayVersion')!r} is not the images' Ray, {installed}"
        )
    if cluster.at("spec.authOptions.mode") != "token":
        yield cluster.finding("spec.authOptions.mode", "must be token: whoever reaches Ray's ports could run code")
    if cluster.at("spec.enableInTreeAutoscaling") and cluster.at("spec.autoscalerOptions.version") != "v2":
        yield cluster.finding("spec.autoscalerOptions.version", "must be v2")
    yield from _flags(cluster)
    head = cluster.at("spec.headGroupSpec.rayStartParams") or {}
    if head.get("num-cpus") != "0":
        yield cluster.finding("spec.headGroupSpec.rayStartParams.num-cpus", 'must be "0": the head runs no replicas')
    for at, group in enumerate(cluster.at("spec.workerGroupSpecs") or ()):
        field, params = f"spec.workerGroupSpecs.{at}", group.get("rayStartParams") or {}
        if dig(group, "labels", {}).get(node_address.ROLE) != node_address.ENGINE:
            yield cluster.finding(
                f"{field}.labels",
                f"{node_address.ROLE} must be {node_address.ENGINE}: with the directory's actor no node is ever idle",
            )
        if not group.get("minReplicas", 0) <= group.get("replicas", 0) <= group.get("maxReplicas", math.inf):
            yield cluster.finding(f"{field}.replicas", "is not between minReplicas and maxReplicas")
        yield from _ports_declared(Pod(cluster, f"{field}.template", group.get("template") or {}), params)


def _flags(cluster: Object) -> Iterator[Finding]:
    """No schema knows what `ray start` takes, or that all nodes must agree on ports."""
    from ray.scripts import scripts  # Takes a second, and not every rendering has a cluster.

    known = {option.removeprefix("--") for param in scripts.start.params for option in param.opts}
    groups = [f"workerGroupSpecs.{at}" for at in range(len(cluster.at("spec.workerGroupSpecs") or ()))]
    for group in ("headGroupSpec", *groups):
        field = f"spec.{group}.rayStartParams"
        params = cluster.at(field) or {}
        for name in sorted(set(params) - known):
            yield cluster.finding(f"{field}.{name}", "`ray start` has no such option")
        for name, port in NODE_PORTS.items():
            if params.get(name) != port:
                yield cluster.finding(
                    f"{field}.{name}", f"{params.get(name)!r} is not {port!r}, as routers' nodes have it"
                )


def _ports_declared(pod: Pod, params: Mapping[str, str]) -> Iterator[Finding]:
    for name, param in (("agent", "dashboard-agent-listen-port"), ("ray-metrics", "metrics-export-port")):
        if str(pod.ports.get(name)) != params.get(param):
            yield pod.finding(
                "containers.0.ports", f"{name} is {pod.ports.get(name)}, and {param} is {params.get(param)}"
            )


def ray_ports(cluster: Object) -> list[tuple[int, int]]:
    """Ranges of the ports by which Ray nodes reach each other, the GCS's aside."""
    params = cluster.at("spec.headGroupSpec.rayStartParams") or {}
    single = ["node-manager", "object-manager", "runtime-env-agent", "dashboard-agent-grpc", "dashboard-agent-listen"]
    names = [(f"{name}-port", f"{name}-port") for name in single] + [("min-worker-port", "max-worker-port")]
    return [(int(params[low]), int(params[high])) for low, high in names if low in params and high in params]


def lane_ports(settings: list[Settings]) -> list[tuple[int, int]]:
    """Ranges of the ports by which routers reach engines."""
    firsts = {int(engine.get("lane_port", 0)) for each in settings for engine in each.engines}
    return [(first, first + LANE_PORTS - 1) for first in sorted(firsts) if first]


def cpus(quantity: object) -> float:
    """CPUs of a Kubernetes quantity such as ``500m`` or ``2``."""
    text = str(quantity)
    return float(text[:-1]) / 1000 if text.endswith("m") else float(text)
