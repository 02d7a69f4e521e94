"""What a request may expect of each replica, from the snapshot alone. Pure."""

from __future__ import annotations

from router.types import PrefixView, ReplicaView, Snapshot


def first_token_s(view: ReplicaView, prefix: PrefixView, now: float) -> float:
    """Seconds until the prompt's first token on that replica: what is left of the queue at `now` (`Snapshot.now`), the
    step that computes the prompt, and the part of the prompt that is not held there. 0 while the load model knows
    nothing."""
    outlook = view.outlook
    held = prefix.held.get(view.replica)
    # Both are estimates, from different sources: what is held may seem to be more than there is.
    cached = min(held.tokens, prefix.tokens) if held else 0
    return outlook.begins_s(now) + outlook.batch_s + outlook.prefill_s(prefix.tokens, cached)


def first_tokens_s(snapshot: Snapshot) -> list[float]:
    """`first_token_s` of all replicas, in the snapshot's order, at a third of the time.

    `Outlook.prefill_s` is written out: n uncached tokens behind c cached ones make n * c + n * n / 2 pairs, which is
    half of the difference of two squares.
    """
    held, tokens, now = snapshot.prefix.held, snapshot.prefix.tokens, snapshot.now
    pairs = tokens * tokens * 0.5
    expected = []
    for view in snapshot.replicas:
        outlook = view.outlook
        new, new_pairs = tokens, pairs
        if view.replica in held:
            cached = min(held[view.replica].tokens, tokens)
            new -= cached
            new_pairs -= cached * cached * 0.5
        waits = outlook.wait_s - (now - outlook.as_of)
        prefill = new * outlook.token_s + new_pairs * outlook.pair_s
        expected.append((waits if waits > 0.0 else 0.0) + outlook.sent_s + outlook.batch_s + prefill)
    return expected
