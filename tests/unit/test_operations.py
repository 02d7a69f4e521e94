"""docs/operations.md: its commands work as far as no cluster is needed, and its links and alerts are true."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from k8s.check import render, rules
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


def test_the_certificate_is_made_as_the_page_says(tmp_path: Path) -> None:
    block = next(each for each in re.findall(r"```\n(.*?)```", PAGE, re.DOTALL) if "openssl req" in each)
    line = re.search(r"^openssl req(?:.*\\\n)*.*$", block, re.MULTILINE)
    assert line
    subprocess.run(["sh", "-ec", line[0]], cwd=tmp_path, check=True, timeout=60, capture_output=True)
    assert {path.name for path in tmp_path.iterdir()} == {"tls.key", "tls.crt"}


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


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`(k8s/[\w/.-]+)`", PAGE))))
def test_every_file_that_the_page_names_is_there(path: str) -> None:
    assert (ROOT / path).exists()


def test_every_make_target_that_the_page_names_is_there() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"\bmake ([a-z0-9-]+)", PAGE)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
