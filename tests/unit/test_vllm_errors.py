"""What a gRPC client hears of vLLM's exceptions, and that no stream outlives its task without an end."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import pydantic
import pytest

from engine.vllm import VllmEngine
from engine.vllm_errors import FAILED, mapped
from router.errors import (
    InvalidRequest,
    KvlaneError,
    ModelNotFound,
    NoReplica,
    NotSupported,
    Overloaded,
    ReplicaFailed,
    ReplicaLost,
)
from router.types import Rpc
from tests.integration.vllm_fixtures import FOREIGN_WARNINGS, RecordingOut, grpc_call, http_call

pytestmark = [pytest.mark.vllm, pytest.mark.slow, FOREIGN_WARNINGS]


def ours(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    """What our engine has logged; vLLM says things of its own when it is imported."""
    return [record for record in caplog.records if record.name.startswith("engine.")]


class Model(pydantic.BaseModel):
    count: int


def invalid_model() -> Exception:
    with pytest.raises(pydantic.ValidationError) as caught:
        Model(count="many")  # type: ignore[arg-type]
    return caught.value


def raised(name: str, *args: Any) -> Exception:
    """One of vLLM's own exceptions."""
    from vllm import exceptions

    error: Exception = getattr(exceptions, name)(*args)
    return error


def wrapped(cause: Exception) -> Exception:
    """As `AsyncLLM.generate` raises what it did not expect."""
    from vllm.v1.engine.exceptions import EngineGenerateError

    error: Exception = EngineGenerateError()
    error.__cause__ = cause
    return error


def dead() -> Exception:
    from vllm.v1.engine.exceptions import EngineDeadError

    error: Exception = EngineDeadError()
    return error


@pytest.mark.parametrize(
    ("make", "kind", "words"),
    [
        (lambda: raised("VLLMValidationError", "too\nlong"), InvalidRequest, "too long"),
        (lambda: raised("VLLMClientError", "no"), InvalidRequest, "no"),
        (lambda: raised("VLLMNotFoundError", "no such model"), ModelNotFound, "no such model"),
        (lambda: raised("VLLMUnprocessableEntityError", "no image"), InvalidRequest, "no image"),
        (lambda: raised("QueueOverflowError"), Overloaded, "busy"),
        (lambda: raised("RetryableRequestError"), Overloaded, "retry"),
        (lambda: ValueError("out of range"), InvalidRequest, "out of range"),
        (lambda: OverflowError("too big"), InvalidRequest, "too big"),
        (lambda: NotImplementedError("not on this platform"), NotSupported, "not on this platform"),
        (invalid_model, InvalidRequest, "count: "),
        (lambda: wrapped(ValueError("out of range")), InvalidRequest, "out of range"),
        (lambda: wrapped(OverflowError("too big")), InvalidRequest, "too big"),
        (lambda: wrapped(raised("VLLMValidationError", "too long")), InvalidRequest, "too long"),
        (lambda: wrapped(dead()), ReplicaLost, "died"),
        (dead, ReplicaLost, "died"),
        (lambda: NoReplica("ours"), NoReplica, "ours"),
    ],
)
def test_what_vllm_raises_on_purpose_is_told_in_its_words_and_not_logged(
    make: Callable[[], Exception], kind: type[KvlaneError], words: str, caplog: pytest.LogCaptureFixture
) -> None:
    error = mapped(make(), "r1")
    assert type(error) is kind
    assert words in error.message
    assert "\n" not in error.message
    assert not ours(caplog)


@pytest.mark.parametrize(
    "make",
    [
        lambda: TypeError("'NoneType' object is not callable"),
        lambda: KeyError("prompt"),
        lambda: AssertionError(),
        lambda: RuntimeError("internal detail"),
        lambda: wrapped(KeyError("prompt")),
        lambda: wrapped(TypeError("bad operand")),
        lambda: raised("GenerationError"),
        lambda: raised("VLLMServerError", "internal detail"),
    ],
)
def test_a_defect_is_the_replicas_failure_and_logged_once_with_its_traceback(
    make: Callable[[], Exception], caplog: pytest.LogCaptureFixture
) -> None:
    error = mapped(make(), "r1")
    assert type(error) is ReplicaFailed
    assert error.message == FAILED
    (record,) = ours(caplog)
    assert record.levelno == logging.ERROR
    assert "r1" in record.getMessage()
    assert record.exc_info


class Core:
    """An `AsyncLLM` that does nothing, and may die."""

    errored = False

    def get_num_unfinished_requests(self) -> int:
        return 0

    def get_num_queued_tokens(self) -> int:
        return 0

    def shutdown(self) -> None:
        pass


class BrokenGrpc:
    """Fails where no failure is foreseen."""

    def __init__(self, error: BaseException) -> None:
        self._error = error

    async def run(self, call: object, out: object) -> None:
        raise self._error


def engine_with(error: BaseException) -> tuple[VllmEngine, Core]:
    """An engine whose streams break with `error` on both protocols."""
    engine, core = VllmEngine("m", "m", {}), Core()

    async def app(scope: object, receive: object, send: object) -> None:
        raise error

    engine._engine, engine._app = core, app
    engine._grpc = BrokenGrpc(error)  # type: ignore[assignment]
    return engine, core


@pytest.mark.parametrize("rpc", list(Rpc))
@pytest.mark.parametrize("error", [KeyError("x"), asyncio.CancelledError()], ids=["raises", "is cancelled"])
async def test_a_stream_whose_task_breaks_has_an_end(
    rpc: Rpc, error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    engine, _ = engine_with(error)
    out = RecordingOut()
    engine.submit(grpc_call("Generate", b"") if rpc is Rpc.GRPC else http_call("/v1/completions", b""), out)
    await out.ended()
    assert [type(failure) for failure in out.failures] == [ReplicaFailed]
    assert engine.load().waiting == 0
    assert len([record for record in ours(caplog) if record.exc_info]) == isinstance(error, Exception)
    await engine.close()


@pytest.mark.parametrize("rpc", list(Rpc))
async def test_a_stream_that_breaks_because_the_engine_died_is_lost_and_the_death_is_told(rpc: Rpc) -> None:
    engine, core = engine_with(RuntimeError("socket closed"))
    told = asyncio.Event()
    engine.on_step(told.set)
    engine._watch = asyncio.create_task(engine._watch_for_death())
    out = RecordingOut()
    engine.submit(grpc_call("Generate", b"") if rpc is Rpc.GRPC else http_call("/v1/completions", b""), out)
    core.errored = True
    await out.ended()
    assert [type(failure) for failure in out.failures] == [ReplicaLost]
    async with asyncio.timeout(10):
        await told.wait()
    await engine.close()
