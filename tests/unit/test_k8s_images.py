"""The images' recipes, as far as they can be checked without building them."""

from __future__ import annotations

import fnmatch
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from tests.unit.kubernetes import ROOT

IMAGES = ROOT / "k8s" / "images"
RECIPES = sorted(path.name for path in IMAGES.glob("*.Dockerfile"))
USER = "10001"


def instructions(name: str) -> list[tuple[str, str]]:
    """Each instruction and its arguments, lines joined, comments gone."""
    text = re.sub(r"\\\n", " ", (IMAGES / name).read_text())
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in lines)]


def ignored(path: str) -> bool:
    """Whether .dockerignore keeps that path of the repository out of the build context."""
    out = False
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.strip()
        if pattern and not pattern.startswith("#"):
            bare = pattern.lstrip("!")
            if fnmatch.fnmatch(path, bare) or path.startswith(f"{bare}/"):
                out = not pattern.startswith("!")
    return out


def test_there_is_a_recipe_for_each_image() -> None:
    assert RECIPES == ["engine.Dockerfile", "router.Dockerfile"]


@pytest.mark.parametrize("name", RECIPES)
def test_what_is_copied_is_there_and_in_the_build_context(name: str) -> None:
    for word, rest in instructions(name):
        if word == "COPY" and "--from" not in rest:
            for source in rest.split()[:-1]:
                assert (ROOT / source).exists(), source
                assert not ignored(source), source


@pytest.mark.parametrize("name", RECIPES)
def test_bases_are_pinned_and_the_user_is_nobody_special(name: str) -> None:
    found = instructions(name)
    bases = [rest.split("=", 1)[1] for word, rest in found if word == "ARG"]
    assert bases
    assert all(re.search(r":\d+\.\d+\.\d+[\w.-]*$|@sha256:", base) for base in bases)
    assert all(rest.startswith("${PYTHON}") for word, rest in found if word == "FROM")
    users = [rest for word, rest in found if word == "USER"]
    assert users == [f"{USER}:{USER}"]


@pytest.mark.parametrize("name", RECIPES)
def test_only_locks_are_installed_and_the_build_stays_behind(name: str) -> None:
    found = instructions(name)
    installs = [rest for word, rest in found if word == "RUN" and "pip install" in rest]
    assert installs
    assert all("--no-deps" in each for each in installs)
    last = max(place for place, (word, _) in enumerate(found) if word == "FROM")
    assert not any("pip install" in rest for _, rest in found[last:])


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_what_is_copied_is_enough_to_build_the_package(name: str, tmp_path: Path) -> None:
    for word, rest in instructions(name):
        if word == "COPY" and "--from" not in rest:
            for source in rest.split()[:-1]:
                copy = shutil.copytree if (ROOT / source).is_dir() else shutil.copy
                (tmp_path / source).parent.mkdir(exist_ok=True)
                copy(ROOT / source, tmp_path / source)
    wheel = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", "built", "."]
    subprocess.run(wheel, cwd=tmp_path, check=True, timeout=120, capture_output=True)
    [built] = (tmp_path / "built").iterdir()
    with zipfile.ZipFile(built) as file:
        assert {"router/__main__.py", "engine/deployment.py", "kvlane/client.py"} <= set(file.namelist())


def test_both_images_have_the_same_python() -> None:
    bases = {rest for name in RECIPES for word, rest in instructions(name) if word == "ARG"}
    assert len(bases) == 1


def test_the_build_context_leaves_out_what_no_image_needs() -> None:
    for path in (".git/config", ".venv/bin/python", "tests/conftest.py", "requirements/dev.txt", "docs/metrics.md"):
        assert ignored(path), path


def test_the_images_and_the_manifests_agree_on_the_user() -> None:
    for file in ("router.yaml", "ray-cluster.yaml", "deploy-job.yaml"):
        text = (ROOT / "k8s" / "base" / file).read_text()
        assert set(re.findall(r"runAsUser: (\d+)", text)) == {USER}, file


def test_the_build_names_recipes_that_are_there_and_pushes_what_it_built() -> None:
    build = yaml.safe_load((IMAGES / "cloudbuild.yaml").read_text())
    built = []
    for step in build["steps"]:
        assert re.search(r":\d", step["name"]), step["name"]
        if step["args"][0] == "build":
            assert (ROOT / step["args"][step["args"].index("--file") + 1]).exists()
            built.append(step["args"][step["args"].index("--tag") + 1])
    assert build["images"] == built
