"""Dependencies point one way: stages meet in seams, only `dispatch` and `replicas` join them, only `app` constructs.

The table below is the rule. A new module needs a line only where it is no part of a stage; a stage that needs more than
the shared words, the seams and itself needs a reason here.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {"router": ROOT / "router", "engine": ROOT / "engine", "kvlane": ROOT / "protos" / "kvlane"}

WORDS = {"router.types", "router.errors", "router.options", "router.compiled"}
SEAMS = {
    "router.ingress.base",
    "router.policies.base",
    "router.membership.base",
    "router.lane.frames",
    "router.lane.carriers",
}
STAGES = {
    "router.ingress",
    "router.policies",
    "router.membership",
    "router.lane",
    "router.admission",
    "router.prefix",
    "router.load",
    "router.observe",
}
SUPERVISION = {"router.control", "router.listeners", "router.observe.merge", "router.observe.workers"}
# What a module or package may import of ours beyond itself; the longest name that fits a module counts. A name stands
# for all that is in it.
ALLOWED: dict[str, set[str]] = {
    # Shared words and what checks them.
    "router.types": {"router.replica_view", "router.prefix_view"},
    "router.replica_view": set(),
    "router.prefix_view": set(),
    "router.errors": set(),
    "router.options": set(),
    "router.compiled": {"router.errors"},
    "router.fields": set(),
    "router.turns": set(),
    "router.protobuf": set(),
    "router.keys": {"router.errors"},
    "router.files": {"router.errors"},
    "router.ray_private": {"router.errors"},
    # Stages.
    **dict.fromkeys(STAGES, WORDS | SEAMS),
    "router.ingress": WORDS
    | SEAMS
    | {"router.keys", "router.turns", "router.protobuf", "kvlane.v1"}  # gRPC's messages.
    | {"router.lane.relay"},  # The short way of a step, from the lane to the client.
    "router.prefix": WORDS | SEAMS | {"router.protobuf", "kvlane.v1"},  # gRPC's prompts.
    "router.policies": WORDS | SEAMS | {"router.fields"},  # The registry checks options.
    "router.policies.ray_policy": WORDS | SEAMS | {"router.ray_driver"},
    "router.membership": WORDS | SEAMS | {"router.ray_private"},
    "router.lane": WORDS
    | SEAMS
    | {"router.ray_private"}  # The actor carrier calls replicas through Ray.
    | {"router.load.account"},
    "router.observe": WORDS
    | SEAMS
    | {
        "router.admission",
        "router.holding",
        "router.prefix.prefixes",
        "router.replicas",
        "router.turns",
    },  # It reads their figures.
    # Where stages meet.
    "router.replica_life": set(),
    "router.pool": WORDS | SEAMS | {"router.lane.client", "router.load"},
    "router.replicas": WORDS
    | SEAMS
    | {"router.lane.client", "router.lane.meter", "router.lane.troubles", "router.load", "router.pool"}
    | {"router.replica_life"},
    "router.wake": set(),
    "router.holding": WORDS,
    "router.hold": WORDS | {"router.holding", "router.wake"},
    "router.receipts": WORDS | SEAMS,
    "router.dispatch": WORDS
    | SEAMS
    | {"router.admission", "router.hold", "router.prefix", "router.receipts", "router.replicas", "router.turns"},
    "router.app": {"router"},
    # Where policies and Ray Serve's request routers meet.
    "router.ray_requests": WORDS | {"kvlane.v1"},
    "router.ray_driver": WORDS | {"router.ray_requests", "router.ray_private"},
    "router.ray_pool": WORDS | {"router.fields", "router.policies", "router.prefix.prefixes", "router.ray_requests"},
    "router.ray_router": {"router.ray_pool", "router.ray_private"},
    # Around the router.
    "router.schedule": WORDS,
    "router.config": WORDS | {"router.fields", "router.policies.registry", "router.schedule"},
    "router.reference": {"router.config", "router.fields"},
    "router.testing": WORDS | SEAMS,
    "router.garbage": set(),
    "router.signals": set(),
    "router.watched": set(),
    # A supervisor and its workers.
    "router.control": WORDS | {"router.observe.merge"},
    "router.listeners": WORDS,
    "router.worker_process": WORDS | SUPERVISION,
    "router.generation": WORDS | SUPERVISION | {"router.worker_process"},
    "router.supervisor": WORDS
    | SUPERVISION
    | {"router.generation", "router.signals", "router.watched", "router.worker_process"},
    "router.serving": WORDS | {"router.app", "router.control", "router.garbage", "router.signals"},
    "router.node": WORDS | {"router.membership.node_address"},
    "router.workers": WORDS
    | {"router.control", "router.listeners", "router.node", "router.serving", "router.signals", "router.supervisor"}
    | {"router.watched"},
    "router.demo": {"kvlane"},
    "router.up": WORDS
    | {"router.app", "router.control", "router.demo", "router.ray_private", "engine.deployment"}
    | {"router.membership.base", "router.membership.directory", "router.membership.directory_client"},
    "router.__main__": WORDS
    | {
        "router.config",
        "router.fields",
        "router.keys",
        "router.policies.registry",
        "router.up",
        "router.watched",
        "router.workers",
    },
    # The other side of the lane: what travels on it, and how a replica makes itself known.
    "engine": {
        *WORDS,
        "router.lane.frames",
        "router.lane.carriers",
        "router.lane.pipes",
        "router.lane.tls",
        "router.membership.base",
        "router.membership.directory",
        "router.membership.directory_client",
        "router.ray_private",
        "router.schedule",
        "router.prefix.canonical",  # Both sides hash prompts alike.
        "router.prefix.hashing",
        "kvlane.v1",
    },
    # Clients install it alone.
    "kvlane": set(),
}


def modules() -> dict[str, Path]:
    """All our modules by name, generated code left out."""
    found = {}
    for package, directory in PACKAGES.items():
        for path in directory.rglob("*.py"):
            parts = path.relative_to(directory).with_suffix("").parts
            name = ".".join((package, *(parts[:-1] if parts[-1] == "__init__" else parts)))
            if not name.endswith(("_pb2", "_pb2_grpc")):
                found[name] = path
    return dict(sorted(found.items()))


MODULES = modules()


def imports(name: str, source: str, known: set[str], *, is_package: bool = False) -> Iterator[str]:
    """Our modules that a module's source imports, wherever in it the import stands."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = name.split(".")
                parents = parts[: len(parts) - node.level + is_package]
                base = ".".join([*parents, *filter(None, [node.module])])
            inside = [f"{base}.{alias.name}" for alias in node.names]
            targets = [target if target in known else base for target in inside]
        else:
            continue
        yield from (target for target in targets if target.split(".")[0] in PACKAGES)


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def rule_of(name: str) -> str | None:
    """The table's longest name that the module is in."""
    return max((rule for rule in ALLOWED if within(name, rule)), key=len, default=None)


