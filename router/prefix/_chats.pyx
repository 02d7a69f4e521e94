"""The chains of plain chats and texts, compiled: from a body to its hashes in one go (`router.prefix.hashing`).

The rule: the same chain as the Python makes, for whatever body. A chat is plain where all its contents are texts and
nothing shapes the prompt but them, a completion where its prompt is one text; any other is the Python's. It owns no
state.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.object cimport Py_TYPE, PyTypeObject
from libc.string cimport memcpy

from xxhash import xxh3_64_intdigest

from router.prefix.canonical import UNREADABLE
from router.prefix.draft import ASSISTANT, HEADS, Draft
from router.prefix.http_parts import Message
from router.prefix.http_prompts import BARE_CHAT, BARE_TEXT, chat_body, chat_draft, text_body
from router.types import Chain

cdef extern from "Python.h":
    const char *PyUnicode_AsUTF8AndSize(object, Py_ssize_t *) except NULL

cdef enum:
    MOST_MESSAGES = 256

# The fields of a message, as what gets them out of it: by name each is a look-up in its class first.
cdef object ROLE = Message.role
cdef object CONTENT = Message.content
cdef object NAME = Message.name
cdef object CALL_ID = Message.tool_call_id
cdef object CALLS = Message.tool_calls

cdef dict HEAD_BYTES = {role: head.encode("latin-1") for role, head in HEADS.items()}


cdef inline object field(message, getter):
    return (<PyTypeObject*>Py_TYPE(getter)).tp_descr_get(getter, message, Message)


cdef struct Span:
    const char *at
    Py_ssize_t size


cdef class Chats:
    """What a `Hasher` asks of chats and texts; `hashed` makes a draft's chain, `chained` that of any request, `seeds`
    are those that it knows."""

    cdef object hashed, chained
    cdef dict seeds
    cdef Py_ssize_t block_bytes, max_bytes

    def __init__(self, hashed, chained, dict seeds not None, Py_ssize_t block_bytes, Py_ssize_t max_bytes):
        if block_bytes < 1:
            raise ValueError("blocks without bytes")
        self.hashed = hashed
        self.chained = chained
        self.seeds = seeds
        self.block_bytes = block_bytes
        self.max_bytes = max_bytes

    def chain(self, request):
        """The chain of a chat's prompt, which is not large; None where it has none."""
        try:
            found = chat_body.decode(request.body)
            data = plain_bytes(found)
        except UNREADABLE:
            return None
        if data is not None:
            seed = self.seeds.get(("chat", request.model, request.lora, request.cache_salt))
            if seed is not None:
                return self.chain_of(seed, PyBytes_AS_STRING(data), PyBytes_GET_SIZE(data))
        try:
            draft = chat_draft(Draft("chat", ASSISTANT), found, 0)
        except UNREADABLE:
            return None
        return None if draft is None else self.hashed(draft, request)

    def text_chain(self, request):
        """The chain of a completion's prompt, which is not large; None where it has none."""
        cdef const char *at
        cdef Py_ssize_t size
        try:
            found = text_body.decode(request.body)
            text, found.prompt = found.prompt, ""
            if found == BARE_TEXT:
                seed = self.seeds.get(("completion", request.model, request.lora, request.cache_salt))
                if seed is not None:
                    at = PyUnicode_AsUTF8AndSize(text, &size)
                    return self.chain_of(seed, at, size)
        except UNREADABLE:
            pass  # Such as a prompt of token ids, which the Python reads otherwise.
        return self.chained(request)

    cdef object chain_of(self, seed, const char *at, Py_ssize_t size):
        cdef Py_ssize_t i, count = min(size, self.max_bytes) // self.block_bytes
        cdef list hashes = []
        last = seed
        for i in range(count):
            last = xxh3_64_intdigest(PyBytes_FromStringAndSize(at + i * self.block_bytes, self.block_bytes), last) or 1
            hashes.append(last)
        return Chain(self.block_bytes, seed, tuple(hashes), size)


cdef bytes plain_bytes(found):
    """The canonical bytes; None where the chat is not plain, which then is as it was."""
    cdef Span spans[2 * MOST_MESSAGES]
    cdef Span *span = spans
    cdef Py_ssize_t total = 0, i, count
    cdef bytes data
    cdef char *to
    messages = found.messages
    if type(messages) is not list or not 0 < len(<list>messages) <= MOST_MESSAGES:
        return None
    for message in <list>messages:
        if type(message) is not Message:
            return None
        head = HEAD_BYTES.get(field(message, ROLE))
        content = field(message, CONTENT)
        if head is None or type(content) is not str:
            return None
        if (
            field(message, NAME) is not None
            or field(message, CALL_ID) is not None
            or field(message, CALLS) is not None
        ):
            return None
        span.at, span.size = PyBytes_AS_STRING(head), PyBytes_GET_SIZE(head)
        total += span.size
        span += 1
        span.at = PyUnicode_AsUTF8AndSize(content, &span.size)
        total += span.size
        span += 1
    found.messages = None
    shaped = found != BARE_CHAT
    found.messages = messages
    if shaped:
        return None
    count = span - spans
    data = PyBytes_FromStringAndSize(NULL, total)
    to = PyBytes_AS_STRING(data)
    for i in range(count):
        memcpy(to, spans[i].at, spans[i].size)
        to += spans[i].size
    return data
