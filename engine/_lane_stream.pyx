"""The compiled twin of `engine/lane_stream.py`: what waits is kept as C structures, and leaves as one frame's bytes.

Rule: the bytes are those of `router.lane.frames.encode`. An item's place counts under the frame it was put in alone.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.mem cimport PyMem_Free, PyMem_Realloc
from cpython.ref cimport Py_CLEAR, Py_INCREF, Py_XINCREF, PyObject
from libc.stdint cimport int64_t, uint64_t
from libc.string cimport memcpy, memmove

import msgspec

from engine import lane_stream as _twin
from router.lane.frames import Head

cdef extern from "Python.h":
    int _PyBytes_Resize(PyObject **, Py_ssize_t) except -1

cdef Py_ssize_t STEP_PAYLOAD_BYTES = _twin.STEP_PAYLOAD_BYTES
cdef Py_ssize_t STREAM_BACKLOG_BYTES = _twin.STREAM_BACKLOG_BYTES
cdef Py_ssize_t HELD_OUTPUT_BYTES = _twin.HELD_OUTPUT_BYTES
cdef Py_ssize_t MAX_PAYLOAD_BYTES = _twin.MAX_PAYLOAD_BYTES
cdef Py_ssize_t JOINED_PAYLOAD_BYTES = _twin.JOINED_PAYLOAD_BYTES
cdef object overflow = _twin.overflow
cdef object ended = _twin.ended
cdef object failed = _twin.failed
cdef object nothing = _twin.nothing
cdef object _encode = msgspec.msgpack.Encoder().encode

cdef enum:
    ITEM_BYTES = 32  # Of an output's array, numbers and lengths, at the most.
    STEP_BYTES = 64
    FIRST_ROOM = 16
    MOST_ROOM = 4096

cdef struct Item:
    long long stream
    long long tokens
    PyObject *payload  # `bytes`
    PyObject *end  # NULL for none, as `head`.
    PyObject *head


cdef inline char *_big_endian(char *at, uint64_t value, int size) noexcept nogil:
    cdef int i
    for i in range(size):
        at[i] = <char> (value >> 8 * (size - 1 - i))
    return at + size


cdef char *_number(char *at, int64_t value) noexcept nogil:
    """As short as MessagePack can."""
    cdef int wide
    if -32 <= value < 0x80:
        at[0] = <char> value
        return at + 1
    if value >= 0:
        wide = 0 if value < 1 << 8 else 1 if value < 1 << 16 else 2 if value < 1LL << 32 else 3
        at[0] = <char> (0xCC + wide)
    else:
        wide = 0 if value >= -(1 << 7) else 1 if value >= -(1 << 15) else 2 if value >= -(1LL << 31) else 3
        at[0] = <char> (0xD0 + wide)
    return _big_endian(at + 1, <uint64_t> value, 1 << wide)


cdef char *_array(char *at, Py_ssize_t count) noexcept nogil:
    if count < 16:
        at[0] = <char> (0x90 | count)
        return at + 1
    if count < 1 << 16:
        at[0] = <char> 0xDC
        return _big_endian(at + 1, count, 2)
    at[0] = <char> 0xDD
    return _big_endian(at + 1, count, 4)


cdef char *_binary(char *at, const char *data, Py_ssize_t size) noexcept nogil:
    cdef int wide = 0 if size < 1 << 8 else 1 if size < 1 << 16 else 2
    at[0] = <char> (0xC4 + wide)
    at = _big_endian(at + 1, size, 1 << wide)
    memcpy(at, data, size)
    return at + size


cdef inline char *_copy(char *at, bytes encoded) noexcept:
    memcpy(at, PyBytes_AS_STRING(encoded), PyBytes_GET_SIZE(encoded))
    return at + PyBytes_GET_SIZE(encoded)


cdef char *_struct(char *at, PyObject *value, list encoded, Py_ssize_t *next):
    """An end or a head, of which the encoded ones are `encoded`."""
    if value is NULL:
        at[0] = <char> 0xC0
        return at + 1
    at = _copy(at, <bytes> encoded[next[0]])
    next[0] += 1
    return at


cdef class Outbox:
    """See the twin."""

    cdef public long long frame
    cdef public bint paused, due, urgent
    cdef object _lane
    cdef Item *_items
    cdef Py_ssize_t _count, _room

    def __cinit__(self, lane):
        self._lane = lane

    def __dealloc__(self):
        self._drop(self._count)
        PyMem_Free(self._items)

    def __len__(self):
        return self._count

    cdef void _drop(self, Py_ssize_t count) noexcept:
        """Lets go of the first ones; those behind them move up."""
        cdef Py_ssize_t i
        cdef Py_ssize_t left = self._count - count
        for i in range(count):
            Py_CLEAR(self._items[i].payload)
            Py_CLEAR(self._items[i].end)
            Py_CLEAR(self._items[i].head)
        if left:
            memmove(self._items, self._items + count, left * sizeof(Item))
        elif self._room > MOST_ROOM:  # Of a backlog.
            PyMem_Free(self._items)
            self._items, self._room = NULL, 0
        self._count = left

    cdef int _put(self, long long stream, bytes payload, long long tokens, object end, object head) except -1:
        """The lane is told by `_announce`, once the caller knows the item's place."""
        cdef Item *item
        cdef Py_ssize_t room
        if self._count == self._room:
            room = 2 * self._room or FIRST_ROOM
            item = <Item *> PyMem_Realloc(self._items, room * sizeof(Item))
            if item is NULL:
                raise MemoryError()
            self._items, self._room = item, room
        item = &self._items[self._count]
        item.stream, item.tokens = stream, tokens
        Py_INCREF(payload)
        item.payload = <PyObject *> payload
        item.end = <PyObject *> end if end is not None else NULL
        Py_XINCREF(item.end)
        item.head = <PyObject *> head if head is not None else NULL
        Py_XINCREF(item.head)
        self._count += 1
        return 0

    cdef int _announce(self) except -1:
        if not self.due:
            self.due = True
            self._lane.flush_soon()
        if self.urgent:
            self._lane.urge()
        return 0

    def put(self, output):
        self._put(output.stream, bytes(output.payload), output.tokens, output.end, output.head)
        self._announce()

    def take(self, long long seq, long long acked, load, report):
        cdef Py_ssize_t count = 0, size = 0, extra = 0, next = 0, length, i
        cdef list encoded = []
        cdef bytes load_bytes = _encode(load)
        cdef bytes report_bytes = b"\xc0" if report is None else _encode(report)
        cdef bytes one
        cdef Item *item
        cdef PyObject *made
        cdef char *start
        cdef char *at
        while count < self._count and size <= STEP_PAYLOAD_BYTES:
            item = &self._items[count]
            size += PyBytes_GET_SIZE(<bytes> item.payload)
            if item.end is not NULL:
                one = _encode(<object> item.end)
                extra += PyBytes_GET_SIZE(one)
                encoded.append(one)
            if item.head is not NULL:
                one = _encode(<object> item.head)
                extra += PyBytes_GET_SIZE(one)
                encoded.append(one)
            count += 1
        length = STEP_BYTES + PyBytes_GET_SIZE(load_bytes) + PyBytes_GET_SIZE(report_bytes) + extra
        length += size + count * ITEM_BYTES
        frame = PyBytes_FromStringAndSize(NULL, length)
        start = PyBytes_AS_STRING(frame)
        at = start + 4
        at[0] = <char> 0x96
        at[1] = 9
        at = _copy(_number(_number(at + 2, seq), acked), load_bytes)
        at = _array(at, count)
        for i in range(count):
            item = &self._items[i]
            at[0] = <char> 0x95
            at = _number(at + 1, item.stream)
            at = _binary(at, PyBytes_AS_STRING(<bytes> item.payload), PyBytes_GET_SIZE(<bytes> item.payload))
            at = _number(at, item.tokens)
            at = _struct(at, item.end, encoded, &next)
            at = _struct(at, item.head, encoded, &next)
        at = _copy(at, report_bytes)
        length = at - start
        for i in range(4):
            start[i] = <char> (length - 4 >> 8 * i)
        self.frame += 1
        self._drop(count)
        # Shrinks in place; nobody else has seen it.
        made = <PyObject *> frame
        Py_INCREF(frame)
        frame = None
        _PyBytes_Resize(&made, length)
        frame = <object> made
        Py_CLEAR(made)
        return frame

    def waiting(self):
        cdef Py_ssize_t i = 0
        cdef list found = []
        while i < self._count:  # Asked each time: a collection may run code of others meanwhile.
            found.append((self._items[i].stream, PyBytes_GET_SIZE(<bytes> self._items[i].payload)))
            i += 1
        return found

    def clear(self):
        self._drop(self._count)
        self.frame += 1


