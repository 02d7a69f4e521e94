"""What lanes give to accounts, both compiled, without a `Load` in between."""

from router.types import Load


cdef object load_of(const Numbers* numbers):
    return Load(
        numbers.running,
        numbers.waiting,
        numbers.queued_prefill_tokens,
        numbers.kv_usage,
        numbers.step_ms,
        numbers.queued_prefill_pairs,
        numbers.step_prefill_tokens,
        numbers.step_prefill_pairs,
        numbers.step_decodes,
        numbers.step_context_tokens,
        True if numbers.asleep else False,
    )


cdef class Taker:
    """An account that takes steps as numbers; `asleep` is what its last load said."""

    cdef int plainly(self, const Numbers* numbers, long long acked, double now) except -1:
        """A step came at `now` in loop time, whose load counts all streams up to `acked` and sleeps or not as before."""
        raise NotImplementedError
