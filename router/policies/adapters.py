"""Which LoRA adapters the replicas have loaded, as far as this router's own requests tell.

The rule: an engine keeps the adapters that were used last, as many as it has slots (vLLM's `max_loras`), and so does
the mirror. It is bounded by its slots times its replicas, and counts in requests: it needs no clock.
"""

from __future__ import annotations

from collections.abc import Collection

_MAX_REPLICAS = 4096
"""Replicas that are remembered; those that went away are forgotten as others come."""


class AdapterMirror:
    """The last adapters used on each replica."""

    def __init__(self, slots: int) -> None:
        self._slots = slots
        # Both levels from the least to the most recently used: dicts keep the order of insertion.
        self._loaded: dict[str, dict[str, None]] = {}
        self._holders: dict[str, set[str]] = {}
        """The same by adapter."""

    def used(self, replica: str, adapter: str) -> None:
        """A request for that adapter goes there."""
        adapters = self._loaded.pop(replica, None) or {}
        adapters.pop(adapter, None)
        adapters[adapter] = None
        self._loaded[replica] = adapters
        self._holders.setdefault(adapter, set()).add(replica)
        if len(adapters) > self._slots:
            self._forget(replica, next(iter(adapters)))
        if len(self._loaded) > _MAX_REPLICAS:
            gone = next(iter(self._loaded))
            for each in list(self._loaded[gone]):
                self._forget(gone, each)
            del self._loaded[gone]

    def holders(self, adapter: str) -> Collection[str]:
        """The replicas that have the adapter among the last ones used there; those that went away may be among them."""
        return self._holders.get(adapter, ())

    def _forget(self, replica: str, adapter: str) -> None:
        del self._loaded[replica][adapter]
        holders = self._holders[adapter]
        holders.remove(replica)
        if not holders:
            del self._holders[adapter]
