# distutils: language = c++
# cython: language_level=3, binding=False, cdivision=True
"""The native twin of `_rate_counters_py.py`, which is its specification: the same sums in the same order, so the same
answers to the last bit.

The counts of a name are a row of 64-bit cells, private or in a buffer that processes share:

    hash of the name | requests: full again at | tokens: full again at | in use, by process 0 | 1 | ...

The times are moved by compare-and-swap; a process that is killed between two of them leaves one request too many
counted, and no lock. What is in use is a cell for each process, which only that process writes: what a dead one had in
use can be told and freed. The hash is the first cell that a row gets, and rows are never moved or freed, so a row is
found without a lock too.
"""

cimport cython
from cpython.buffer cimport PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytearray cimport PyByteArray_AS_STRING
from cpython.long cimport PyLong_AsLongLong
from cpython.unicode cimport PyUnicode_DecodeASCII
from libc.math cimport ceil
from libc.stdint cimport uintptr_t
from libc.string cimport memcpy

from hashlib import blake2b
from math import inf

from ext._rate_counters_py import CONCURRENCY, REQUESTS, TOKENS, Refusal, Remaining
from ext.errors import NotHeld

# The compiler's own atomics: C++17 has none for memory that was there before, and these cells are other processes' too.
cdef extern from *:
    """
    typedef long long int64_cell;
    static inline int64_cell atomic_get(int64_cell *cell) { return __atomic_load_n(cell, __ATOMIC_SEQ_CST); }
    static inline void atomic_put(int64_cell *cell, int64_cell value) {
        __atomic_store_n(cell, value, __ATOMIC_SEQ_CST);
    }
    static inline void atomic_add(int64_cell *cell, int64_cell more) {
        __atomic_fetch_add(cell, more, __ATOMIC_SEQ_CST);
    }
    static inline bool atomic_swap(int64_cell *cell, int64_cell *seen, int64_cell value) {
        return __atomic_compare_exchange_n(cell, seen, value, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
    }
    """
    int64 atomic_get(int64 *cell) noexcept
    void atomic_put(int64 *cell, int64 value) noexcept
    void atomic_add(int64 *cell, int64 more) noexcept
    bint atomic_swap(int64 *cell, int64 *seen, int64 value) noexcept

cdef double _WINDOW_S = 60.0
cdef double _ROUNDING_S = 1e-9
cdef double _LONGEST_S = 1e9
cdef double _INF = inf
cdef int64 _MAX_UNITS = 1LL << 60
cdef enum:
    HASH, REQUESTS_AT, TOKENS_AT, IN_USE  # cells of a row; the last is the first of one for each process

WINDOW_S = _WINDOW_S
MAX_UNITS = _MAX_UNITS


cdef inline int64 _count(object amount, str what) except -1:
    # Taken as objects because a C argument would cut a float to an integer in silence.
    cdef int64 count = PyLong_AsLongLong(amount)
    if count < 0:
        raise ValueError(f"{what} is {count}; use 0 or more")
    if count > _MAX_UNITS:
        raise OverflowError(f"{what} is {count}; use at most {_MAX_UNITS}")
    return count


cdef inline int _check_time(double now) except -1:
    if now != now:
        raise ValueError("now is NaN; use seconds of a monotonic clock")
    return 0


cdef inline double _later(double a, double b) noexcept:
    return b if b > a else a


cdef inline int64 _bits(double value) noexcept:
    cdef int64 bits
    memcpy(&bits, &value, sizeof(bits))
    return bits


cdef inline double _double(int64 bits) noexcept:
    cdef double value
    memcpy(&value, &bits, sizeof(value))
    return value


cdef inline double _at(int64 *cell) noexcept:
    return _double(atomic_get(cell))


cdef void _move(int64 *cell, double now, double more_s) noexcept:
    """Let the bucket be full again so much later than now, or than it would have been."""
    cdef int64 seen = atomic_get(cell)
    while not atomic_swap(cell, &seen, _bits(_later(_double(seen), now) + more_s)):
        pass


