"""What the tests of the manifests share: renderings, and edits of them."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from k8s.check import render, rules
from k8s.check.objects import Finding, Object

ROOT = Path(__file__).resolve().parents[2]
OVERLAYS = ROOT / "k8s" / "overlays"
NAMES = sorted(path.name for path in OVERLAYS.iterdir())

needs_kustomize = pytest.mark.skipif(render.tool() is None, reason=f"MANIFESTS NOT CHECKED: {render.HOW_TO_INSTALL}")


@cache
def _rendered(name: str) -> list[Object]:
    return render.render(OVERLAYS / name)


class Rendering:
    """The objects of one overlay, to be edited."""

    def __init__(self, name: str) -> None:
        self._objects = copy.deepcopy(_rendered(name))

    def __getitem__(self, label: str) -> Any:
        """The object ``Kind/name``, as YAML has it."""
        return next(each for each in self._objects if each.label == label).raw

    def pod(self, label: str = "Deployment/kvlane-router") -> Any:
        return self[label]["spec"]["template"]["spec"]

    def container(self, label: str = "Deployment/kvlane-router") -> Any:
        return self.pod(label)["containers"][0]

    def worker(self) -> Any:
        return self["RayCluster/kvlane-ray"]["spec"]["workerGroupSpecs"][0]

    def toml(self, old: str, new: str) -> None:
        data = self["ConfigMap/kvlane-config"]["data"]
        assert old in data["kvlane.toml"]
        data["kvlane.toml"] = data["kvlane.toml"].replace(old, new)

    def remove(self, label: str) -> None:
        self._objects = [each for each in self._objects if each.label != label]

    def add(self, raw: dict[str, Any]) -> None:
        self._objects.append(Object(raw))

    def find(self) -> list[Finding]:
        """What the check says of it."""
        return rules.check(self._objects, rules.our_documentation())
