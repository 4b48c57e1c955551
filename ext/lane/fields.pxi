# The lines of a head: their names, and how a value is read.


cdef class Names:
    """A small set of header names, compared without making objects."""

    cdef vector[string] _names
    cdef list _texts
    cdef unsigned long long _sizes

    def __cinit__(self, names):
        self._texts = sorted(names)
        if len(self._texts) > MOST_NAMES:
            raise ValueError(f"{len(self._texts)} names; at most {MOST_NAMES} can be told apart")
        for name in self._texts:
            raw = name.encode("ascii")
            self._names.push_back(raw)
            self._sizes |= 1ULL << len(raw)

    cdef int at(self, const char* name, size_t size) noexcept:
        """Its place among them, which are sorted; -1 if it is none."""
        cdef size_t i
        if size >= NAME or not (self._sizes >> size) & 1:
            return -1
        for i in range(self._names.size()):
            if self._names[i].size() == size and memcmp(self._names[i].data(), name, size) == 0:
                return <int>i
        return -1

    cdef str find(self, const char* name, size_t size):
        cdef int at = self.at(name, size)
        return None if at < 0 else <str>self._texts[at]

    cdef bint begins(self, const char* name, size_t size):
        """Whether one of the names is a prefix of this one."""
        cdef size_t i
        for i in range(self._names.size()):
            if self._names[i].size() <= size and memcmp(self._names[i].data(), name, self._names[i].size()) == 0:
                return True
        return False


cdef struct Field:
    char name[NAME]  # lower case; `size` 0 where it was longer than any name we know
    size_t size
    const char* value
    size_t length


cdef const char* _field(const char* p, const char* end, Field* field) noexcept nogil:
    """Read one header line, CRLF included, into `field`; NULL where it is not plainly one. `end` is past a CRLF."""
    cdef size_t size = 0
    cdef const char* stop
    while vr_token(p[0]):
        if size < NAME:
            field.name[size] = p[0] | 32 if 65 <= p[0] <= 90 else p[0]
        size += 1
        p += 1
    if size == 0 or p[0] != 58:
        return NULL
    field.size = size if size < NAME else 0
    p += 1
    stop = vr_value_end(p, end)
    if end - stop < 2 or stop[0] != 13 or stop[1] != 10:
        return NULL
    while p < stop and (p[0] == 32 or p[0] == 9):
        p += 1
    field.value = p
    field.length = stop - p
    while field.length and (p[field.length - 1] == 32 or p[field.length - 1] == 9):
        field.length -= 1
    return stop + 2


cdef inline bint _named(Field* field, const char* name, size_t size) noexcept nogil:
    return field.size == size and memcmp(field.name, name, size) == 0


cdef bint _same(const char* text, size_t size, const char* lower, size_t length) noexcept nogil:
    """Equal but for the case of letters."""
    cdef size_t i
    if size != length:
        return False
    for i in range(size):
        if (text[i] | 32 if 65 <= text[i] <= 90 else text[i]) != lower[i]:
            return False
    return True


cdef long long _digits(const char* text, size_t size) noexcept nogil:
    """A length; -1 where it is not digits, or more of them than any body of ours has."""
    cdef long long value = 0
    cdef size_t i
    if size < 1 or size > 15:
        return -1
    for i in range(size):
        if not 48 <= text[i] <= 57:
            return -1
        value = value * 10 + text[i] - 48
    return value


cdef bint _json(const char* text, size_t size) noexcept nogil:
    return (
        _same(text, size, b"application/json", 16)
        or _same(text, size, b"application/json; charset=utf-8", 31)
        or _same(text, size, b"application/json;charset=utf-8", 30)
    )


cdef str _text(const char* at, size_t size):
    return PyUnicode_DecodeUTF8(at, size, "surrogateescape")
