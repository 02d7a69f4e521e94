"""Errors as gRPC clients see them: a status, a message, and trailing metadata with the stable name and rich details."""

from __future__ import annotations

from typing import Final

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]

from router.errors import KvlaneError

MAX_MESSAGE_BYTES: Final = 1024
"""A status travels in headers, in the worst case at thrice its size, and clients refuse more than 8 KiB of those."""
DOMAIN: Final = "kvlane"

Trailers = tuple[tuple[str, str | bytes], ...]


def render(error: KvlaneError, request_id: str = "") -> tuple[grpc.StatusCode, str, Trailers]:
    """The status code, message and trailing metadata that tell a client of `error`."""
    code = grpc.StatusCode[error.grpc_status]
    message = _cut(error.message)
    trailers: list[tuple[str, str | bytes]] = [
        ("kvlane-error", error.name),
        ("kvlane-retryable", "1" if error.retryable else "0"),
        ("grpc-status-details-bin", _details(error, code, message, request_id).SerializeToString()),
    ]
    if request_id:
        trailers.append(("x-request-id", request_id))
    return code, message, tuple(trailers)


def _details(error: KvlaneError, code: grpc.StatusCode, message: str, request_id: str) -> status_pb2.Status:
    """The error in google.rpc's standard shape, which generic clients and tools understand."""
    facts = {"fault": error.fault.value, "retryable": "true" if error.retryable else "false"}
    if request_id:
        facts["request_id"] = request_id
    number, _ = code.value
    status = status_pb2.Status(code=number, message=message)
    status.details.append(_any(error_details_pb2.ErrorInfo(reason=error.name.upper(), domain=DOMAIN, metadata=facts)))
    if error.param is not None:
        violation = error_details_pb2.BadRequest.FieldViolation(field=_cut(error.param), description=message)
        status.details.append(_any(error_details_pb2.BadRequest(field_violations=[violation])))
    if error.retry_after_s is not None:
        delay = duration_pb2.Duration()
        delay.FromMilliseconds(max(0, round(error.retry_after_s * 1000)))
        status.details.append(_any(error_details_pb2.RetryInfo(retry_delay=delay)))
    return status


def _any(
    message: error_details_pb2.ErrorInfo | error_details_pb2.BadRequest | error_details_pb2.RetryInfo,
) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(message)
    return packed


def _cut(text: str) -> str:
    """`text` within `MAX_MESSAGE_BYTES` of UTF-8; surrogates, which have no UTF-8, are replaced."""
    encoded = text.encode(errors="replace")
    if len(encoded) <= MAX_MESSAGE_BYTES:
        return encoded.decode()
    return encoded[: MAX_MESSAGE_BYTES - 3].decode(errors="ignore") + "…"
