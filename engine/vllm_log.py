"""What vLLM's own log shows of requests: a line for what is no defect, the traceback for what is.

Rule: nothing is left out, only tracebacks that would point at vLLM's code for what a client or the model wrote.
"""

from __future__ import annotations

import logging
from typing import Final

_VLLM: Final = "vllm"
_PARSERS: Final = ("vllm.tool_parsers.", "vllm.reasoning.")
"""Here the model's own words are parsed; when they are malformed, vLLM hands them on as plain text."""


def shorten_tracebacks() -> None:
    """Has the handlers of vLLM's log in this process shorten what is no defect. vLLM makes them when an engine starts;
    may be called again.
    """
    for handler in logging.getLogger(_VLLM).handlers:
        if _shorten not in handler.filters:
            handler.addFilter(_shorten)


def _shorten(record: logging.LogRecord) -> bool:
    from vllm.exceptions import GracefulHTTPError, VLLMClientError

    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, (VLLMClientError, GracefulHTTPError)) or (error and record.name.startswith(_PARSERS)):
        said = f"{record.getMessage()} {type(error).__name__}: {error}"
        record.msg, record.args = "%s", (" ".join(said.split()),)
        record.levelno, record.levelname = logging.WARNING, logging.getLevelName(logging.WARNING)
        record.exc_info = record.exc_text = None
    return True


def keep_levels() -> None:
    """Fixes the level of our own loggers. Something that vLLM imports sets the root's to ERROR, and our warnings would
    vanish with it; call this first."""
    for name in ("engine", "router"):
        logger = logging.getLogger(name)
        if logger.level == logging.NOTSET:
            logger.setLevel(logger.getEffectiveLevel())
