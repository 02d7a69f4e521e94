"""The arithmetic of `router.policies.cost`, compiled: the same costs to the last bit, and the same decisions.

The rule: it judges ordinary snapshots only. Whatever is out of the ordinary (figures that are no floats, numbers too
large to be exact as such, mappings that are no dicts) it leaves to the Python, which then says what becomes of it; until
it is sure it changes nothing and draws nothing. It owns no state but a copy of the leans.
"""

from cpython.bytearray cimport PyByteArray_AS_STRING, PyByteArray_GET_SIZE
from cpython.dict cimport PyDict_CheckExact, PyDict_GetItemWithError
from cpython.float cimport PyFloat_AS_DOUBLE, PyFloat_CheckExact
from cpython.long cimport PyLong_AsLongLongAndOverflow, PyLong_CheckExact
from cpython.mem cimport PyMem_Free, PyMem_Malloc
from cpython.object cimport PyObject
from cpython.ref cimport Py_XDECREF, Py_XINCREF
from libc.math cimport INFINITY, fabs, isfinite, pow

from router.types import TERMS, Decision, Holders, Reason, given

# The places in `router.types.Terms`.
cdef enum:
    FREE = 0
    SENT = 1
    BATCH = 2
    STEP = 3
    TOKEN = 4
    PAIR = 5
    RUNNING = 6
    DEPTH = 7
    BEYOND = 8
    USAGE = 9
    LEASES = 10
    WIDTH = 11

assert TERMS == WIDTH

cdef enum:
    MOST_REPLICAS = 8192

# Sums of so many such numbers are exact as floats.
cdef long long MOST = 1LL << 40
cdef long long EXACT = 1LL << 53

# As in `router.policies.cost`.
cdef double TIE = 0.02
cdef double TIE_S = 1e-4
cdef double CROWDED = 1e6
cdef double ALONE = 0.1

# Not a constant to the compiler, which might make another function of it than Python's power is.
cdef double FOURTH = float("4")

# From 3.12 on Python's `sum` of floats keeps what rounding loses (Neumaier's sum).
cdef bint COMPENSATED = sum([1.0, 1e100, 1.0, -1e100]) == 2.0


cdef struct Sum:
    double total
    double lost


cdef inline void add(Sum* made, double value) noexcept nogil:
    cdef double total = made.total + value
    if COMPENSATED:
        if fabs(made.total) >= fabs(value):
            made.lost += (made.total - total) + value
        else:
            made.lost += (value - total) + made.total
    made.total = total


cdef inline double total_of(Sum* made) noexcept nogil:
    return made.total + made.lost if made.lost != 0.0 and isfinite(made.lost) else made.total


cdef struct Pad:
    Py_ssize_t count
    const double* numbers
    PyObject* owner  # Of the numbers, where they are a pool's.
    double* own
    double* costs


