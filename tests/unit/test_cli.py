"""The command line: what it prints and how it fails."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from router.__main__ import main

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def test_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["version"]) == 0
    assert capsys.readouterr().out.startswith("kvlane 0.")


def test_policies_and_scorers_are_listed_with_their_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["policies"]) == 0
    policies, scorers = capsys.readouterr().out.split("\nScorers ")
    for name in ("round-robin", "least-queue", "power-of-two", "random", "cost", "weighted", "session"):
        assert f"\n{name}  (kvlane " in policies
    assert "choices: an integer at least 2, default 2" in policies
    assert "scorers: a table, default {'prefix': 3.0, " in policies
    for name in ("prefix", "queue", "session"):
        assert f"\n{name}  (kvlane " in scorers
    assert "lead: a number above 0, default 8.0" in scorers


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda path: path.name)
def test_check_prints_a_file_normalized_and_stays_so(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", str(path)]) == 0
    printed = capsys.readouterr().out
    again = tmp_path / "again.toml"
    again.write_text(printed)
    assert main(["check", str(again)]) == 0
    assert capsys.readouterr().out == printed


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["check", "/nowhere.toml"], "nowhere.toml"),
        (["serve", "--http", "8000"], "--http 8000: expected HOST:PORT"),
        (["serve", "--policy", "least-queu"], "did you mean 'least-queue'"),
        (["serve", "--workers", "0"], "workers"),
        (["deploy"], "nothing to deploy"),
        (["up", "--replicas", "0"], "--replicas"),
    ],
)
def test_mistakes_end_with_status_2_and_one_clear_line(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("kvlane: ")
    assert told in error
    assert "Traceback" not in error


def test_an_unknown_field_names_the_nearest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "config.toml"
    path.write_text("[http]\nprot = 1\n")
    assert main(["check", str(path)]) == 2
    assert "did you mean 'port'?" in capsys.readouterr().err


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    command = f"{sys.executable} -m router policies | head -n 1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert done.stdout.startswith("Policies")
    assert done.stderr == ""


def test_a_reload_asked_for_while_serve_begins_does_not_end_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def serve(*args: object, **options: object) -> int:
        os.kill(os.getpid(), signal.SIGHUP)
        return 0

    monkeypatch.setattr("router.workers.serve", serve)
    monkeypatch.setattr("router.workers.log_to_stderr", lambda config: None)
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        assert main(["serve"]) == 0
    finally:
        signal.signal(signal.SIGHUP, before)
