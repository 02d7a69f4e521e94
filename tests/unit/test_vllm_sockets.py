"""The folder for vLLM's own sockets: private, short enough, gone with the engine, and unknown to everybody else."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from engine.vllm_sockets import EngineSockets

pytestmark = pytest.mark.slow  # vLLM takes seconds to import.

VARIABLE = "VLLM_RPC_BASE_PATH"
SOCKET_NAME_CHARS = 36


def config(backend: str = "mp") -> SimpleNamespace:
    return SimpleNamespace(parallel_config=SimpleNamespace(distributed_executor_backend=backend))


def test_the_folder_is_there_while_the_engine_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    sockets = EngineSockets()
    with sockets.starting(config()):
        folder = Path(os.environ[VARIABLE])
    assert VARIABLE not in os.environ
    assert folder.stat().st_mode & 0o777 == 0o700
    (folder / "a").touch()
    sockets.remove()
    sockets.remove()
    assert not folder.exists()


def test_a_start_that_fails_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as parent:
        monkeypatch.setenv(VARIABLE, parent)
        with pytest.raises(RuntimeError), EngineSockets().starting(config()):
            raise RuntimeError(os.environ[VARIABLE])
        assert os.environ[VARIABLE] == parent
        assert not os.listdir(parent)


def test_names_of_sockets_fit_however_long_the_usual_folder_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for length in range(30, 120):
        parent = tmp_path.joinpath("x" * max(length - len(str(tmp_path)) - 1, 1))
        parent.mkdir(exist_ok=True)
        monkeypatch.setenv(VARIABLE, str(parent))
        sockets = EngineSockets()
        with sockets.starting(config()):
            assert len(os.environ[VARIABLE]) + 1 + SOCKET_NAME_CHARS <= 107
        sockets.remove()


def test_workers_that_may_be_on_other_machines_keep_the_usual_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    with EngineSockets().starting(config("ray")):
        assert VARIABLE not in os.environ
