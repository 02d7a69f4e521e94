"""What goes wrong with one system while the others go on."""

from __future__ import annotations

from pathlib import Path


class PeerError(Exception):
    """A system that could not be installed, started or used: one line with its name, the cause and where its log is."""

    def __init__(self, name: str, cause: str, log: Path | None = None) -> None:
        where = f" (log: {log})" if log is not None else ""
        super().__init__(f"{name}: {cause}{where}")
