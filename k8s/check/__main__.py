"""``python -m k8s.check [DIRECTORY…]``: checks Kustomize directories, by default all overlays beside this package."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from k8s.check import rules
from k8s.check.render import RenderError, render

OVERLAYS = Path(__file__).resolve().parents[1] / "overlays"


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0 nothing found, 1 something found, 2 it could not be rendered."""
    parser = argparse.ArgumentParser(prog="python -m k8s.check", description="Check Kubernetes manifests of kvlane.")
    parser.add_argument("directories", nargs="*", type=Path, metavar="DIRECTORY", help="default: all overlays")
    parser.add_argument(
        "--secret", action="append", default=[], metavar="NAME/KEY", help="a Secret's key that is made elsewhere"
    )
    arguments = parser.parse_args(argv)
    known = rules.our_documentation()
    known = known._replace(secrets=known.secrets | set(arguments.secret))
    status = 0
    for directory in arguments.directories or sorted(OVERLAYS.iterdir()):
        try:
            rendered = render(directory)
        except RenderError as error:
            print(f"{directory.name}: {error}", file=sys.stderr)
            return 2
        found = rules.check(rendered, known)
        for finding in found:
            print(f"{directory.name}: {finding}")
        print(f"{directory.name}: {len(rendered)} objects, {len(found)} problems")
        status = status or bool(found)
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
