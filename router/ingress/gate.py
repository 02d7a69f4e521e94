"""The gate: which clients may ask, and for which models.

Rule: a request is let in by its API key alone, and the key goes no further: neither to a replica, nor into a log, a
receipt or a metric. The gate owns the keys in use and what each tenant has asked; `reload` replaces the keys whole.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Final

from router import keys
from router.errors import KeyRefused, ModelForbidden, cut
from router.ingress.base import ModelStatus
from router.ingress.refusals import RefusalLog
from router.keys import Key

CREDENTIALS: Final = frozenset({"authorization", "x-api-key"})
"""Where clients put keys: those of OpenAI's and of Anthropic's APIs."""
_SCHEME: Final = "bearer "


class Gate:
    """All ingresses of one router process share it."""

    def __init__(
        self,
        path: str,
        refused: Callable[[str, str], None] = lambda ingress, reason: None,
        *,
        wall: Callable[[], float] = time.time,
    ) -> None:
        """Reads the keys. `refused` is called with ``http`` or ``grpc`` and why, `wall` is in seconds since 1970.

        Raises `ConfigError`.
        """
        self.path = path
        self.asked: dict[str, int] = {}
        """Requests let in, by tenant."""
        self._refused = refused
        self._wall = wall
        self._log = RefusalLog()
        self._keys: keys.Keys = {}
        self.reload()

    def reload(self) -> None:
        """Reads the keys again. Raises `ConfigError`, and those in use stay. Any thread may call it."""
        found = keys.read(self.path)
        for key in found.values():
            self.asked.setdefault(key.tenant, 0)
        self._keys = found  # Last: whoever is let in by them is counted.

    def admit(self, ingress: str, given: Mapping[str, str]) -> Key:
        """Counts a request in by the key that the client showed in headers or metadata. Raises `KeyRefused`."""
        key = self.check(ingress, given)
        self.asked[key.tenant] += 1
        return key

    def check(self, ingress: str, given: Mapping[str, str]) -> Key:
        """The same, and counts nothing but refusals."""
        text = given.get("authorization")
        if text is not None and text[: len(_SCHEME)].lower() == _SCHEME:
            text = text[len(_SCHEME) :].strip()
        elif text is None:
            text = given.get("x-api-key")
        if text is None:
            raise self._refusal(ingress, "missing", "There is no API key: send it as `authorization: Bearer KEY`")
        if not keys.is_well_formed(text):
            raise self._refusal(ingress, "malformed", "The API key is not valid")
        key = keys.find(self._keys, text)
        if key is None:
            raise self._refusal(ingress, "unknown", "The API key is not valid")
        if key.expires_at != math.inf and self._wall() >= key.expires_at:
            raise self._refusal(ingress, "expired", "The API key has expired", key)
        return key

    def check_model(self, ingress: str, key: Key, model: str, adapter: str = "") -> None:
        """Raises `ModelForbidden` where the key is not for that model, or for that adapter of it."""
        if key.models is not None:
            for name in (model, adapter) if adapter else (model,):
                if name not in key.models:
                    self._tell(ingress, "model", key)
                    raise ModelForbidden(f"The API key is not for the model `{cut(name)}`", param="model")

    def _refusal(self, ingress: str, reason: str, message: str, key: Key | None = None) -> KeyRefused:
        self._tell(ingress, reason, key)
        return KeyRefused(message)

    def _tell(self, ingress: str, reason: str, key: Key | None) -> None:
        self._refused(ingress, reason)
        whose = f" of {key.tenant!r} ({key.id})" if key is not None else ""
        self._log.tell("refused over %s: API key%s: %s", ingress, whose, reason)


def visible(models: tuple[ModelStatus, ...], key: Key | None) -> tuple[ModelStatus, ...]:
    """Those of the models that the key is for; all of them where none is asked for."""
    if key is None or key.models is None:
        return models
    return tuple(status for status in models if key.allows(status.card.name))
