"""The model of a multipart/form-data body (RFC 7578), such as an audio upload, without a look at all of its bytes.

Sans-IO. The one rule: whatever the body holds, reading it costs a few milliseconds at most. So parts are found by
searches for the boundary, in the first and the last `WINDOW_BYTES` alone: a field stands before or behind the file,
and what is between is the file.
"""

from __future__ import annotations

import re
from collections.abc import Generator
from typing import Final

from router.errors import InvalidRequest

MAX_PARTS: Final = 64
"""Parts looked at; forms for engines have a dozen fields."""
WINDOW_BYTES: Final = 256 << 10
"""Searching that many bytes for a hostile boundary was measured at 1.5 ms."""
MAX_MODEL_BYTES: Final = 4096
"""Of the field itself; a part that short is found whole even where it begins at a window's edge."""
_MAX_BOUNDARY: Final = 70  # RFC 2046, 5.1.1.
_MAX_TYPE_CHARS: Final = 1024
_MAX_HEAD_BYTES: Final = 8192  # Of all parts' headers together; a file's name may be long.

# One parameter of a header value. Possessive throughout, so that no value makes it try twice.
_PARAMETER: Final = re.compile(rb';\s*+([^\s=;"]++)\s*+=\s*+("(?:[^"\\]|\\.)*+"|[^\s;"]*+)', re.DOTALL)
_WANTED: Final = frozenset({b"boundary", b"name", b"filename", b"filename*"})
_PLAIN_HEADER: Final = re.compile(rb"[A-Za-z0-9-]++:[ -~\x80-\xff]*+").fullmatch
_PLAIN_DISPOSITION: Final = re.compile(
    rb'content-disposition: *+form-data *+; *+name="[^"\\%]*+"(?: *+; *+filename="[^"\\]*+")?+', re.IGNORECASE
).fullmatch
_ESCAPED: Final = re.compile(rb"\\(.)", re.DOTALL)


def read_model(body: bytes, content_type: str) -> str:
    """The value of the field `model`; empty where there is none within the windows. Raises `InvalidRequest`."""
    delimiter, at = _opened(body, content_type)
    heads = 0
    for _ in range(MAX_PARTS):
        if body.startswith(b"--", at):
            return ""
        begin, wanted = _read_head(body, at)
        heads += begin - at
        if heads > _MAX_HEAD_BYTES:
            raise InvalidRequest(f"The form has more than {_MAX_HEAD_BYTES} bytes of headers")
        end = _next_delimiter(body, delimiter, begin)
        if wanted:
            return _value(body, begin, end)
        if end < 0:
            return ""
        at = end + len(delimiter)
    raise InvalidRequest(f"The form has more than {MAX_PARTS} parts")


def read_model_strictly(body: bytes, content_type: str) -> Generator[None, None, str]:
    """The same for whoever must not name any other model: of the whole body, in slices.

    Raises `InvalidRequest` also for a form that names it twice, and for heads that another reader might understand
    otherwise: what the engine takes must be what was judged here.
    """
    delimiter, at = _opened(body, content_type)
    model: str | None = None
    for _ in range(MAX_PARTS):
        if body.startswith(b"--", at):
            return model or ""
        begin, wanted = _read_head(body, at)
        if not _is_plain(body[at:begin]):
            raise InvalidRequest(
                "A part of the form has headers that are not plain: one content-disposition, no escapes"
            )
        end = yield from _found_in_slices(body, delimiter, begin)
        if end < 0:
            raise InvalidRequest("The body is not valid multipart/form-data: its last boundary is missing")
        if wanted:
            if model is not None:
                raise InvalidRequest("The form names its model more than once", param="model")
            model = _value(body, begin, end)
        at = end + len(delimiter)
    raise InvalidRequest(f"The form has more than {MAX_PARTS} parts")


def _opened(body: bytes, content_type: str) -> tuple[bytes, int]:
    """What stands between two parts, and where the first one of them ends."""
    boundary = _parameters(content_type[:_MAX_TYPE_CHARS].encode("latin-1")).get(b"boundary", b"")
    if not 0 < len(boundary) <= _MAX_BOUNDARY:
        raise InvalidRequest(f"multipart/form-data needs a boundary of 1 to {_MAX_BOUNDARY} characters")
    delimiter = b"\r\n--" + boundary
    at = len(delimiter) if body.startswith(b"\r\n") else len(delimiter) - 2
    if not body.startswith(delimiter[-at:]):
        raise InvalidRequest("The body is not valid multipart/form-data: it does not begin with its boundary")
    return delimiter, at


def _is_plain(head: bytes) -> bool:
    """Whether the head of a part can be read in one way only."""
    lines = [line for line in head.split(b"\r\n") if line]
    dispositions = [line for line in lines if line[:20].lower() == b"content-disposition:"]
    return (
        len(dispositions) == 1
        and _PLAIN_DISPOSITION(dispositions[0]) is not None
        and all(_PLAIN_HEADER(line) is not None for line in lines)
    )


def _found_in_slices(body: bytes, delimiter: bytes, begin: int) -> Generator[None, None, int]:
    while begin < len(body):
        at = body.find(delimiter, begin, begin + WINDOW_BYTES + len(delimiter))
        if at >= 0:
            return at
        begin += WINDOW_BYTES
        yield
    return -1


def _next_delimiter(body: bytes, delimiter: bytes, begin: int) -> int:
    """Where the first one from `begin` on stands within the windows; negative where there is none."""
    reach = WINDOW_BYTES + len(delimiter)  # So that one across a window's edge is found too.
    at = body.find(delimiter, begin, max(reach, begin + MAX_MODEL_BYTES + len(delimiter)))
    return at if at >= 0 else body.find(delimiter, max(begin, len(body) - reach))


def _read_head(body: bytes, at: int) -> tuple[int, bool]:
    """Where the content of the part begins whose delimiter ends at `at`, and whether it is the field `model`."""
    end = body.find(b"\r\n\r\n", at, at + _MAX_HEAD_BYTES)
    if end < 0 or not body.startswith(b"\r\n", at):
        raise InvalidRequest("The body is not valid multipart/form-data: a part has no proper headers")
    for line in body[at:end].split(b"\r\n"):
        name, _, value = line.partition(b":")
        if name.strip().lower() == b"content-disposition":
            parameters = _parameters(value)
            return end + 4, parameters.get(b"name") == b"model" and not {b"filename", b"filename*"} & {*parameters}
    return end + 4, False


def _value(body: bytes, begin: int, end: int) -> str:
    if end < 0:
        raise InvalidRequest("The body is not valid multipart/form-data: model has no end", param="model")
    if end - begin > MAX_MODEL_BYTES:
        raise InvalidRequest(f"model: longer than {MAX_MODEL_BYTES} bytes", param="model")
    try:
        return body[begin:end].decode()
    except UnicodeDecodeError as error:
        raise InvalidRequest("model: not valid UTF-8", param="model") from error


def _parameters(value: bytes) -> dict[bytes, bytes]:
    """The parameters of a header value, by lower-case name; the first of a name counts."""
    found: dict[bytes, bytes] = {}
    for name, text in _PARAMETER.findall(value):
        found.setdefault(name.lower(), text)
    return {name: _unquoted(text) for name, text in found.items() if name in _WANTED}


def _unquoted(text: bytes) -> bytes:
    return _ESCAPED.sub(rb"\1", text[1:-1]) if text.startswith(b'"') else text
