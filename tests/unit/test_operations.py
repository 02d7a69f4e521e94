"""docs/operations.md: its commands work as far as no cluster is needed, and its links and alerts are true."""

from __future__ import annotations

import contextlib
import re
import shutil
import ssl
import subprocess
from pathlib import Path

import pytest
import yaml

from k8s.check import render, rules
from router.errors import DeadlineExceeded, Fault, KvlaneError
from router.lane.tls import LaneTls, TlsFiles
from tests.unit.kubernetes import ROOT, needs_kustomize

PAGE = (ROOT / "docs" / "operations.md").read_text()
MARK = "<!-- tried by tests/unit/test_operations.py -->\n```\n"


def slug(heading: str) -> str:
    """The anchor that a heading has."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


@needs_kustomize
def test_an_overlay_of_ones_own_is_made_as_the_page_says(tmp_path: Path) -> None:
    for part in ("k8s", "docs"):
        shutil.copytree(ROOT / part, tmp_path / part)
    block = PAGE.partition(MARK)[2].partition("\n```")[0]
    making, _, checking = block.partition("\nEND\n")
    subprocess.run(["sh", "-ec", f"{making}\nEND\n"], cwd=tmp_path, check=True, timeout=60)
    assert checking == "make k8s-check ARGS=k8s/overlays/mine"
    rendered = render.render(tmp_path / "k8s/overlays/mine")
    images = set(re.findall(r"image: (\S+)", yaml.safe_dump_all([dict(each.raw) for each in rendered])))
    assert images == {"YOUR_REPOSITORY/router:0.1.0", "YOUR_REPOSITORY/engine:0.1.0", "redis:7.4.2"}
    hosts = [each.at("spec.rules.0.host") for each in rendered if each.kind == "Ingress"]
    assert hosts == ["llm.your.domain"]
    assert rules.check(rendered, rules.our_documentation()) == []


def make_certificates(secret: str, directory: Path) -> None:
    """What the block that makes that Secret makes with openssl."""
    block = next(each for each in re.findall(r"```\n(.*?)```", PAGE, re.DOTALL) if f" {secret} " in each)
    lines = re.findall(r"^openssl req(?:.*\\\n)*.*$", block, re.MULTILINE)
    assert lines
    subprocess.run(["sh", "-ec", "\n".join(lines)], cwd=directory, check=True, timeout=60, capture_output=True)


def test_the_certificate_is_made_as_the_page_says(tmp_path: Path) -> None:
    make_certificates("kvlane-grpc-tls", tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"tls.key", "tls.crt"}


def test_lanes_get_certificates_as_the_page_says(tmp_path: Path) -> None:
    make_certificates("kvlane-lane-tls", tmp_path)
    files = TlsFiles(*(str(tmp_path / name) for name in ("tls.crt", "tls.key", "ca.crt")))
    server, client = LaneTls("replica", files).context(), LaneTls("router", files).context()
    there, here = ssl.MemoryBIO(), ssl.MemoryBIO()
    replica, router = server.wrap_bio(there, here, server_side=True), client.wrap_bio(here, there)
    for end in (router, replica, router, replica):  # Each says what it has to, and waits for the other.
        with contextlib.suppress(ssl.SSLWantReadError):
            end.do_handshake()
    assert router.getpeercert()
    assert replica.getpeercert()


def test_every_link_in_the_page_leads_somewhere() -> None:
    anchors = {slug(each) for each in re.findall(r"^#+ (.+)$", PAGE, re.MULTILINE)}
    anchors |= set(re.findall(r'<a id="([\w-]+)">', PAGE))
    for target in re.findall(r"\]\(([^)]+)\)", PAGE):
        path, _, anchor = target.partition("#")
        if path:
            assert (ROOT / "docs" / path).exists(), target
        else:
            assert anchor in anchors, target


def test_every_alert_has_its_section_and_every_section_its_alert() -> None:
    text = (ROOT / "k8s/components/gke-monitoring/rules.yaml").read_text()
    alerts = {rule["alert"] for group in yaml.safe_load(text)["spec"]["groups"] for rule in group["rules"]}
    assert rules.our_documentation().alerts == alerts


def test_nobody_is_woken_for_what_clients_get_wrong() -> None:
    text = (ROOT / "k8s/components/gke-monitoring/rules.yaml").read_text()
    spared = re.search(r'kvlane_requests_total\{outcome!~"([^"]+)"\}', text)
    assert spared
    pages = {each.name for each in all_errors(KvlaneError) if not re.fullmatch(spared[1], each.name)}
    others = {each.name for each in all_errors(KvlaneError) if each.fault is not Fault.CLIENT}
    assert pages == others | {DeadlineExceeded.name}


def all_errors(base: type[KvlaneError]) -> set[type[KvlaneError]]:
    found = {base}.union(*(all_errors(each) for each in base.__subclasses__()))
    return {each for each in found if each.__module__ == KvlaneError.__module__}


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`(k8s/[\w/.-]+)`", PAGE))))
def test_every_file_that_the_page_names_is_there(path: str) -> None:
    assert (ROOT / path).exists()


def test_every_make_target_that_the_page_names_is_there() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"\bmake ([a-z0-9-]+)", PAGE)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
