"""What a request may expect of a replica, from the snapshot alone. Pure."""

from __future__ import annotations

from router.types import PrefixView, ReplicaView


def first_token_s(view: ReplicaView, prefix: PrefixView, now: float) -> float:
    """Seconds until the first token of that prompt on that replica: what its queue still takes at `now` (on the clock
    of `Snapshot.now`), then the part of the prompt that it does not hold. 0 while the load model knows nothing."""
    outlook = view.outlook
    held = prefix.held.get(view.replica)
    # Both are estimates, from different sources: what is held may seem to be more than there is.
    cached = min(held.tokens, prefix.tokens) if held else 0
    waits = outlook.wait_s - (now - outlook.as_of)
    return (waits if waits > 0.0 else 0.0) + outlook.batch_s + outlook.prefill_s(prefix.tokens, cached)
