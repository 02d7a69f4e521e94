"""Renders a Kustomize directory with the tool that applies it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import yaml

from k8s.check.objects import Object

TIMEOUT_S = 120.0
HOW_TO_INSTALL = (
    "neither kubectl (1.27 or later) nor kustomize (5.0 or later) is on the PATH: install one, "
    "for example as kubernetes.io/docs/tasks/tools/install-kubectl-linux says"
)


class RenderError(Exception):
    """The directory cannot be rendered; the text says why."""


def tool() -> list[str] | None:
    """The command line that renders, without the directory; None where there is no such tool."""
    if shutil.which("kubectl"):
        return ["kubectl", "kustomize"]
    return ["kustomize", "build"] if shutil.which("kustomize") else None


def render(directory: Path) -> list[Object]:
    """The objects of a Kustomize directory. Raises `RenderError`."""
    command = tool()
    if command is None:
        raise RenderError(HOW_TO_INSTALL)
    done = subprocess.run([*command, str(directory)], capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    if done.returncode:
        raise RenderError(done.stderr.strip())
    return parse(done.stdout)


def parse(text: str) -> list[Object]:
    """The objects of a YAML stream."""
    return [Object(each) for each in yaml.load_all(text, yaml.CSafeLoader) if each]
