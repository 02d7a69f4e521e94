"""What the simulated engine's protocols have in common: what a request asks, and who renders the answer."""

from __future__ import annotations

from typing import Protocol

import msgspec

from engine.simulated_core import Job, SimulatedOptions
from engine.simulated_text import Prompt, text_prompt
from router.errors import InvalidRequest, NotSupported


class Reply(Protocol):
    """Renders one answer into its `StreamOut`."""

    def token(self, job: Job) -> None:
        """One more token, which is not the last."""

    def last(self, job: Job) -> None:
        """The last token, and all that comes after it but the stream's end itself."""


class Ask(msgspec.Struct, frozen=True):
    """A request to the engine."""

    prompt: Prompt
    text: bytes
    """What the prompt's tokens stand for, four bytes each; the last one may lack some."""
    max_tokens: int | None
    priority: int
    reply: Reply


class PromptMaker:
    """Makes prompts with the engine's block size and seed."""

    def __init__(self, options: SimulatedOptions) -> None:
        self._block_tokens = options.block_tokens
        self._seed = options.seed

    def text(self, text: bytes, salt: str | None) -> Prompt:
        return text_prompt(text, self._block_tokens, seed=self._seed, salt=salt or "")


def check_sampling(*, n: int | None, max_tokens: int | None, temperature: float | None, top_p: float | None) -> None:
    """Refuses what vLLM refuses too, and several choices. Raises `InvalidRequest` or `NotSupported`."""
    if n is not None and n < 1:
        raise InvalidRequest(f"n must be at least 1, got {n}.", param="n")
    if n is not None and n > 1:
        raise NotSupported("The simulated engine gives one choice per request.", param="n")
    if max_tokens is not None and max_tokens < 1:
        raise InvalidRequest(f"max_tokens must be at least 1, got {max_tokens}.", param="max_tokens")
    # Written so that NaN is refused as well.
    if temperature is not None and not 0 <= temperature < float("inf"):
        raise InvalidRequest(f"temperature must be non-negative, got {temperature}.", param="temperature")
    if top_p is not None and not 0 < top_p <= 1:
        raise InvalidRequest(f"top_p must be in (0, 1], got {top_p}.", param="top_p")
