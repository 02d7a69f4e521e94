"""Accounts, the load model and a pool's terms, compiled: `router.load.account`, `router.load.model` and the columns of
`router.pool` for who needs numbers and no views.

The rule: each class gives what the Python class of its name gives, to the last bit, whatever a replica reports. Numbers
that C's are too small for are worked out as Python objects. A `Table` belongs to its pool, an `Account` to its lane.
"""

cimport cython
from cpython.bytearray cimport PyByteArray_AS_STRING
from cpython.float cimport PyFloat_AS_DOUBLE, PyFloat_AsDouble, PyFloat_CheckExact
from cpython.long cimport PyLong_AsLongLongAndOverflow, PyLong_CheckExact
from cpython.object cimport Py_EQ, Py_TYPE, PyObject_RichCompareBool, PyTypeObject
from libc.math cimport INFINITY, fabs, isfinite, pow

from collections import deque

from router.load._steps cimport Numbers, Taker, load_of

from router.types import NO_CHARGE, NO_PREFIX, TERMS, CacheMode, Load, Outlook, PoolSnapshot, ReplicaView

cdef enum:
    WIDTH = 11
    BEYOND = 8

assert TERMS == WIDTH

# Of which sums are exact as floats, and products as C's whole numbers; as in `router.policies._costs`.
cdef long long MOST = 1LL << 40
cdef long long SMALL = 1LL << 31
cdef long long UNBOUNDED = 1LL << 30

# As in `router.load.model`.
cdef double UNIT_TOKENS = 1e3
cdef double UNIT_PAIRS = 1e6
cdef double UNIT_CONTEXT = 1e5
cdef double MEMORY = 0.999
cdef double RIDGE = 1e-3
cdef double MOST_FIGURE = 1e100
cdef long long REFIT_STEPS = 32
cdef double OUTLIER = 5.0
cdef double LEAST_FACTOR = 0.1
cdef double MOST_FACTOR = 10.0
cdef double CHANCE = 1.25
cdef double HALF_LIFE_S = 5.0
cdef double PRIOR_MS = 500.0
cdef long long LEARN_EVERY = 4
cdef long long LEARNED_STEPS = 256
cdef double FRESH_S = 0.5
cdef double FACTOR_S = 0.25
cdef double GUESS_TOKEN_MS = 0.05
cdef double GUESS_BUDGET = 2048.0

# Not a constant to the compiler, which might make another function of it than Python's power is.
cdef double HALF = float("0.5")

# From 3.12 on Python's `sum` of floats keeps what rounding loses (Neumaier's sum).
cdef bint COMPENSATED = sum([1.0, 1e100, 1.0, -1e100]) == 2.0

# The fields of a load, as what gets them out of it: by name each is a look-up in its class first.
cdef object RUNNING = Load.running
cdef object WAITING = Load.waiting
cdef object QUEUED_TOKENS = Load.queued_prefill_tokens
cdef object KV_USAGE = Load.kv_usage
cdef object STEP_MS = Load.step_ms
cdef object QUEUED_PAIRS = Load.queued_prefill_pairs
cdef object STEP_TOKENS = Load.step_prefill_tokens
cdef object STEP_PAIRS = Load.step_prefill_pairs
cdef object STEP_DECODES = Load.step_decodes
cdef object STEP_CONTEXT = Load.step_context_tokens


cdef inline object field(load, getter):
    if type(load) is Load:
        return (<PyTypeObject*>Py_TYPE(getter)).tp_descr_get(getter, load, Load)
    return getattr(load, getter.__name__)


cdef struct Expected:
    double wait_s
    double step_s
    double token_s
    double pair_s
    double batch_s
    double as_of
    double sent_s


