"""A plain step's load as numbers, and who takes it: see `_steps.pyx`."""

cdef struct Numbers:
    long long running
    long long waiting
    long long queued_prefill_tokens
    long long step_prefill_tokens
    long long step_decodes
    long long step_context_tokens
    double kv_usage
    double step_ms
    double queued_prefill_pairs
    double step_prefill_pairs
    bint asleep

cdef object load_of(const Numbers* numbers)

cdef class Taker:
    cdef bint asleep

    cdef int plainly(self, const Numbers* numbers, long long acked, double now) except -1
