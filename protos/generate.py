"""Generates the Python code of every .proto file under this directory, or checks that what is there is current.

``python protos/generate.py`` writes; ``python protos/generate.py --check`` writes nothing and exits 1 where a file is
missing, differs, or is left over from a .proto file that is gone. The generator is the pinned grpcio-tools: another
version would write other files, so it is refused.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from importlib import metadata
from importlib.resources import files
from pathlib import Path

HERE = Path(__file__).resolve().parent
PINS = HERE.parent / "requirements" / "dev.txt"
GENERATED = ("*_pb2.py", "*_pb2.pyi", "*_pb2_grpc.py")


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    parser = argparse.ArgumentParser(description="Generate the Python code of the .proto files.")
    parser.add_argument("--check", action="store_true", help="write nothing, exit 1 where the code is out of date")
    parser.add_argument("--root", type=Path, default=HERE, help="directory with the .proto files (default: here)")
    options = parser.parse_args(arguments)
    if problem := _version_problem():
        return _fail(problem)
    try:
        wanted = generate(options.root)
    except GenerateError as error:
        return _fail(str(error))
    if not options.check:
        write(options.root, wanted)
        return 0
    if drift := differences(options.root, wanted):
        return _fail("generated code is out of date; run `python protos/generate.py`:\n  " + "\n  ".join(drift))
    return 0


class GenerateError(Exception):
    """The compiler refused the .proto files."""


def generate(root: Path) -> dict[Path, bytes]:
    """What should stand under `root`: contents by relative path. Raises `GenerateError`."""
    from grpc_tools import protoc  # type: ignore[import-untyped]

    protos = sorted(str(path.relative_to(root)) for path in root.rglob("*.proto"))
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory)
        status = protoc.main(
            [
                "protoc",
                f"-I{root}",
                f"-I{files('grpc_tools') / '_proto'}",
                f"--python_out={out}",
                f"--pyi_out={out}",
                f"--grpc_python_out={out}",
                *protos,
            ]
        )
        if status != 0:
            raise GenerateError(f"protoc failed with status {status}")
        return {path.relative_to(out): _typed(path) for path in sorted(out.rglob("*")) if path.is_file()}


def write(root: Path, wanted: dict[Path, bytes]) -> None:
    """Makes the generated files under `root` be exactly `wanted`."""
    for path in _present(root) - wanted.keys():
        (root / path).unlink()
    for path, content in wanted.items():
        (root / path).write_bytes(content)


def differences(root: Path, wanted: dict[Path, bytes]) -> list[str]:
    """One line for each generated file that is missing, stale or left over."""
    present = _present(root)
    lines = [f"{path}: missing" for path in sorted(wanted.keys() - present)]
    lines += [f"{path}: no .proto file makes this any more" for path in sorted(present - wanted.keys())]
    lines += [
        f"{path}: differs" for path in sorted(present & wanted.keys()) if (root / path).read_bytes() != wanted[path]
    ]
    return lines


def _typed(path: Path) -> bytes:
    """A generated file's content; in stubs with the type arguments that protoc leaves out and strict checkers want."""
    content = path.read_bytes()
    return re.sub(rb"\b_Mapping\b(?=[\],])", b"_Mapping[str, object]", content) if path.suffix == ".pyi" else content


def _present(root: Path) -> set[Path]:
    return {path.relative_to(root) for pattern in GENERATED for path in root.rglob(pattern)}


def _version_problem() -> str:
    pin = re.search(r"^grpcio-tools==([^\s;\\]+)", PINS.read_text(), re.MULTILINE)
    if pin is None:
        return f"{PINS} pins no grpcio-tools"
    try:
        installed = metadata.version("grpcio-tools")
    except metadata.PackageNotFoundError:
        return f"grpcio-tools is not installed; install {PINS}"
    if installed != pin[1]:
        return f"grpcio-tools {installed} is installed, but the generated code is made by {pin[1]} (from {PINS})"
    return ""


def _fail(message: str) -> int:
    sys.stderr.write(message + "\n")
    return 1


if __name__ == "__main__":
    sys.exit(main())
