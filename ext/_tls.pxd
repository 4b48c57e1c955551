"""TLS for other native modules."""

cdef enum:
    RECORD = 16 << 10  # of plain text; what TLS puts into one record at most

cdef class Tls:
    cdef object _object, _read, _write, _incoming, _outgoing
    cdef readonly bint shaken, ended, bare
    cdef readonly str words

    cdef int shake(self) except -2
    cdef int take(self, const char* data, size_t size) except -1
    cdef ssize_t read(self, char* to, size_t room, object view) except -1
    cdef bint write(self, const char* data, size_t size) except -1
    cdef bint speaks(self) except -1
    cdef bytes said(self)
    cdef int part(self) except -1
    cdef object session(self)
