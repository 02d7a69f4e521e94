"""How long a prompt is that nobody reads, judged by the request's body alone; pure."""

from __future__ import annotations

from router.prefix.window import without_media
from router.types import Request


def prompt_size(request: Request, most: int) -> int:
    """Bytes that may be prompt, at most so many: the body's, without long media. 0 where it has none.

    The JSON around the texts counts too: it is little beside a prompt that is long enough to matter.
    """
    body = request.body
    if request.method != "POST" or not body:
        return 0
    return min(len(body) if is_form(body) else len(without_media(body)), most)


def is_form(body: bytes) -> bool:
    """Whether it is a multipart body, which begins with its boundary."""
    return body.startswith(b"--")
