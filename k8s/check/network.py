"""Rules on NetworkPolicies: nothing is open that need not be, and nothing that is needed is closed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from k8s.check import settings
from k8s.check.objects import Finding, Object, Objects, Pod, matches

FRONT_ENDS = ("35.191.0.0/16", "130.211.0.0/22")
"""Where Google's front ends and health checks come from."""
_PEER = {"ingress": "from", "egress": "to"}
_DNS = 53


def check(objects: Objects) -> Iterator[Finding]:
    """What policies leave open, and what they close by mistake."""
    if not objects.pods:
        return
    policies = objects.of("NetworkPolicy")
    if not any(_denies_all(policy) for policy in policies):
        yield Finding("NetworkPolicy/default-deny", "spec", "missing: no policy denies what the others do not allow")
    known = [*((port, port) for pod in objects.pods for port in pod.ports.values()), *_ranges(objects)]
    for policy in policies:
        yield from _policy(policy, objects, known)
    for pod in objects.pods:
        if not _rules(objects, pod, "egress", _DNS):
            yield pod.owner.finding(
                f"{pod.path}.metadata.labels", "no NetworkPolicy lets the pod ask for names (port 53)"
            )
    yield from _services(objects)
    yield from _ray(objects)
    yield from _lanes(objects)


def _denies_all(policy: Object) -> bool:
    both = {"Ingress", "Egress"} <= set(policy.at("spec.policyTypes") or ())
    return both and not policy.at("spec.podSelector") and not policy.at("spec.ingress") and not policy.at("spec.egress")


def _policy(policy: Object, objects: Objects, known: list[tuple[int, int]]) -> Iterator[Finding]:
    pods = objects.selected(policy.at("spec.podSelector") or {})
    if not pods:
        yield policy.finding("spec.podSelector", "selects no pod")
    for way, peer in _PEER.items():
        if policy.at(f"spec.{way}") and way.capitalize() not in (policy.at("spec.policyTypes") or ()):
            yield policy.finding("spec.policyTypes", f"{way} rules without {way.capitalize()} say nothing")
        for at, rule in enumerate(policy.at(f"spec.{way}") or ()):
            field = f"spec.{way}.{at}"
            if not rule.get(peer):
                yield policy.finding(f"{field}.{peer}", "missing: that opens it to everybody")
            if not rule.get("ports"):
                yield policy.finding(f"{field}.ports", "missing: that opens all ports")
            yield from _peers(policy, f"{field}.{peer}", rule.get(peer) or (), objects)
            targets = pods if way == "ingress" else _targets(rule.get(peer) or (), objects)
            yield from _ports(policy, f"{field}.ports", rule.get("ports") or (), targets, known)


def _peers(policy: Object, field: str, peers: Any, objects: Objects) -> Iterator[Finding]:
    for at, peer in enumerate(peers):
        if "podSelector" in peer and "namespaceSelector" not in peer and not objects.selected(peer["podSelector"]):
            yield policy.finding(f"{field}.{at}.podSelector", "selects no pod")


def _targets(peers: Any, objects: Objects) -> list[Pod]:
    inside = [peer["podSelector"] for peer in peers if "podSelector" in peer and "namespaceSelector" not in peer]
    return [pod for selector in inside for pod in objects.selected(selector)]


def _ports(
    policy: Object, field: str, ports: Any, targets: list[Pod], known: list[tuple[int, int]]
) -> Iterator[Finding]:
    """Named ports must be some target's; numbers must be a port that somebody here listens on."""
    for at, port in enumerate(ports):
        wanted = port.get("port")
        if isinstance(wanted, str) and not any(wanted in pod.ports for pod in targets):
            yield policy.finding(f"{field}.{at}.port", f"no pod that it is about has a port {wanted!r}")
        elif isinstance(wanted, int) and targets:
            last = port.get("endPort", wanted)
            if wanted != _DNS and not any(wanted <= high and low <= last for low, high in known):
                yield policy.finding(f"{field}.{at}.port", f"nobody here listens on {wanted}")


def _ranges(objects: Objects) -> list[tuple[int, int]]:
    ray = [each for cluster in objects.clusters for each in settings.ray_ports(cluster)]
    return [*ray, *settings.lane_ports(settings.of(objects)), (settings.GCS_PORT, settings.GCS_PORT)]


