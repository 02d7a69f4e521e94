"""Rules on what refers to what: selectors, Services, autoscalers, budgets, accounts, ConfigMaps, Secrets."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from k8s.check.objects import Container, Finding, Object, Objects, Pod, dig, matches

_SCALED = ("Deployment", "StatefulSet")


def check(objects: Objects, secrets: Collection[str]) -> Iterator[Finding]:
    """What refers to nothing, or to something else. `secrets` are those that the operator makes, as ``name/key``."""
    for each in objects:
        yield from _namespace(each, objects)
    for owner in objects.of("Deployment", "StatefulSet", "DaemonSet"):
        yield from _selector(owner)
    for service in objects.of("Service"):
        yield from _service(service, objects)
    for scaler in objects.of("HorizontalPodAutoscaler"):
        yield from _scaler(scaler, objects)
    for budget in objects.of("PodDisruptionBudget"):
        yield from _budget(budget, objects)
    for pod in objects.pods:
        yield from _references(pod, objects, secrets)
        yield from _spread(pod)
    for router in objects.routers:
        yield from _rollout(router)
    for cluster in objects.clusters:
        yield from _cluster_secrets(cluster, objects, secrets)
    for monitoring in objects.of("PodMonitoring"):
        yield from _monitoring(monitoring, objects)


def _namespace(each: Object, objects: Objects) -> Iterator[Finding]:
    cluster_wide = ("Namespace", "PriorityClass", "ClusterRole", "ClusterRoleBinding", "CustomResourceDefinition")
    namespace = each.at("metadata.namespace")
    if each.kind not in cluster_wide and not (namespace and objects.find("Namespace", namespace)):
        yield each.finding("metadata.namespace", f"{namespace!r} is not a Namespace of this rendering")


def _selector(owner: Object) -> Iterator[Finding]:
    selector, labels = owner.at("spec.selector") or {}, owner.at("spec.template.metadata.labels") or {}
    if not selector or not matches(selector, labels):
        yield owner.finding("spec.selector", f"{selector} does not select the template's labels {labels}")


def _service(service: Object, objects: Objects) -> Iterator[Finding]:
    selector = service.at("spec.selector")
    if not selector:
        return
    pods = objects.selected({"matchLabels": selector})
    if not pods:
        yield service.finding("spec.selector", f"{selector} selects no pod")
    for at, port in enumerate(service.at("spec.ports") or ()):
        target = port.get("targetPort", port.get("port"))
        if not port.get("name"):
            yield service.finding(f"spec.ports.{at}.name", "missing; Ingresses and policies go by the name")
        for pod in pods:
            if target not in pod.ports and target not in pod.ports.values():
                yield service.finding(f"spec.ports.{at}.targetPort", f"{pod.owner.label} has no port {target!r}")


def _scaler(scaler: Object, objects: Objects) -> Iterator[Finding]:
    kind, name = scaler.at("spec.scaleTargetRef.kind"), scaler.at("spec.scaleTargetRef.name")
    target = objects.find(str(kind), str(name))
    if target is None:
        yield scaler.finding("spec.scaleTargetRef", f"there is no {kind}/{name}")
    elif target.at("spec.replicas") is not None:
        yield target.finding("spec.replicas", f"each apply would undo what {scaler.label} decided; leave it out")
    low, high = scaler.at("spec.minReplicas", 1), scaler.at("spec.maxReplicas", 1)
    if low > high:
        yield scaler.finding("spec.minReplicas", f"{low} is above spec.maxReplicas, which is {high}")
    if low < 2:
        yield scaler.finding("spec.minReplicas", f"{low} leaves no router while one is replaced; 2 at least")


def _budget(budget: Object, objects: Objects) -> Iterator[Finding]:
    pods = objects.selected(budget.at("spec.selector") or {})
    if not pods:
        yield budget.finding("spec.selector", "selects no pod")
    share = budget.at("spec.maxUnavailable") is not None or str(budget.at("spec.minAvailable", "")).endswith("%")
    for pod in pods:
        owner, kept = pod.owner, budget.at("spec.minAvailable")
        if share and owner.kind == "RayCluster":
            yield budget.finding("spec", "a RayCluster has no scale: only a whole minAvailable works for its pods")
        replicas = _least(owner, objects)
        if isinstance(kept, int) and replicas is not None and kept >= replicas:
            yield budget.finding("spec.minAvailable", f"{kept} of {owner.label}'s {replicas} pods: none may ever go")


def _least(owner: Object, objects: Objects) -> int | None:
    """The fewest pods that it runs; None where Ray decides that."""
    if owner.kind not in _SCALED:
        return None
    for scaler in objects.of("HorizontalPodAutoscaler"):
        if scaler.at("spec.scaleTargetRef.name") == owner.name:
            return int(scaler.at("spec.minReplicas", 1))
    return int(owner.at("spec.replicas", 1))


def _references(pod: Pod, objects: Objects, secrets: Collection[str]) -> Iterator[Finding]:
    for field, kind in (("serviceAccountName", "ServiceAccount"), ("priorityClassName", "PriorityClass")):
        name = pod.spec.get(field)
        if name and not objects.find(kind, name) and not name.startswith("system-"):
            yield pod.finding(field, f"there is no {kind}/{name}")
    for name, volume in pod.volumes.items():
        config = dig(volume, "configMap.name")
        if config and not objects.find("ConfigMap", config):
            yield pod.finding("volumes", f"{name}: there is no ConfigMap/{config}")
        secret = dig(volume, "secret.secretName")
        if secret and not dig(volume, "secret.optional") and not _has_secret(secret, None, objects, secrets):
            yield pod.finding("volumes", _undocumented(secret))
    for container in pod.containers:
        for item in container.raw.get("env") or ():
            ref = dig(item, "valueFrom.secretKeyRef") or {}
            if ref and not ref.get("optional") and not _has_secret(ref["name"], ref["key"], objects, secrets):
                yield container.finding("env", f"{item['name']}: {_undocumented(ref['name'], ref['key'])}")
        yield from _secret_files(container, objects, secrets)


def _secret_files(container: Container, objects: Objects, secrets: Collection[str]) -> Iterator[Finding]:
    """A variable that names a file in a Secret's mount names a key that the Secret has."""
    for path, volume in container.mounts.items():
        secret = dig(container.pod.volumes.get(volume) or {}, "secret.secretName")
        for name, value in container.env.items():
            key = value.removeprefix(f"{path}/")
            if secret and key != value and not _has_secret(secret, key, objects, secrets):
                yield container.finding("env", f"{name}: {_undocumented(secret, key)}")