cdef class Arithmetic:
    """What one policy computes; `leans` gives how much it leans away from each of some places, `random` its chance."""

    cdef double price, queue_price, interference, answer_tokens, crowd_factor, crowd_slack, place_tokens
    cdef double lean_s, lean_requests, late_s
    cdef object leans, random
    cdef object leaning
    cdef bytearray lean

    def __init__(self, options, leans, random):
        self.price = options.price
        self.queue_price = options.queue_price
        self.interference = options.interference
        self.answer_tokens = options.answer_tokens
        self.crowd_factor = options.crowd_factor
        self.crowd_slack = options.crowd_slack
        self.place_tokens = options.place_tokens
        self.lean_s = options.lean_s
        self.late_s = options.late_s
        self.lean_requests = options.lean_requests
        self.leans = leans
        self.random = random
        self.leaning = None
        self.lean = bytearray()

    def costs(self, snapshot):
        """The cost at each replica; None where the Python has to say it."""
        cdef Pad pad
        pad.own = pad.costs = NULL
        pad.owner = NULL
        try:
            if not self.worked_out(snapshot, given(snapshot), &pad):
                return None
            return [pad.costs[at] for at in range(pad.count)]
        finally:
            PyMem_Free(pad.own)
            PyMem_Free(pad.costs)
            Py_XDECREF(pad.owner)

    def choose(self, snapshot):
        """The decision; None where the Python has to make it."""
        cdef Pad pad
        cdef Py_ssize_t best, next_best
        cdef double least, bound
        pad.own = pad.costs = NULL
        pad.owner = NULL
        try:
            replicas = given(snapshot)
            if len(replicas) == 1:
                return Decision(replicas[0].replica, Reason.ONLY_REPLICA)
            if not self.worked_out(snapshot, replicas, &pad):
                return None
            best = place_of_least(&pad)
            least = pad.costs[best]
            pad.costs[best] = INFINITY
            next_best = place_of_least(&pad)
            bound = least + TIE * least + TIE_S
            if pad.costs[next_best] <= bound:
                pad.costs[best] = least
                best = self.drawn(&pad, bound)
                pad.costs[best] = INFINITY
                next_best = place_of_least(&pad)
            return Decision(replicas[best].replica, Reason.LEAST_COST, (replicas[next_best].replica,), least)
        finally:
            PyMem_Free(pad.own)
            PyMem_Free(pad.costs)
            Py_XDECREF(pad.owner)

    cdef Py_ssize_t drawn(self, Pad* pad, double bound) except -1:
        """Among those that cost no more, one with the shortest queue, at random."""
        cdef Py_ssize_t at, place = 0, ties = 0
        cdef long long skip
        cdef double depth, shortest = INFINITY
        for at in range(pad.count):
            if pad.costs[at] <= bound:
                depth = pad.numbers[at * WIDTH + DEPTH]
                if depth < shortest:
                    shortest, place, ties = depth, at, 1
                elif depth == shortest:
                    ties += 1
        if ties <= 1:
            return place
        skip = int(self.random.random() * ties)
        if skip >= ties:
            raise ValueError("chance is not below 1")
        while skip > 0:
            place += 1
            if pad.costs[place] <= bound and pad.numbers[place * WIDTH + DEPTH] == shortest:
                skip -= 1
        return place

    cdef bint worked_out(self, snapshot, replicas, Pad* pad) except -1:
        """Whether `pad.costs` has the costs now."""
        try:
            if not laid_out(snapshot, replicas, pad):
                return False
            return self.summed_up(snapshot, pad)
        except Exception:
            return False  # Where it is an error it is one in Python too.

    cdef bint summed_up(self, snapshot, Pad* pad) except -1:
        cdef Py_ssize_t at, count = pad.count
        cdef const double* row
        cdef double* costs
        cdef double wait, begins, now, soon, mean_wait, pressure, share, price, tokens, half, new, pairs, there
        cdef double other, other_pairs, less, less_pairs, everyone, leases, crowd, others, most_s, ways, room
        cdef double most_depth = -INFINITY, most_beyond = -INFINITY
        cdef Sum waits, usages
        cdef PyObject* found
        cdef const double* lean
        cdef object squeezed
        prefix, moment, places = snapshot.prefix, snapshot.now, snapshot.places
        if not PyFloat_CheckExact(moment) or not PyDict_CheckExact(places):
            return False
        now = PyFloat_AS_DOUBLE(moment)
        soon = now + self.late_s
        if not exact(prefix.tokens, &tokens):
            return False
        costs = pad.costs = <double*>PyMem_Malloc(count * sizeof(double))
        if costs == NULL:
            raise MemoryError
        waits.total = waits.lost = usages.total = usages.lost = everyone = leases = 0.0
        row = pad.numbers
        for at in range(count):
            begins = row[FREE] if row[FREE] > soon or row[RUNNING] == 0.0 else row[FREE] + row[STEP]
            wait = row[SENT] + begins - now if begins > now else row[SENT]
            costs[at] = wait
            add(&waits, wait)
            add(&usages, row[USAGE])
            everyone += row[DEPTH]
            leases += row[LEASES]
            if row[DEPTH] > most_depth:
                most_depth = row[DEPTH]
            if row[BEYOND] > most_beyond:
                most_beyond = row[BEYOND]
            row += WIDTH
        mean_wait = total_of(&waits) / count
        pressure = total_of(&usages) / count
        if 0.0 <= pressure <= 1e70:
            share = self.interference * pow(pressure, FOURTH)
        else:
            squeezed = pressure
            share = self.interference * <double>(squeezed ** 4)  # Of Python's floats, which may be an error.
        price = 1.0 + self.price + self.queue_price * mean_wait
        half = 0.5 * tokens * tokens
        held = prefix.held
        if type(held) is not Holders:
            held = Holders.of(held)
        new, pairs = tokens, half
        most = held.most
        if most is not None and not uncached(most, tokens, half, &new, &pairs):
            return False
        row = pad.numbers
        for at in range(count):
            costs[at] = (
                costs[at]
                + row[BATCH]
                + self.answer_tokens * row[STEP]
                + (new * row[TOKEN] + pairs * row[PAIR]) * (price + share * row[RUNNING])
            )
            row += WIDTH
        groups = held.groups
        if type(groups) is not list and type(groups) is not tuple:
            return False
        for one, names in groups:
            if type(names) is not tuple:
                return False
            other, other_pairs = tokens, half
            if one is not None and not uncached(one, tokens, half, &other, &other_pairs):
                return False
            less, less_pairs = other - new, other_pairs - pairs
            for name in <tuple>names:
                found = PyDict_GetItemWithError(places, name)
                if found == NULL:
                    continue
                if not within(<object>found, count, &at):
                    return False
                row = pad.numbers + at * WIDTH
                costs[at] += (less * row[TOKEN] + less_pairs * row[PAIR]) * (price + share * row[RUNNING])
        crowd = (self.crowd_factor + 2.0 * mean_wait) * everyone / count + self.crowd_slack
        if most_depth > crowd:
            for at in range(count):
                if pad.numbers[at * WIDTH + DEPTH] > crowd:
                    costs[at] += CROWDED
        if most_beyond >= 0.0:
            for at in range(count):
                row = pad.numbers + at * WIDTH
                if row[BEYOND] >= 0.0:
                    room = row[DEPTH] - row[BEYOND]
                    costs[at] += (row[BEYOND] + 1.0) * self.place_tokens * row[STEP] / (room if room > 1.0 else 1.0)
        if everyone != 0.0 and self.lean_s != 0.0:
            others = 1.0 - leases / everyone
            if others > ALONE:
                ways = count * self.lean_requests
                if ways == 0.0:
                    return False  # Which in Python is an error.
                there = everyone / ways
                most_s = self.lean_s * others * (1.0 if 1.0 < there else there)
                if not self.leant(places, count):
                    return False
                lean = <const double*>PyByteArray_AS_STRING(self.lean)
                for at in range(count):
                    costs[at] = costs[at] + lean[at] * most_s
        return True

    cdef bint leant(self, places, Py_ssize_t count) except -1:
        """Whether `self.lean` has the leans of all places."""
        cdef double* lean
        cdef Py_ssize_t at
        leans = self.leans(places)
        if leans is not self.leaning:
            self.leaning = None
            if type(leans) is not list:
                return False
            self.lean = bytearray(len(<list>leans) * sizeof(double))
            lean = <double*>PyByteArray_AS_STRING(self.lean)
            for at in range(len(<list>leans)):
                if not PyFloat_CheckExact((<list>leans)[at]):
                    return False
                lean[at] = PyFloat_AS_DOUBLE((<list>leans)[at])
            self.leaning = leans
        return PyByteArray_GET_SIZE(self.lean) == count * <Py_ssize_t>sizeof(double)


