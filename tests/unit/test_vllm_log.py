"""vLLM's own log, as a replica shows it."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator

import pytest

from engine.vllm_log import shorten_tracebacks
from tests.integration.vllm_fixtures import FOREIGN_WARNINGS

pytestmark = [pytest.mark.vllm, pytest.mark.slow, FOREIGN_WARNINGS]


@pytest.fixture
def shown() -> Iterator[io.StringIO]:
    """What a handler of vLLM's log writes."""
    text = io.StringIO()
    handler = logging.StreamHandler(text)
    handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    log = logging.getLogger("vllm")
    log.addHandler(handler)
    shorten_tracebacks()
    shorten_tracebacks()
    assert len(handler.filters) == 1
    yield text
    log.removeHandler(handler)


def say(logger: str, error: Exception) -> None:
    try:
        raise error
    except Exception:
        logging.getLogger(logger).exception("Error in %s.", "the stream")


def test_a_clients_mistake_takes_one_line(shown: io.StringIO) -> None:
    from vllm.exceptions import VLLMValidationError

    say("vllm.entrypoints.openai.completion.serving", VLLMValidationError("token 9\nis unknown"))
    assert shown.getvalue() == "WARNING Error in the stream. VLLMValidationError: token 9 is unknown\n"


def test_a_models_malformed_tool_call_takes_one_line(shown: io.StringIO) -> None:
    say("vllm.tool_parsers.hermes_tool_parser", ValueError("no JSON"))
    assert shown.getvalue() == "WARNING Error in the stream. ValueError: no JSON\n"


def test_a_defect_keeps_its_traceback(shown: io.StringIO) -> None:
    say("vllm.entrypoints.openai.completion.serving", ValueError("oops"))
    assert shown.getvalue().startswith("ERROR Error in the stream.\nTraceback (most recent call last):\n")
