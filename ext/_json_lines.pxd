"""Numbers as the lines have them, for other native modules."""

from libcpp.string cimport string

cdef void put_whole(string* line, unsigned long long number) noexcept
cdef void put_steps(string* line, double value) noexcept
