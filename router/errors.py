"""The closed hierarchy of errors, each with its HTTP status, gRPC status, retryability and fault.

An ingress renders these in one place; foreign exceptions are mapped to one of them at the seam where they appear.
`name` is stable: it crosses lanes, labels metrics and stands in the answer, so clients may match on it.
"""

from __future__ import annotations

import enum
from typing import ClassVar, Final

SHOWN_CHARS: Final = 100
"""How much of a client's own word stands in a message about it."""
LOGGED_CHARS: Final = 300
"""How much of such a word or of a message stands in a log line."""


def cut(text: str, limit: int = SHOWN_CHARS) -> str:
    """`text` with at most `limit` characters; what is left out shows as an ellipsis."""
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


class Fault(enum.StrEnum):
    """Whose doing an error is."""

    CLIENT = "client"
    REPLICA = "replica"
    ROUTER = "router"


class KvlaneError(Exception):
    """Base of all errors that a client may see."""

    name: ClassVar[str] = "internal"
    http_status: ClassVar[int] = 500
    grpc_status: ClassVar[str] = "INTERNAL"
    """Name of a grpc.StatusCode member."""
    openai_type: ClassVar[str] = "InternalServerError"
    fault: ClassVar[Fault] = Fault.ROUTER
    retryable: ClassVar[bool] = False
    """True where the same request may succeed on another replica or a moment later."""
    openai_code: ClassVar[str] = ""
    """OpenAI's own word for it in its error object; empty leaves the HTTP status there, as vLLM does."""
    logged: ClassVar[bool] = False
    """Whoever raised it has logged it, so that a flood of them is no flood of lines."""

    def __init__(self, message: str, *, param: str | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        """The request field at fault, for OpenAI's error object."""
        self.retry_after_s = retry_after_s


class InternalError(KvlaneError):
    """A defect in kvlane."""


class InvalidRequest(KvlaneError):
    name = "invalid_request"
    http_status = 400
    grpc_status = "INVALID_ARGUMENT"
    openai_type = "BadRequestError"
    fault = Fault.CLIENT


class ModelNotFound(InvalidRequest):
    name = "model_not_found"
    http_status = 404
    grpc_status = "NOT_FOUND"
    openai_type = "NotFoundError"


class PathNotFound(InvalidRequest):
    name = "path_not_found"
    http_status = 404
    grpc_status = "UNIMPLEMENTED"
    openai_type = "NotFoundError"


class MethodNotAllowed(InvalidRequest):
    name = "method_not_allowed"
    http_status = 405
    grpc_status = "UNIMPLEMENTED"

    def __init__(self, message: str, *, allow: tuple[str, ...]) -> None:
        super().__init__(message)
        self.allow = allow


class KeyRefused(KvlaneError):
    """The client showed no API key, or none that is valid."""

    name = "invalid_api_key"
    http_status = 401
    grpc_status = "UNAUTHENTICATED"
    openai_type = "AuthenticationError"
    openai_code = "invalid_api_key"
    fault = Fault.CLIENT
    logged = True


class ModelForbidden(KvlaneError):
    """The client's API key is not for this model."""

    name = "model_forbidden"
    http_status = 403
    grpc_status = "PERMISSION_DENIED"
    openai_type = "PermissionDeniedError"
    openai_code = "model_forbidden"
    fault = Fault.CLIENT
    logged = True


class RequestTimeout(InvalidRequest):
    """The client did not finish sending its request in time."""

    name = "request_timeout"
    http_status = 408
    grpc_status = "DEADLINE_EXCEEDED"
    openai_type = "RequestTimeoutError"


class BodyTooLarge(InvalidRequest):
    name = "body_too_large"
    http_status = 413
    grpc_status = "RESOURCE_EXHAUSTED"
    openai_type = "RequestEntityTooLargeError"


class UnsupportedEncoding(InvalidRequest):
    """The body is compressed, or encoded otherwise."""

    name = "unsupported_encoding"
    http_status = 415
    grpc_status = "UNIMPLEMENTED"
    openai_type = "UnsupportedMediaTypeError"


class HeadersTooLarge(InvalidRequest):
    name = "headers_too_large"
    http_status = 431
    grpc_status = "RESOURCE_EXHAUSTED"


class BadFraming(InvalidRequest):
    """A gRPC request whose bytes are no messages."""

    name = "bad_framing"
    grpc_status = "INTERNAL"


class NotSupported(InvalidRequest):
    """The model or engine cannot do what was asked."""

    name = "not_supported"
    http_status = 400
    grpc_status = "UNIMPLEMENTED"


class ClientTooSlow(KvlaneError):
    """The client read so slowly that its stream's buffer ran over."""

    name = "client_too_slow"
    http_status = 500
    grpc_status = "RESOURCE_EXHAUSTED"
    openai_type = "ClientTooSlowError"
    fault = Fault.CLIENT


class DeadlineExceeded(KvlaneError):
    name = "deadline_exceeded"
    http_status = 504
    grpc_status = "DEADLINE_EXCEEDED"
    openai_type = "TimeoutError"
    fault = Fault.CLIENT


class Overloaded(KvlaneError):
    """Rejected before any work: more requests in flight than configured."""

    name = "overloaded"
    http_status = 429
    grpc_status = "RESOURCE_EXHAUSTED"
    openai_type = "RateLimitError"
    fault = Fault.ROUTER
    retryable = True


class TooManyConnections(Overloaded):
    """The connection itself is refused, whatever it would have asked."""

    name = "too_many_connections"
    http_status = 503
    grpc_status = "UNAVAILABLE"
    openai_type = "ServiceUnavailableError"


class NoReplica(KvlaneError):
    """Rejected before any work: no replica of the model is ready."""

    name = "no_replica"
    http_status = 503
    grpc_status = "UNAVAILABLE"
    openai_type = "ServiceUnavailableError"
    fault = Fault.REPLICA
    retryable = True


class ReplicaDraining(NoReplica):
    """A replica takes no new requests any more; another may."""

    name = "replica_draining"


class HoldFull(NoReplica):
    """Rejected before any work: too many requests wait for a replica already."""

    name = "hold_full"
    fault = Fault.ROUTER


class ReplicaLost(KvlaneError):
    """The replica or its lane was lost during the work."""

    name = "replica_lost"
    http_status = 502
    grpc_status = "UNAVAILABLE"
    openai_type = "BadGatewayError"
    fault = Fault.REPLICA
    retryable = True


class ReplicaFailed(KvlaneError):
    """The replica failed at this request; another try would likely fail too."""

    name = "replica_failed"
    http_status = 500
    fault = Fault.REPLICA


class ShuttingDown(KvlaneError):
    """This router is going away."""

    name = "shutting_down"
    http_status = 503
    grpc_status = "UNAVAILABLE"
    openai_type = "ServiceUnavailableError"
    retryable = True


class ConfigError(KvlaneError):
    """A configuration that cannot be used; stops start-up."""

    name = "config"


def _subclasses(cls: type[KvlaneError]) -> list[type[KvlaneError]]:
    return [cls, *(leaf for sub in cls.__subclasses__() for leaf in _subclasses(sub))]


_BY_NAME = {cls.name: cls for cls in reversed(_subclasses(KvlaneError)) if cls is not MethodNotAllowed}


def from_wire(name: str, message: str, param: str | None = None) -> KvlaneError:
    """The error of that name; a name that this version does not know becomes `ReplicaFailed`."""
    return _BY_NAME.get(name, ReplicaFailed)(message, param=param)
