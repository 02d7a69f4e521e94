"""What replicas store and what requests in flight will bring them, and the look-up, in C.

Sans-IO. The rule: it answers as `blocks.py` does. Each block has one cell in a hash table: its hash, its depth and a
bit for each replica that holds it. A look-up fetches the cells of many blocks at once, so that their ways from memory
overlap: at a million blocks nearly each is one. `PrefixIndex` owns it.

A table that has to change its size does so cell by cell, with each change that is made to it. The cells lie in the
order of their keys, at whichever size: a walk through all of them can stop anywhere and go on after changes.
"""

cimport cython
from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.long cimport PyLong_AsUnsignedLong
from cpython.object cimport PyObject
from cpython.sequence cimport PySequence_Fast_GET_ITEM, PySequence_Fast_GET_SIZE
from libc.math cimport fabs, rint
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc, qsort, realloc
from libc.string cimport memcpy, memset

import os
from array import array

from router.prefix.names import Names
from router.types import NO_HOLDERS, Held, Holders

ctypedef uint64_t u64

cdef extern from *:
    """
    #include <stdint.h>
    #include <stdlib.h>
    #include <sys/mman.h>

    _Static_assert(sizeof(unsigned long) == 8, "hashes are read as unsigned long, which CPython does fastest");

    /* Where a key belongs among `room` cells. It grows with the key. */
    static inline uint64_t kv_home(uint64_t key, uint64_t room) {
        return (uint64_t)(((unsigned __int128)key * room) >> 64);
    }

    /* The least key that belongs there. */
    static inline uint64_t kv_least(uint64_t home, uint64_t room) {
        return (uint64_t)((((unsigned __int128)home << 64) + room - 1) / room);
    }

    /* Cells that are all zero; NULL where there is no memory. A large table is mapped: what the heap has used before
       would have to be cleared at once, for milliseconds. */
    #define KV_MAPPED ((size_t)1 << 20)
    static inline uint64_t *kv_cells(size_t size) {
        if (size < KV_MAPPED)
            return calloc(1, size);
        void *found = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        return found == MAP_FAILED ? NULL : found;
    }

    static inline void kv_free(uint64_t *cells, size_t size) {
        if (cells == NULL || size < KV_MAPPED)
            free(cells);
        else
            munmap(cells, size);
    }

    /* Gives back the memory of whole pages between two addresses; nothing there is read any more. */
    static inline void kv_give_back(char *from, char *to) {
        const uintptr_t page = 65536;  /* Arm has pages as large. */
        const uintptr_t first = ((uintptr_t)from + page - 1) & ~(page - 1), end = (uintptr_t)to & ~(page - 1);
        if (first < end)
            madvise((void *)first, end - first, MADV_DONTNEED);
    }

    #define kv_fetch(cell) __builtin_prefetch(cell)
    #define kv_ones(word) __builtin_popcountll(word)
    #define kv_lowest(word) __builtin_ctzll(word)
    """
    u64 kv_home(u64 key, u64 room) noexcept nogil
    u64 kv_least(u64 home, u64 room) noexcept nogil
    u64* kv_cells(size_t size) noexcept nogil
    void kv_free(u64* cells, size_t size) noexcept nogil
    void kv_give_back(char* start, char* end) noexcept nogil
    void kv_fetch(const void* cell) noexcept nogil
    int kv_ones(u64 word) noexcept nogil
    int kv_lowest(u64 word) noexcept nogil

BANDS = (1 << 10, 1 << 12, 1 << 14, 1 << 16, 1 << 32)
"""A replica's blocks are read in the order of their depths, roughly: where not all find room in a mirror, the beginnings
of prompts shall."""

cdef enum:
    KEY = 0
    META = 1  # The depth, and a bit that tells that the cell is used.
    MASK = 2  # So many words as there must be.
    LEAST_ROOM = 512
    WORDS = 2  # Of a mask at first: most fleets are smaller than 128.
    SPILL = 512  # Cells behind the last home. The longest row of all among millions of cells, 13/16 full, has 400.
    AT_ONCE = 4096  # Tables up to there change their size at one go.
    PER_BLOCK = 16  # Cells that move to the new size with each block that is stored, evicted, entered or swept.
    GIVEN_BACK = 1 << 20  # Bytes of an old table that are given back at once: a large one at its end takes milliseconds.
    FIRST = 16  # Blocks that are looked up at once, at first: many prompts are not known further than that.
    BATCH = 32  # Cells on their way from memory at the same time.
    AHEAD = 16  # So many integers too.
    PIECE = 1024  # Cells read at once for a replica's blocks.
    SCANNED = 4096  # Bytes of cells that are gone through at the cost of one block.
    TAKEN = 4  # Blocks that are taken out at the cost of one.

cdef u64 USED = 1ULL << 32
cdef u64 DEPTH = 0xFFFFFFFF


cdef struct Cells:
    u64* at  # NULL where there are none.
    u64 room
    u64 slots  # With the spill. One cell more is never used, and ends each row.
    u64 used
    Py_ssize_t words  # Of a mask.
    Py_ssize_t step  # Words from cell to cell.


