"""The compiled parts: `*.pyx` beside the Python that they stand in for (docs/decisions/0007-compiled-parts.md).

Everything else about the package is in pyproject.toml. Where there is no compiler the package is installed without
them, and runs on the Python parts alone.
"""

import os
from pathlib import Path

from setuptools import Extension, setup

SOURCES = sorted(str(path) for package in ("router", "engine") for path in Path(package).rglob("*.pyx"))
# No fused multiply-add: compiled and Python parts give the same numbers to the last bit.
FLAGS = ["-O2", "-ffp-contract=off"]


def compiled_parts() -> list[Extension]:
    """None where Cython is not there, as in an environment that leaves it out."""
    try:
        from Cython.Build import cythonize
    except ImportError:
        return []
    parts = [
        Extension(
            source.removesuffix(".pyx").replace("/", "."), [source], extra_compile_args=FLAGS, depends=["setup.py"]
        )
        for source in SOURCES
    ]
    directives = {"language_level": 3, "boundscheck": False, "wraparound": False, "cdivision": True}
    found: list[Extension] = cythonize(parts, build_dir="build/cython", compiler_directives=directives)
    for part in found:
        part.optional = os.environ.get("KVLANE_COMPILED") != "1"  # Cython forgets what stood in the list.
    return found


setup(ext_modules=compiled_parts())