cdef bint _take_from(int64 *cell, double now, double cost_s) noexcept:
    """As `_move`, but only while it stays within the window."""
    cdef int64 seen = atomic_get(cell)
    cdef double at
    while True:
        at = _later(_double(seen), now) + cost_s
        if at - now - _WINDOW_S > _ROUNDING_S:
            return False
        if atomic_swap(cell, &seen, _bits(at)):
            return True


cdef void _put_back(int64 *cell, double cost_s) noexcept:
    cdef int64 seen = atomic_get(cell)
    while not atomic_swap(cell, &seen, _bits(_double(seen) - cost_s)):
        pass


cdef int64 _left(double reset_s, int64 per_minute) noexcept:
    if per_minute == 0:
        return -1
    cdef double left = (_WINDOW_S - reset_s) * per_minute / _WINDOW_S + 1e-6
    return <int64>left if left > 0 else 0


cdef class Meter:
    """The limits of one name on its counts. See the pure twin."""

    def __init__(self):
        raise TypeError("use RateCounters.meter")

    @property
    def in_use(self):
        """Grants that were not settled yet, in all processes."""
        return self._in_use()

    def remaining(self, double now):
        """What is left. Changes nothing."""
        _check_time(now)
        cdef double requests_s = _later(_at(self.row + REQUESTS_AT) - now, 0.0)
        cdef double tokens_s = _later(_at(self.row + TOKENS_AT) - now, 0.0)
        return Remaining(
            _left(requests_s, self.requests_per_minute), _left(tokens_s, self.tokens_per_minute),
            requests_s if self.requests_per_minute else -1.0, tokens_s if self.tokens_per_minute else -1.0,
        )

    cdef int64 _in_use(self) noexcept:
        cdef int64 in_use = 0
        cdef int each
        for each in range(self.processes):
            in_use += atomic_get(self.row + IN_USE + each)
        return in_use

    cdef int64 _cost(self, int64 stated, int64 guessed) noexcept:
        return min(stated + guessed, self.tokens_per_minute)

    cdef double _check(self, int64 stated, int64 guessed, double now, int *limit) noexcept:
        """The wait, and the limit that causes it; -1 where there is room."""
        cdef double wait_s = -1.0, over_s
        if self.concurrency and self._in_use() >= self.concurrency:
            wait_s, limit[0] = 0.0, IN_USE
        if self.requests_per_minute:
            over_s = _later(_at(self.row + REQUESTS_AT), now) + self.request_s - now - _WINDOW_S
            if over_s > _later(wait_s, _ROUNDING_S):
                wait_s, limit[0] = over_s, REQUESTS_AT
        if self.tokens_per_minute:
            if stated > self.tokens_per_minute:
                limit[0] = TOKENS_AT
                return _INF
            over_s = _later(_at(self.row + TOKENS_AT), now) + self._cost(stated, guessed) * self.token_s
            over_s = over_s - now - _WINDOW_S
            if over_s > _later(wait_s, _ROUNDING_S):
                wait_s, limit[0] = over_s, TOKENS_AT
        return wait_s

    cdef bint _take(self, int64 cost, double now) noexcept:
        """All of it or nothing; False where another process took what `_check` had seen."""
        cdef int64 *mine = self.row + IN_USE + self.process
        atomic_add(mine, 1)
        # counted before it is compared: two that come together may both be refused, and never both be let in
        if not self.concurrency or self._in_use() <= self.concurrency:
            if not self.requests_per_minute or _take_from(self.row + REQUESTS_AT, now, self.request_s):
                if not self.tokens_per_minute or _take_from(self.row + TOKENS_AT, now, cost * self.token_s):
                    return True
                if self.requests_per_minute:
                    _put_back(self.row + REQUESTS_AT, self.request_s)
        atomic_add(mine, -1)
        return False

    cdef void _settle(self, int64 more, double now) noexcept:
        atomic_add(self.row + IN_USE + self.process, -1)
        if more and self.tokens_per_minute:
            _move(self.row + TOKENS_AT, now, more * self.token_s)

    cdef void _cancel(self, int64 cost) noexcept:
        atomic_add(self.row + IN_USE + self.process, -1)
        if self.requests_per_minute:
            _put_back(self.row + REQUESTS_AT, self.request_s)
        if self.tokens_per_minute:
            _put_back(self.row + TOKENS_AT, cost * self.token_s)

    def __repr__(self):
        return (
            f"<Meter {self.name}: {self.requests_per_minute} requests, {self.tokens_per_minute} tokens a minute, "
            f"{self.in_use} of {self.concurrency} at once>"
        )


