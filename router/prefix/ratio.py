"""Tokens per byte of a model's prompts, as its replicas report them; pure. `Prefixes` owns one per base model."""

from __future__ import annotations

from typing import ClassVar, Final

_MEMORY_BYTES: Final = 4 << 20
"""Prompts older than about these many bytes count half or less, so that a change of the traffic's language shows."""
_PRIOR_BYTES: Final = 4096


class Ratio:
    """Starts from a guess that the first few kilobytes outweigh."""

    PRIOR: ClassVar[float] = 0.25
    """English text has about four bytes to a token."""

    def __init__(self) -> None:
        self._bytes = float(_PRIOR_BYTES)
        self._tokens = _PRIOR_BYTES * self.PRIOR
        self.tokens_per_byte = self.PRIOR

    def learn(self, prompt_bytes: int, prompt_tokens: int) -> None:
        """Prompts of so many canonical bytes had so many tokens."""
        self._bytes += prompt_bytes
        self._tokens += prompt_tokens
        self.tokens_per_byte = self._tokens / self._bytes
        if self._bytes > _MEMORY_BYTES:
            self._bytes /= 2
            self._tokens /= 2
