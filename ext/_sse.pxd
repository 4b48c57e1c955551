"""The event scanner for other native modules."""

from libcpp.pair cimport pair
from libcpp.string cimport string
from libcpp.vector cimport vector


cdef class EventScanner:
    cdef readonly bint withhold_usage, done, oversized
    cdef readonly Py_ssize_t max_event_bytes
    cdef readonly long long events, output_events
    cdef readonly object usage, first_usage, finish_reason, error
    cdef string _pending
    cdef vector[pair[Py_ssize_t, Py_ssize_t]] _cuts
    cdef Py_ssize_t _line, _seen, _data_at, _data_end, _data_lines, _bom
    cdef bint _first_line, _after_cr, _cut_last, _raw, _carried, _fields, _named_error
    cdef bytes _feed(self, bytes data)
    cdef Py_ssize_t _scan(self, const char* buffer, Py_ssize_t size) except -1
    cdef bint _end_line(self, const char* buffer, Py_ssize_t start, Py_ssize_t line, Py_ssize_t end) noexcept
    cdef void _data_line(self, const char* buffer, Py_ssize_t at, Py_ssize_t end) noexcept
    cdef int _end_event(self, const char* buffer, Py_ssize_t start, Py_ssize_t end, Py_ssize_t after) except -1
    cdef bint _look_joined(self, bytes payload) except -1
    cdef bint _look(self, const char* first, const char* end) except -1
    cdef int _note(self, object found, bytes payload) except -1
    cdef void _begin(self) noexcept
    cdef void _shift(self, Py_ssize_t boundary, Py_ssize_t size) noexcept
    cdef bytes _without_cuts(self, const char* buffer, Py_ssize_t end)