cdef struct Found:
    int64_t blocks
    int64_t tokens
    int64_t soon
    Py_ssize_t mask  # Which of the masks found.


cdef inline size_t size_of(const Cells* cells) noexcept nogil:
    return (cells.slots + 1) * cells.step * sizeof(u64)


cdef inline u64* probe(Cells* cells, u64 key) noexcept nogil:
    cdef u64* cell = cells.at + kv_home(key, cells.room) * cells.step
    while cell[META]:
        if cell[KEY] == key:
            return cell
        cell += cells.step
    return NULL


cdef u64* put(Cells* cells, u64 key) noexcept nogil:
    """A cell for a key that has none; NULL if the row of cells ends at the table's end."""
    cdef u64* cell = cells.at + kv_home(key, cells.room) * cells.step
    while cell[META]:
        cell += cells.step
    if cell == cells.at + cells.slots * cells.step:
        return NULL
    cell[KEY] = key
    cell[META] = USED
    cells.used += 1
    return cell


cdef inline void copy(u64* to, const u64* cell, Py_ssize_t words) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(words):  # Mostly three: less than a call takes.
        to[i] = cell[i]


cdef void drop(Cells* cells, u64* cell) noexcept nogil:
    """Empties a cell; those behind it that belong before them move up, so that no row is broken."""
    cdef u64* other = cell + cells.step
    cdef Py_ssize_t i
    while other[META]:
        if cells.at + kv_home(other[KEY], cells.room) * cells.step <= cell:
            copy(cell, other, cells.step)
            cell = other
        other += cells.step
    for i in range(cells.step):
        cell[i] = 0
    cells.used -= 1


cdef inline bint is_empty(const u64* mask, Py_ssize_t words) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(words):
        if mask[i]:
            return False
    return True


