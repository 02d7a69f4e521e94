"""The form that a stream's events keep from token to token, taken from one of them.

Sans-IO. vLLM's own server renders a stream's first text event; the events after it differ in the text alone, and in the
token counts where usage goes with each. Rule: a template is only made of an event in which everything else is known to
stay, and only where putting its own text back in gives the same bytes.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

_START: Final = b"data: "
_STOP: Final = b"\n\n"
_CHUNK: Final = frozenset({"id", "object", "created", "model", "choices", "usage"})
_CHOICE: Final = frozenset({"index", "logprobs", "finish_reason", "stop_reason", "prompt_token_ids", "token_ids"})
_COUNTS: Final = ("prompt_tokens", "total_tokens", "completion_tokens")
_USAGE: Final = frozenset({*_COUNTS, "completion_tokens_details"})
_USAGE_BYTES: Final = b'"usage":{"prompt_tokens":%d,"total_tokens":%d,"completion_tokens":%d'

_quote = msgspec.json.Encoder().encode
_parse = msgspec.json.Decoder().decode


class ChunkTemplate:
    """Renders the events of one stream."""

    __slots__ = ("_after", "_before", "_between", "_prompt_tokens", "_tokens")

    def __init__(self, before: bytes, after: bytes, usage: tuple[bytes, int, int] | None = None) -> None:
        self._before = before
        self._between: bytes | None = None
        """What stands between text and usage; None without usage."""
        self._prompt_tokens = self._tokens = 0
        if usage is not None:
            self._between, self._prompt_tokens, self._tokens = usage
        self._after = after

    @classmethod
    def of(cls, event: bytes) -> ChunkTemplate | None:
        """The template of a text event; None where it is none, or may not be like the ones after it."""
        found = _text_of(event)
        if found is None:
            return None
        text, marker, usage = found
        before, marked, after = event.partition(marker)
        quoted = _quote(text)
        if not marked or not after.startswith(quoted):
            return None
        after = after[len(quoted) :]
        if marker in after:
            return None
        if usage is None:
            return cls(before + marker, after)
        prompt, total, completion = usage
        between, counted, after = after.partition(_USAGE_BYTES % usage)
        if total != prompt + completion or not counted or after[:1].isdigit():
            return None
        return cls(before + marker, after, (between, prompt, completion))

    def render(self, text: str, tokens: int) -> bytes:
        """The event of the next `tokens` tokens. Raises `UnicodeEncodeError` for a lone surrogate."""
        if self._between is None:
            return self._before + _quote(text) + self._after
        self._tokens += tokens
        counts = _USAGE_BYTES % (self._prompt_tokens, self._prompt_tokens + self._tokens, self._tokens)
        return self._before + _quote(text) + self._between + counts + self._after


def _text_of(event: bytes) -> tuple[str, bytes, tuple[int, int, int] | None] | None:
    """An event's text, the bytes before it, and its usage."""
    if not (event.startswith(_START) and event.endswith(_STOP)):
        return None
    try:
        chunk: Any = _parse(event[len(_START) :])
        if not chunk.keys() <= _CHUNK:
            return None
        (choice,) = chunk["choices"]
        text, marker = _choice_text(choice)
        usage = chunk.get("usage")
        if usage is None:
            return text, marker, None
        if not usage.keys() <= _USAGE or usage.get("completion_tokens_details") is not None:
            return None
        prompt, total, completion = (usage[name] for name in _COUNTS)
    except (msgspec.DecodeError, AttributeError, KeyError, TypeError, ValueError):
        return None
    return text, marker, (prompt, total, completion)


def _choice_text(choice: dict[str, Any]) -> tuple[str, bytes]:
    """Raises `ValueError` where there is more in the choice than an unfinished text."""
    if "delta" in choice:
        rest, content = {"delta"}, choice["delta"]
        field, marker = "content", b'"delta":{"content":'
        if content.keys() != {"content"}:
            raise ValueError
    else:
        rest, content = {"text"}, choice
        field, marker = "text", b'"choices":[{"index":0,"text":'
    if not choice.keys() - rest <= _CHOICE or choice["index"] != 0:
        raise ValueError
    if any(choice[name] is not None for name in choice.keys() - rest - {"index"}):
        raise ValueError
    text = content[field]
    if not isinstance(text, str):
        raise ValueError
    return text, marker