cdef class StepFit:
    """step ms as a linear function of (1, tokens, pairs, context)."""

    cdef double guess[4]
    cdef double products[4][4]
    cdef double targets[4]
    cdef readonly long long steps
    cdef long long due

    def __init__(self, guess):
        cdef int i, j
        for i in range(4):
            self.guess[i] = guess[i]
            self.targets[i] = 0.0
            for j in range(4):
                self.products[i][j] = 0.0
        self.steps = 0
        self.due = 1

    @property
    def coefficients(self):
        """Milliseconds per step, token, pair and context token."""
        return self.guess[0], self.guess[1], self.guess[2], self.guess[3]

    cdef double expect_ms(self, double tokens, double pairs, double context) noexcept:
        return self.guess[0] + self.guess[1] * tokens + self.guess[2] * pairs + self.guess[3] * context

    cdef bint learn(self, double tokens, double pairs, double context, double ms) noexcept:
        cdef double row[4]
        cdef double slow, weight, scaled
        cdef int i, j
        row[0], row[1], row[2], row[3] = 1.0, tokens / UNIT_TOKENS, pairs / UNIT_PAIRS, context / UNIT_CONTEXT
        slow = 1.0 if 1.0 > ms else ms
        weight = 1.0 / (slow * slow)
        for i in range(4):
            scaled = row[i] * weight
            for j in range(i, 4):
                self.products[i][j] = self.products[i][j] * MEMORY + scaled * row[j]
            self.targets[i] = self.targets[i] * MEMORY + scaled * ms
        self.steps += 1
        if self.steps < self.due:
            return False
        self.fit()
        self.due = self.steps + min(self.steps, REFIT_STEPS)
        return True

    cdef void fit(self) noexcept:
        cdef double last[4]
        cdef double solution[4]
        cdef double values[4]
        cdef double units[4]
        cdef int free[4]
        cdef int i, least, size = 4
        units[0], units[1], units[2], units[3] = 1.0, UNIT_TOKENS, UNIT_PAIRS, UNIT_CONTEXT
        for i in range(4):
            free[i] = i
            last[i] = self.guess[i] * units[i]
            values[i] = 0.0
        while size:
            self.solve(free, size, last, solution)
            least = 0
            for i in range(1, size):
                if solution[i] < solution[least]:
                    least = i
            if solution[least] >= 0.0:
                break
            size -= 1
            for i in range(least, size):
                free[i] = free[i + 1]
        for i in range(size):
            values[free[i]] = solution[i] / units[free[i]]
        for i in range(4):
            self.guess[i] = values[i]

    cdef void solve(self, const int* free, int size, const double* last, double* solution) noexcept:
        cdef double rows[4][5]
        cdef double ridge, ratio, pivot, total, lost, value, most
        cdef int i, j, k, one, other
        most = self.products[free[0]][free[0]]
        for i in range(1, size):
            if self.products[free[i]][free[i]] > most:
                most = self.products[free[i]][free[i]]
        ridge = RIDGE * most * 1e-3 + 1e-12
        for i in range(size):
            one = free[i]
            for j in range(size):
                other = free[j]
                rows[i][j] = self.products[min(one, other)][max(one, other)]
            rows[i][i] += ridge
            rows[i][size] = self.targets[one] + ridge * last[one]
        for k in range(size):
            pivot = rows[k][k]
            for i in range(k + 1, size):
                ratio = rows[i][k] / pivot
                if ratio != 0.0:
                    for j in range(k, size + 1):
                        rows[i][j] -= ratio * rows[k][j]
        for k in range(size - 1, -1, -1):
            total = lost = 0.0
            for j in range(k + 1, size):
                value = rows[k][j] * solution[j]
                if COMPENSATED:
                    if fabs(total) >= fabs(value):
                        lost += (total - (total + value)) + value
                    else:
                        lost += (value - (total + value)) + total
                total += value
            if lost != 0.0 and isfinite(lost):
                total += lost
            solution[k] = (rows[k][size] - total) / rows[k][k]


cdef struct Pace:
    double took
    double expected
    double at


cdef inline double left(const Pace* pace, double now) noexcept:
    cdef double passed = now - pace.at
    return pow(HALF, passed / HALF_LIFE_S) if passed > 0.0 else 1.0


cdef inline void stepped(Pace* pace, double now, double took_ms, double expected_ms) noexcept:
    cdef double share = left(pace, now)
    pace.took = pace.took * share + took_ms
    pace.expected = pace.expected * share + expected_ms
    pace.at = now


