# Where requests go, and how those of one kind go by themselves.


cdef class Pool:
    """The idle connections to one address, the latest used first. With a `tls` context they speak TLS to `name`."""

    cdef readonly str host
    cdef readonly int port
    cdef bytes _host
    cdef long long _keep
    cdef list _idle
    cdef object _tls, _session
    cdef str _name

    def __cinit__(self, str host not None, int port, double keepalive_s, tls=None, str name not None=""):
        self.host, self.port = host, port
        self._host = host.encode("ascii")
        self._tls, self._name = tls, name
        self._keep = <long long>(keepalive_s * SECOND)
        self._idle = []

    @property
    def idle(self):
        """How many connections wait for their next request."""
        return len(self._idle)


cdef class Limits:
    """How long the waits of an exchange may take."""

    cdef long long connect, first_byte, idle, total, stall

    def __cinit__(self, *, double connect_s, double first_byte_s, double idle_s, double total_s, double stall_s):
        self.connect = <long long>(connect_s * SECOND)
        self.first_byte = <long long>(first_byte_s * SECOND)
        self.idle = <long long>(idle_s * SECOND)
        self.total = <long long>(total_s * SECOND)
        self.stall = <long long>(stall_s * SECOND)


cdef struct Edit:
    size_t start, end
    const char* text
    size_t size


cdef class Flow:
    """Where requests of one kind go, and through which gate. See `_relay.pyi`."""

    cdef readonly object origin
    cdef Gate _gate
    cdef Pool _pool
    cdef bytes _head
    cdef Limits _limits
    cdef list _texts
    cdef vector[int] _members  # of the body, which the texts replace; -1: before the first
    cdef string _streams
    cdef bint _withholds
    cdef long long _until

    def __init__(
        self, origin, Gate gate not None, Pool pool, bytes head not None, changes, Limits limits not None, *,
        bytes stream_lines not None, bint withhold_usage, double until_s,
    ):
        self.origin, self._gate, self._pool, self._head, self._limits = origin, gate, pool, head, limits
        self._texts = [text for _, text in changes]
        self._members = [member for member, _ in changes]
        self._streams = stream_lines
        self._withholds = withhold_usage
        self._until = <long long>(until_s * SECOND) if until_s < 1e9 else NEVER

    cdef void _lines(self, const string* passed, string* lines) noexcept:
        """The lines of a stream's head: what it is, what we say of every stream, then the upstream's others."""
        cdef const char* line = passed.data()
        cdef const char* end = line + passed.size()
        cdef const char* following
        lines.assign(self._streams)
        while line < end:
            following = <const char*>memchr(line, 10, end - line) + 1
            if following - line > 14 and memcmp(line, b"content-type: ", 14) == 0:
                lines.insert(0, line, following - line)
            else:
                lines.append(line, following - line)
            line = following

    cdef int _edits(self, const Places* places, vector[Edit]* edits) except -1:
        """The changes at their places in a body, in order."""
        cdef Edit edit
        cdef size_t i, at
        cdef bytes text
        for i in range(self._members.size()):
            text = <bytes>self._texts[i]
            edit.text, edit.size = PyBytes_AS_STRING(text), PyBytes_GET_SIZE(text)
            if self._members[i] < 0:
                edit.start = edit.end = places.first
            else:
                edit.start, edit.end = places.start[self._members[i]], places.end[self._members[i]]
            at = edits.size()
            edits.push_back(edit)
            while at and edits[0][at - 1].start > edit.start:
                edits[0][at] = edits[0][at - 1]
                at -= 1
            edits[0][at] = edit
        return 0
