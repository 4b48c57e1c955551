"""Tallies for other native modules."""

from libcpp.vector cimport vector


cdef class Histogram:
    cdef vector[double] _bounds
    cdef vector[long long] _counts
    cdef double _total_s
    cdef void _observe(self, double seconds) noexcept


cdef class Tally:
    cdef readonly Histogram duration, first_byte, queue, load, upstream
    cdef readonly long long unwaited, input_tokens, cached_tokens, output_tokens, errors
    cdef long long _statuses[6]
    cdef void _ended(self, int status, double duration_s) noexcept
    cdef void _answered(self, double first_byte_s, double upstream_s, double queue_s, double load_s) noexcept
    cdef void _used(self, long long input_tokens, long long cached_tokens, long long output_tokens) noexcept