cdef inline double factor_of(const Pace* pace, double now, double otherwise) noexcept:
    cdef double share = left(pace, now)
    cdef double factor = (pace.took * share + PRIOR_MS * otherwise) / (pace.expected * share + PRIOR_MS)
    factor = LEAST_FACTOR if LEAST_FACTOR > factor else factor
    return MOST_FACTOR if MOST_FACTOR < factor else factor


cdef class FleetModel:
    """What all replicas of one model have in common."""

    cdef readonly StepFit prefill, decode
    cdef readonly double budget, now
    cdef readonly long long version
    cdef double stale_at
    cdef Pace pace

    def __init__(self):
        self.prefill = StepFit((0.0, GUESS_TOKEN_MS, 0.0, 0.0))
        self.decode = StepFit((0.0, GUESS_TOKEN_MS, 0.0, 0.0))
        self.budget = GUESS_BUDGET
        self.version = 0
        self.stale_at = self.now = 0.0
        self.pace.took = self.pace.expected = self.pace.at = 0.0

    def foresight(self):
        """For one replica's account."""
        return ReplicaModel(self)

    cdef void fitted(self, bint early) noexcept:
        if early or self.now >= self.stale_at:
            self.version += 1
            self.stale_at = self.now + FRESH_S


cdef class ReplicaModel:
    """One replica: the fleet's model times its own factor."""

    cdef FleetModel fleet
    cdef Pace pace
    cdef double as_of, factor, factor_until
    cdef long long steps
    cdef bint told, busy
    cdef object last_ms, last_prompt, last_decodes, last_context

    def __init__(self, FleetModel fleet not None):
        self.fleet = fleet
        self.pace.took = self.pace.expected = self.pace.at = 0.0
        self.as_of = 0.0
        self.factor = 1.0
        self.factor_until = -INFINITY
        self.steps = 0
        self.told = self.busy = False

    @property
    def news(self):
        return self.fleet

    def observe(self, load, double now):
        """Learns from a step whose report came at `now`."""
        self.take(load, now)

    cdef int take(self, load, double now) except -1:
        return self.take_in(
            field(load, STEP_MS),
            field(load, STEP_TOKENS),
            field(load, STEP_DECODES),
            field(load, STEP_CONTEXT),
            field(load, QUEUED_TOKENS),
            field(load, RUNNING),
            field(load, STEP_PAIRS),
            now,
        )

    cdef int take_in(
        self, step_ms, prompted, decodes, context, queued, running, prompted_pairs, double now
    ) except -1:
        cdef FleetModel fleet = self.fleet
        cdef StepFit fit
        cdef bint again, silent
        cdef double ms, pairs, prompt
        fleet.now = now
        again = self.told and (
            PyObject_RichCompareBool(step_ms, self.last_ms, Py_EQ) != 0
            and PyObject_RichCompareBool(prompted, self.last_prompt, Py_EQ) != 0
            and PyObject_RichCompareBool(decodes, self.last_decodes, Py_EQ) != 0
            and PyObject_RichCompareBool(context, self.last_context, Py_EQ) != 0
        )
        self.told = True
        self.last_ms, self.last_prompt, self.last_decodes, self.last_context = step_ms, prompted, decodes, context
        ms = PyFloat_AsDouble(step_ms)
        silent = ms <= 0.0 or not (prompted or decodes)
        if silent or not again or not self.busy or (decodes and not context):
            self.as_of = now
        self.busy = queued > 0 or running > 0
        if silent or again:
            return 0
        pairs = PyFloat_AsDouble(prompted_pairs)
        if not (fabs(ms) < MOST_FIGURE and fabs(pairs) < MOST_FIGURE):
            return 0
        prompt = PyFloat_AsDouble(prompted)
        if prompt > fleet.budget:
            fleet.budget = prompt
        fit = fleet.prefill if prompted else fleet.decode
        self.steps += 1
        if self.steps % LEARN_EVERY and fit.steps >= LEARNED_STEPS:
            return 0
        self.learn(fit, PyFloat_AsDouble(prompted + decodes), pairs, PyFloat_AsDouble(context), ms)
        return 0

    cdef void learn(self, StepFit fit, double tokens, double pairs, double context, double ms) noexcept:
        cdef FleetModel fleet = self.fleet
        cdef double expected = fit.expect_ms(tokens, pairs, context)
        cdef double common, factor, most
        if fit.steps >= REFIT_STEPS and expected > 0.0:
            common = factor_of(&fleet.pace, fleet.now, 1.0)
            factor = factor_of(&self.pace, fleet.now, common)
            most = OUTLIER * expected * factor
            ms = most if most < ms else ms
            stepped(&self.pace, fleet.now, ms, expected)
            stepped(&fleet.pace, fleet.now, ms, expected)
            self.factor_until = -INFINITY
            ms *= common / factor
        if fit.learn(tokens, pairs, context, ms):
            fleet.fitted(fit.steps <= LEARNED_STEPS)

    def outlook(self, load, unacked_tokens, unacked_pairs, unacked):
        """What to expect of the replica with this load and these requests on their way to it."""
        cdef Expected expected
        self.expect(load, unacked_tokens, unacked_pairs, unacked, &expected)
        return outlook_of(&expected)

    cdef int expect(self, load, unacked_tokens, unacked_pairs, unacked, Expected* made) except -1:
        cdef double ahead, both, read
        cdef long long running, here, tokens, others
        cdef bint busy
        self.compare_again()
        there, decodes, context = field(load, RUNNING), field(load, STEP_DECODES), field(load, STEP_CONTEXT)
        if small(there, &running) and small(decodes, &here) and small(context, &tokens) and small(unacked, &others):
            if here > running:
                tokens = tokens * running // here
                here = running
            ahead, both, read = <double>here, <double>(here + others), <double>tokens
        else:
            there = max(there, 0)
            if decodes > there:
                decodes, context = there, context * there // decodes
            ahead, both = PyFloat_AsDouble(decodes), PyFloat_AsDouble(decodes + unacked)
            read = PyFloat_AsDouble(context)
        busy = there > 0
        self.work_out(
            busy,
            ahead,
            both,
            read,
            PyFloat_AsDouble(field(load, QUEUED_TOKENS)),
            PyFloat_AsDouble(field(load, QUEUED_PAIRS)),
            PyFloat_AsDouble(unacked_tokens),
            PyFloat_AsDouble(unacked_pairs),
            made,
        )
        return 0

    cdef bint expect_plainly(
        self, const Numbers* load, unacked_tokens, unacked_pairs, Py_ssize_t unacked, Expected* made
    ) except -1:
        """The same of a load in numbers; False where some are too large for C's."""
        cdef long long here = load.step_decodes, tokens = load.step_context_tokens
        if not (0 <= load.running < SMALL and 0 <= here < SMALL and 0 <= tokens < SMALL and unacked < SMALL):
            return False
        self.compare_again()
        if here > load.running:
            tokens = tokens * load.running // here
            here = load.running
        self.work_out(
            load.running > 0,
            <double>here,
            <double>(here + unacked),
            <double>tokens,
            <double>load.queued_prefill_tokens,
            load.queued_prefill_pairs,
            PyFloat_AsDouble(unacked_tokens),
            PyFloat_AsDouble(unacked_pairs),
            made,
        )
        return True

    cdef void work_out(
        self,
        bint busy,
        double ahead,
        double both,
        double read,
        double queued_tokens,
        double queued_pairs,
        double sent_tokens,
        double sent_pairs,
        Expected* made,
    ) noexcept:
        """Of so many decodes in the next step, as it is and with the requests on their way, that read so much."""
        cdef FleetModel fleet = self.fleet
        cdef StepFit prefill = fleet.prefill
        cdef StepFit decode = fleet.decode
        cdef double scale, beside, per_token, wait, under_way, pair = prefill.guess[2]
        scale = self.factor * 1e-3
        beside = prefill.guess[0] + prefill.guess[1] * ahead + prefill.guess[3] * read
        per_token = prefill.guess[1] + beside / fleet.budget
        wait = per_token * queued_tokens + pair * queued_pairs
        under_way = decode.guess[0] + decode.guess[1] * ahead + decode.guess[3] * read
        if busy and under_way > wait:
            wait = under_way
        made.wait_s = wait * scale
        made.step_s = (decode.guess[0] + decode.guess[1] * both + decode.guess[3] * read) * scale
        made.token_s = per_token * scale
        made.pair_s = pair * scale
        made.batch_s = beside * scale
        made.as_of = self.as_of
        made.sent_s = (per_token * sent_tokens + pair * sent_pairs) * scale

    cdef void compare_again(self) noexcept:
        if self.fleet.now >= self.factor_until:
            self.compare()

    cdef void compare(self) noexcept:
        cdef double now = self.fleet.now
        cdef double common = factor_of(&self.fleet.pace, now, 1.0)
        cdef double factor = factor_of(&self.pace, now, common)
        self.factor = common if common / CHANCE < factor < common * CHANCE else factor
        self.factor_until = now + FACTOR_S


