"""The seam where vLLM's exceptions and error answers become ours.

Rule: only what is known to be the client's doing is told to the client as such. Anything unexpected is the replica's
failure, without details for the client, and logged here with its traceback.
"""

from __future__ import annotations

import logging
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

FAILED: Final = "the engine failed at this request"

_log = logging.getLogger(__name__)


def mapped(error: Exception, request_id: str) -> KvlaneError:
    """`error`, raised while vLLM served the request, as one of ours; what is for the client has vLLM's own message."""
    from pydantic import ValidationError
    from vllm.entrypoints.serve import create_error_response
    from vllm.exceptions import GracefulHTTPError, RetryableRequestError, VLLMClientError
    from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

    if isinstance(error, EngineGenerateError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # vLLM wraps what its front end raises once it has begun with a request.
    if isinstance(error, KvlaneError):
        return error
    if isinstance(error, EngineDeadError):
        return ReplicaLost("the engine died")
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        return InvalidRequest(_one_line(f"{field}: {first['msg']}" if field else first["msg"]), param=field or None)
    # The classes that vLLM raises on purpose, and the bare ones that its checks of a request still raise.
    refusals = (VLLMClientError, GracefulHTTPError, RetryableRequestError, NotImplementedError)
    if isinstance(error, (*refusals, ValueError, OverflowError)):
        return of_response(create_error_response(error))
    _log.error("request %s: vLLM failed", request_id, exc_info=error)
    return ReplicaFailed(FAILED)


def of_response(response: Any) -> KvlaneError:
    """vLLM's `ErrorResponse` as one of ours."""
    info = response.error
    kind = _BY_STATUS.get(int(info.code), ReplicaFailed)
    return kind(_one_line(info.message) or "vLLM failed without a message", param=info.param)


def _one_line(message: str) -> str:
    return " ".join(message.split())
