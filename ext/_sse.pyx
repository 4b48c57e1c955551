# distutils: language = c++
# cython: language_level=3, binding=False, boundscheck=False, wraparound=False, cdivision=True
"""The native twin of `_sse_py.py`, which is its specification.

A memory scan finds the line ends, another the colons of a payload; at a colon the last letter of the key tells in most
cases that it is none of ours. Refused: searching the payload once for each key, which is eight scans instead of one.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.string cimport memchr, memcmp
from libcpp.pair cimport pair
from libcpp.string cimport string

from ext._sse_json import details, joined

cdef enum:
    HAS_CHOICES = 1
    HAS_DELTA = 2
    UNUSUAL = 4


cdef inline bint _blank(char c) noexcept nogil:
    return c == b" " or c == b"\t" or c == b"\r" or c == b"\n"


cdef inline const char* _skip_blanks(const char* at, const char* end) noexcept nogil:
    while at < end and _blank(at[0]):
        at += 1
    return at


cdef inline bint _is_key(const char* first, const char* quote, const char* key, Py_ssize_t size) noexcept nogil:
    """Whether what ends with this closing quote is the key, its opening quote included (`size` counts it)."""
    return quote - first >= size and memcmp(quote - size, key, size) == 0


cdef inline int _mark(const char* first, const char* quote, const char* at, const char* end) noexcept nogil:
    """What the key before `quote` and the value at `at` say of their event."""
    cdef char value = at[0] if at < end else 0
    cdef char last = (quote - 1)[0]
    if last == b"e":
        if value == b"{" and _is_key(first, quote, b'"usage', 6):
            return UNUSUAL
        if end - at >= 7 and memcmp(at, b'"error"', 7) == 0 and _is_key(first, quote, b'"type', 5):
            return UNUSUAL
    elif last == b"n":
        if value == b'"' and (
            _is_key(first, quote, b'"finish_reason', 14)
            or _is_key(first, quote, b'"stop_reason', 12)
            or _is_key(first, quote, b'"finishReason', 13)
        ):
            return UNUSUAL
    elif last == b"s":
        if value == b"[" and (_is_key(first, quote, b'"choices', 8) or _is_key(first, quote, b'"candidates', 11)):
            at = _skip_blanks(at + 1, end)
            return HAS_CHOICES if at < end and at[0] != b"]" else 0
    elif last == b"a":
        if _is_key(first, quote, b'"delta', 6):
            return HAS_DELTA
        if value == b"{" and _is_key(first, quote, b'"usageMetadata', 14):
            return UNUSUAL
    elif last == b"r":
        if (value == b'"' or value == b"{") and _is_key(first, quote, b'"error', 6):
            return UNUSUAL
    return 0


cdef int _marks(const char* first, const char* end) noexcept nogil:
    """All that a payload's keys say of it, without parsing it."""
    cdef int marks = 0
    cdef const char* at = first
    cdef const char* quote
    while True:
        at = <const char*>memchr(at, b":", end - at)
        if at == NULL:
            return marks
        quote = at - 1
        while quote > first and _blank(quote[0]):
            quote -= 1
        at += 1
        if quote - first >= 5 and quote[0] == b'"':
            marks |= _mark(first, quote, _skip_blanks(at, end), end)


cdef inline Py_ssize_t _position(const char* buffer, char wanted, Py_ssize_t at, Py_ssize_t size) noexcept nogil:
    cdef const char* found = <const char*>memchr(buffer + at, wanted, size - at)
    return size if found == NULL else found - buffer