cdef object outlook_of(const Expected* made):
    return Outlook(made.wait_s, made.step_s, made.token_s, made.pair_s, made.batch_s, made.as_of, made.sent_s)


cdef bint small(number, long long* value) except -1:
    """Whether it is a whole number from 0 on of which products are exact."""
    cdef int overflow = 0
    if not PyLong_CheckExact(number):
        return False
    value[0] = PyLong_AsLongLongAndOverflow(number, &overflow)
    return not overflow and 0 <= value[0] < SMALL


cdef bint counted(number, long long* value) except -1:
    """Whether it is a whole number of which sums are exact as floats."""
    cdef int overflow = 0
    if not PyLong_CheckExact(number):
        return False
    value[0] = PyLong_AsLongLongAndOverflow(number, &overflow)
    return not overflow and -MOST <= value[0] <= MOST


@cython.final
@cython.no_gc
@cython.freelist(256)
cdef class Row:
    """One replica at one moment."""

    cdef readonly object replica
    cdef object last, leases, max_num_seqs, outlook, tokens, pairs, kv_tokens, cache, made
    cdef Py_ssize_t unacked
    cdef Expected expected
    cdef Numbers numbers  # The load, where `last` is None.

    cdef object load(self):
        if self.last is None:
            self.last = load_of(&self.numbers)
        return self.last

    @property
    def queue_depth(self):
        """As of its view."""
        if self.last is None:
            return self.numbers.running + self.unacked + self.numbers.waiting
        return field(self.last, RUNNING) + self.unacked + field(self.last, WAITING)

    @property
    def asleep(self):
        """As of its view."""
        return bool(self.numbers.asleep) if self.last is None else self.last.asleep

    def expects_s(self, now, tokens, cached):
        """As of its view."""
        cdef const Expected* expected = &self.expected
        cdef double wait, new, had
        cdef long long whole, known
        if self.outlook is not None or not (small(tokens, &whole) and small(cached, &known)):
            return self.view().expects_s(now, tokens, cached)
        if not whole or expected.token_s == 0.0 or self.asleep:
            return 0.0
        wait = expected.wait_s - (<double>now - expected.as_of)
        new, had = <double>(whole - known), <double>known
        return (
            (wait if wait > 0.0 else 0.0)
            + expected.sent_s
            + expected.batch_s
            + (new * expected.token_s + new * (had + new * 0.5) * expected.pair_s)
        )

    cdef object view(self):
        if self.made is None:
            outlook = outlook_of(&self.expected) if self.outlook is None else self.outlook
            self.made = ReplicaView(
                self.replica,
                self.load(),
                self.unacked,
                self.leases,
                self.max_num_seqs,
                outlook,
                self.tokens,
                self.pairs,
                self.kv_tokens,
                self.cache,
            )
        return self.made

    cdef bint lay_out(self, double* terms) except -1:
        """Whether all its terms are exact as numbers, and are in `terms` now."""
        cdef Expected* expected = &self.expected
        cdef long long running, waiting, most, leases
        if self.last is None:
            terms[9] = self.numbers.kv_usage
            running, waiting = self.numbers.running, self.numbers.waiting
            if not (-MOST <= running <= MOST and -MOST <= waiting <= MOST):
                return False
        else:
            usage = field(self.last, KV_USAGE)
            if not (
                is_float(usage, &terms[9])
                and counted(field(self.last, RUNNING), &running)
                and counted(field(self.last, WAITING), &waiting)
            ):
                return False
        if not (counted(self.max_num_seqs, &most) and counted(self.leases, &leases)):
            return False
        if self.outlook is not None and not taken_apart(self.outlook, expected):
            return False
        running += self.unacked
        waiting += running
        most = waiting - (most or UNBOUNDED)
        if not (-MOST <= running <= MOST and -MOST <= waiting <= MOST and -MOST <= most <= MOST):
            return False
        terms[0] = expected.as_of + expected.wait_s
        terms[1] = expected.sent_s
        terms[2] = expected.batch_s
        terms[3] = expected.step_s
        terms[4] = expected.token_s
        terms[5] = expected.pair_s
        terms[6] = <double>running
        terms[7] = <double>waiting
        terms[BEYOND] = <double>most
        terms[10] = <double>leases
        return True


