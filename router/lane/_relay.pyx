"""The short way of a plain step, from a lane's bytes to the clients (see `router/lane/relay.py`).

Rule: a frame is read whole before anything of it is done, and whatever is not plain goes the long way unread. No
reference is borrowed over a call: a sink may end its stream, others' and the lane.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.ref cimport PyObject
from libc.string cimport memcpy
from libc.stdint cimport uint32_t, uint64_t

from router.lane.frames import LARGE_BYTES as _LARGE_BYTES
from router.lane.meter import SAMPLE as _SAMPLE
from router.load._steps cimport Numbers, Taker

cdef extern from "Python.h":
    PyObject *PyDict_GetItemWithError(object, object) except? NULL

cdef extern from *:
    """
    #include <sys/socket.h>
    #ifndef MSG_NOSIGNAL
    #define MSG_NOSIGNAL 0  /* Python ignores SIGPIPE. */
    #endif
    """
    enum:
        MSG_DONTWAIT
        MSG_NOSIGNAL
    Py_ssize_t send(int, const void *, size_t, int) nogil

cdef enum:
    MOST_OUTPUTS = 256
    SHORT_BYTES = 2048
    FRAMING_BYTES = 20

cdef Py_ssize_t LARGE_BYTES = _LARGE_BYTES
cdef Py_ssize_t PACED_BYTES = 128 << 10
cdef int SAMPLE = _SAMPLE
cdef long long MOST = 1LL << 40
cdef double MOST_FLOAT = 1e15
cdef double MOST_MS = 1e7

cdef struct Piece:
    long long stream
    long long tokens
    const unsigned char *payload
    Py_ssize_t size

cdef struct Reader:
    const unsigned char *at
    const unsigned char *end


# Each returns 0 where the item is something else than what is plain.

cdef inline bint _array(Reader *reader, Py_ssize_t *count) noexcept nogil:
    cdef unsigned char tag
    if reader.at >= reader.end:
        return False
    tag = reader.at[0]
    if tag & 0xF0 == 0x90:
        count[0] = tag & 0x0F
        reader.at += 1
        return True
    if tag == 0xDC and reader.end - reader.at >= 3:
        count[0] = (<Py_ssize_t> reader.at[1] << 8) | reader.at[2]
        reader.at += 3
        return True
    return False


cdef inline bint _number(Reader *reader, long long *value) noexcept nogil:
    """From 0 to `MOST`."""
    cdef unsigned char tag
    cdef int size, i
    cdef uint64_t found = 0
    if reader.at >= reader.end:
        return False
    tag = reader.at[0]
    if tag < 0x80:
        value[0] = tag
        reader.at += 1
        return True
    if tag < 0xCC or tag > 0xCF:
        return False
    size = 1 << (tag - 0xCC)
    if reader.end - reader.at <= size:
        return False
    for i in range(1, size + 1):
        found = (found << 8) | reader.at[i]
    if found > <uint64_t> MOST:
        return False
    value[0] = <long long> found
    reader.at += 1 + size
    return True


cdef inline bint _float(Reader *reader, double most, double *value) noexcept nogil:
    """From 0 to `most`."""
    cdef uint64_t bits = 0
    cdef double found
    cdef int i
    if reader.at >= reader.end:
        return False
    if reader.at[0] < 0x80:
        value[0] = reader.at[0]
        reader.at += 1
        return True
    if reader.at[0] != 0xCB or reader.end - reader.at < 9:
        return False
    for i in range(1, 9):
        bits = (bits << 8) | reader.at[i]
    memcpy(&found, &bits, 8)
    if not (found >= 0.0 and found <= most):
        return False
    value[0] = found
    reader.at += 9
    return True


cdef inline bint _nil(Reader *reader) noexcept nogil:
    if reader.at >= reader.end or reader.at[0] != 0xC0:
        return False
    reader.at += 1
    return True


cdef inline bint _binary(Reader *reader, const unsigned char **start, Py_ssize_t *size) noexcept nogil:
    cdef int wide, i
    cdef Py_ssize_t found = 0
    if reader.at >= reader.end or reader.at[0] < 0xC4 or reader.at[0] > 0xC6:
        return False
    wide = 1 << (reader.at[0] - 0xC4)
    if reader.end - reader.at <= wide:
        return False
    for i in range(1, wide + 1):
        found = (found << 8) | reader.at[i]
    if found > reader.end - reader.at - 1 - wide:
        return False
    start[0] = reader.at + 1 + wide
    size[0] = found
    reader.at += 1 + wide + found
    return True


cdef bint _numbers(Reader *reader, Numbers *load) noexcept nogil:
    """A `Load`, whole or without fields that came later."""
    cdef Py_ssize_t count
    if not _array(reader, &count) or count < 10 or count > 11:
        return False
    if not (
        _number(reader, &load.running)
        and _number(reader, &load.waiting)
        and _number(reader, &load.queued_prefill_tokens)
        and _float(reader, MOST_FLOAT, &load.kv_usage)
        and _float(reader, MOST_MS, &load.step_ms)
        and _float(reader, MOST_FLOAT, &load.queued_prefill_pairs)
        and _number(reader, &load.step_prefill_tokens)
        and _float(reader, MOST_FLOAT, &load.step_prefill_pairs)
        and _number(reader, &load.step_decodes)
        and _number(reader, &load.step_context_tokens)
    ):
        return False
    load.asleep = False
    if count == 11:
        if reader.at >= reader.end or reader.at[0] & 0xFE != 0xC2:
            return False
        load.asleep = reader.at[0] & 1
        reader.at += 1
    return True


cdef bint _output(Reader *reader, Piece *piece) noexcept nogil:
    """An `Output` with nothing but a payload."""
    cdef Py_ssize_t count
    if not _array(reader, &count) or count < 2 or count > 5:
        return False
    piece.tokens = 0
    return (
        _number(reader, &piece.stream)
        and _binary(reader, &piece.payload, &piece.size)
        and (count < 3 or _number(reader, &piece.tokens))
        and (count < 4 or _nil(reader))
        and (count < 5 or _nil(reader))
    )


cdef Py_ssize_t _read_step(
    const unsigned char *data, Py_ssize_t size, long long *acked, Numbers *load, Piece *pieces
) noexcept nogil:
    """How many outputs the plain step has that these bytes are, with its length before it; -1 where they are none."""
    cdef Reader reader
    cdef Py_ssize_t count, outputs, i
    cdef long long seq
    reader.at = data + 4
    reader.end = data + size
    if not _array(&reader, &count) or count < 5 or count > 6:
        return -1
    if reader.at >= reader.end or reader.at[0] != 9:
        return -1
    reader.at += 1
    if not (_number(&reader, &seq) and _number(&reader, acked) and _numbers(&reader, load)):
        return -1
    if not _array(&reader, &outputs) or outputs > MOST_OUTPUTS:
        return -1
    for i in range(outputs):
        if not _output(&reader, &pieces[i]):
            return -1
    if count == 6 and not _nil(&reader):
        return -1
    return outputs if reader.at == reader.end else -1


cdef inline bint _is_whole(bytes data) noexcept:
    """Whether these are one frame, and no large one."""
    cdef const unsigned char *start = <const unsigned char *> PyBytes_AS_STRING(data)
    cdef Py_ssize_t size = PyBytes_GET_SIZE(data)
    if size < 4 or size - 4 >= LARGE_BYTES or size > PACED_BYTES:
        return False
    return (start[0] | start[1] << 8 | start[2] << 16 | <uint32_t> start[3] << 24) == <uint32_t> (size - 4)


cdef Py_ssize_t _frame(char *to, const unsigned char *payload, Py_ssize_t size) noexcept nogil:
    """Writes the chunk as HTTP/1 frames it, in `FRAMING_BYTES` more at the most; returns its length."""
    cdef char digits[16]
    cdef int count = 0
    cdef char *at = to
    cdef Py_ssize_t left = size
    while left:
        digits[count] = b"0123456789abcdef"[left & 15]
        count += 1
        left >>= 4
    while count:
        count -= 1
        at[0] = digits[count]
        at += 1
    at[0] = 13
    at[1] = 10
    memcpy(at + 2, payload, size)
    at += size + 2
    at[0] = 13
    at[1] = 10
    return at + 2 - to


cdef bytes _chunk(const unsigned char *payload, Py_ssize_t size):
    cdef Py_ssize_t left = size, length = 4
    cdef bytes framed
    while left:
        length += 1
        left >>= 4
    framed = PyBytes_FromStringAndSize(NULL, length + size)
    _frame(PyBytes_AS_STRING(framed), payload, size)
    return framed


cdef class Chunks:
    """The short way of an HTTP answer."""

    cdef public bint _open
    cdef public int _socket
    cdef public object _write

    def __cinit__(self, *_):
        self._socket = -1

    def data(self, payload, tokens):
        """Relays one payload; by `_slowly` where the short way is not open."""
        if not self._open or not payload:
            self._slowly(payload)
        elif type(payload) is bytes:
            self._relay(<const unsigned char *> PyBytes_AS_STRING(payload), PyBytes_GET_SIZE(payload))
        else:
            self._socket = -1  # For what follows may not overtake what the transport could not send at once.
            self._write(b"%x\r\n%b\r\n" % (len(payload), payload))

    cdef int _relay(self, const unsigned char *payload, Py_ssize_t size) except -1:
        """Sends a payload that has bytes; only while `_open`."""
        cdef char framed[SHORT_BYTES + FRAMING_BYTES]
        cdef const char *at = framed
        cdef Py_ssize_t length, sent
        cdef bytes chunk
        if self._socket < 0:
            self._write(_chunk(payload, size))
            return 0
        if size <= SHORT_BYTES:
            length = _frame(framed, payload, size)
        else:
            chunk = _chunk(payload, size)
            at, length = PyBytes_AS_STRING(chunk), PyBytes_GET_SIZE(chunk)
        sent = send(self._socket, at, length, MSG_DONTWAIT | MSG_NOSIGNAL)
        if sent != length:
            # The client is slow, or gone: from here on it is the transport's, which has nothing waiting.
            self._socket = -1
            if sent < 0:
                sent = 0
            self._write(PyBytes_FromStringAndSize(at + sent, length - sent))
        return 0


cdef object _short_data = Chunks.data


cdef class Stream:
    """One request in flight on a lane."""

    cdef public object sink, data, last, done
    cdef public double began
    cdef public double expected_s
    cdef public bint joins
    cdef Chunks chunks

    def __init__(self, sink, done, double began, double expected_s, bint joins):
        self.sink = sink
        self.joins = joins
        self.data = sink.data
        self.last = getattr(sink, "last", self.data)
        self.done = done
        self.began = began
        self.expected_s = expected_s
        if isinstance(sink, Chunks) and getattr(type(sink), "data", None) is _short_data:
            self.chunks = sink

    def deafen(self, deaf):
        """Whatever still comes goes to `deaf`."""
        self.chunks = None
        self.sink = deaf
        self.data = self.last = deaf.data


cdef class Relay:
    """A lane's receiving end."""

    cdef public long long steps
    cdef public object tokens  # What replicas say adds up to anything.
    cdef public bint _heard
    cdef public dict _streams
    cdef public object _meter
    cdef bint ready
    cdef Taker taker
    cdef object now

    def _relays(self, account, now):
        """From now on plain steps may go the short way: their loads to `account`, at the times that `now` says."""
        self.taker = account if isinstance(account, Taker) else None
        self.now = now

    def data_received(self, data):
        cdef bint whole = self.ready and type(data) is bytes and _is_whole(<bytes> data)
        self._heard = True
        if whole and self._relayed(<bytes> data):
            return
        self.ready = False
        if whole:
            self._alone(PyBytes_FromStringAndSize(PyBytes_AS_STRING(data) + 4, len(data) - 4))
        else:
            self._read(data)
        self.ready = self.taker is not None and self._at_rest()

    cdef bint _relayed(self, bytes data) except -1:
        """Whether this frame was a plain step, which then is done with."""
        cdef const unsigned char *start = <const unsigned char *> PyBytes_AS_STRING(data)
        cdef Py_ssize_t size = PyBytes_GET_SIZE(data)
        cdef Py_ssize_t count, i
        cdef long long acked = 0
        cdef long long tokens = 0
        cdef Numbers load
        cdef Piece pieces[MOST_OUTPUTS]
        cdef PyObject *found
        cdef dict streams
        cdef Stream stream
        cdef Taker taker
        count = _read_step(start, size, &acked, &load, pieces)
        if count < 0 or load.asleep != self.taker.asleep:
            return False
        if not self.steps % SAMPLE:
            self._meter.frame(size - 4)
        streams = self._streams
        for i in range(count):
            found = PyDict_GetItemWithError(streams, pieces[i].stream)
            if found is NULL or not pieces[i].size:
                continue
            stream = <Stream?> <object> found
            try:
                if stream.began != 0.0:
                    self._began(stream)
                tokens += pieces[i].tokens
                if stream.chunks is not None and stream.chunks._open:
                    stream.chunks._relay(pieces[i].payload, pieces[i].size)
                else:
                    stream.data(
                        PyBytes_FromStringAndSize(<const char *> pieces[i].payload, pieces[i].size), pieces[i].tokens
                    )
            except Exception as error:
                self._failed(stream, error)
        self.tokens += tokens
        self.steps += 1
        if not self.steps % SAMPLE:
            self._meter.step(count)
        taker = self.taker
        taker.plainly(&load, acked, self.now())
        return True
