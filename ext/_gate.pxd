"""The gate for other native modules."""

from libcpp.string cimport string
from libcpp.vector cimport vector

from ext._occupancy cimport Occupancy
from ext._rate_counters cimport Meter
from ext._tally cimport Tally

cdef enum:
    GIVEN = 28  # letters of an id that we give

cdef struct Ride:
    # One request on its way. Times are monotonic seconds; counts are -1 where nobody told them.
    char id[GIVEN]
    double began_s, first_byte_s, ended_s
    long long key_cost, model_cost  # reserved
    long long bytes_in, bytes_out
    long long prompt, cached, output
    const char* reason  # why the answer ended; NULL: it does not say
    Py_ssize_t reason_size
    const char* remote
    Py_ssize_t remote_size


cdef bytes digest(const string* text)


cdef class Form:
    cdef vector[string] _texts
    cdef vector[int] _fields
    cdef bint _sparse
    cdef bytes _line(self, const Ride* ride, double at_s)


cdef class Gate:
    cdef readonly Occupancy flying, slots
    cdef readonly Meter key, model
    cdef readonly Tally tally
    cdef long long _stated, _guessed
    cdef int _bytes_per_token
    cdef string _facts, _wait, _rest
    cdef list _forms
    cdef bint _admit(self, Ride* ride, string* rates) noexcept
    cdef int _withdraw(self, const Ride* ride) except -1
    cdef object _grant(self, const Ride* ride, const string* rates)
    cdef int _settle(self, Ride* ride) except -1
    cdef void _head(self, const Ride* ride, const string* passed, const string* rates, string* head) noexcept