cdef bint taken_apart(outlook, Expected* made) except -1:
    """Whether all of an outlook is in `made` now."""
    return (
        is_float(outlook.wait_s, &made.wait_s)
        and is_float(outlook.step_s, &made.step_s)
        and is_float(outlook.token_s, &made.token_s)
        and is_float(outlook.pair_s, &made.pair_s)
        and is_float(outlook.batch_s, &made.batch_s)
        and is_float(outlook.as_of, &made.as_of)
        and is_float(outlook.sent_s, &made.sent_s)
    )


cdef inline bint is_float(number, double* value) noexcept:
    if not PyFloat_CheckExact(number):
        return False
    value[0] = PyFloat_AS_DOUBLE(number)
    return True


@cython.final
cdef class Account(Taker):
    """One replica's load as this router knows it."""

    cdef readonly object replica, cache, news
    cdef object last
    cdef Numbers numbers
    cdef public object on_sleep
    cdef public object _foresight
    cdef readonly object leases
    cdef readonly object max_num_seqs
    cdef object kv_tokens, tokens, pairs
    cdef object charges
    cdef object version
    cdef long long fleet_version
    cdef bint foreseen
    cdef object outlook
    cdef Expected expected
    cdef Row current
    cdef readonly list _watchers

    def __init__(self, replica, info, load, foresight=None):
        if foresight is None:
            from router.load.account import Blind

            foresight = Blind()
        self.replica = replica
        self.last = load
        self.asleep = load.asleep
        self.leases = 0
        self.cache = CacheMode.APPROXIMATE if info.prefix_caching else CacheMode.OFF
        self._foresight = foresight
        self.news = foresight.news
        self.max_num_seqs = info.max_num_seqs
        self.kv_tokens = info.kv_blocks * info.kv_block_tokens
        self.charges = deque()
        self.tokens = 0
        self.pairs = 0.0
        self.version = 0
        self.fleet_version = 0
        self.foreseen = False
        self._watchers = []
        self.on_sleep = nothing

    def watch(self, set stale not None, number):
        self._watchers.append((stale, number))

    def unwatch(self, stale=None):
        self._watchers = [one for one in self._watchers if stale is not None and one[0] is not stale]

    @property
    def load(self):
        """What the replica said last."""
        if self.last is None:
            self.last = load_of(&self.numbers)
        return self.last

    @property
    def unacked(self):
        """Requests submitted that `load` does not count."""
        return len(self.charges)

    def submitted(self, stream, charge=NO_CHARGE):
        """A stream was written to the lane; stream ids rise by one."""
        self.charges.append((stream, charge))
        self.tokens += charge.tokens
        self.pairs += charge.pairs
        self.foreseen = False
        self.changed()

    def stepped(self, load, acked, now):
        """A step came at `now` in loop time: `load` counts all streams up to `acked`."""
        cdef bint slept = self.asleep
        self.last = load
        self.asleep = load.asleep
        self.acked(acked)
        foresight = self._foresight
        if type(foresight) is ReplicaModel:
            (<ReplicaModel>foresight).take(load, now)
        else:
            foresight.observe(load, now)
        self.foreseen = False
        self.changed()
        if self.asleep != slept:
            self.on_sleep()

    cdef int plainly(self, const Numbers* numbers, long long acked, double now) except -1:
        """The same of a load that is no object; it sleeps as before."""
        self.numbers = numbers[0]
        self.last = None
        if self.charges:
            self.acked(acked)
        foresight = self._foresight
        if type(foresight) is ReplicaModel:
            (<ReplicaModel>foresight).take_in(
                numbers.step_ms,
                numbers.step_prefill_tokens,
                numbers.step_decodes,
                numbers.step_context_tokens,
                numbers.queued_prefill_tokens,
                numbers.running,
                numbers.step_prefill_pairs,
                now,
            )
        else:
            foresight.observe(self.load, now)
        self.foreseen = False
        self.changed()
        return 0

    cdef int acked(self, acked) except -1:
        charges = self.charges
        if charges:
            while charges and charges[0][0] <= acked:
                charge = charges.popleft()[1]
                self.tokens -= charge.tokens
                self.pairs -= charge.pairs
            if not charges:
                self.pairs = 0.0
        return 0

    def leased(self, change):
        """One lease more or less."""
        self.leases += change
        self.changed()

    def caches(self, mode):
        """What is known of its KV cache changed."""
        self.cache = mode
        self.changed()

    cdef int changed(self) except -1:
        if self.current is not None:
            self.current = None
            for stale, number in self._watchers:
                (<set>stale).add(number)
        return 0

    def view(self):
        """The replica as policies see it; the same object until something changes."""
        return self.row().view()

    cdef Row row(self):
        cdef Row row = self.current
        if self.is_late():
            row = None
            self.foresee()
        if row is None:
            row = Row.__new__(Row)
            row.replica = self.replica
            row.last = self.last
            if self.last is None:
                row.numbers = self.numbers
            row.unacked = len(self.charges)
            row.leases = self.leases
            row.max_num_seqs = self.max_num_seqs
            row.outlook = self.outlook
            row.expected = self.expected
            row.tokens = self.tokens
            row.pairs = self.pairs
            row.kv_tokens = self.kv_tokens
            row.cache = self.cache
            self.current = row
        return row

    cdef bint is_late(self) except -1:
        """Whether the outlook is out of date; takes the news in."""
        cdef long long fleet_version
        if type(self.news) is FleetModel:
            fleet_version = (<FleetModel>self.news).version
            if self.foreseen and fleet_version == self.fleet_version:
                return False
            self.fleet_version = fleet_version
            return True
        version = self.news.version
        if self.foreseen and version == self.version:
            return False
        self.version = version
        return True

    cdef int foresee(self) except -1:
        foresight = self._foresight
        if type(foresight) is ReplicaModel:
            self.outlook = None
            if self.last is not None or not (<ReplicaModel>foresight).expect_plainly(
                &self.numbers, self.tokens, self.pairs, len(self.charges), &self.expected
            ):
                (<ReplicaModel>foresight).expect(
                    self.load, self.tokens, self.pairs, len(self.charges), &self.expected
                )
        else:
            self.outlook = foresight.outlook(self.load, self.tokens, self.pairs, len(self.charges))
        self.foreseen = True
        return 0


