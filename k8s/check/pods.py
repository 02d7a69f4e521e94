"""Rules on each pod: images, resources, privileges, probes, secrets in the clear."""

from __future__ import annotations

import re
from collections.abc import Iterator

from k8s.check.objects import Container, Finding, Objects, Pod, dig

_TAG = re.compile(r":([\w][\w.-]{0,127})$")
_DIGEST = re.compile(r"@sha256:[0-9a-f]{64}$")
_MOVING = {"latest", "nightly", "main", "master", "stable", "edge"}
_SECRET = re.compile(r"TOKEN|PASSWORD|SECRET|_KEY$|CREDENTIAL", re.IGNORECASE)
NEEDS_API = "kvlane-ray-head"
"""The only account whose pods may talk to the Kubernetes API: Ray's autoscaler runs there."""


def check(objects: Objects) -> Iterator[Finding]:
    """What is wrong with pods."""
    for pod in objects.pods:
        yield from _isolation(pod)
        for container in pod.containers:
            yield from _image(container)
            yield from _resources(container)
            yield from _privileges(container)
            yield from _probes(container)
            yield from _mounts(container)
            yield from _environment(container)
    for router in objects.routers:
        yield from _router_probes(router)
    for cluster in objects.clusters:
        yield from _autoscaler(Pod(cluster, "spec.headGroupSpec.template", cluster.at("spec.headGroupSpec.template")))


def _isolation(pod: Pod) -> Iterator[Finding]:
    spec, security = pod.spec, pod.spec.get("securityContext") or {}
    for field in ("hostNetwork", "hostPID", "hostIPC"):
        if spec.get(field):
            yield pod.finding(field, "the pod must not share the node's")
    for name, volume in pod.volumes.items():
        if "hostPath" in volume:
            yield pod.finding("volumes", f"{name} is a hostPath")
    if security.get("runAsNonRoot") is not True:
        yield pod.finding("securityContext.runAsNonRoot", "must be true")
    if not security.get("runAsUser"):
        yield pod.finding("securityContext.runAsUser", "must be a number above 0")
    if dig(security, "seccompProfile.type") != "RuntimeDefault":
        yield pod.finding("securityContext.seccompProfile.type", "must be RuntimeDefault")
    if spec.get("enableServiceLinks") is not False:
        yield pod.finding("enableServiceLinks", "must be false: their variables begin with KVLANE_, as the router's do")
    token = spec.get("automountServiceAccountToken")
    if token is not False and spec.get("serviceAccountName") != NEEDS_API:
        yield pod.finding("automountServiceAccountToken", "must be false: nothing here talks to the Kubernetes API")
    if not spec.get("serviceAccountName"):
        yield pod.finding("serviceAccountName", "missing; the default account may get rights that nobody meant for it")


def _image(container: Container) -> Iterator[Finding]:
    image = str(container.raw.get("image", ""))
    tag = _TAG.search(image)
    if _DIGEST.search(image):
        return
    if tag is None:
        yield container.finding("image", f"{image!r} is not pinned: it has neither tag nor digest")
    elif tag[1] in _MOVING:
        yield container.finding("image", f"{image!r} is not pinned: {tag[1]} means another image tomorrow")


def _resources(container: Container) -> Iterator[Finding]:
    for part in ("requests", "limits"):
        for resource in ("cpu", "memory"):
            if dig(container.raw, f"resources.{part}.{resource}") is None:
                yield container.finding(f"resources.{part}.{resource}", "missing")
    asked, allowed = (dig(container.raw, f"resources.{part}.memory") for part in ("requests", "limits"))
    if asked and allowed and asked != allowed:
        yield container.finding(
            "resources.limits.memory",
            f"{allowed} is not what is requested, {asked}: memory that is lent is taken back by a kill",
        )
    gpus = [dig(container.raw, f"resources.{part}") or {} for part in ("requests", "limits")]
    if gpus[0].get("nvidia.com/gpu") != gpus[1].get("nvidia.com/gpu"):
        yield container.finding("resources.limits", "nvidia.com/gpu differs from what is requested")


