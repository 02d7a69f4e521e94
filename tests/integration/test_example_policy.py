"""The example plugin as a user would take it: installed by pip, found by name, and choosing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from loadtests.processes import MODEL, engines, router
from tests.integration.ray_local import wait_until

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "docs" / "examples" / "kvlane-policy-example"
DEADLINE_S = 120

pytestmark = pytest.mark.slow

CHOOSE = """
import json, random
from router.policies import registry
from router.testing import make_request, make_snapshot

policy = registry.create("sticky-session", {"max_lead": 3}, random.Random(1))
decide = lambda depths: policy.choose(make_request(session_id="session-1"), make_snapshot(depths)).replica
home = decide([0, 0, 0, 0])
busy = [4 if home == f"replica-{index}" else 0 for index in range(4)]
print(json.dumps({
    "installed": {spec.name: spec.dist for spec in registry.installed()},
    "home": home, "again": decide([3, 3, 3, 3]), "when_busy": decide(busy),
}))
"""

REFUSED = """
from router.config import load
load(None, env={}, flags={"policy.name": "sticky-session", "policy.options.max_led": 3})
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the example in it, installed from a copy so that the build leaves nothing in the tree."""
    directory = tmp_path_factory.mktemp("example")
    ignored = shutil.ignore_patterns("build", "*.egg-info", "__pycache__")
    source = shutil.copytree(EXAMPLE, directory / "source", ignore=ignored)
    target = directory / "site"
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check", "--quiet"]
    run([sys.executable, "-m", "pip", "install", *options, "--target", str(target), str(source)])
    return target


def run(command: list[str], site: Path | None = None, *, fails: bool = False) -> str:
    """What the command prints, both streams."""
    env = {**os.environ, "PYTHONPATH": str(site)} if site else None
    out = subprocess.PIPE
    done = subprocess.run(
        command, env=env, cwd=ROOT, stdout=out, stderr=out, text=True, timeout=DEADLINE_S, check=False
    )
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_the_installed_example_is_listed_created_by_name_and_chooses(site: Path) -> None:
    told = json.loads(run([sys.executable, "-c", CHOOSE], site))
    assert told["installed"]["sticky-session"] == "kvlane-policy-example 0.1.0"
    assert told["installed"]["power-of-two"].startswith("kvlane ")
    assert told["again"] == told["home"]
    assert told["when_busy"] != told["home"]


def test_the_installed_examples_options_are_checked_as_the_built_ins_are(site: Path) -> None:
    told = run([sys.executable, "-c", REFUSED], site, fails=True)
    assert "policy.options.max_led: unknown field; did you mean 'max_lead'?" in told


def test_the_examples_own_tests_and_the_conformance_suite_pass(site: Path) -> None:
    tests = [str(EXAMPLE / "tests"), str(ROOT / "tests" / "conformance" / "test_policies.py")]
    told = run([sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-v", *tests], site)
    assert "test_it_keeps_the_promises_of_every_policy PASSED" in told
    assert "[sticky-session-{}] PASSED" in told


def test_the_installed_example_routes_requests_in_a_router_that_names_it(site: Path) -> None:
    with (
        engines(3, {"step_base_ms": 1.0}) as (_, addresses),
        router(addresses, "sticky-session", env={"PYTHONPATH": str(site)}) as (_, http, _),
        httpx.Client(base_url=f"http://127.0.0.1:{http}", timeout=DEADLINE_S) as client,
    ):
        wait_until(lambda: client.get("/readyz").json()["models"] == {MODEL: 3}, "all replicas are ready")
        homes = {}
        for session in (f"session-{index}" for index in range(12)):
            routes = [ask(client, session) for _ in range(4)]
            assert {route["policy"] for route in routes} == {"sticky-session"}
            (homes[session],) = {route["replica"] for route in routes}
        assert set(homes.values()) == {address["replica"] for address in addresses}


def ask(client: httpx.Client, session: str) -> dict[str, str]:
    """The receipt of one completion of that session."""
    body = {"model": MODEL, "prompt": "hello", "max_tokens": 2}
    response = client.post("/v1/completions", json=body, headers={"x-session-id": session})
    assert response.status_code == 200, response.text
    return dict(field.split("=", 1) for field in response.headers["x-kvlane-route"].split(";"))