@cython.freelist(256)
cdef class Grant:
    """What was reserved. See the pure twin."""

    def __init__(self):
        raise TypeError("use RateCounters.reserve")

    def settle(self, used, double now):
        """The request is over and used so many tokens, or None: nobody knows, and what was reserved stays taken."""
        cdef int64 tokens = -1 if used is None else _count(used, "used")
        _check_time(now)
        self._give_up()
        settle(self.first, self.second, self.first_cost, self.second_cost, tokens, now)

    def cancel(self):
        """There was no request after all: everything is as if nothing had been reserved."""
        self._give_up()
        cancel(self.first, self.second, self.first_cost, self.second_cost)

    cdef int _give_up(self) except -1:
        if not self.held:
            raise NotHeld("this grant was settled or cancelled before")
        self.held = False
        return 0


cdef bint reserve(
    Meter first, Meter second, int64 stated, int64 guessed, double now,
    int64 *first_cost, int64 *second_cost, Short *short,
) noexcept:
    """Take from both meters, or from neither: False, and what there is too little of."""
    cdef int limit = 0, other_limit = 0
    cdef double wait_s, other_wait_s
    first_cost[0] = 0 if first is None else first._cost(stated, guessed)
    second_cost[0] = 0 if second is None else second._cost(stated, guessed)
    while True:
        wait_s = other_wait_s = -1.0
        if first is not None:
            wait_s = first._check(stated, guessed, now, &limit)
        if second is not None:
            other_wait_s = second._check(stated, guessed, now, &other_limit)
        if wait_s >= 0.0 or other_wait_s >= 0.0:
            short.of_second = other_wait_s > wait_s
            short.limit = other_limit if short.of_second else limit
            short.wait_s = other_wait_s if short.of_second else wait_s
            return False
        if first is not None and not first._take(first_cost[0], now):
            continue
        if second is None or second._take(second_cost[0], now):
            return True
        if first is not None:
            first._cancel(first_cost[0])


cdef void settle(
    Meter first, Meter second, int64 first_cost, int64 second_cost, int64 used, double now
) noexcept:
    """What was reserved is over and used so many tokens; -1: nobody knows, and it stays taken."""
    if first is not None:
        first._settle(0 if used < 0 else used - first_cost, now)
    if second is not None:
        second._settle(0 if used < 0 else used - second_cost, now)


cdef void cancel(Meter first, Meter second, int64 first_cost, int64 second_cost) noexcept:
    """As if nothing had been reserved."""
    if first is not None:
        first._cancel(first_cost)
    if second is not None:
        second._cancel(second_cost)


cdef Grant grant_of(Meter first, Meter second, int64 first_cost, int64 second_cost, str headers):
    """What `reserve` took, for Python to settle or to cancel."""
    cdef Grant grant = Grant.__new__(Grant)
    grant.first, grant.second, grant.held = first, second, True
    grant.first_cost, grant.second_cost = first_cost, second_cost
    grant.headers = headers
    return grant