def trespasses(name: str, source: str, known: set[str], *, is_package: bool = False) -> list[str]:
    """What the module imports and must not."""
    rule = rule_of(name)
    if rule is None:
        return ["it has no line in the table"]
    may = ALLOWED[rule] | {rule}
    return [
        target
        for target in imports(name, source, known, is_package=is_package)
        if not any(within(target, allowed) for allowed in may)
    ]


@pytest.mark.parametrize("name", [name for name in MODULES if name != "router"])
def test_a_module_imports_only_what_its_place_allows(name: str) -> None:
    path = MODULES[name]
    found = trespasses(name, path.read_text(), set(MODULES), is_package=path.stem == "__init__")
    assert not found, f"{name} must not import {', '.join(found)}"


def test_the_packages_themselves_import_nothing_of_ours() -> None:
    for package, directory in PACKAGES.items():
        assert not list(imports(package, (directory / "__init__.py").read_text(), set(MODULES), is_package=True))


def test_no_module_imports_itself_around_a_circle() -> None:
    known = set(MODULES)
    graph = {
        name: set(imports(name, path.read_text(), known, is_package=path.stem == "__init__")) & known
        for name, path in MODULES.items()
    }
    while ends := [name for name, targets in graph.items() if not targets]:
        for name in ends:
            del graph[name]
        for targets in graph.values():
            targets.difference_update(ends)
    assert not graph, f"import circles among {', '.join(graph)}"


def test_the_table_names_seams_that_are_there() -> None:
    assert set(MODULES) >= WORDS | SEAMS


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("router.types", "from router.errors import KvlaneError"),
        ("router.policies.mine", "from router.lane.client import Lane"),
        ("router.policies.mine", "def f():\n    import router.lane.client"),
        ("router.policies.mine", "from router.lane import client"),
        ("router.policies.mine", "from ..lane import client"),
        ("router.lane.client", "from router.policies import registry"),
        ("router.dispatch", "from router.lane.client import Lane"),
        ("router.ingress.http", "from router import app"),
        ("router.admission", "from router.ingress.http import HttpIngress"),
        ("engine.vllm", "from router.dispatch import Dispatcher"),
        ("kvlane.client", "from router.types import Request"),
        ("router.newcomer", ""),
    ],
)
def test_the_check_finds_what_must_not_be(name: str, source: str) -> None:
    assert trespasses(name, source, set(MODULES) | {"router.lane.client"})


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("router.policies.mine", "from router.types import Decision\nfrom .base import NoOptions\nimport msgspec"),
        ("router.lane.client", "from router.lane import frames\nfrom router.membership.base import ReplicaRecord"),
        ("router.dispatch", "from router.policies.base import Policy\nfrom router.replicas import Replicas"),
        ("router.app", "from router.ingress.http import HttpIngress\nfrom router.dispatch import Dispatcher"),
        ("engine.vllm", "from engine.base import StreamOut\nfrom router.lane.frames import Submit"),
    ],
)
def test_the_check_lets_the_flow_of_data_be(name: str, source: str) -> None:
    assert not trespasses(name, source, set(MODULES))