def _privileges(container: Container) -> Iterator[Finding]:
    wanted = {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities.drop": ["ALL"],
    }
    for field, value in wanted.items():
        if dig(container.raw, f"securityContext.{field}") != value:
            yield container.finding(f"securityContext.{field}", f"must be {str(value).lower()}")
    if dig(container.raw, "securityContext.capabilities.add"):
        yield container.finding("securityContext.capabilities.add", "must be empty")
    if dig(container.raw, "securityContext.privileged"):
        yield container.finding("securityContext.privileged", "must be false")
    if dig(container.raw, "securityContext.runAsUser") == 0:
        yield container.finding("securityContext.runAsUser", "must be above 0")


def _probes(container: Container) -> Iterator[Finding]:
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        for kind in ("httpGet", "tcpSocket"):
            port = dig(container.raw, f"{probe}.{kind}.port")
            if isinstance(port, int):
                yield container.finding(f"{probe}.{kind}.port", f"{port} is a number; name the port, so that it is one")
            elif port is not None and port not in container.ports:
                yield container.finding(f"{probe}.{kind}.port", f"the container has no port {port!r}")
    served = container.pod.owner.kind in ("Deployment", "StatefulSet", "RayCluster") and container.ports
    for probe in ("readinessProbe", "livenessProbe"):
        if served and not container.raw.get(probe):
            yield container.finding(probe, "missing")


def _router_probes(router: Container) -> Iterator[Finding]:
    if (path := dig(router.raw, "readinessProbe.httpGet.path")) != "/readyz":
        yield router.finding("readinessProbe.httpGet.path", f"{path!r} must be /readyz")
    for probe in ("livenessProbe", "startupProbe"):
        if (path := dig(router.raw, f"{probe}.httpGet.path")) != "/healthz":
            yield router.finding(
                f"{probe}.httpGet.path", f"{path!r} must be /healthz: a router without engines must wait, not restart"
            )


def _mounts(container: Container) -> Iterator[Finding]:
    for mount in container.raw.get("volumeMounts") or ():
        if mount.get("subPath") or mount.get("subPathExpr"):
            yield container.finding(
                "volumeMounts", f"{mount['mountPath']}: a subPath never changes in a running pod; mount the directory"
            )
    for path, volume in container.mounts.items():
        if volume not in container.pod.volumes and container.pod.owner.kind != "StatefulSet":
            yield container.finding("volumeMounts", f"{path}: the pod has no volume {volume!r}")
    for path in ("/tmp", "/dev/shm") if _is_ray(container) else ():
        if path not in container.mounts:
            yield container.finding("volumeMounts", f"{path} is missing: Ray writes there, and the root is read-only")
    for name, described in container.pod.volumes.items():
        if "emptyDir" in described and not dig(described, "emptyDir.sizeLimit"):
            yield container.pod.finding("volumes", f"{name} has no sizeLimit: it could fill the node")


def _is_ray(container: Container) -> bool:
    return container.pod.labels.get("kvlane.io/ray-node") == "true"


def _environment(container: Container) -> Iterator[Finding]:
    for name, value in container.env.items():
        if _SECRET.search(name) and not name.endswith(("_FILE", "_PATH", "_MODE")) and value:
            yield container.finding("env", f"{name} is a secret in the clear; take it from a Secret")


def _autoscaler(head: Pod) -> Iterator[Finding]:
    owner = head.owner
    if not owner.at("spec.enableInTreeAutoscaling"):
        return
    for field in ("resources.requests", "resources.limits", "securityContext"):
        if not owner.at(f"spec.autoscalerOptions.{field}"):
            yield owner.finding(f"spec.autoscalerOptions.{field}", "missing")
    if owner.at("spec.autoscalerOptions.securityContext.allowPrivilegeEscalation") is not False:
        yield owner.finding("spec.autoscalerOptions.securityContext.allowPrivilegeEscalation", "must be false")
    if head.spec.get("automountServiceAccountToken") is False:
        yield head.finding("automountServiceAccountToken", "must be true: the autoscaler talks to the Kubernetes API")