def nothing():
    """Nobody asks whether it sleeps."""


@cython.final
@cython.no_gc
cdef class Rows:
    """A pool's replicas at one moment."""

    cdef tuple rows
    cdef tuple made
    cdef tuple transposed

    def __init__(self, tuple rows not None):
        for row in rows:
            if type(row) is not Row:
                raise TypeError("no row")
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, Py_ssize_t place):
        """One replica's row (`router.types.Brief`)."""
        if not 0 <= place < len(self.rows):
            raise IndexError(place)
        return self.rows[place]

    @property
    def views(self):
        """Made once."""
        if self.made is None:
            self.made = tuple([(<Row>row).view() for row in self.rows])
        return self.made

    @property
    def columns(self):
        """A list for each of `Terms`; made once."""
        if self.transposed is None:
            terms = zip(*[view.terms for view in self.views])
            self.transposed = tuple([list(column) for column in terms])
        return self.transposed

    def view(self, Py_ssize_t place):
        """Of one replica; the same object as in `views`."""
        if not 0 <= place < len(self.rows):
            raise IndexError(place)
        return (<Row>self.rows[place]).view()

    def brief(self, Py_ssize_t place):
        """One replica's row; it makes a view only where its outlook is not the load model's."""
        return self[place]

    def __repr__(self):
        return repr(self.views)