cdef class RateCounters:
    """The counts of any number of names. See the pure twin."""

    cdef dict _rows  # of names; bytearrays, where no buffer was given
    cdef Py_buffer _buffer
    cdef int64 *_shared
    cdef Py_ssize_t _capacity
    cdef int _processes, _process

    def __cinit__(self, buffer=None, *, int processes=1, int process=0):
        if not 0 <= process < processes:
            raise ValueError(f"process is {process} of {processes}; use 0 to {processes - 1}")
        self._rows = {}
        self._processes, self._process = processes, process
        if buffer is None:
            return
        PyObject_GetBuffer(buffer, &self._buffer, PyBUF_WRITABLE)
        self._shared = <int64 *>self._buffer.buf
        self._capacity = self._buffer.len // (8 * (IN_USE + processes))
        if <uintptr_t>self._buffer.buf % 8 or not self._capacity:
            raise ValueError("the buffer is unaligned or has no room for a name")

    def __dealloc__(self):
        if self._shared is not NULL:
            PyBuffer_Release(&self._buffer)

    @staticmethod
    def bytes_for(names, processes):
        """The size of a buffer for so many names."""
        return 8 * _count(names, "names") * (IN_USE + _count(processes, "processes"))

    def meter(self, str name not None, requests_per_minute=0, tokens_per_minute=0, concurrency=0):
        """Limits on the counts of `name`, which go on from those of an earlier meter of that name."""
        cdef Meter meter = Meter.__new__(Meter)
        meter.requests_per_minute = _count(requests_per_minute, REQUESTS)
        meter.tokens_per_minute = _count(tokens_per_minute, TOKENS)
        meter.concurrency = _count(concurrency, CONCURRENCY)
        meter.name, meter.memory = name, self
        meter.processes, meter.process = self._processes, self._process
        if meter.requests_per_minute:
            meter.request_s = _WINDOW_S / meter.requests_per_minute
        if meter.tokens_per_minute:
            meter.token_s = _WINDOW_S / meter.tokens_per_minute
        meter.row = self._own_row(name) if self._shared is NULL else self._shared_row(name)
        return meter

    def reserve(self, Meter first, Meter second, stated, guessed, double now):
        """Take one request, one of the concurrency and the tokens from both meters, or from neither."""
        cdef int64 to_state = _count(stated, "stated"), to_guess = _count(guessed, "guessed")
        cdef int64 first_cost = 0, second_cost = 0
        cdef Short short
        _check_time(now)
        if reserve(first, second, to_state, to_guess, now, &first_cost, &second_cost, &short):
            return grant_of(first, second, first_cost, second_cost, _headers(first, second, now))
        meter = second if short.of_second else first
        return Refusal(meter, _limit_name(short.limit), short.wait_s, _headers(first, second, now))

    def forget(self, int process):
        """This process is gone: what it had in use is free again."""
        cdef Py_ssize_t at
        if not 0 <= process < self._processes:
            raise ValueError(f"process is {process} of {self._processes}; use 0 to {self._processes - 1}")
        for at in range(self._capacity):
            atomic_put(self._row(at) + IN_USE + process, 0)
        for own in self._rows.values():
            atomic_put(<int64 *>PyByteArray_AS_STRING(own) + IN_USE + process, 0)

    cdef int64 *_row(self, Py_ssize_t at) noexcept:
        return self._shared + at * (IN_USE + self._processes)

    cdef int64 *_own_row(self, str name) except NULL:
        own = self._rows.get(name)
        if own is None:
            own = self._rows[name] = bytearray(8 * (IN_USE + self._processes))
        return <int64 *>PyByteArray_AS_STRING(own)

    cdef int64 *_shared_row(self, str name) except NULL:
        """Open addressing: the row with the name's hash, or the first free one after where it should be."""
        cdef bytes digest = blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest()
        cdef int64 wanted = int.from_bytes(digest, "little", signed=True) or 1
        cdef Py_ssize_t at = <Py_ssize_t>(<unsigned long long>wanted % <unsigned long long>self._capacity)
        cdef Py_ssize_t _tried
        cdef int64 seen
        for _tried in range(self._capacity):
            seen = 0
            if atomic_swap(self._row(at) + HASH, &seen, wanted) or seen == wanted:
                return self._row(at)
            at = at + 1 if at + 1 < self._capacity else 0
        raise OverflowError(f"there is room for {self._capacity} names, and {name!r} is one more")

    def __repr__(self):
        cdef Py_ssize_t at, names = len(self._rows)
        for at in range(self._capacity):
            names += atomic_get(self._row(at) + HASH) != 0
        return f"<RateCounters {names} names>"