def _rules(objects: Objects, pod: Pod, way: str, port: int) -> list[Mapping[str, Any]]:
    """The rules that let this port of the pod (of its peers, for egress) be reached."""
    found: list[Mapping[str, Any]] = []
    for policy in objects.of("NetworkPolicy"):
        if matches(policy.at("spec.podSelector") or {}, pod.labels):
            for rule in policy.at(f"spec.{way}") or ():
                entries: Sequence[Mapping[str, Any]] = rule.get("ports") or ({},)
                if any(_covers(entry, port, pod) for entry in entries):
                    found.append(rule)
    return found


def _covers(entry: Mapping[str, Any], port: int, pod: Pod) -> bool:
    wanted = entry.get("port")
    if wanted is None:
        return True
    low = pod.ports.get(wanted, -1) if isinstance(wanted, str) else int(wanted)
    return low <= port <= int(entry.get("endPort", low))


def _open(objects: Objects, source: Pod, target: Pod, port: int) -> bool:
    """Whether both ends' policies let `source` reach that port of `target`."""
    ways = (("egress", source, target), ("ingress", target, source))
    return all(
        any(
            matches(peer["podSelector"], other.labels)
            for rule in _rules(objects, here, way, port)
            for peer in rule.get(_PEER[way]) or ()
            if "podSelector" in peer and "namespaceSelector" not in peer
        )
        for way, here, other in ways
    )


def _services(objects: Objects) -> Iterator[Finding]:
    public = bool(objects.of("Ingress", "Gateway"))
    for service in objects.of("Service"):
        for pod in objects.selected({"matchLabels": service.at("spec.selector") or {"": ""}}):
            for port in service.at("spec.ports") or ():
                target = port.get("targetPort", port.get("port"))
                number = pod.ports.get(target, target) if isinstance(target, str) else target
                if not isinstance(number, int):
                    continue
                rules = _rules(objects, pod, "ingress", number)
                if not rules:
                    yield service.finding(
                        "spec.ports", f"no NetworkPolicy lets anybody reach {target} of {pod.owner.label}"
                    )
                router = any(router.pod == pod for router in objects.routers)
                blocks = {peer.get("ipBlock", {}).get("cidr") for rule in rules for peer in rule.get("from") or ()}
                if public and router and not blocks.issuperset(FRONT_ENDS) and "0.0.0.0/0" not in blocks:
                    yield service.finding("spec.ports", f"no NetworkPolicy lets the load balancer reach {target}: "
                                          f"{' and '.join(FRONT_ENDS)}")  # fmt: skip


def _ray(objects: Objects) -> Iterator[Finding]:
    for cluster in objects.clusters:
        nodes = [pod for pod in objects.pods if pod.owner == cluster]
        head, *_ = nodes
        drivers = [pod for pod in objects.pods if any("--config" in " ".join(each.words) for each in pod.containers)]
        for node in [*nodes[1:], *drivers]:
            if not _open(objects, node, head, settings.GCS_PORT):
                yield node.owner.finding(
                    f"{node.path}.metadata.labels",
                    f"no NetworkPolicy lets the pod reach Ray's GCS ({settings.GCS_PORT})",
                )
            for port in sorted({port for ends in settings.ray_ports(cluster) for port in ends}):
                if not (_open(objects, node, head, port) and _open(objects, head, node, port)):
                    yield cluster.finding(
                        "spec.headGroupSpec.rayStartParams",
                        f"no NetworkPolicy lets {node.owner.label} and the head reach port {port} of each other",
                    )


def _lanes(objects: Objects) -> Iterator[Finding]:
    read = settings.of(objects)
    engines = [pod for pod in objects.pods if pod.owner.kind == "RayCluster" and "workerGroupSpecs" in pod.path]
    for each in read if engines else ():
        for at, engine in enumerate(each.engines):
            if not engine.get("lane_port"):
                yield each.finding(f"engines.{at}.lane_port", "missing: no NetworkPolicy can name a port that is any")
    for router in objects.routers:
        for engine_pod in engines:
            for port in sorted({port for ends in settings.lane_ports(read) for port in ends}):
                if not _open(objects, router.pod, engine_pod, port):
                    yield router.pod.owner.finding(
                        f"{router.pod.path}.metadata.labels",
                        f"no NetworkPolicy lets the router reach lane port {port} of {engine_pod.owner.label}",
                    )