cdef Py_ssize_t place_of_least(Pad* pad) noexcept:
    """As Python's `min` and `index`, also where there are figures that are no numbers."""
    cdef Py_ssize_t at, best = 0
    for at in range(1, pad.count):
        if pad.costs[at] < pad.costs[best]:
            best = at
    return best


cdef bint laid_out(snapshot, replicas, Pad* pad) except -1:
    """Whether `pad.numbers` has the terms of all replicas now, one after the other."""
    cdef Py_ssize_t at, place, count = len(replicas)
    cdef double* row
    if not 0 < count <= MOST_REPLICAS:
        return False
    pad.count = count
    pool = snapshot.pool
    if type(replicas) is not tuple:
        if pool is not None and pool.rows is replicas:
            numbers = pool.numbers
            if type(numbers) is bytearray and PyByteArray_GET_SIZE(numbers) == count * WIDTH * <Py_ssize_t>sizeof(double):
                pad.numbers = <const double*>PyByteArray_AS_STRING(numbers)
                pad.owner = <PyObject*>numbers
                Py_XINCREF(pad.owner)
                return True
        replicas = snapshot.replicas
        if type(replicas) is not tuple or len(replicas) != count:
            return False
    row = pad.own = <double*>PyMem_Malloc(count * WIDTH * sizeof(double))
    if row == NULL:
        raise MemoryError
    pad.numbers = row
    for view in <tuple>replicas:
        terms = view.terms
        if type(terms) is not tuple or len(<tuple>terms) != WIDTH:
            return False
        for place in range(WIDTH):
            term = (<tuple>terms)[place]
            if RUNNING <= place <= BEYOND or place == LEASES:
                if not counted(term, &row[place]):
                    return False
            elif PyFloat_CheckExact(term):
                row[place] = PyFloat_AS_DOUBLE(term)
            else:
                return False
        row += WIDTH
    return True


cdef bint counted(number, double* value) except -1:
    """Whether it is a number of requests of which sums are exact as floats."""
    return whole(number, MOST, value)


cdef bint exact(number, double* value) except -1:
    """Whether it is a whole number that is exact as a float."""
    return whole(number, EXACT, value)


cdef bint whole(number, long long most, double* value) except -1:
    """Whether it is a whole number that is no further from 0."""
    cdef int overflow = 0
    cdef long long found
    if not PyLong_CheckExact(number):
        return False
    found = PyLong_AsLongLongAndOverflow(number, &overflow)
    if overflow or not -most <= found <= most:
        return False
    value[0] = <double>found
    return True


cdef bint within(number, Py_ssize_t count, Py_ssize_t* place) except -1:
    """Whether it is the place of one of so many."""
    cdef double found
    if not exact(number, &found) or not 0.0 <= found < count:
        return False
    place[0] = <Py_ssize_t>found
    return True


cdef bint uncached(held, double tokens, double half, double* new, double* pairs) except -1:
    """Whether it can be said what of a prompt is not cached where so much is held."""
    cdef double cached
    if not exact(held.tokens, &cached):
        return False
    if tokens < cached:
        cached = tokens
    new[0] = tokens - cached
    pairs[0] = half - 0.5 * cached * cached
    return True
