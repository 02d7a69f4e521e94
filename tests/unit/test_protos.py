"""The generated protobuf code: current, and told apart from what is not."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

PROTOS = Path(__file__).resolve().parents[2] / "protos"
SCRIPT = PROTOS / "generate.py"


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_protos", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    shutil.copytree(PROTOS, tmp_path / "protos", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / "protos"


def test_the_committed_code_is_what_the_protos_generate() -> None:
    done = subprocess.run([sys.executable, str(SCRIPT), "--check"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_changed_proto_is_drift_until_it_is_generated_anew(
    generator: ModuleType, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    proto = copy / "kvlane" / "v1" / "inference.proto"
    proto.write_text(proto.read_text() + "\nmessage Extra { string note = 1; }\n")
    assert generator.main(["--check", "--root", str(copy)]) == 1
    assert "run `python protos/generate.py`:\n  kvlane/v1/inference_pb2.py: differs" in capsys.readouterr().err
    assert generator.main(["--root", str(copy)]) == 0
    assert generator.main(["--check", "--root", str(copy)]) == 0


def test_missing_and_left_over_files_are_drift(
    generator: ModuleType, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (copy / "kvlane" / "v1" / "inference_pb2.pyi").unlink()
    (copy / "kvlane" / "v1" / "gone_pb2.py").write_text("")
    assert generator.main(["--check", "--root", str(copy)]) == 1
    err = capsys.readouterr().err
    assert "kvlane/v1/inference_pb2.pyi: missing" in err
    assert "kvlane/v1/gone_pb2.py: no .proto file makes this any more" in err
    assert generator.main(["--root", str(copy)]) == 0
    assert not (copy / "kvlane" / "v1" / "gone_pb2.py").exists()


def test_a_broken_proto_fails_and_writes_nothing(
    generator: ModuleType, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = copy / "kvlane" / "v1" / "inference_pb2.py"
    before = code.read_bytes()
    (copy / "kvlane" / "v1" / "inference.proto").write_text("this is no proto")
    assert generator.main(["--root", str(copy)]) == 1
    assert "protoc failed" in capsys.readouterr().err
    assert code.read_bytes() == before


def test_another_generator_version_is_refused(
    generator: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(generator.metadata, "version", lambda _name: "1.0.0")
    assert generator.main(["--check"]) == 1
    assert "grpcio-tools 1.0.0 is installed" in capsys.readouterr().err


def test_the_client_needs_nothing_of_the_router() -> None:
    program = "import sys, kvlane.client; print([m for m in sys.modules if m.split('.')[0] in ('router', 'engine')])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "[]\n")