@cython.final
cdef class Table:
    """The terms of a pool's replicas as numbers (`router.pool.Views` in Python)."""

    cdef tuple accounts
    cdef list news, seen
    cdef list now
    cdef readonly Rows rows
    cdef readonly set stale
    cdef bytearray terms
    cdef object pinned  # Nobody can change their size.
    cdef bytearray exact
    cdef Py_ssize_t odd

    def __init__(self, accounts):
        cdef Account account
        found = {}
        self.accounts = tuple(accounts)
        for account in self.accounts:
            if account is None:
                raise TypeError("no account")
            found[id(account.news)] = account.news
        self.news = list(found.values())
        self.seen = [news.version for news in self.news]
        self.now = [None] * len(self.accounts)
        self.terms = bytearray(len(self.accounts) * WIDTH * sizeof(double))
        self.pinned = memoryview(self.terms)
        self.exact = bytearray(b"\1") * len(self.accounts)
        self.odd = 0
        self.stale = set(range(len(self.accounts)))
        self.renew()

    @property
    def numbers(self):
        """The terms as C doubles, replica after replica; None where some would not be exact."""
        return None if self.odd else self.terms

    def snapshot(self, model, now, places):
        """All of them as they are now."""
        self.refresh()
        return PoolSnapshot(model, self.rows, NO_PREFIX, now, places, self)

    def least_beyond(self):
        """By how much the shortest queue is beyond its batch."""
        cdef Py_ssize_t place
        cdef double least = INFINITY
        cdef const double* terms
        self.refresh()
        if self.odd or not self.accounts:
            return min([view.terms[BEYOND] for view in self.rows.views])
        terms = <const double*>PyByteArray_AS_STRING(self.terms)
        for place in range(len(self.accounts)):
            if terms[place * WIDTH + BEYOND] < least:
                least = terms[place * WIDTH + BEYOND]
        return <long long>least

    cdef int refresh(self) except -1:
        cdef Py_ssize_t at
        for at in range(len(self.news)):
            news = self.news[at]
            if type(news) is FleetModel:
                if (<FleetModel>news).version == <long long>self.seen[at]:
                    continue
            elif news.version == self.seen[at]:
                continue
            self.seen = [one.version for one in self.news]
            self.stale.update(range(len(self.accounts)))
            break
        if self.stale:
            self.renew()
        return 0

    cdef int renew(self) except -1:
        """Takes in what has changed of those in `stale`."""
        cdef Py_ssize_t place
        cdef Row row
        cdef bint exact
        cdef double* terms = <double*>PyByteArray_AS_STRING(self.terms)
        for number in self.stale:
            place = number
            if not 0 <= place < len(self.accounts):
                raise IndexError(place)
            row = (<Account>self.accounts[place]).row()
            exact = row.lay_out(terms + place * WIDTH)
            if exact != self.exact[place]:
                self.odd += 1 if self.exact[place] else -1
                self.exact[place] = exact
            self.now[place] = row
        self.rows = Rows(tuple(self.now))
        self.stale.clear()
        return 0
