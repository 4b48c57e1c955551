"""The body scan for other native modules: nothing of Python is made before somebody asks."""

from libcpp.string cimport string

cdef enum:
    SPLICED_MEMBERS = 3

cdef struct Places:
    # Where a member may be put first, and where the members are that may be spliced: `model`, `stream_options`,
    # `priority`. An `end` of 0: there is none.
    Py_ssize_t first
    Py_ssize_t start[SPLICED_MEMBERS]
    Py_ssize_t end[SPLICED_MEMBERS]

cdef bint scan_into(
    const unsigned char* body, Py_ssize_t size, int max_depth, string* short_form, Places* places
) noexcept
cdef struct Answered:
    # What an answer says of itself. Counts are -1, and the reason NULL, where it does not say.
    long long prompt, cached, output
    const char* reason
    Py_ssize_t reason_size

cdef bint read_answer_into(const unsigned char* body, Py_ssize_t size, Answered* answered) noexcept
cdef bint read_usage_into(const unsigned char* usage, Py_ssize_t size, Answered* answered) noexcept
cdef dict spans_of(const Places* places)
