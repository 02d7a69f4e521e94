"""What a rendering holds, as the rules look at it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple


class Finding(NamedTuple):
    """Something wrong, and where."""

    object: str
    """``Kind/name``."""
    field: str
    """Dotted path in it."""
    message: str

    def __str__(self) -> str:
        return f"{self.object}: {self.field}: {self.message}"


class Object(NamedTuple):
    """One Kubernetes object, as YAML has it."""

    raw: Mapping[str, Any]

    @property
    def api(self) -> str:
        return str(self.raw.get("apiVersion", ""))

    @property
    def kind(self) -> str:
        return str(self.raw.get("kind", ""))

    @property
    def name(self) -> str:
        return str(self.at("metadata.name") or "")

    @property
    def label(self) -> str:
        return f"{self.kind}/{self.name}"

    def at(self, path: str, default: Any = None) -> Any:
        """The value at a dotted path, numbers being places in lists; `default` where there is none."""
        return dig(self.raw, path, default)

    def annotation(self, name: str) -> str:
        return str((self.at("metadata.annotations") or {}).get(name, ""))

    def finding(self, field: str, message: str) -> Finding:
        return Finding(self.label, field, message)


class Container(NamedTuple):
    """A container of a pod template."""

    pod: Pod
    path: str
    raw: Mapping[str, Any]

    @property
    def ports(self) -> dict[str, int]:
        return {str(port.get("name", "")): int(port["containerPort"]) for port in self.raw.get("ports") or ()}

    @property
    def words(self) -> list[str]:
        """Its command line."""
        return [str(word) for word in (*(self.raw.get("command") or ()), *(self.raw.get("args") or ()))]

    @property
    def env(self) -> dict[str, str]:
        """Variables with a literal value."""
        return {item["name"]: str(item["value"]) for item in self.raw.get("env") or () if "value" in item}

    @property
    def mounts(self) -> dict[str, str]:
        """Path to the volume's name."""
        return {mount["mountPath"]: mount["name"] for mount in self.raw.get("volumeMounts") or ()}

    def finding(self, field: str, message: str) -> Finding:
        return self.pod.owner.finding(f"{self.path}.{field}", message)


class Pod(NamedTuple):
    """A pod template and the object that it stands in."""

    owner: Object
    path: str
    template: Mapping[str, Any]

    @property
    def labels(self) -> Mapping[str, str]:
        return dig(self.template, "metadata.labels") or {}

    @property
    def spec(self) -> Mapping[str, Any]:
        return self.template.get("spec") or {}

    @property
    def containers(self) -> list[Container]:
        path = f"{self.path}.spec.containers"
        return [Container(self, f"{path}.{at}", raw) for at, raw in enumerate(self.spec.get("containers") or ())]

    @property
    def ports(self) -> dict[str, int]:
        return {name: port for container in self.containers for name, port in container.ports.items()}

    @property
    def volumes(self) -> Mapping[str, Mapping[str, Any]]:
        return {volume["name"]: volume for volume in self.spec.get("volumes") or ()}

    def finding(self, field: str, message: str) -> Finding:
        return self.owner.finding(f"{self.path}.spec.{field}", message)


class Objects:
    """All objects of one rendering."""

    def __init__(self, objects: list[Object]) -> None:
        self._objects = objects

    def __iter__(self) -> Iterator[Object]:
        return iter(self._objects)

    def of(self, *kinds: str) -> list[Object]:
        return [each for each in self._objects if each.kind in kinds]

    def find(self, kind: str, name: str) -> Object | None:
        return next((each for each in self.of(kind) if each.name == name), None)

    @cached_property
    def pods(self) -> list[Pod]:
        return [pod for each in self._objects for pod in _pods(each)]

    def selected(self, selector: Mapping[str, Any]) -> list[Pod]:
        """The pods that a label selector (`matchLabels`, `matchExpressions`) selects; an empty one selects all."""
        return [pod for pod in self.pods if matches(selector, pod.labels)]

    @property
    def routers(self) -> list[Container]:
        """Containers that run ``kvlane serve``."""
        return [each for pod in self.pods for each in pod.containers if _runs(each.words, "serve")]

    @property
    def clusters(self) -> list[Object]:
        return self.of("RayCluster")


def _runs(words: list[str], command: str) -> bool:
    return any(word.endswith("kvlane") and after == command for word, after in pairwise(words))


def _pods(owner: Object) -> Iterator[Pod]:
    if owner.kind == "RayCluster":
        yield Pod(owner, "spec.headGroupSpec.template", owner.at("spec.headGroupSpec.template") or {})
        for at, group in enumerate(owner.at("spec.workerGroupSpecs") or ()):
            yield Pod(owner, f"spec.workerGroupSpecs.{at}.template", group.get("template") or {})
    elif owner.kind == "Pod":
        yield Pod(owner, "", owner.raw)
    elif owner.kind == "CronJob":
        path = "spec.jobTemplate.spec.template"
        yield Pod(owner, path, owner.at(path) or {})
    elif owner.at("spec.template") and owner.kind in ("Deployment", "StatefulSet", "DaemonSet", "Job", "ReplicaSet"):
        yield Pod(owner, "spec.template", owner.at("spec.template"))


def dig(raw: Any, path: str, default: Any = None) -> Any:
    for step in path.split("."):
        if isinstance(raw, Mapping) and step in raw:
            raw = raw[step]
        elif isinstance(raw, list) and step.isdigit() and int(step) < len(raw):
            raw = raw[int(step)]
        else:
            return default
    return raw


def matches(selector: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    """Whether a label selector selects these labels."""
    wanted = selector.get("matchLabels") or {}
    expressions = selector.get("matchExpressions") or ()
    return all(labels.get(key) == value for key, value in wanted.items()) and all(
        _holds(expression, labels) for expression in expressions
    )


def _holds(expression: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    key, values = expression["key"], expression.get("values") or ()
    match expression["operator"]:
        case "In":
            return labels.get(key) in values
        case "NotIn":
            return labels.get(key) not in values
        case "Exists":
            return key in labels
        case _:
            return key not in labels
