"""The HTTP ingress's log: one bounded line per event, whatever a client sent."""

from __future__ import annotations

import logging
from typing import Final

from router.errors import LOGGED_CHARS, Fault, InternalError, KvlaneError, cut
from router.ingress.http_response import Envelope

logger: Final = logging.getLogger("kvlane.http")


def log_failure(error: KvlaneError, envelope: Envelope) -> None:
    """One line; with a traceback only for what is a defect here."""
    if error.logged:
        return
    path, message = cut(envelope.path, LOGGED_CHARS), cut(error.message, LOGGED_CHARS)
    what = (envelope.method, path, error.http_status, error.name, message, envelope.request_id)
    if isinstance(error, InternalError):
        logger.error("%s %r %d %s: %r (%s)", *what, exc_info=error)
    elif error.fault is Fault.REPLICA:
        logger.warning("%s %r %d %s: %r (%s)", *what)
    else:
        logger.info("%s %r %d %s: %r (%s)", *what)


def log_defect(doing: str, method: str, path: str) -> None:
    """The exception being handled, with its traceback."""
    logger.exception("failed to %s %s %r", doing, method, cut(path, LOGGED_CHARS))


def log_relayed_refusal(envelope: Envelope, status: int) -> None:
    """An error that the replica itself answered with, such as vLLM's judgement of a client's values."""
    logger.info(
        "%s %r %d by the replica (%s)", envelope.method, cut(envelope.path, LOGGED_CHARS), status, envelope.request_id
    )


def log_answer(envelope: Envelope, status: int) -> None:
    """An answer that was given whole."""
    if logger.isEnabledFor(logging.DEBUG):
        logger.debug("%s %r %d %s", envelope.method, cut(envelope.path, LOGGED_CHARS), status, envelope.request_id)
