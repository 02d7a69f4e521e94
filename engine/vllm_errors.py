"""The seam where vLLM's exceptions and error answers become ours.

Rule: vLLM itself classifies its exceptions (the same way that its server does); here only its classes meet our classes.
"""

from __future__ import annotations

from typing import Any, Final

from router.errors import (
    InvalidRequest,
    KvlaneError,
    ModelNotFound,
    NotSupported,
    Overloaded,
    ReplicaFailed,
    ReplicaLost,
)

_BY_STATUS: Final[dict[int, type[KvlaneError]]] = {
    400: InvalidRequest,
    404: ModelNotFound,
    422: InvalidRequest,
    501: NotSupported,
    503: Overloaded,
}


def mapped(error: Exception) -> KvlaneError:
    """`error`, raised by vLLM, as one of ours; with vLLM's own message on one line."""
    from pydantic import ValidationError
    from vllm.entrypoints.serve import create_error_response
    from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

    if isinstance(error, KvlaneError):
        return error
    if isinstance(error, EngineDeadError):
        return ReplicaLost("the engine died")
    if isinstance(error, EngineGenerateError) and isinstance(error.__cause__, ValueError):
        error = error.__cause__
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        return InvalidRequest(_one_line(f"{field}: {first['msg']}" if field else first["msg"]), param=field or None)
    return of_response(create_error_response(error))


def of_response(response: Any) -> KvlaneError:
    """vLLM's `ErrorResponse` as one of ours."""
    info = response.error
    kind = _BY_STATUS.get(int(info.code), ReplicaFailed)
    return kind(_one_line(info.message) or "vLLM failed without a message", param=info.param)


def _one_line(message: str) -> str:
    return " ".join(message.split())