cdef class LaneStream:
    """See the twin."""

    cdef public long long id
    cdef public object stop
    cdef public bint over
    cdef public Py_ssize_t backlog
    cdef object _lane, _head
    cdef Outbox _outbox
    cdef bint _joins
    cdef Py_ssize_t _place
    cdef long long _frame

    def __cinit__(self, lane, Outbox outbox not None, long long stream, bint joins):
        self._lane = lane
        self._outbox = outbox
        self._joins = joins
        self._frame = -1
        self.id = stream
        self.stop = nothing

    def head(self, status, headers):
        self._head = Head(status, tuple(headers))

    def data(self, payload, long long tokens=0, *, bint urgent=False):
        cdef Outbox outbox = self._outbox
        cdef Item *item
        cdef object joined
        if self.over:
            return
        if type(payload) is not bytes:
            payload = bytes(memoryview(payload))
        if outbox.paused:
            if self.backlog > STREAM_BACKLOG_BYTES:
                overflow(self)
                return
            self.backlog += PyBytes_GET_SIZE(payload) + HELD_OUTPUT_BYTES
            self._lane.held_back()
        if PyBytes_GET_SIZE(payload) > MAX_PAYLOAD_BYTES:
            self._put_in_pieces(payload, tokens)
            return
        item = self._waiting()
        if item is not NULL and self._joins and PyBytes_GET_SIZE(<bytes> item.payload) < JOINED_PAYLOAD_BYTES:
            joined = <bytes> item.payload + <bytes> payload
            Py_CLEAR(item.payload)
            Py_INCREF(joined)
            item.payload = <PyObject *> joined
            item.tokens += tokens
        else:
            self._put(payload, tokens, None)
        if urgent:
            self._lane.urge()

    def end(self, finish=""):
        self._finish(ended(finish))

    def fail(self, error):
        self._finish(failed(error))

    cdef Item *_waiting(self) noexcept:
        """The last output, while its frame has not gone out."""
        return &self._outbox._items[self._place] if self._frame == self._outbox.frame else NULL

    cdef int _put(self, bytes payload, long long tokens, object end) except -1:
        cdef Outbox outbox = self._outbox
        outbox._put(self.id, payload, tokens, end, self._head)
        self._head = None
        self._place = outbox._count - 1
        self._frame = outbox.frame
        return outbox._announce()

    cdef int _finish(self, object end) except -1:
        cdef Item *item
        if self.over:
            return 0
        item = self._waiting()
        if item is not NULL:
            Py_CLEAR(item.end)
            Py_INCREF(end)
            item.end = <PyObject *> end
        else:
            self._put(b"", 0, end)
        self._lane.forget(self)
        return 0

    cdef int _put_in_pieces(self, bytes payload, long long tokens) except -1:
        cdef Py_ssize_t start
        for start in range(0, PyBytes_GET_SIZE(payload), MAX_PAYLOAD_BYTES):
            self._put(payload[start : start + MAX_PAYLOAD_BYTES], tokens if not start else 0, None)
        return 0
