"""The compiled parts: built where they can be, never needed, never silently missing."""

from __future__ import annotations

import logging
import runpy
import shutil
import sys
import sysconfig
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from engine.replica import Replica
from router import compiled
from router.__main__ import main
from router.config import load
from router.errors import ConfigError
from tests.fakes import ScriptedEngine

ROOT = Path(__file__).resolve().parents[2]
HEADERS = Path(sysconfig.get_path("include"), "Python.h")


def test_every_source_is_a_part_and_has_its_twins_types() -> None:
    sources = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for package in ("router", "engine")
        for path in ROOT.glob(f"{package}/**/*.pyx")
    }
    assert sources == set(compiled.PARTS)
    assert all((ROOT / name.replace(".", "/")).with_suffix(".pyi").exists() for name in compiled.PARTS)


@pytest.mark.skipif(not (shutil.which("cc") or shutil.which("gcc")), reason="no C compiler")
@pytest.mark.skipif(not HEADERS.exists(), reason="no headers of Python")
def test_where_there_is_a_compiler_they_are_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(compiled.VARIABLE, raising=False)
    assert compiled.missing() == ()
    assert compiled.told() == "compiled parts: in use"


def test_they_can_be_left_out(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv(compiled.VARIABLE, "0")
    assert compiled.missing() == compiled.PARTS
    assert main(["version"]) == 0
    assert "compiled parts: left out (KVLANE_COMPILED=0)" in capsys.readouterr().out


def test_a_part_that_is_not_there_is_named_or_demanded(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(compiled, "PARTS", ("router._nothing",))
    monkeypatch.delenv(compiled.VARIABLE, raising=False)
    assert compiled.part("router._nothing") is None
    with caplog.at_level("INFO"):
        compiled.note(logging.getLogger("router"))
    assert [(record.levelname, "not there (router._nothing)" in record.message) for record in caplog.records] == [
        ("WARNING", True)
    ]
    monkeypatch.setenv(compiled.VARIABLE, "1")
    with pytest.raises(ConfigError, match=r"KVLANE_COMPILED=1, and router._nothing is not there"):
        compiled.missing()


async def test_a_replica_says_what_it_uses_and_does_not_begin_without_what_is_demanded(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "engine._lane_stream", None)
    monkeypatch.setenv(compiled.VARIABLE, "1")
    with pytest.raises(ConfigError, match=r"KVLANE_COMPILED=1, and engine._lane_stream is not there"):
        Replica("a", ScriptedEngine(), b"secret")
    monkeypatch.delenv(compiled.VARIABLE)
    replica = Replica("a", ScriptedEngine(), b"secret")
    await replica.start()
    await replica.close()
    assert "not there (engine._lane_stream)" in caplog.text


def test_another_value_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv(compiled.VARIABLE, "yes")
    assert main(["version"]) == 2
    assert "KVLANE_COMPILED=yes: expected 0 or 1" in capsys.readouterr().err


def test_the_variable_is_no_unknown_field(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load(None, env={compiled.VARIABLE: "0"}) == load(None, env={})


def test_without_cython_the_package_is_installed_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr("setuptools.setup", given.update)
    monkeypatch.setitem(sys.modules, "Cython.Build", None)
    monkeypatch.chdir(ROOT)
    runpy.run_path(str(ROOT / "setup.py"))
    assert given == {"ext_modules": []}


@pytest.mark.parametrize(("wanted", "optional"), [("", True), ("1", False)])
def test_without_a_compiler_the_package_is_installed_unless_the_parts_are_demanded(
    wanted: str, optional: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {}

    def cythonize(parts: list[Any], **_: object) -> list[Any]:
        return [SimpleNamespace(name=part.name, optional=None) for part in parts]  # Cython forgets it, too.

    monkeypatch.setattr("setuptools.setup", given.update)
    monkeypatch.setitem(sys.modules, "Cython.Build", SimpleNamespace(cythonize=cythonize))
    monkeypatch.setenv(compiled.VARIABLE, wanted)
    monkeypatch.chdir(ROOT)
    runpy.run_path(str(ROOT / "setup.py"))
    assert {part.name for part in given["ext_modules"]} == set(compiled.PARTS)
    assert all(part.optional is optional for part in given["ext_modules"])