def _has_secret(name: str, key: str | None, objects: Objects, secrets: Collection[str]) -> bool:
    if rendered := objects.find("Secret", name):
        keys = {*(rendered.at("data") or ()), *(rendered.at("stringData") or ())}
        return key is None or key in keys
    return any(each == f"{name}/{key}" or (key is None and each.startswith(f"{name}/")) for each in secrets)


def _undocumented(name: str, key: str | None = None) -> str:
    what = f"key {key!r} of Secret/{name}" if key else f"Secret/{name}"
    return f"{what} is neither here nor made by a command in docs/operations.md"


def _cluster_secrets(cluster: Object, objects: Objects, secrets: Collection[str]) -> Iterator[Finding]:
    name = cluster.at("spec.authOptions.secretName")
    if name and not _has_secret(name, "auth_token", objects, secrets):
        yield cluster.finding("spec.authOptions.secretName", _undocumented(name, "auth_token"))
    ref = cluster.at("spec.gcsFaultToleranceOptions.redisPassword.valueFrom.secretKeyRef")
    if ref and not _has_secret(ref["name"], ref["key"], objects, secrets):
        yield cluster.finding("spec.gcsFaultToleranceOptions.redisPassword", _undocumented(ref["name"], ref["key"]))


def _spread(pod: Pod) -> Iterator[Finding]:
    for at, constraint in enumerate(pod.spec.get("topologySpreadConstraints") or ()):
        if not matches(constraint.get("labelSelector") or {"matchLabels": {"": ""}}, pod.labels):
            yield pod.finding(f"topologySpreadConstraints.{at}.labelSelector", "does not select the pod's own labels")


def _rollout(router: Container) -> Iterator[Finding]:
    owner = router.pod.owner
    if owner.kind != "Deployment":
        yield owner.finding("kind", "routers share nothing: a Deployment runs them")
    if owner.at("spec.strategy.rollingUpdate.maxUnavailable") not in (0, "0%"):
        yield owner.finding(
            "spec.strategy.rollingUpdate.maxUnavailable", "must be 0: a new router first, then an old one goes"
        )


def _monitoring(monitoring: Object, objects: Objects) -> Iterator[Finding]:
    pods = objects.selected(monitoring.at("spec.selector") or {})
    if not pods:
        yield monitoring.finding("spec.selector", "selects no pod")
    for at, endpoint in enumerate(monitoring.at("spec.endpoints") or ()):
        if pods and not any(endpoint.get("port") in pod.ports for pod in pods):
            yield monitoring.finding(
                f"spec.endpoints.{at}.port", f"no selected pod has a port {endpoint.get('port')!r}"
            )
