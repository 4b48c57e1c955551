"""Limits for other native modules: what `RateCounters.reserve` and a grant do, without an object for each request."""

cimport cython

ctypedef long long int64

cdef enum:
    LINES = 512  # more than all header lines of a grant take

cdef struct Short:
    # What there was too little of: the meter, its limit (a cell of its row), and the wait for it.
    bint of_second
    int limit
    double wait_s


@cython.final
cdef class Meter:
    cdef readonly str name
    cdef readonly int64 requests_per_minute, tokens_per_minute, concurrency
    cdef double request_s, token_s  # of the window, each
    cdef int64 *row
    cdef int process, processes
    cdef object memory  # keeps the row where it is
    cdef int64 _in_use(self) noexcept
    cdef int64 _cost(self, int64 stated, int64 guessed) noexcept
    cdef double _check(self, int64 stated, int64 guessed, double now, int *limit) noexcept
    cdef bint _take(self, int64 cost, double now) noexcept
    cdef void _settle(self, int64 more, double now) noexcept
    cdef void _cancel(self, int64 cost) noexcept


@cython.final
cdef class Grant:
    cdef Meter first, second
    cdef int64 first_cost, second_cost
    cdef bint held
    cdef readonly str headers
    cdef int _give_up(self) except -1


cdef bint reserve(
    Meter first, Meter second, int64 stated, int64 guessed, double now,
    int64 *first_cost, int64 *second_cost, Short *short,
) noexcept
cdef void settle(Meter first, Meter second, int64 first_cost, int64 second_cost, int64 used, double now) noexcept
cdef void cancel(Meter first, Meter second, int64 first_cost, int64 second_cost) noexcept
cdef Grant grant_of(Meter first, Meter second, int64 first_cost, int64 second_cost, str headers)
cdef Py_ssize_t header_lines(char *lines, Meter first, Meter second, double now) noexcept
