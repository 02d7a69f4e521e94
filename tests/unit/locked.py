"""A gate with known keys, for the tests of both ingresses."""

from __future__ import annotations

from pathlib import Path

from router import keys
from router.ingress.gate import Gate


class Locked:
    """A gate for two keys: one for everything, and one for the model `tiny` alone."""

    def __init__(self, folder: Path) -> None:
        self.all, entry = keys.new("admin")
        self.tiny, tiny = keys.new("team-a", ["tiny"])
        path = folder / "keys.toml"
        path.write_text(entry + tiny)
        self.refused: list[tuple[str, str]] = []
        self.gate = Gate(str(path), lambda ingress, reason: self.refused.append((ingress, reason)))
