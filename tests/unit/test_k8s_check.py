"""The check of the manifests: all overlays pass it, and what operators get wrong is found and named."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from k8s.check import render, rules, schemas, settings
from k8s.check.objects import Object, Objects, matches
from router.membership import node_address
from tests.unit.kubernetes import NAMES, OVERLAYS, ROOT, Rendering, needs_kustomize

pytestmark = needs_kustomize

Edit = Callable[[Rendering], object]
ROUTER, RAY, JOB = "Deployment/kvlane-router", "RayCluster/kvlane-ray", "Job/kvlane-deploy"
INGRESS, BACKEND, SERVICE = "Ingress/kvlane", "BackendConfig/kvlane", "Service/kvlane"
NEG = "cloud.google.com/neg"


def put(value: Any, *steps: Any) -> Callable[[Any], None]:
    """Sets what lies at the steps."""

    def edit(raw: Any) -> None:
        for step in steps[:-1]:
            raw = raw[step]
        raw[steps[-1]] = value

    return edit


@pytest.mark.parametrize("name", NAMES)
def test_an_overlay_has_no_problem(name: str) -> None:
    assert [str(finding) for finding in Rendering(name).find()] == []


def test_there_is_an_overlay_for_each_purpose() -> None:
    assert NAMES == ["cpu-demo", "gateway-api", "gke-h100", "gke-l4", "multi-tenant", "prewarmed"]


# Mistakes: overlay, edit, the object and field that are named, words of the message.
SEEDS: dict[str, tuple[str, Edit, str, str, str]] = {
    "a misspelt field": (
        "gke-l4", lambda r: put(600, "terminationGracePeriodSecond")(r.pod()),
        ROUTER, "spec.template.spec", "terminationGracePeriodSecond",
    ),
    "a misspelt field of a custom object": (
        "gke-l4", lambda r: put(60, "spec", "drainTimeoutSec")(r[BACKEND]), BACKEND, "spec", "drainTimeoutSec",
    ),
    "a misspelt field deep in a custom object's pods": (
        "gke-l4", lambda r: put("x", "imagePullPolice")(r.worker()["template"]["spec"]["containers"][0]),
        RAY, "workerGroupSpecs.0.template.spec.containers.0", "imagePullPolice",
    ),
    "a value of the wrong type": (
        "gke-l4", lambda r: put("two", "spec", "maxReplicas")(r["HorizontalPodAutoscaler/kvlane-router"]),
        "HorizontalPodAutoscaler/kvlane-router", "spec.maxReplicas", "'two'",
    ),
    "a required field that is missing": (
        "gke-l4", lambda r: r.worker().pop("groupName"), RAY, "spec.workerGroupSpecs.0", "groupName",
    ),
    "an unknown API version": (
        "gke-l4", lambda r: put("cloud.google.com/v2", "apiVersion")(r[BACKEND]), BACKEND, "apiVersion", "v2",
    ),
    "an experimental field that GKE does not have": (
        "gateway-api", lambda r: put({}, "spec", "rules", 0, "retry")(r["HTTPRoute/kvlane"]),
        "HTTPRoute/kvlane", "spec.rules.0", "retry",
    ),
    "an object twice": (
        "gke-l4", lambda r: r.add(dict(r["ServiceAccount/kvlane-router"])),
        "ServiceAccount/kvlane-router", "metadata.name", "another",
    ),
    "a selector that selects other pods": (
        "gke-l4", lambda r: put("routers", "spec", "selector", "matchLabels", "app.kubernetes.io/component")(r[ROUTER]),
        ROUTER, "spec.selector", "does not select",
    ),
    "a Service that selects nothing": (
        "gke-l4", lambda r: put("route", "spec", "selector", "app.kubernetes.io/component")(r[SERVICE]),
        SERVICE, "spec.selector", "selects no pod",
    ),
    "a wrong target port": (
        "gke-l4", lambda r: put(8080, "spec", "ports", 0, "targetPort")(r[SERVICE]),
        SERVICE, "spec.ports.0.targetPort", "no port 8080",
    ),
    "a container port that the router does not listen on": (
        "gke-l4", lambda r: put(8080, "ports", 0, "containerPort")(r.container()),
        ROUTER, "containers.0.ports", "listens on 8000",
    ),
    "a probe on a port that is not there": (
        "gke-l4", lambda r: put("web", "readinessProbe", "httpGet", "port")(r.container()),
        ROUTER, "readinessProbe.httpGet.port", "no port 'web'",
    ),
    "a readiness probe that is no readiness": (
        "gke-l4", lambda r: put("/healthz", "readinessProbe", "httpGet", "path")(r.container()),
        ROUTER, "readinessProbe.httpGet.path", "/readyz",
    ),
    "a liveness probe that restarts routers without engines": (
        "gke-l4", lambda r: put("/readyz", "livenessProbe", "httpGet", "path")(r.container()),
        ROUTER, "livenessProbe.httpGet.path", "/healthz",
    ),
    "no grace period": (
        "gke-l4", lambda r: r.pod().pop("terminationGracePeriodSeconds"),
        ROUTER, "terminationGracePeriodSeconds", "30 cuts streams",
    ),
    "a grace period that a preStop hook uses up": (
        "gke-l4", lambda r: put({"preStop": {"sleep": {"seconds": 60}}}, "lifecycle")(r.container()),
        ROUTER, "terminationGracePeriodSeconds", "60 s preStop",
    ),
    "a grace period below the longest stream": (
        "gke-l4", lambda r: r.toml("grace_s = 540.0", "grace_s = 900.0"),
        ROUTER, "terminationGracePeriodSeconds", "935",
    ),
    "engines that are killed while they drain": (
        "gke-l4", lambda r: r.toml("drain_timeout_s = 600.0", "drain_timeout_s = 700.0"),
        RAY, "template.spec.terminationGracePeriodSeconds", "drain_timeout_s",
    ),
    "engines that Ray stops while they drain": (
        "gke-l4",
        lambda r: r.worker()["template"]["spec"]["containers"][0]["env"].remove(
            {"name": "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", "value": "615"}),
        RAY, "containers.0.env", "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S is 30",
    ),
    "a hook that gives up before engines have drained": (
        "gke-l4",
        lambda r: next(
            each for each in r.worker()["template"]["spec"]["containers"][0]["env"] if each["name"] == "DRAIN_S"
        ).update(value="300"),
        RAY, "containers.0.env", "DRAIN_S is 300",
    ),
    "a router that ends when the head is away": (
        "gke-l4",
        lambda r: r.container()["env"].append({"name": "RAY_gcs_rpc_server_reconnect_timeout_s", "value": "600"}),
        ROUTER, "containers.0.env", "RAY_gcs_rpc_server_reconnect_timeout_s",
    ),
    "engines' nodes that the directory would keep from being idle": (
        "gke-l4", lambda r: r.worker().pop("labels"), RAY, "workerGroupSpecs.0.labels", "kvlane-role must be engine",
    ),
    "a Secret that never changes in its pods": (
        "multi-tenant", lambda r: put("tls.crt", "volumeMounts", 4, "subPath")(r.container()),
        ROUTER, "containers.0.volumeMounts", "subPath",
    ),
    "probes that would need a client's certificate": (
        "gke-l4",
        lambda r: r.container()["env"].extend(
            {"name": f"KVLANE_HTTP_TLS_{name}_FILE", "value": f"/run/secrets/kvlane-grpc-tls/tls.{end}"}
            for name, end in (("CERT", "crt"), ("KEY", "key"), ("CLIENT_CA", "crt"))),
        ROUTER, "readinessProbe.httpGet.port", "certificate",
    ),
    "probes in plaintext of a port that speaks TLS": (
        "gke-l4",
        lambda r: r.container()["env"].extend(
            {"name": f"KVLANE_HTTP_TLS_{name}_FILE", "value": f"/run/secrets/kvlane-grpc-tls/tls.{end}"}
            for name, end in (("CERT", "crt"), ("KEY", "key"))),
        ROUTER, "readinessProbe.httpGet.scheme", "HTTPS",
    ),
    "a load balancer that cuts streams": (
        "gke-l4", lambda r: r[BACKEND]["spec"].pop("timeoutSec"), BACKEND, "spec.timeoutSec", "30",
    ),
    "a load balancer that cuts streams that were held": (
        "gke-l4", lambda r: put(1000, "spec", "timeoutSec")(r[BACKEND]), BACKEND, "spec.timeoutSec", "hold.timeout_s",
    ),
    "a Gateway's backend that cuts streams": (
        "gateway-api", lambda r: put(60, "spec", "default", "timeoutSec")(r["GCPBackendPolicy/kvlane"]),
        "GCPBackendPolicy/kvlane", "spec.default.timeoutSec", "60",
    ),
    "connection draining that is too short": (
        "gke-l4", lambda r: put(30, "spec", "connectionDraining", "drainingTimeoutSec")(r[BACKEND]),
        BACKEND, "drainingTimeoutSec", "540",
    ),
    "a health check on another port": (
        "gke-l4", lambda r: put(9100, "spec", "healthCheck", "port")(r[BACKEND]),
        BACKEND, "spec.healthCheck.port", "8000",
    ),
    "a Gateway's health check on another path": (
        "gateway-api",
        lambda r: put("/", "httpHealthCheck", "requestPath")(
            r["HealthCheckPolicy/kvlane"]["spec"]["default"]["config"]),
        "HealthCheckPolicy/kvlane", "requestPath", "/readyz",
    ),
    "a Service behind a Gateway without a health check": (
        "gateway-api", lambda r: r.remove("HealthCheckPolicy/kvlane-grpc-lb"),
        "Service/kvlane-grpc-lb", "(policies)", "HealthCheckPolicy",
    ),
    "an idle timeout below the load balancer's": (
        "gke-l4", lambda r: r.toml("idle_timeout_s = 620.0", "idle_timeout_s = 60.0"),
        "ConfigMap/kvlane-config", "http.idle_timeout_s", "600",
    ),
    "a misspelt field of the configuration": (
        "gke-l4", lambda r: r.toml("idle_timeout_s", "idel_timeout_s"),
        "ConfigMap/kvlane-config", "kvlane.toml: http.idel_timeout_s", "did you mean 'idle_timeout_s'",
    ),
    "broken TOML": (
        "gke-l4", lambda r: r.toml("[grpc]", "[grpc"), "ConfigMap/kvlane-config", "kvlane.toml", "broken TOML",
    ),
    "a router that listens on loopback": (
        "gke-l4", lambda r: r.toml('[grpc]\nhost = "0.0.0.0"', "[grpc]"),
        "ConfigMap/kvlane-config", "grpc.host", "loopback",
    ),
    "a variable that is no field": (
        "gke-l4",
        lambda r: (
            put('[http]\nhost = "0.0.0.0"', "data", "kvlane.toml")(r["ConfigMap/kvlane-config"]),
            r.container()["env"].append({"name": "KVLANE_HTTP_PROT", "value": "1"}),
        ),
        "ConfigMap/kvlane-config", "KVLANE_HTTP_PROT", "KVLANE_HTTP_PORT",
    ),
    "another Ray cluster's address": (
        "gke-l4", lambda r: r.toml("kvlane-ray-head-svc:6379", "ray-head-svc:6379"),
        "ConfigMap/kvlane-config", "membership.ray_address", "kvlane-ray-head-svc:6379",
    ),
    "Ray without a token": (
        "gke-l4", lambda r: r[RAY]["spec"].pop("authOptions"), RAY, "spec.authOptions.mode", "token",
    ),
    "another version of Ray": (
        "gke-l4", lambda r: put("2.40.0", "spec", "rayVersion")(r[RAY]), RAY, "spec.rayVersion", "2.40.0",
    ),
    "fewer GPUs than engines may want": (
        "gke-l4", lambda r: put(4, "maxReplicas")(r.worker()), RAY, "spec.workerGroupSpecs", "4 GPUs at most",
    ),
    "pods without the GPUs of a replica": (
        "gke-h100", lambda r: r.toml("tensor_parallel_size = 4", "tensor_parallel_size = 16"),
        "ConfigMap/kvlane-config", "engines.0", "16 GPUs",
    ),
    "another Ray port than the policies name": (
        "gke-l4", lambda r: put("7000", "rayStartParams", "object-manager-port")(r.worker()),
        RAY, "object-manager-port", "6382",
    ),
    "an option that `ray start` does not have": (
        "gke-l4", lambda r: put("6382", "rayStartParams", "object-manger-port")(r.worker()),
        RAY, "rayStartParams.object-manger-port", "no such option",
    ),
    "an image that is not pinned": (
        "gke-l4", lambda r: put("example.invalid/kvlane/router", "image")(r.container()),
        ROUTER, "containers.0.image", "not pinned",
    ),
    "an image with a moving tag": (
        "gke-l4", lambda r: put("example.invalid/kvlane/router:latest", "image")(r.container(JOB)),
        JOB, "containers.0.image", "latest",
    ),
    "no memory limit": (
        "gke-l4", lambda r: r.container()["resources"]["limits"].pop("memory"),
        ROUTER, "resources.limits.memory", "missing",
    ),
    "a container that may become root": (
        "gke-l4", lambda r: put(True, "securityContext", "allowPrivilegeEscalation")(r.container()),
        ROUTER, "securityContext.allowPrivilegeEscalation", "false",
    ),
    "a pod that runs as root": (
        "gke-l4", lambda r: r.pod()["securityContext"].pop("runAsNonRoot"),
        ROUTER, "securityContext.runAsNonRoot", "true",
    ),
    "a root file system that can be written": (
        "gke-l4",
        lambda r: r.worker()["template"]["spec"]["containers"][0]["securityContext"].pop("readOnlyRootFilesystem"),
        RAY, "securityContext.readOnlyRootFilesystem", "true",
    ),
    "no /tmp beside a read-only root": (
        "gke-l4", lambda r: put("/scratch", "volumeMounts", 2, "mountPath")(r.container()),
        ROUTER, "volumeMounts", "/tmp",
    ),
    "a token of the Kubernetes API that nobody needs": (
        "gke-l4", lambda r: r.pod().pop("automountServiceAccountToken"),
        ROUTER, "automountServiceAccountToken", "false",
    ),
    "service links": ("gke-l4", lambda r: r.pod().pop("enableServiceLinks"), ROUTER, "enableServiceLinks", "KVLANE_"),
    "a secret in the clear": (
        "gke-l4", lambda r: r.container()["env"].append({"name": "RAY_AUTH_TOKEN", "value": "abc"}),
        ROUTER, "containers.0.env", "RAY_AUTH_TOKEN",
    ),
    "a Secret that nobody makes": (
        "gke-l4", lambda r: put("ray-token", "spec", "authOptions", "secretName")(r[RAY]),
        RAY, "spec.authOptions.secretName", "ray-token",
    ),
    "a Secret's key that nobody makes": (
        "multi-tenant", lambda r: next(each for each in r.container()["env"] if "AUTH_KEYS" in each["name"]).update(
            value="/run/secrets/kvlane-api-keys/keys.json", name="KEYS_FILE"),
        ROUTER, "containers.0.env", "keys.json",
    ),
    "a ConfigMap that is not there": (
        "gke-l4", lambda r: r.remove("ConfigMap/kvlane-config"), ROUTER, "volumes", "ConfigMap/kvlane-config",
    ),
    "a priority class that is not there": (
        "gke-l4", lambda r: r.remove("PriorityClass/kvlane-router"), ROUTER, "priorityClassName", "kvlane-router",
    ),
    "TLS files that are not mounted where engines run": (
        "multi-tenant",
        lambda r: [
            mount.update(mountPath="/elsewhere")
            for mount in r.worker()["template"]["spec"]["containers"][0]["volumeMounts"]
            if mount["name"] == "lane-tls"
        ],
        "ConfigMap/kvlane-config", "engines.0.lane_tls", "nothing mounted",
    ),
    "an autoscaler of nothing": (
        "gke-l4", lambda r: put("router", "spec", "scaleTargetRef", "name")(r["HorizontalPodAutoscaler/kvlane-router"]),
        "HorizontalPodAutoscaler/kvlane-router", "spec.scaleTargetRef", "Deployment/router",
    ),
    "replicas that fight the autoscaler": (
        "gke-l4", lambda r: put(3, "spec", "replicas")(r[ROUTER]), ROUTER, "spec.replicas", "undo",
    ),
    "an autoscaler by a metric that nobody has": (
        "gke-l4",
        lambda r: put("prometheus.googleapis.com|kvlane_streams|gauge", "spec", "metrics", 0, "pods", "metric", "name")(
            r["HorizontalPodAutoscaler/kvlane-router"]),
        "HorizontalPodAutoscaler/kvlane-router", "metric.name", "kvlane_streams",
    ),
    "a budget of nothing": (
        "gke-l4",
        lambda r: put("r", "spec", "selector", "matchLabels", "app.kubernetes.io/component")(
            r["PodDisruptionBudget/kvlane-router"]),
        "PodDisruptionBudget/kvlane-router", "spec.selector", "no pod",
    ),
    "a budget that lets no node be drained": (
        "gke-l4",
        lambda r: r["PodDisruptionBudget/kvlane-router"].update(
            spec={"minAvailable": 2, "selector": {"matchLabels": {"app.kubernetes.io/component": "router"}}}),
        "PodDisruptionBudget/kvlane-router", "spec.minAvailable", "none may ever go",
    ),
    "a budget that does not work for a RayCluster": (
        "gke-l4",
        lambda r: r["PodDisruptionBudget/kvlane-engine"].update(
            spec={"maxUnavailable": 1, "selector": {"matchLabels": {"app.kubernetes.io/component": "engine"}}}),
        "PodDisruptionBudget/kvlane-engine", "spec", "no scale",
    ),
    "a rollout that takes routers away first": (
        "gke-l4", lambda r: put(1, "spec", "strategy", "rollingUpdate", "maxUnavailable")(r[ROUTER]),
        ROUTER, "maxUnavailable", "0",
    ),
    "a spread over other pods": (
        "gke-l4",
        lambda r: put({"matchLabels": {"a": "b"}}, "topologySpreadConstraints", 0, "labelSelector")(r.pod()),
        ROUTER, "topologySpreadConstraints.0", "own labels",
    ),
    "no default deny": (
        "gke-l4", lambda r: r.remove("NetworkPolicy/default-deny"), "NetworkPolicy/default-deny", "spec", "missing",
    ),
    "no DNS": ("gke-l4", lambda r: r.remove("NetworkPolicy/dns"), ROUTER, "labels", "port 53"),
    "a policy on a port that nobody has": (
        "gke-l4", lambda r: put("https", "spec", "ingress", 0, "ports", 0, "port")(r["NetworkPolicy/load-balancer"]),
        "NetworkPolicy/load-balancer", "spec.ingress.0.ports.0.port", "'https'",
    ),
    "a policy open to everybody": (
        "gke-l4", lambda r: r["NetworkPolicy/load-balancer"]["spec"]["ingress"][0].pop("from"),
        "NetworkPolicy/load-balancer", "spec.ingress.0.from", "everybody",
    ),
    "a load balancer that is kept out": (
        "gke-l4", lambda r: r.remove("NetworkPolicy/load-balancer"), SERVICE, "spec.ports", "35.191.0.0/16",
    ),
    "lanes that are closed at the router": (
        "gke-l4", lambda r: r.remove("NetworkPolicy/lanes-out"), ROUTER, "labels", "lane port 7100",
    ),
    "lanes whose ports a policy does not name": (
        "gke-l4", lambda r: r.toml("lane_port = 7100", "lane_port = 7200"), ROUTER, "labels", "lane port 7200",
    ),
    "lanes on any port": (
        "gke-l4", lambda r: r.toml("lane_port = 7100", ""), "ConfigMap/kvlane-config", "engines.0.lane_port", "any",
    ),
    "a router that is no Ray node for the policies": (
        "gke-l4",
        lambda r: r[ROUTER]["spec"]["template"]["metadata"]["labels"].pop("kvlane.io/ray-node"),
        ROUTER, "labels", "GCS",
    ),
    "an annotation that is no JSON": (
        "gke-l4", lambda r: put("{ingress: true}", "metadata", "annotations", NEG)(r[SERVICE]),
        SERVICE, NEG, "not a JSON object",
    ),
    "no network endpoint group": (
        "gke-l4", lambda r: r[SERVICE]["metadata"]["annotations"].pop(NEG), SERVICE, NEG, "missing",
    ),
    "a backend configuration for another port": (
        "gke-l4",
        lambda r: put('{"ports": {"web": "kvlane"}}', "metadata", "annotations", "cloud.google.com/backend-config")(
            r[SERVICE]),
        SERVICE, "backend-config", "'web'",
    ),
    "an Ingress to a port that is not there": (
        "gke-l4",
        lambda r: put("web", "spec", "rules", 0, "http", "paths", 0, "backend", "service", "port", "name")(r[INGRESS]),
        INGRESS, "paths.0.backend.service.port", "'web'",
    ),
    "an Ingress to a headless Service": (
        "gke-l4",
        lambda r: put("kvlane-grpc", "spec", "rules", 0, "http", "paths", 6, "backend", "service", "name")(r[INGRESS]),
        INGRESS, "paths.6.backend.service.name", "headless",
    ),
    "public metrics": (
        "gke-l4", lambda r: put("/", "spec", "rules", 0, "http", "paths", 0, "path")(r[INGRESS]),
        INGRESS, "paths.0.path", "public",
    ),
    "a host without a certificate": (
        "gke-l4", lambda r: put("llm.example.org", "spec", "rules", 0, "host")(r[INGRESS]),
        INGRESS, "spec.rules.0.host", "ManagedCertificate",
    ),
    "a certificate that is not there": (
        "gke-l4", lambda r: r.remove("ManagedCertificate/kvlane"), INGRESS, "managed-certificates", "kvlane",
    ),
    "gRPC through a load balancer without TLS to the pod": (
        "gke-l4",
        lambda r: put([each for each in r.container()["env"] if "TLS" not in each["name"]], "env")(r.container()),
        ROUTER, "containers.0.env", "grpc.tls_cert_file",
    ),
    "a route on a listener that is not there": (
        "gateway-api", lambda r: put("tls", "spec", "parentRefs", 0, "sectionName")(r["HTTPRoute/kvlane"]),
        "HTTPRoute/kvlane", "sectionName", "'tls'",
    ),
    "a route for a host that the listener does not have": (
        "gateway-api", lambda r: put(["x.example.com"], "spec", "hostnames")(r["GRPCRoute/kvlane"]),
        "GRPCRoute/kvlane", "spec.hostnames", "no request gets here",
    ),
    "a route to a port that is not there": (
        "gateway-api", lambda r: put(8000, "spec", "rules", 0, "backendRefs", 0, "port")(r["HTTPRoute/kvlane"]),
        "HTTPRoute/kvlane", "backendRefs.0.port", "8000",
    ),
    "scrapes of a port that is not there": (
        "gke-l4", lambda r: put("metrics", "spec", "endpoints", 0, "port")(r["PodMonitoring/kvlane-router"]),
        "PodMonitoring/kvlane-router", "spec.endpoints.0.port", "'metrics'",
    ),
    "an alert on a metric that nobody has": (
        "gke-l4",
        lambda r: put("kvlane_stream_count > 1", "spec", "groups", 0, "rules", 0, "expr")(r["Rules/kvlane"]),
        "Rules/kvlane", "spec.groups.0.rules.0.expr", "kvlane_stream",
    ),
    "an alert that nobody knows what to do about": (
        "gke-l4", lambda r: put("KvlaneOdd", "spec", "groups", 0, "rules", 0, "alert")(r["Rules/kvlane"]),
        "Rules/kvlane", "spec.groups.0.rules.0.alert", "KvlaneOdd",
    ),
    "an object in another namespace": (
        "gke-l4", lambda r: put("default", "metadata", "namespace")(r[SERVICE]),
        SERVICE, "metadata.namespace", "'default'",
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("mistake", SEEDS)
def test_a_mistake_is_found_and_named(mistake: str) -> None:
    overlay, edit, label, field, words = SEEDS[mistake]
    rendering = Rendering(overlay)
    edit(rendering)
    found = rendering.find()
    named = [each for each in found if each.object == label and field in each.field + each.message]
    assert any(words in str(each) for each in named), [str(each) for each in found]


def test_the_command_tells_what_it_found_and_fails(tmp_path: Path) -> None:
    (tmp_path / "kustomization.yaml").write_text("resources: [service.yaml]\n")
    service = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "a"}, "spec": {"port": []}}
    (tmp_path / "service.yaml").write_text(yaml.safe_dump(service))
    done = command(str(tmp_path))
    assert done.returncode == 1
    assert f"{tmp_path.name}: Service/a: spec: " in done.stdout
    assert "'port' was unexpected" in done.stdout


def test_the_command_says_why_it_cannot_render(tmp_path: Path) -> None:
    done = command(str(tmp_path))
    assert done.returncode == 2
    assert "kustomization" in done.stderr


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "k8s.check", *arguments]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


def test_without_the_tool_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(render.RenderError, match="kubectl"):
        render.render(OVERLAYS / "gke-l4")


def test_every_custom_kind_that_is_used_has_a_schema_with_its_source() -> None:
    for file in (ROOT / "k8s/check/schemas").glob("*.yaml"):
        for part in yaml.safe_load_all(file.read_text()):
            assert set(part) == {"source", "licence", "apiVersion", "kinds"}, file


@pytest.mark.parametrize("version", schemas.VERSIONS)
def test_schemas_are_closed(version: str) -> None:
    odd = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "a", "lables": {}}, "data": {}}
    found = list(schemas.check(Objects([Object(odd)])))
    assert [each.field for each in found] == ["metadata"], version
    assert "lables" in found[0].message


def test_secrets_and_alerts_are_read_off_the_documentation() -> None:
    known = rules.documented(
        "create secret generic one --from-file=a=/dev/stdin\ncreate secret tls two --cert=x\n### KvlaneThing\nKvlaneX",
        "| `kvlane_a_total{x}`, `kvlane_b` | what |",
    )
    assert known.secrets == {"one/a", "two/tls.crt", "two/tls.key"}
    assert known.metrics == {"kvlane_a_total", "kvlane_b"}
    assert known.alerts == {"KvlaneThing"}


@pytest.mark.parametrize(
    ("selector", "selected"),
    [
        ({}, True),
        ({"matchLabels": {"a": "1"}}, True),
        ({"matchLabels": {"a": "2"}}, False),
        ({"matchExpressions": [{"key": "a", "operator": "In", "values": ["1", "2"]}]}, True),
        ({"matchExpressions": [{"key": "a", "operator": "NotIn", "values": ["1"]}]}, False),
        ({"matchExpressions": [{"key": "b", "operator": "Exists"}]}, False),
        ({"matchExpressions": [{"key": "b", "operator": "DoesNotExist"}]}, True),
    ],
)
def test_selectors_are_read_as_kubernetes_reads_them(selector: dict[str, Any], selected: bool) -> None:
    assert matches(selector, {"a": "1"}) is selected


def test_the_deploy_job_gives_ray_options_that_it_has() -> None:
    from ray.scripts import scripts

    known = {option for param in scripts.start.params for option in param.opts}
    script = Rendering("gke-l4").container(JOB)["command"][-1]
    given = dict(word.partition("=")[::2] for word in script.split() if word.startswith("--") and word != "--config")
    assert given.keys() <= known
    assert {name: given[f"--{name}"] for name in settings.NODE_PORTS} == settings.NODE_PORTS
    assert given["--labels"] == f"{node_address.ROLE}={node_address.ROUTER}"


def test_cpus_are_read_as_kubernetes_reads_them() -> None:
    assert [settings.cpus(text) for text in ("500m", "2", 3, "0.5")] == [0.5, 2, 3, 0.5]