cdef str _limit_name(int limit):
    return REQUESTS if limit == REQUESTS_AT else TOKENS if limit == TOKENS_AT else CONCURRENCY


cdef str _headers(Meter first, Meter second, double now):
    cdef char lines[LINES]
    return PyUnicode_DecodeASCII(lines, header_lines(lines, first, second, now), NULL)


cdef Py_ssize_t header_lines(char *lines, Meter first, Meter second, double now) noexcept:
    """Write what is left of both, at most `LINES` bytes; how many there were."""
    cdef char *end = _lines(lines, b"requests", first, second, now, REQUESTS_AT)
    return _lines(end, b"tokens", first, second, now, TOKENS_AT) - lines


cdef inline int64 _limit_of(Meter meter, int cell) noexcept:
    return 0 if meter is None else meter.requests_per_minute if cell == REQUESTS_AT else meter.tokens_per_minute


cdef char *_lines(char *end, const char *unit, Meter first, Meter second, double now, int cell) noexcept:
    """The lines of one unit: of the meter that has fewer left."""
    cdef int64 limit = _limit_of(first, cell), other = _limit_of(second, cell), left, other_left
    cdef double reset_s = 0.0, other_s = 0.0
    if limit:
        reset_s = _later(_at(first.row + cell) - now, 0.0)
    if other:
        other_s = _later(_at(second.row + cell) - now, 0.0)
    left, other_left = _left(reset_s, limit), _left(other_s, other)
    if other and (not limit or other_left < left):
        limit, left, reset_s = other, other_left, other_s
    if not limit:
        return end
    end = _number(_name(end, b"x-ratelimit-limit-", unit), limit)
    end = _number(_name(_text(end, b"\r\n"), b"x-ratelimit-remaining-", unit), left)
    end = _duration(_name(_text(end, b"\r\n"), b"x-ratelimit-reset-", unit), reset_s)
    return _text(end, b"\r\n")


cdef inline char *_text(char *end, const char *text) noexcept:
    while text[0]:
        end[0] = text[0]
        end += 1
        text += 1
    return end


cdef inline char *_name(char *end, const char *family, const char *unit) noexcept:
    return _text(_text(_text(end, family), unit), b": ")


cdef char *_number(char *end, int64 number) noexcept:
    cdef char digits[20]
    cdef int count = 0
    while True:
        digits[count] = <char>(48 + number % 10)
        count += 1
        number //= 10
        if not number:
            break
    while count:
        count -= 1
        end[0] = digits[count]
        end += 1
    return end


cdef char *_duration(char *end, double seconds) noexcept:
    """As OpenAI writes them. See the pure twin."""
    cdef int64 all_ms = <int64>ceil(min(seconds, _LONGEST_S) * 1000.0 - 1e-3), whole_s, ms
    if all_ms < 0:
        all_ms = 0
    whole_s, ms = all_ms // 1000, all_ms % 1000
    if not whole_s:
        return _text(_number(end, ms), b"ms") if ms else _text(end, b"0s")
    if whole_s >= 60:
        end = _text(_number(end, whole_s // 60), b"m")
    end = _number(end, whole_s % 60)
    if ms:
        end = _text(end, b".")
        end[0] = <char>(48 + ms // 100)
        end[1] = <char>(48 + ms // 10 % 10)
        end[2] = <char>(48 + ms % 10)
        end += 3
        while end[-1] == 48:
            end -= 1
    return _text(end, b"s")
