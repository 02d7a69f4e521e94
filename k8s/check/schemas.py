"""Strict schemas: of Kubernetes' own objects, and of the custom ones under ``schemas/``.

Unknown fields are refused everywhere, as the API server does for `kubectl apply --validate=strict`. Kubernetes' schemas
come from the package `kubernetes-validate`; the custom ones are the published ones without their descriptions.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft202012Validator
from jsonschema.exceptions import ValidationError
from referencing import Registry, Resource

from k8s.check.objects import Finding, Object, Objects

VERSIONS = ("1.32", "1.35")
"""Kubernetes versions that the manifests are for: the oldest, and a recent one."""
_CUSTOM = Path(__file__).with_name("schemas")
_BASE = "https://kubernetes.io"
_OWN_GROUPS = ("apps", "autoscaling", "batch", "policy")


def check(objects: Objects) -> Iterator[Finding]:
    """What the schemas refuse."""
    seen = set[tuple[str, str, str]]()
    for each in objects:
        key = (each.kind, str(each.at("metadata.namespace") or ""), each.name)
        if key in seen:
            yield each.finding("metadata.name", "there is another object of this kind and name")
        seen.add(key)
        if not each.name:
            yield each.finding("metadata.name", "missing")
        versions = VERSIONS if _is_own(each.api) else ("",)
        found = [finding for version in versions for finding in _problems(each, version)]
        yield from dict.fromkeys(found)


def _is_own(api: str) -> bool:
    """Whether Kubernetes itself has that API."""
    group = api.rpartition("/")[0]
    return not group or group in _OWN_GROUPS or (group.endswith(".k8s.io") and group != "gateway.networking.k8s.io")


def _problems(each: Object, version: str) -> Iterator[Finding]:
    validator = _own(each.api, each.kind, version) if version else _custom().get((each.api, each.kind))
    if validator is None:
        where = f"Kubernetes {version}" if version else f"k8s/check/schemas for {each.kind}"
        yield each.finding("apiVersion", f"{each.api} is not in {where}")
        return
    for error in validator.iter_errors(each.raw):
        field, message = _told(error)
        yield each.finding(field, message)


def _told(error: ValidationError) -> tuple[str, str]:
    """The field and the words of the part of a problem that says most."""
    while error.context and error.validator in ("oneOf", "anyOf"):
        error = max(error.context, key=lambda inner: len(inner.absolute_path))
    return ".".join(map(str, error.absolute_path)) or "(object)", error.message[:300]


@cache
def _own(api: str, kind: str, version: str) -> Draft202012Validator | None:
    group, _, short = api.rpartition("/")
    group = group.partition(".")[0]
    file = f"{kind}-{group}-{short}.json" if group else f"{kind}-{short}.json"
    try:
        schema = json.loads(_schemas(version).joinpath(file.lower()).read_text())
    except FileNotFoundError:
        return None
    return Draft202012Validator(schema, registry=_registry(version))


def _schemas(version: str) -> Any:
    return resources.files("kubernetes_validate").joinpath("kubernetes-json-schema", f"v{version}.0-local-strict")


@cache
def _registry(version: str) -> Registry[Any]:
    definitions = json.loads(_schemas(version).joinpath("_definitions.json").read_text())
    return Registry().with_resource(f"{_BASE}/api/_definitions.json", Resource.from_contents(definitions))


@cache
def _custom() -> Mapping[tuple[str, str], Draft202012Validator]:
    found = {}
    for file in sorted(_CUSTOM.glob("*.yaml")):
        for part in yaml.load_all(file.read_text(), yaml.CSafeLoader):
            for kind, spec in part["kinds"].items():
                schema = _object(part["apiVersion"], kind, spec)
                found[part["apiVersion"], kind] = Draft202012Validator(schema, registry=_registry(VERSIONS[0]))
    return found


def _object(api: str, kind: str, spec: Mapping[str, Any]) -> dict[str, Any]:
    meta = f"{_BASE}/api/_definitions.json#/$defs/io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta"
    return {
        "$id": f"{_BASE}/custom/{kind}",
        "type": "object",
        "required": ["apiVersion", "kind", "metadata", "spec"],
        "additionalProperties": False,
        "properties": {
            "apiVersion": {"const": api},
            "kind": {"const": kind},
            "metadata": {"$ref": meta},
            "spec": _closed({"type": "object", **spec}),
        },
    }


def _closed(schema: Any) -> Any:
    """The schema with every object in it closed to fields that it does not name."""
    if isinstance(schema, list):
        return [_closed(each) for each in schema]
    if not isinstance(schema, Mapping):
        return schema
    closed = {key: _closed(value) for key, value in schema.items()}
    if isinstance(closed.get("properties"), Mapping) and closed.get("type") == "object":
        closed.setdefault("additionalProperties", False)
    return closed
