"""Peers' own virtual environments under `.bench/`, made where they are first needed, from the public packages."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from loadtests.peers.errors import PeerError

BENCH: Final = Path(__file__).resolve().parents[2] / ".bench"
INSTALL_TIMEOUT_S: Final = 900.0
_WHOLE: Final = ".complete"

Runner = Callable[[Sequence[str], Path], None]
"""Runs a command with its output in a log. Raises `OSError` and `subprocess.SubprocessError` where it fails."""


def run_logged(command: Sequence[str], log: Path) -> None:
    """A `Runner`; the log is added to."""
    with log.open("ab") as out:
        subprocess.run(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, check=True, timeout=INSTALL_TIMEOUT_S)


def installed(package: str, version: str, bench: Path = BENCH, run: Runner = run_logged) -> Path:
    """The `bin` directory of an environment that holds exactly this package; `PeerError` where it cannot be made."""
    place = bench / f"{package}-{version}"
    if not (place / _WHOLE).exists():
        log = bench / "logs" / f"{package}-install.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        log.unlink(missing_ok=True)
        shutil.rmtree(place, ignore_errors=True)  # What an interrupted installation has left.
        try:
            run([sys.executable, "-m", "venv", str(place)], log)
            pip = [str(place / "bin" / "python"), "-m", "pip", "install", "--no-input", "--disable-pip-version-check"]
            run([*pip, f"{package}=={version}"], log)
        except (OSError, subprocess.SubprocessError) as error:
            raise PeerError(package, f"version {version} could not be installed: {error}", log) from error
        (place / _WHOLE).touch()
    return place / "bin"