@cython.final
cdef class Table:
    """Blocks and masks: an open hash table, while it changes its size two.

    A block has a cell in one of them. In the old one the cells before `moved` are empty, and no row reaches across.
    """

    cdef Cells now
    cdef Cells old
    cdef u64 moved
    cdef u64 given_back
    cdef int64_t* counts  # Per place, where somebody counts.

    def __cinit__(self):
        if self.begin(LEAST_ROOM, WORDS) < 0:
            raise MemoryError

    def __dealloc__(self):
        kv_free(self.now.at, size_of(&self.now))
        kv_free(self.old.at, size_of(&self.old))

    cdef inline u64 used(self) noexcept:
        return self.now.used + self.old.used

    cdef u64 size(self) noexcept:
        cdef u64 total = (self.now.slots + 1) * self.now.step
        if self.old.at != NULL:
            total += (self.old.slots + 1) * self.old.step
        return total * sizeof(u64)

    cdef inline bint is_old(self, const u64* cell) noexcept:
        return self.old.at != NULL and self.old.at <= cell < self.old.at + self.old.slots * self.old.step

    cdef inline Py_ssize_t words(self, const u64* cell) noexcept:
        return self.old.words if self.is_old(cell) else self.now.words

    cdef inline void fetch(self, u64 key) noexcept:
        kv_fetch(self.now.at + kv_home(key, self.now.room) * self.now.step)
        if self.old.at != NULL:
            kv_fetch(self.old.at + kv_home(key, self.old.room) * self.old.step)

    cdef inline u64* find(self, u64 key) noexcept:
        cdef u64* cell = probe(&self.now, key)
        if cell == NULL and self.old.at != NULL and kv_home(key, self.old.room) >= self.moved:
            cell = probe(&self.old, key)
        return cell

    cdef u64* cell_of(self, u64 key, Py_ssize_t word) noexcept:
        """The cell of a block, a new one if there is none, with so many words before the last in its mask; NULL if
        there is no way."""
        cdef u64* cell = self.find(key)
        cdef u64* new = NULL
        if cell != NULL and self.words(cell) > word:
            return cell
        if cell == NULL and self.old.at != NULL and self.old.words > word:
            # The new table's memory is best touched in its order. The old one gets a sixteenth fuller at most.
            if kv_home(key, self.old.room) >= self.moved and self.old.used * 16 < self.old.room * 13:
                new = put(&self.old, key)
        if new == NULL:
            new = put(&self.now, key)
        if cell != NULL and new != NULL:
            new[META] = cell[META]
            copy(new + MASK, cell + MASK, self.words(cell))
            drop(&self.old, cell)
        return new

    cdef void remove(self, u64* cell) noexcept:
        drop(&self.old if self.is_old(cell) else &self.now, cell)

    # -- size

    cdef int prepare(self, u64 more, Py_ssize_t words, Py_ssize_t soon) except -1:
        """Makes room for so many blocks more, and for masks of so many words, of which more may be needed soon."""
        cdef u64 total = self.used() + more, room = self.now.room
        cdef Py_ssize_t wide = self.now.words
        if self.old.at != NULL:
            self.advance(PER_BLOCK * more)
        if total * 4 <= room * 3 and words <= self.now.words:
            return 0
        while wide < words or wide < soon:
            wide *= 2
        if self.old.at != NULL:  # Seldom: past 128 replicas, where one more than masks have room for comes meanwhile.
            self.advance(self.old.slots)
        if total * 8 > room * 5:
            room = max(room + room // 2, total + total // 2)
        if self.begin(room, wide) < 0:
            raise MemoryError
        if self.old.at != NULL:  # Else all of them would go where there was no room.
            self.advance(PER_BLOCK * more)
        return 0

    cdef void spare(self, u64 less) noexcept:
        """After so many blocks less: a table that is nearly empty becomes smaller. Not by so much that it could be full
        before all is moved; and not while keys are unevenly spread, as where a walk takes blocks out."""
        cdef u64 room
        if self.old.at != NULL:
            self.advance(PER_BLOCK * less)
        elif self.now.room > LEAST_ROOM and self.now.used * 8 < self.now.room:
            room = max(<u64>LEAST_ROOM, self.now.used * 2, self.now.room // 8)
            self.begin(room, self.now.words)  # Without memory for it, it stays.

    cdef int begin(self, u64 room, Py_ssize_t words) noexcept:
        """Another size; -1 where there is no memory for that."""
        cdef Cells new
        new.room, new.slots, new.used, new.words, new.step = room, room + SPILL, 0, words, MASK + words
        new.at = kv_cells(size_of(&new))
        if new.at == NULL:
            return -1
        self.old, self.now, self.moved, self.given_back = self.now, new, 0, 0
        if self.old.at != NULL and self.old.slots <= AT_ONCE:
            self.advance(self.old.slots)
        return 0

    cdef void advance(self, u64 budget) noexcept:
        """Moves cells to the new size: so many, and those up to the end of their row."""
        cdef u64 end = self.moved + min(budget, self.old.slots - self.moved)
        cdef Py_ssize_t step = self.old.step, words = self.old.words
        cdef u64* cell = self.old.at + self.moved * step
        cdef u64* new
        if not self.old.used:  # Only its memory is to be given back, which takes time too.
            self.moved = end = min(self.old.slots, max(end, self.moved + GIVEN_BACK // (step * sizeof(u64))))
        while self.moved < end or (self.old.used and cell[META]):
            if cell[META]:
                new = put(&self.now, cell[KEY])
                if new != NULL:
                    new[META] = cell[META]
                    copy(new + MASK, cell + MASK, words)
                else:
                    self.lose(cell)
                self.old.used -= 1
            self.moved += 1
            cell += step
        if (self.moved - self.given_back) * step * sizeof(u64) >= GIVEN_BACK:
            kv_give_back(<char*> (self.old.at + self.given_back * step), <char*> (self.old.at + self.moved * step))
            self.given_back = self.moved
        if self.moved >= self.old.slots:
            kv_free(self.old.at, size_of(&self.old))
            self.old.at = NULL
            self.old.used = 0

    cdef void lose(self, const u64* cell) noexcept:
        """A block that finds no cell is forgotten. It takes a row of `SPILL` cells at the table's end."""
        cdef Py_ssize_t i
        cdef u64 word
        if self.counts == NULL:
            return
        for i in range(self.old.words):
            word = cell[MASK + i]
            while word:
                self.counts[64 * i + kv_lowest(word)] -= 1
                word &= word - 1


cdef inline object plain(object numbers, str kinds):
    """A sequence that can be read without any code of others: a tuple, a list, or an array of one of these kinds."""
    kind = type(numbers)
    if kind is tuple or kind is list or (kind is array and numbers.typecode in kinds):
        return numbers
    return list(numbers)


cdef Py_ssize_t length(object blocks) except -1:
    return len(blocks)


@cython.final
cdef class Blocks:
    """A `BlockStore`."""

    cdef readonly Py_ssize_t max_blocks
    cdef readonly Py_ssize_t refused
    cdef Table stored
    cdef Table soon
    cdef u64 odd, odder  # A key is the hash times both. The first is known to nobody, so that no rows can be made up.
    cdef u64 undo, undoer
    cdef Py_ssize_t places, words
    cdef object names
    cdef dict spelled
    cdef u64* live  # Masks of the places that match, and of those whose blocks are to be taken out.
    cdef u64* leaving
    cdef int64_t* counts  # Stored blocks per place.
    cdef u64 cursor  # From this key on are blocks to be taken out.
    # Of a look-up.
    cdef u64* keys
    cdef u64** cells
    cdef uint32_t* depths
    cdef Py_ssize_t room
    cdef Py_ssize_t looked
    cdef u64* scratch  # Four masks.
    cdef int64_t* already  # Per place.
    cdef Found* found
    cdef u64* masks  # One for each found, and one more.
    cdef Py_ssize_t founds, founds_room
    cdef double tokens_per_block

    def __cinit__(self, max_blocks):
        if max_blocks < 0:
            raise ValueError("max_blocks is negative")
        self.max_blocks = max_blocks
        self.stored, self.soon = Table(), Table()
        self.names = Names()
        self.spelled = self.names.spelled
        self.odd = int.from_bytes(os.urandom(8), "little") | 1
        self.odder = 0x9E3779B97F4A7C15ULL
        self.undo, self.undoer = inverse(self.odd), inverse(self.odder)
        self.make_places(64)
        self.make_room(256)
        self.make_founds(64)

    def __dealloc__(self):
        free(self.live)
        free(self.leaving)
        free(self.counts)
        free(self.keys)
        free(self.cells)
        free(self.depths)
        free(self.scratch)
        free(self.already)
        free(self.found)
        free(self.masks)

    def __len__(self):
        return <Py_ssize_t> self.stored.used()

    @property
    def coming(self):
        return self.soon.used()

    @property
    def untidy(self):
        return self.stored.old.at != NULL or self.soon.old.at != NULL

    def bytes(self):
        cdef u64 per_place = (2 + 4) * sizeof(u64) // 8 + 2 * sizeof(int64_t)
        cdef u64 look_up = self.room * (sizeof(u64) + sizeof(u64*) + sizeof(uint32_t))
        cdef u64 finds = self.founds_room * (sizeof(Found) + self.words * sizeof(u64))
        return self.stored.size() + self.soon.size() + self.places * per_place + look_up + finds

    def roughly_bytes(self):
        return self.bytes()

    # -- memory

    cdef int make_places(self, Py_ssize_t places) except -1:
        """Grows what there is one of per place, or bit by bit."""
        cdef Py_ssize_t words = (places + 63) // 64
        places = words * 64
        grow(<void**> &self.live, self.words * sizeof(u64), words * sizeof(u64))
        grow(<void**> &self.leaving, self.words * sizeof(u64), words * sizeof(u64))
        grow(<void**> &self.scratch, 0, 4 * words * sizeof(u64))
        grow(<void**> &self.counts, self.places * sizeof(int64_t), places * sizeof(int64_t))
        self.stored.counts = self.counts
        grow(<void**> &self.already, 0, places * sizeof(int64_t))
        if self.founds_room:
            grow(<void**> &self.masks, 0, (self.founds_room + 1) * words * sizeof(u64))
        self.places, self.words = places, words
        return 0

    cdef int make_room(self, Py_ssize_t size) except -1:
        """For a look-up of so many blocks."""
        if size > self.room:
            size += size // 2
            grow(<void**> &self.keys, 0, size * sizeof(u64))
            grow(<void**> &self.cells, 0, size * sizeof(u64*))
            grow(<void**> &self.depths, 0, size * sizeof(uint32_t))
            self.room = size
        return 0

    cdef int make_founds(self, Py_ssize_t size) except -1:
        cdef Py_ssize_t old = self.founds_room * self.words * sizeof(u64)
        grow(<void**> &self.found, self.founds_room * sizeof(Found), size * sizeof(Found))
        grow(<void**> &self.masks, old, (size + 1) * self.words * sizeof(u64))
        self.founds_room = size
        return 0

    # -- blocks from outside

    cdef inline u64 key(self, u64 block) noexcept:
        """One to one. The tables tell blocks apart by their first bits, and chosen hashes must not fall into one row."""
        cdef u64 key = block * self.odd
        return (key ^ (key >> 32)) * self.odder

    cdef inline u64 block(self, u64 key) noexcept:
        key *= self.undoer
        return (key ^ (key >> 32)) * self.undo

    cdef int read(self, object blocks, Py_ssize_t first, Py_ssize_t end) except -1:
        """The keys of some blocks of a plain sequence; there is room for them."""
        cdef Py_ssize_t i
        cdef Py_buffer view
        if type(blocks) is array:
            PyObject_GetBuffer(blocks, &view, PyBUF_SIMPLE)
            for i in range(first, min(end, view.len // <Py_ssize_t> sizeof(u64))):
                self.keys[i] = self.key((<const u64*> view.buf)[i])
            PyBuffer_Release(&view)
        else:
            for i in range(first, min(end, first + AHEAD)):
                kv_fetch(PySequence_Fast_GET_ITEM(blocks, i))
            for i in range(first, end):
                if i + AHEAD < end:
                    kv_fetch(PySequence_Fast_GET_ITEM(blocks, i + AHEAD))
                self.keys[i] = self.key(PyLong_AsUnsignedLong(<object> PySequence_Fast_GET_ITEM(blocks, i)))
        return 0

    cdef int read_depths(self, object depths, Py_ssize_t end) except -1:
        cdef Py_ssize_t i
        cdef Py_buffer view
        cdef u64 depth
        if type(depths) is array:
            PyObject_GetBuffer(depths, &view, PyBUF_SIMPLE)
            memcpy(self.depths, view.buf, min(end * <Py_ssize_t> sizeof(uint32_t), view.len))
            PyBuffer_Release(&view)
        else:
            for i in range(end):
                depth = PyLong_AsUnsignedLong(<object> PySequence_Fast_GET_ITEM(depths, i))
                if depth > DEPTH:
                    raise OverflowError("a depth of more than 32 bits")
                self.depths[i] = <uint32_t> depth
        return 0

    cdef inline int check(self, Py_ssize_t place) except -1:
        if not 0 <= place < self.places:
            raise IndexError("no such place")
        return 0

    # -- places

    def open(self, Py_ssize_t place, replica):
        if place < 0:
            raise IndexError("no such place")
        if place >= self.places:
            self.make_places(place + 1)
        if self.counts[place]:
            raise ValueError("the place's blocks are not taken out yet")
        self.names.open(place, replica)
        self.live[place >> 6] |= 1ULL << (place & 63)
        self.leaving[place >> 6] &= ~(1ULL << (place & 63))

    def retire(self, Py_ssize_t place):
        self.check(place)
        self.names.retire(place)
        self.live[place >> 6] &= ~(1ULL << (place & 63))
        if self.counts[place]:
            self.leaving[place >> 6] |= 1ULL << (place & 63)

    def remove(self, Py_ssize_t place, Py_ssize_t budget):
        """Goes through the cells of all blocks, for all places at once that leave, and so in all takes as long as there
        are blocks, and not as the place has."""
        cdef Cells* cells = &self.stored.now
        cdef u64* cell
        cdef u64* end
        cdef u64 gone, home
        cdef Py_ssize_t i, step, work = 0, cost, enough
        cdef Py_ssize_t words = min(cells.words, self.words)  # Cells may have more than there are places for.
        cdef bint touched
        self.check(place)
        if self.stored.old.at != NULL:
            self.stored.advance(<u64> max(budget, 1) * PER_BLOCK)
            return budget
        step = cells.step
        cost = max(1, SCANNED // (TAKEN * step * <Py_ssize_t> sizeof(u64)))  # Of a block that is taken out, in cells.
        enough = max(budget, 1) * TAKEN * cost
        cell = cells.at + kv_home(self.cursor, cells.room) * step
        end = cells.at + cells.slots * step
        while self.counts[place]:
            touched = False
            for i in range(words):
                gone = cell[MASK + i] & self.leaving[i]
                if gone:
                    touched = True
                    cell[MASK + i] ^= gone
                    while gone:
                        self.counted_out(64 * i + kv_lowest(gone))
                        work += cost
                        gone &= gone - 1
            if touched and is_empty(cell + MASK, cells.words):
                drop(cells, cell)
                continue  # Another may be there now.
            if work >= enough and not cell[META]:  # Between two rows: none moves across.
                break
            cell += step
            work += 1
            if cell >= end:
                cell = cells.at
        home = (cell - cells.at) // step
        self.cursor = kv_least(home, cells.room) if home < cells.room else 0
        if not self.counts[place]:
            self.leaving[place >> 6] &= ~(1ULL << (place & 63))
            if is_empty(self.leaving, self.words):
                self.stored.spare(0)
        return work // (TAKEN * cost)

    cdef void counted_out(self, Py_ssize_t place) noexcept:
        self.counts[place] -= 1
        if not self.counts[place]:
            self.leaving[place >> 6] &= ~(1ULL << (place & 63))

    def tidy(self, Py_ssize_t budget):
        """Moves cells of tables that change their size."""
        if budget > 0 and self.soon.old.at != NULL:
            self.soon.advance(<u64> budget * PER_BLOCK)
            budget = 0
        if budget > 0 and self.stored.old.at != NULL:
            self.stored.advance(<u64> budget * PER_BLOCK)
            budget = 0
        return budget

    # -- what is stored

    def store(self, Py_ssize_t place, hashes, depths):
        cdef Table table = self.stored
        cdef Py_ssize_t size, i, at, refused = 0
        cdef u64 bit = 1ULL << (place & 63)
        cdef Py_ssize_t word = place >> 6
        cdef u64* cell
        self.check(place)
        if not self.live[word] & bit:
            raise ValueError("nobody is at this place")
        hashes, depths = plain(hashes, "QL"), plain(depths, "I")
        size = length(hashes)
        if length(depths) != size:
            raise ValueError("not as many depths as blocks")
        if not size:
            return
        self.make_room(size)
        self.read(hashes, 0, size)
        self.read_depths(depths, size)
        table.prepare(min(size, max(0, self.max_blocks - <Py_ssize_t> table.used())), word + 1, self.words)
        for at in range(0, size, BATCH):
            for i in range(at, min(at + BATCH, size)):
                table.fetch(self.keys[i])
            for i in range(at, min(at + BATCH, size)):
                if <Py_ssize_t> table.used() < self.max_blocks or table.find(self.keys[i]) != NULL:
                    cell = table.cell_of(self.keys[i], word)
                else:
                    cell = NULL
                if cell == NULL:
                    self.keys[refused] = self.keys[i]
                    refused += 1
                    continue
                cell[META] = USED | self.depths[i]
                if not cell[MASK + word] & bit:
                    cell[MASK + word] |= bit
                    self.counts[place] += 1
        if refused:
            qsort(self.keys, refused, sizeof(u64), by_key)
            for i in range(refused):  # Twice in one report is once.
                self.refused += not i or self.keys[i] != self.keys[i - 1]

    def evict(self, Py_ssize_t place, hashes):
        cdef Table table = self.stored
        cdef Py_ssize_t size, i, at
        cdef u64 bit = 1ULL << (place & 63)
        cdef Py_ssize_t word = place >> 6
        cdef u64* cell
        self.check(place)
        hashes = plain(hashes, "QL")
        size = length(hashes)
        if not size:
            return
        self.make_room(size)
        self.read(hashes, 0, size)
        for at in range(0, size, BATCH):
            for i in range(at, min(at + BATCH, size)):
                table.fetch(self.keys[i])
            for i in range(at, min(at + BATCH, size)):
                cell = table.find(self.keys[i])
                if cell == NULL or word >= table.words(cell) or not cell[MASK + word] & bit:
                    continue
                cell[MASK + word] ^= bit
                self.counted_out(place)
                if is_empty(cell + MASK, table.words(cell)):
                    table.remove(cell)
        if is_empty(self.leaving, self.words):
            table.spare(size)
        elif table.old.at != NULL:
            table.advance(PER_BLOCK * size)

    def held(self, Py_ssize_t place):
        self.check(place)
        return self.counts[place]

    def holds(self, Py_ssize_t place):
        self.check(place)
        return self.counts[place] != 0

    def runs(self, Py_ssize_t place):
        """Pieces of one walk through all blocks per band of depths; many of them may be empty."""
        self.check(place)
        return self.walk(place)

    def walk(self, Py_ssize_t place):
        shallow = 0
        for deep in BANDS:
            cursor = 0
            while cursor is not None and self.counts[place]:
                blocks = []
                cursor = self.piece(place, cursor, shallow, deep, blocks)
                yield blocks
            shallow = deep

    cdef object piece(self, Py_ssize_t place, u64 first, u64 shallow, u64 deep, list blocks):
        """Adds its blocks in the next few cells from a key on; returns the key behind them, None at the end."""
        cdef Cells* cells = &self.stored.now
        cdef u64 at = kv_home(first, cells.room), end = at + PIECE, last = 0xFFFFFFFFFFFFFFFFULL
        cdef u64* cell = cells.at + at * cells.step
        while at < cells.slots and (at < end or cell[META]):
            at += 1
            cell += cells.step
        if at < cells.room and at < cells.slots:
            at += 1  # The empty one: no row reaches across.
        at = min(at, cells.slots)
        if at < cells.room:
            last = kv_least(at, cells.room) - 1
        self.collect(cells, place, first, last, shallow, deep, 0, blocks)
        if self.stored.old.at != NULL:
            self.collect(&self.stored.old, place, first, last, shallow, deep, self.stored.moved, blocks)
        return last + 1 if at < cells.room else None

    cdef int collect(
        self, Cells* cells, Py_ssize_t place, u64 first, u64 last, u64 shallow, u64 deep, u64 moved, list blocks
    ) except -1:
        """The blocks of a place whose keys are from `first` to `last`, in one table."""
        cdef u64 at = max(kv_home(first, cells.room), moved), end = kv_home(last, cells.room)
        cdef u64* cell = cells.at + at * cells.step
        cdef Py_ssize_t word = place >> 6
        if word >= cells.words:
            return 0
        while at < cells.slots and (at <= end or cell[META]):
            if cell[META] and cell[MASK + word] >> (place & 63) & 1:
                if first <= cell[KEY] <= last and shallow <= cell[META] & DEPTH < deep:
                    blocks.append(self.block(cell[KEY]))
            at += 1
            cell += cells.step
        return 0

    def first(self, Py_ssize_t place, chain):
        cdef Py_ssize_t size, at = 0, word = place >> 6
        cdef u64* cell
        self.check(place)
        chain = plain(chain, "QL")
        size = length(chain)
        self.begin_look_up(size)
        while at < size:
            if at >= self.looked:
                self.look_up(chain, size)
            cell = self.cells[at]
            if cell == NULL or word >= self.stored.words(cell) or not cell[MASK + word] >> (place & 63) & 1:
                break
            at += 1
        return at

    # -- what comes

    def enter(self, Py_ssize_t place, blocks, dict again not None):
        cdef Table table = self.soon
        cdef Py_ssize_t size, i, word = place >> 6
        cdef u64 bit = 1ULL << (place & 63), twice
        cdef u64* cell
        self.check(place)
        blocks = plain(blocks, "QL")
        size = length(blocks)
        self.make_room(size)
        self.read(blocks, 0, size)
        table.prepare(size, word + 1, self.words)
        for i in range(min(size, 2 * BATCH)):
            table.fetch(self.keys[i])
        for i in range(size):
            cell = table.cell_of(self.keys[i], word)
            if cell == NULL:
                continue
            twice = cell[MASK + word] & bit
            cell[MASK + word] |= bit
            if twice:
                block = self.block(self.keys[i])
                again[block] = again.get(block, 0) + 1

    def withdraw(self, Py_ssize_t place, blocks, dict again not None):
        cdef Table table = self.soon
        cdef Py_ssize_t size, i, word = place >> 6
        cdef u64 bit = 1ULL << (place & 63)
        cdef u64* cell
        self.check(place)
        blocks = plain(blocks, "QL")
        size = length(blocks)
        self.make_room(size)
        self.read(blocks, 0, size)
        for i in range(min(size, 2 * BATCH)):
            table.fetch(self.keys[i])
        for i in range(size):
            if again:
                block = self.block(self.keys[i])
                more = again.get(block, 0)
                if more:
                    if more > 1:
                        again[block] = more - 1
                    else:
                        del again[block]
                    continue
            cell = table.find(self.keys[i])
            if cell == NULL or word >= table.words(cell):
                continue
            cell[MASK + word] &= ~bit
            if is_empty(cell + MASK, table.words(cell)):
                table.remove(cell)
        table.spare(size)

    # -- lookups

    def match(self, chain, double tokens_per_block):
        cdef Py_ssize_t size, at = 0, i, words = self.words, some
        cdef u64* alive = self.scratch
        cdef u64* left = self.scratch + words
        cdef u64* cell
        cdef u64 stays, goes, stay, tokens = 0
        chain = plain(chain, "QL")
        size = length(chain)
        if not size:
            return NO_HOLDERS
        self.begin_look_up(size)
        self.tokens_per_block = tokens_per_block
        memcpy(alive, self.live, words * sizeof(u64))
        while True:  # `alive` hold all blocks up to `at`.
            cell = NULL
            if at < size:
                if at >= self.looked:
                    self.look_up(chain, size)
                cell = self.cells[at]
            some = self.stored.words(cell) if cell != NULL else 0
            stays = goes = 0
            for i in range(words):
                stay = alive[i] & cell[MASK + i] if i < some else 0
                left[i] = alive[i] ^ stay
                alive[i] = stay
                goes |= left[i]
                stays |= stay
            if goes and (at or self.soon.used()):
                self.part(left, chain, size, at, tokens)
            if not stays:
                break
            tokens = cell[META] & DEPTH
            at += 1
        return self.holders() if self.founds else NO_HOLDERS

    cdef int begin_look_up(self, Py_ssize_t size) except -1:
        self.make_room(size)
        self.looked = self.founds = 0
        return 0

    cdef int look_up(self, object chain, Py_ssize_t size) except -1:
        """The cells of the next few blocks of a chain."""
        cdef Py_ssize_t i, first = self.looked, end = min(size, first + (BATCH if first else FIRST))
        self.read(chain, first, end)
        for i in range(first, end):
            self.stored.fetch(self.keys[i])
        for i in range(first, end):
            self.cells[i] = self.stored.find(self.keys[i])
        self.looked = end
        return 0

    cdef int part(self, u64* mask, object chain, Py_ssize_t size, Py_ssize_t at, u64 tokens) except -1:
        """The replicas in `mask` store so many blocks and not the next one; it may come with requests in flight."""
        cdef u64* some = self.scratch + 2 * self.words
        cdef u64 any_come = 0, any_left = 0
        cdef Py_ssize_t i, words
        cdef u64* cell
        if at < size and self.soon.used():
            cell = self.soon.find(self.keys[at])
            if cell != NULL:
                words = self.soon.words(cell)
                for i in range(self.words):
                    some[i] = mask[i] & cell[MASK + i] if i < words else 0
                    mask[i] ^= some[i]
                    any_come |= some[i]
        if at:
            for i in range(self.words):
                any_left |= mask[i]
            if any_left:
                self.add(at, tokens, 0, mask)
        if any_come:
            self.go_on(some, chain, size, at, tokens)
        return 0

    cdef int go_on(self, u64* mask, object chain, Py_ssize_t size, Py_ssize_t stored, u64 tokens) except -1:
        """To the replicas in `mask` requests in flight will bring the block after the stored ones."""
        cdef Py_ssize_t at = stored, i, here_words, coming_words
        cdef u64 any_left, any_stay = 1, word, here, both
        cdef u64* left = self.scratch + 3 * self.words
        cdef u64* cell
        cdef u64* coming
        cdef bint some_stored = False
        cdef int64_t reach
        memset(self.already, 0, self.places * sizeof(int64_t))
        while any_stay:
            cell = coming = NULL
            here_words = coming_words = 0
            if at < size:
                if at >= self.looked:
                    self.look_up(chain, size)
                cell, coming = self.cells[at], self.soon.find(self.keys[at])
                if cell != NULL:
                    here_words = self.stored.words(cell)
                if coming != NULL:
                    coming_words = self.soon.words(coming)
            any_left = any_stay = 0
            for i in range(self.words):
                word = mask[i]
                left[i] = 0
                if not word:
                    continue
                here = word & cell[MASK + i] if i < here_words else 0
                both = here | (word & coming[MASK + i] if i < coming_words else 0)
                left[i] = word & ~both
                mask[i] = both
                any_left |= left[i]
                any_stay |= both
            if any_left:
                reach = self.reach(at, stored, tokens)
                if some_stored:
                    self.add_each(at, reach, at - stored, left)
                else:
                    self.add(at, reach, at - stored, left)
            if here_words:
                for i in range(min(self.words, here_words)):
                    here = mask[i] & cell[MASK + i]
                    while here:
                        self.already[64 * i + kv_lowest(here)] += 1
                        some_stored = True
                        here &= here - 1
            at += 1
        return 0

    cdef int64_t reach(self, Py_ssize_t at, Py_ssize_t stored, u64 tokens) except -1:
        """The tokens up to the end of a block that comes: as somebody reported, else an estimate."""
        cdef u64* cell = self.cells[at - 1]
        cdef double more
        if cell != NULL:
            return <int64_t> (cell[META] & DEPTH)
        more = <double> (at - stored) * self.tokens_per_block
        if not fabs(more) < 1e18:
            raise OverflowError("tokens without end")
        return <int64_t> tokens + <int64_t> rint(more)

    # -- what a lookup found

    cdef int add(self, int64_t blocks, int64_t tokens, int64_t soon, const u64* mask) except -1:
        cdef Found* one
        if self.founds == self.founds_room:
            self.make_founds(max(64, 2 * self.founds_room))
        one = self.found + self.founds
        one.blocks, one.tokens, one.soon, one.mask = blocks, tokens, soon, self.founds
        memcpy(self.masks + self.founds * self.words, mask, self.words * sizeof(u64))
        self.founds += 1
        return 0

    cdef int add_each(self, int64_t blocks, int64_t tokens, int64_t soon, u64* mask) except -1:
        """Those in `mask`, of which each stores others of the blocks that come."""
        cdef Py_ssize_t i
        cdef u64* one = self.scratch + self.words  # `match` has no use for it now.
        memset(one, 0, self.words * sizeof(u64))
        for i in range(self.words):
            while mask[i]:
                one[i] = mask[i] & (~mask[i] + 1)
                self.add(blocks, tokens, soon - self.already[64 * i + kv_lowest(mask[i])], one)
                mask[i] ^= one[i]
            one[i] = 0
        return 0

    cdef void join(self) noexcept:
        """Puts what was found in order, and those together that hold the same."""
        cdef Py_ssize_t i, j, last = 0
        cdef Found* one
        if self.founds > 1:
            qsort(self.found, self.founds, sizeof(Found), by_held)
        for i in range(1, self.founds):
            one = self.found + i
            if by_held(self.found + last, one) == 0:
                for j in range(self.words):
                    self.masks[self.found[last].mask * self.words + j] |= self.masks[one.mask * self.words + j]
            else:
                last += 1
                self.found[last] = one[0]
        self.founds = last + 1

    cdef object holders(self):
        """As `Names.holders`, of what was found."""
        cdef Found* found = self.found
        cdef u64* masks = self.masks
        cdef Py_ssize_t room = self.founds_room, words = self.words
        self.join()
        # Set aside: as objects are made, a finalizer may run that looks something up.
        self.found, self.masks, self.founds_room = NULL, NULL, 0
        try:
            return self.told(found, self.founds, masks, masks + room * words, words)
        finally:
            if self.found == NULL and self.words == words:
                self.found, self.masks, self.founds_room = found, masks, room
            else:
                free(found)
                free(masks)

    cdef object told(self, Found* found, Py_ssize_t founds, u64* masks, u64* rest, Py_ssize_t words):
        cdef Py_ssize_t i, j, half = 0, size
        cdef u64 any_rest = 0
        cdef u64* mask
        for j in range(words):
            rest[j] = self.live[j]
            half += kv_ones(rest[j])
        half >>= 1
        most = None
        cdef list named = []
        for i in range(founds):
            size = 0
            mask = masks + found[i].mask * words
            for j in range(words):
                size += kv_ones(mask[j])
                rest[j] ^= mask[j]
            held = Held(found[i].blocks, found[i].tokens, found[i].soon)
            if size > half:
                most = held
            else:
                named.append((held, self.spell(mask, words)))
        if most is None:
            return Holders(named)
        for j in range(words):
            any_rest |= rest[j]
        if any_rest:
            named.append((None, self.spell(rest, words)))
        return Holders(named, most, self.names.roster)

    cdef object spell(self, const u64* mask, Py_ssize_t words):
        if words == 1:
            number = mask[0]
        else:
            number = int.from_bytes((<const char*> mask)[: words * sizeof(u64)], "little")
        names = self.spelled.get(number)
        return self.names.of(number) if names is None else names


cdef int by_key(const void* one, const void* other) noexcept nogil:
    cdef u64 a = (<const u64*> one)[0], b = (<const u64*> other)[0]
    return -1 if a < b else a > b


cdef int by_held(const void* one, const void* other) noexcept nogil:
    cdef const Found* a = <const Found*> one
    cdef const Found* b = <const Found*> other
    if a.blocks != b.blocks:
        return -1 if a.blocks < b.blocks else 1
    if a.tokens != b.tokens:
        return -1 if a.tokens < b.tokens else 1
    if a.soon != b.soon:
        return -1 if a.soon < b.soon else 1
    return 0


cdef u64 inverse(u64 odd) noexcept nogil:
    """What undoes a multiplication by an odd number."""
    cdef u64 found = odd
    for _ in range(5):  # Each doubles the bits that are right, three at first.
        found *= 2 - odd * found
    return found


cdef int grow(void** memory, size_t old, size_t size) except -1:
    """More memory, of which all behind the `old` bytes is zero."""
    cdef void* new = realloc(memory[0], size)
    if new == NULL:
        raise MemoryError
    memory[0] = new
    memset(<char*> new + old, 0, size - old)
    return 0