cdef class EventScanner:
    """One stream's scanner. See the pure twin."""

    def __cinit__(self, bint withhold_usage=False, Py_ssize_t max_event_bytes=1 << 20):
        if max_event_bytes < 1:
            raise ValueError(f"max_event_bytes is {max_event_bytes}; use 1 or more")
        self.withhold_usage = withhold_usage
        self.max_event_bytes = max_event_bytes
        self._first_line = True

    def feed(self, bytes data not None):
        """The bytes to forward now: whole events and comments. The very object `data` when all of it goes."""
        return self._feed(data)

    cdef bytes _feed(self, bytes data):
        cdef bint whole = self._pending.empty()
        cdef Py_ssize_t size = PyBytes_GET_SIZE(data), boundary
        cdef const char* buffer = PyBytes_AS_STRING(data)
        if size == 0:
            return data
        if not whole:
            self._pending.append(buffer, size)
            buffer = self._pending.data()
            size = self._pending.size()
        self._cuts.clear()
        boundary = self._scan(buffer, size)
        if not self._raw and size - boundary > self.max_event_bytes:
            self._raw = self.oversized = True
        if self._raw:
            self._carried = size > self._line
            boundary = size
        self._shift(boundary, size)
        if whole and boundary == size and self._cuts.empty():
            return data
        answer = self._without_cuts(buffer, boundary)
        if whole:
            self._pending.assign(buffer + boundary, size - boundary)
        else:
            self._pending.erase(0, boundary)
        return answer

    def flush(self):
        """The rest, at the end of the stream, which ends the last line and event too."""
        cdef bytes rest = self._pending
        cdef const char* buffer = PyBytes_AS_STRING(rest)
        cdef Py_ssize_t size = PyBytes_GET_SIZE(rest)
        self._cuts.clear()
        if size > self._line:
            self._end_line(buffer, 0, self._line, size)
        if self._raw or self._data_lines:
            self._end_event(buffer, 0, size, size)
        self._pending.clear()
        self._begin()
        self._line = self._seen = 0
        self._raw = self._carried = self._after_cr = self._cut_last = False
        self._first_line = True
        return rest if self._cuts.empty() else b""

    # -- lines and events; positions are offsets into the buffer, whose event in progress begins at `start`

    cdef Py_ssize_t _scan(self, const char* buffer, Py_ssize_t size) except -1:
        """Go through all finished lines: where the last event ended. What to withhold goes into `_cuts`."""
        cdef Py_ssize_t start = 0, end, after
        if self._after_cr and buffer[self._seen] == b"\n":
            self._line += 1
            self._seen = self._line
            if self._line == 1 and not self._fields and not self._raw:
                start = 1
                if self._cut_last:
                    self._cuts.push_back(pair[Py_ssize_t, Py_ssize_t](0, 1))
        self._after_cr = False
        cdef Py_ssize_t lf = -1, cr = -1  # kept until passed: a stream of one is searched only once for the other
        while True:
            if lf < self._seen:
                lf = _position(buffer, b"\n", self._seen, size)
            if cr < self._seen:
                cr = _position(buffer, b"\r", self._seen, size)
            end = lf if lf < cr else cr
            if end == size:
                break
            after = end + 1
            if buffer[end] == b"\r":
                if after == size:
                    self._after_cr = True
                elif buffer[after] == b"\n":
                    after += 1
            if self._end_line(buffer, start, self._line, end):
                self._end_event(buffer, start, end, after)
                start = after
            elif not self._fields and not self._raw:
                start = after
                self._cut_last = False
                self._bom = 0
            self._line = self._seen = after
        self._seen = size
        return start

    cdef bint _end_line(self, const char* buffer, Py_ssize_t start, Py_ssize_t line, Py_ssize_t end) noexcept:
        """Take note of a line; whether it is the empty one that ends an event."""
        cdef bint carried = self._carried
        if self._first_line:
            self._first_line = False
            if end - line >= 3 and memcmp(buffer + line, b"\xef\xbb\xbf", 3) == 0:
                line += 3
                self._bom = 3
        self._carried = False
        if not self._raw and end - start > self.max_event_bytes:
            self._raw = self.oversized = True
        if end == line and not carried:
            return True
        if self._raw or buffer[line] == b":":
            return False
        self._fields = True
        if end - line >= 4 and memcmp(buffer + line, b"data", 4) == 0:
            self._data_line(buffer, line + 4, end)
        elif end - line >= 6 and memcmp(buffer + line, b"event:", 6) == 0:
            line += 7 if end - line > 6 and buffer[line + 6] == b" " else 6
            self._named_error = end - line == 5 and memcmp(buffer + line, b"error", 5) == 0
        return False

    cdef void _data_line(self, const char* buffer, Py_ssize_t at, Py_ssize_t end) noexcept:
        if at < end:
            if buffer[at] != b":":
                return
            at += 1
            if at < end and buffer[at] == b" ":
                at += 1
        self._data_at = at
        self._data_end = end
        self._data_lines += 1

    cdef int _end_event(
        self, const char* buffer, Py_ssize_t start, Py_ssize_t end, Py_ssize_t after
    ) except -1:
        cdef bint withhold = False
        self._cut_last = False
        if self._raw:
            self.events += 1
            self.output_events += 1
            self._raw = False
        elif self._data_lines == 1:
            withhold = self._look(buffer + self._data_at, buffer + self._data_end)
        elif self._data_lines:
            withhold = self._look_joined(joined(buffer[start + self._bom : end]))
        if withhold:
            self._cuts.push_back(pair[Py_ssize_t, Py_ssize_t](start, after))
            self._cut_last = True
        self._begin()
        return 0

    cdef bint _look_joined(self, bytes payload) except -1:
        cdef const char* first = PyBytes_AS_STRING(payload)
        return self._look(first, first + PyBytes_GET_SIZE(payload))

    cdef bint _look(self, const char* first, const char* end) except -1:
        """Count an event and note what it says; whether to withhold it."""
        cdef int marks
        cdef bint only_usage = False, has_usage = False
        self.events += 1
        if end - first == 6 and memcmp(first, b"[DONE]", 6) == 0:
            self.done = True
            return False
        marks = _marks(first, end)
        if self._named_error or marks & UNUSUAL:
            payload = PyBytes_FromStringAndSize(first, end - first)
            found = details(payload)
            has_usage = found.usage is not None
            only_usage = found.only_usage
            self._note(found, payload)
        if marks & HAS_CHOICES or (marks & HAS_DELTA and not has_usage):
            self.output_events += 1
        return self.withhold_usage and only_usage

    cdef int _note(self, object found, bytes payload) except -1:
        if found.usage is not None:
            self.usage = found.usage
            if self.first_usage is None:
                self.first_usage = found.usage
        if found.finish_reason is not None:
            self.finish_reason = found.finish_reason
        if found.error is not None or self._named_error:
            self.error = payload if found.error is None else found.error
        return 0

    cdef void _begin(self) noexcept:
        self._fields = self._named_error = False
        self._data_at = self._data_end = self._data_lines = self._bom = 0

    cdef void _shift(self, Py_ssize_t boundary, Py_ssize_t size) noexcept:
        if boundary == size:
            self._line = self._seen = 0
        else:
            self._line -= boundary
            self._seen -= boundary
            self._data_at -= boundary
            self._data_end -= boundary

    cdef bytes _without_cuts(self, const char* buffer, Py_ssize_t end):
        cdef string kept
        cdef Py_ssize_t at = 0
        if self._cuts.empty():
            return PyBytes_FromStringAndSize(buffer, end)
        for cut in self._cuts:
            kept.append(buffer + at, cut.first - at)
            at = cut.second
        kept.append(buffer + at, end - at)
        return kept

    def __repr__(self):
        counts = f"{self.events} events, {self.output_events} with output"
        return f"<EventScanner {counts}, {self._pending.size()} bytes pending>"
