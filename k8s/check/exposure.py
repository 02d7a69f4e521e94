"""Rules on what is public: Ingress, Gateway, and what they hang on Services."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from k8s.check import settings
from k8s.check.objects import Finding, Object, Objects, dig

_NEG = "cloud.google.com/neg"
_PROTOCOLS = "cloud.google.com/app-protocols"
_BACKEND = "cloud.google.com/backend-config"
_NAMED = {
    "networking.gke.io/managed-certificates": "ManagedCertificate",
    "networking.gke.io/v1beta1.FrontendConfig": "FrontendConfig",
}
_PRIVATE = ("/", "/metrics", "/readyz", "/healthz", "/debug")


def check(objects: Objects) -> Iterator[Finding]:
    """What of the way in leads nowhere, or cuts streams."""
    for service in objects.of("Service"):
        yield from _annotations(service, objects)
    for ingress in objects.of("Ingress"):
        yield from _ingress(ingress, objects)
    for route in objects.of("HTTPRoute", "GRPCRoute"):
        yield from _route(route, objects)
    for policy in objects.of("HealthCheckPolicy", "GCPBackendPolicy"):
        yield from _target(policy, objects)
    read = [each for each in settings.of(objects) if each.container in objects.routers and each.tree]
    for each in read:
        for backend in objects.of("BackendConfig"):
            yield from _timeouts(backend, "spec", each)
            yield from _health(backend, "spec.healthCheck", backend.at("spec.healthCheck") or {}, each)
        for backend in objects.of("GCPBackendPolicy"):
            yield from _timeouts(backend, "spec.default", each)
        for policy in objects.of("HealthCheckPolicy"):
            field = "spec.default.config.httpHealthCheck"
            yield from _health(policy, field, policy.at(field) or {}, each)
        yield from _grpc(objects, each)
    yield from _covered(objects)


def _json(service: Object, name: str) -> tuple[Mapping[str, Any], list[Finding]]:
    text = service.annotation(name)
    try:
        parsed = json.loads(text) if text else {}
    except ValueError:
        parsed = None
    if isinstance(parsed, dict):
        return parsed, []
    return {}, [service.finding(f"metadata.annotations.{name}", f"{text!r} is not a JSON object")]


def _annotations(service: Object, objects: Objects) -> Iterator[Finding]:
    names = {port.get("name") for port in service.at("spec.ports") or ()}
    numbers = {str(port.get("port")) for port in service.at("spec.ports") or ()}
    neg, wrong = _json(service, _NEG)
    yield from wrong
    if neg and not (neg.get("ingress") is True or neg.get("exposed_ports")):
        yield service.finding(f"metadata.annotations.{_NEG}", "asks for no network endpoint group")
    for port in neg.get("exposed_ports") or ():
        if port not in numbers:
            yield service.finding(f"metadata.annotations.{_NEG}", f"the Service has no port {port}")
    protocols, wrong = _json(service, _PROTOCOLS)
    yield from wrong
    for port, protocol in protocols.items():
        if port not in names:
            yield service.finding(f"metadata.annotations.{_PROTOCOLS}", f"the Service has no port {port!r}")
        if protocol not in ("HTTP", "HTTPS", "HTTP2"):
            yield service.finding(f"metadata.annotations.{_PROTOCOLS}", f"{protocol!r} is none of HTTP, HTTPS, HTTP2")
    backends, wrong = _json(service, _BACKEND)
    yield from wrong
    for port, name in (backends.get("ports") or {}).items():
        if port not in names:
            yield service.finding(f"metadata.annotations.{_BACKEND}", f"the Service has no port {port!r}")
        if not objects.find("BackendConfig", name):
            yield service.finding(f"metadata.annotations.{_BACKEND}", f"there is no BackendConfig/{name}")


def _ingress(ingress: Object, objects: Objects) -> Iterator[Finding]:
    for name, kind in _NAMED.items():
        for wanted in filter(None, ingress.annotation(name).split(",")):
            if not objects.find(kind, wanted.strip()):
                yield ingress.finding(f"metadata.annotations.{name}", f"there is no {kind}/{wanted}")
    hosts = {domain for each in objects.of("ManagedCertificate") for domain in each.at("spec.domains") or ()}
    for at, rule in enumerate(ingress.at("spec.rules") or ()):
        if rule.get("host") not in hosts and not ingress.at("spec.tls"):
            yield ingress.finding(f"spec.rules.{at}.host", f"{rule.get('host')!r} is in no ManagedCertificate")
        for place, path in enumerate(dig(rule, "http.paths") or ()):
            field = f"spec.rules.{at}.http.paths.{place}"
            if path.get("path") in _PRIVATE:
                yield ingress.finding(f"{field}.path", f"{path['path']} makes metrics and health public")
            service = dig(path, "backend.service") or {}
            yield from _backend(ingress, f"{field}.backend.service", service, objects)


def _backend(ingress: Object, field: str, wanted: Mapping[str, Any], objects: Objects) -> Iterator[Finding]:
    service = objects.find("Service", str(wanted.get("name")))
    if service is None:
        yield ingress.finding(f"{field}.name", f"there is no Service/{wanted.get('name')}")
        return
    ports = {(port.get("name"), port.get("port")) for port in service.at("spec.ports") or ()}
    name, number = dig(wanted, "port.name"), dig(wanted, "port.number")
    if not any(name == each[0] or number == each[1] for each in ports):
        yield ingress.finding(f"{field}.port", f"{service.label} has no port {name or number!r}")
    if service.at("spec.clusterIP") == "None":
        yield ingress.finding(f"{field}.name", f"{service.label} is headless: a load balancer cannot use it")
    for annotation in (_NEG, _BACKEND):
        if not service.annotation(annotation):
            yield service.finding(f"metadata.annotations.{annotation}", f"missing, and {ingress.label} leads there")


def _route(route: Object, objects: Objects) -> Iterator[Finding]:
    for at, parent in enumerate(route.at("spec.parentRefs") or ()):
        gateway = objects.find("Gateway", parent["name"])
        sections = {each["name"]: each for each in (gateway.at("spec.listeners") if gateway else ())}
        wanted = parent.get("sectionName")
        if wanted not in sections:
            yield route.finding(
                f"spec.parentRefs.{at}.sectionName", f"Gateway/{parent['name']} has no listener {wanted!r}"
            )
            continue
        host = sections[wanted].get("hostname")
        for name in route.at("spec.hostnames") or ():
            if host and name != host and not (host.startswith("*.") and name.endswith(host[1:])):
                yield route.finding("spec.hostnames", f"{name} is not the listener's {host}: no request gets here")
    for at, rule in enumerate(route.at("spec.rules") or ()):
        for place, match in enumerate(rule.get("matches") or ()):
            if dig(match, "path.value") in _PRIVATE:
                yield route.finding(f"spec.rules.{at}.matches.{place}.path", "makes metrics and health public")
        for place, ref in enumerate(rule.get("backendRefs") or ()):
            service = objects.find("Service", ref["name"])
            field = f"spec.rules.{at}.backendRefs.{place}"
            if service is None:
                yield route.finding(f"{field}.name", f"there is no Service/{ref['name']}")
            elif ref.get("port") not in {port.get("port") for port in service.at("spec.ports") or ()}:
                yield route.finding(f"{field}.port", f"{service.label} has no port {ref.get('port')}")


def _target(policy: Object, objects: Objects) -> Iterator[Finding]:
    kind, name = policy.at("spec.targetRef.kind"), policy.at("spec.targetRef.name")
    if not objects.find(str(kind), str(name)):
        yield policy.finding("spec.targetRef", f"there is no {kind}/{name}")


def _timeouts(backend: Object, field: str, read: settings.Settings) -> Iterator[Finding]:
    longest, held, grace = read.exit_s, read.held_s, float(read.at("shutdown.grace_s"))
    timeout = backend.at(f"{field}.timeoutSec")
    if timeout is None or timeout < longest:
        yield backend.finding(
            f"{field}.timeoutSec",
            f"{timeout or 'missing, that is 30'} cuts streams that a stopping router lets go on for {longest:g} s",
        )
    elif timeout < held + longest:
        yield backend.finding(
            f"{field}.timeoutSec",
            f"{timeout} cuts streams that were held: with hold.timeout_s it is {held + longest:g} at least",
        )
    draining = backend.at(f"{field}.connectionDraining.drainingTimeoutSec")
    if draining is None or draining < grace:
        yield backend.finding(
            f"{field}.connectionDraining.drainingTimeoutSec",
            f"{draining or 'missing'} is below shutdown.grace_s = {grace:g}",
        )


def _health(policy: Object, field: str, health: Mapping[str, Any], read: settings.Settings) -> Iterator[Finding]:
    if health.get("requestPath") != "/readyz":
        yield policy.finding(f"{field}.requestPath", f"{health.get('requestPath')!r} must be /readyz")
    name = "admin" if read.at("http.tls_client_ca_file") else "http"
    port = read.container.ports.get(name)
    if health.get("port") != port:
        yield policy.finding(f"{field}.port", f"{health.get('port')} is not the router's {name} port, {port}")


def _grpc(objects: Objects, read: settings.Settings) -> Iterator[Finding]:
    """HTTP/2 from a load balancer to a pod is only spoken inside TLS."""
    for service in objects.of("Service"):
        protocols, _ = _json(service, _PROTOCOLS)
        http2 = "HTTP2" in protocols.values() or any(
            port.get("appProtocol") == "HTTP2" for port in service.at("spec.ports") or ()
        )
        named = read.container.env.get("KVLANE_GRPC_TLS_CERT_FILE") or read.at("grpc.tls_cert_file")
        if http2 and not named:
            yield read.container.finding("env", f"{service.label} speaks HTTP2, which needs grpc.tls_cert_file")


def _covered(objects: Objects) -> Iterator[Finding]:
    """Each Service behind a Gateway has its health check and its timeouts."""
    behind = {
        ref["name"]
        for route in objects.of("HTTPRoute", "GRPCRoute")
        for rule in route.at("spec.rules") or ()
        for ref in rule.get("backendRefs") or ()
    }
    for name in sorted(behind):
        for kind in ("HealthCheckPolicy", "GCPBackendPolicy"):
            if not any(policy.at("spec.targetRef.name") == name for policy in objects.of(kind)):
                yield Finding(f"Service/{name}", "(policies)", f"a Gateway leads there and no {kind} is about it")
