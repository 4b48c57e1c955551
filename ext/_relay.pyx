# distutils: language = c++
# cython: language_level=3, binding=False, boundscheck=False, wraparound=False, cdivision=True
"""The relay: sockets, HTTP/1.1 framing and time limits of calls that go straight through, in native code.

It lives in an epoll descriptor of its own, which any event loop can watch: whenever that is readable, `pump` handles
what is ready. Python is entered for decisions: once for a request, once at the end of its answer, and for a stream
once at its first output. For requests of a kind that it has decided on before it is not entered at all: they go by the
`Flow` that it left for them, until something out of the ordinary becomes of one, which is Python's from there on
(`resume`). Open vSwitch keeps such a cache of flows before its slow path (Pfaff et al., NSDI 2015).

It is a *recogniser*, not an HTTP server. What is not exactly one of a few kinds of request, written in a narrow
grammar, goes with its connection and all of its bytes to whoever `hand_over` gives it.

    client --head, body--> flow | decide --forward--> upstream --head--> body | events --> client
       \\--- not recognised, not decided, failed before the answer began: hand_over

What always holds:
- a request that goes by a flow becomes Python's at most once, and whoever has it then settles it;
- what Python is not asked for is not made: headers and short forms are compared as bytes with the last request's, so
  that a caller who says the same again, but for its messages, costs a comparison (`Client.memo`);
- a client's request stays in its buffer until the answer begins, so until then it can be handed over or sent again;
- of one exchange at most one of `whole`, `ended`, `failed` is called, once, except that `whole` may decline by None;
- nothing is read from an upstream while its client has bytes to take, so what waits for a client is one read at most;
- what a turn has to say is sent at its end, in one go: a peer on another core is woken once, not once for each;
- over TLS (`_tls.pyx`) what is held to be sent is sealed already, and what is read is plain, all that there is of it;
- a connection whose descriptor is closed is kept until the batch of events is over, since one of them may name it.

Its twin is the ordinary lane of the proxy's server. The protocol with Python is in `_relay.pyi`.
"""

from cpython.buffer cimport PyBUF_WRITE
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.memoryview cimport PyMemoryView_FromMemory
from cpython.unicode cimport PyUnicode_AsUTF8AndSize, PyUnicode_DecodeASCII, PyUnicode_DecodeUTF8
from libc.errno cimport EAGAIN, ECONNABORTED, ECONNRESET, EINPROGRESS, EINTR, ENOTCONN, errno
from libc.stdint cimport uint32_t
from libc.stdlib cimport free, malloc, realloc
from libc.string cimport memchr, memcmp, memcpy, memmove, strlen
from libc.time cimport time, time_t
from libcpp.string cimport string
from libcpp.vector cimport vector

from ext._body_scan cimport Answered, Places, read_answer_into, read_usage_into, scan_into, spans_of
from ext._gate cimport GIVEN, Gate, Ride, digest
from ext._json_lines cimport put_whole
from ext._sse cimport EventScanner
from ext._tls cimport RECORD, Tls

cdef extern from *:
    """
    #include <arpa/inet.h>
    #include <errno.h>
    #include <netinet/in.h>
    #include <netinet/tcp.h>
    #include <string.h>
    #include <sys/epoll.h>
    #include <sys/socket.h>
    #include <sys/uio.h>
    #include <time.h>
    #include <unistd.h>
    #include "_text.h"

    static inline long long vr_now(void) {
        struct timespec t;
        clock_gettime(CLOCK_MONOTONIC, &t);
        return t.tv_sec * 1000000000ll + t.tv_nsec;
    }
    static inline int vr_watch(int ep, int op, int fd, unsigned events, void *tag) {
        struct epoll_event e; e.events = events; e.data.ptr = tag;
        return epoll_ctl(ep, op, fd, &e);
    }
    static void vr_no_delay(int fd) { int one = 1; setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one); }

    /* inet_ntop for IPv4. That is a printf, whose code nobody else keeps in the cache. */
    static void vr_dotted(const struct in_addr *address, char *text) {
        const unsigned char *byte = (const unsigned char *)address;
        for (int i = 0; i < 4; i++) {
            if (i) *text++ = '.';
            if (byte[i] > 99) *text++ = '0' + byte[i] / 100;
            if (byte[i] > 9) *text++ = '0' + byte[i] / 10 % 10;
            *text++ = '0' + byte[i] % 10;
        }
        *text = 0;
    }
    /* Accept one connection; `text`, of `size`, gets the peer's address, or nothing where it has none. */
    static int vr_accept(int listener, char *text, int size) {
        struct sockaddr_storage a; socklen_t n = sizeof a;
        int fd = accept4(listener, (struct sockaddr *)&a, &n, SOCK_NONBLOCK | SOCK_CLOEXEC);
        text[0] = 0;
        if (fd < 0) return fd;
        if (a.ss_family == AF_INET) vr_dotted(&((struct sockaddr_in *)&a)->sin_addr, text);
        if (a.ss_family == AF_INET6) inet_ntop(AF_INET6, &((struct sockaddr_in6 *)&a)->sin6_addr, text, size);
        return fd;
    }
    /* What is set for a listener holds for whom it accepts. */
    static void vr_for_all(int listener) {
        int one = 1;
        vr_no_delay(listener);
        setsockopt(listener, SOL_SOCKET, SO_KEEPALIVE, &one, sizeof one);
    }
    /* Begin to connect to a numeric address; -1 with errno. */
    static int vr_connect(const char *host, int port) {
        struct sockaddr_in a4; struct sockaddr_in6 a6; struct sockaddr *a; socklen_t n; int fd;
        memset(&a4, 0, sizeof a4); memset(&a6, 0, sizeof a6);
        if (inet_pton(AF_INET, host, &a4.sin_addr) == 1) {
            a4.sin_family = AF_INET; a4.sin_port = htons(port); a = (struct sockaddr *)&a4; n = sizeof a4;
        } else if (inet_pton(AF_INET6, host, &a6.sin6_addr) == 1) {
            a6.sin6_family = AF_INET6; a6.sin6_port = htons(port); a = (struct sockaddr *)&a6; n = sizeof a6;
        } else { errno = EINVAL; return -1; }
        fd = socket(a->sa_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
        if (fd < 0) return -1;
        vr_no_delay(fd);
        if (connect(fd, a, n) < 0 && errno != EINPROGRESS) { int e = errno; close(fd); errno = e; return -1; }
        return fd;
    }
    /* Two ends of a pipe with two ways; -1 with errno. */
    static int vr_pair(int *ends) { return socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, ends); }
    static inline int vr_failed(int why) { errno = why; return -1; }
    static int vr_error(int fd) {
        int e = 0; socklen_t n = sizeof e;
        return getsockopt(fd, SOL_SOCKET, SO_ERROR, &e, &n) < 0 ? errno : e;
    }
    /* Send the parts. A few bytes are copied together: that costs less than the kernel's reading of a list of parts. */
    static ssize_t vr_send(int fd, struct iovec *parts, int count) {
        char few[2048]; size_t size = 0; int i; struct msghdr m;
        if (count == 1) return send(fd, parts[0].iov_base, parts[0].iov_len, MSG_NOSIGNAL);
        for (i = 0; i < count && size + parts[i].iov_len <= sizeof few; i++) {
            if (parts[i].iov_len) memcpy(few + size, parts[i].iov_base, parts[i].iov_len);
            size += parts[i].iov_len;
        }
        if (i == count) return send(fd, few, size, MSG_NOSIGNAL);
        memset(&m, 0, sizeof m); m.msg_iov = parts; m.msg_iovlen = count;
        return sendmsg(fd, &m, MSG_NOSIGNAL);
    }
    /* RFC 9110's token characters, and what a header's value may hold (ours: ASCII only; an upstream's: any text). */
    static inline int vr_token(unsigned char c) {
        if ((c >= '0' && c <= '9') || ((c | 32) >= 'a' && (c | 32) <= 'z') || c == '-') return 1;
        return c && strchr("!#$%&'*+-.^_`|~", c) != 0;
    }
    static inline int vr_text(unsigned char c) { return c == 9 || (c >= 32 && c != 127); }
    /* The end of a header's value: blocks of visible ASCII, then whatever else is text. */
    static inline const char *vr_value_end(const char *p, const char *end) {
        p = (const char *)vr_visible((const unsigned char *)p, (const unsigned char *)end);
        while (p < end && vr_text((unsigned char)*p)) p++;
        return p;
    }
    """
    cdef struct iovec:
        void* iov_base
        size_t iov_len
    cdef union epoll_data_t:
        void* ptr
    cdef struct epoll_event:
        uint32_t events
        epoll_data_t data
    long long vr_now() noexcept nogil
    int vr_watch(int ep, int op, int fd, unsigned events, void* tag) noexcept nogil
    int vr_accept(int listener, char* text, int size) noexcept nogil
    void vr_for_all(int listener) noexcept nogil
    int vr_connect(const char* host, int port) noexcept nogil
    int vr_pair(int* ends) noexcept nogil
    int vr_failed(int why) noexcept nogil
    int vr_error(int fd) noexcept nogil
    ssize_t vr_send(int fd, iovec* parts, int count) noexcept nogil
    bint vr_token(unsigned char c) noexcept nogil
    bint vr_text(unsigned char c) noexcept nogil
    const char* vr_value_end(const char* p, const char* end) noexcept nogil
    const unsigned char* vr_plain(const unsigned char* p, const unsigned char* end) noexcept nogil
    const unsigned char* vr_visible(const unsigned char* p, const unsigned char* end) noexcept nogil
    int epoll_create1(int flags) nogil
    int epoll_wait(int ep, epoll_event* events, int most, int timeout_ms) nogil
    int epoll_close "close"(int fd) nogil
    ssize_t recv(int fd, void* buffer, size_t size, int flags) nogil
    void* memmem(const void* where, size_t size, const void* what, size_t length) nogil
    char* strerror(int number) nogil
    enum:
        EPOLLIN, EPOLLOUT, EPOLLERR, EPOLLHUP, EPOLLRDHUP, EPOLLEXCLUSIVE
        EPOLL_CTL_ADD, EPOLL_CTL_DEL, EPOLL_CTL_MOD, EPOLL_CLOEXEC

# How an exchange fails: `ext.relay.Failure`.
cdef enum:
    K_LEFT = 1
    K_STALLED = 2
    K_UNREACHABLE = 3
    K_BROKE = 4
    K_FIRST_BYTE = 5
    K_IDLE = 6
    K_TOTAL = 7
    K_STOPPING = 8
    K_WAIT = 9  # for a request, or for the rest of one

cdef enum:
    BATCH = 256
    ACCEPTS = 64  # at once, then the others get a turn
    ADDRESS = 64  # INET6_ADDRSTRLEN, and a zone
    SCRATCH = 1 << 17
    MOST_HEAD = 16 << 10
    MOST_HEADERS = 64
    MOST_BODY = 256 << 10
    MOST_DIGITS = 5  # of a chunk's size: no chunk is larger than a body
    MOST_AHEAD = 64 << 10  # of a client that sends while it is answered
    MOST_ANSWER = 1 << 20  # an answer up to this size is held until it is whole
    MOST_REFUSAL = 64 << 10  # no error envelope is larger
    TAIL = 4096  # of a larger answer, where its usage is
    LEAST_READ = 4096  # room for this much is made before a read that goes on with a request
    SMALL = 16 << 10  # a connection keeps a buffer of this size when it has nothing to hold
    MOST_SPARE = 64  # larger buffers, of SCRATCH bytes, that the relay keeps for the next large requests
    MOST_KINDS = 4096
    SLOTS = 512
    AT_ONCE = 8 << 10  # more than this is not copied to be sent at the end of the turn
    SEALED = 17 << 10  # so much is read over TLS at once, a record: its buffer keeps its size, on every connection
    NAME = 40  # longer header names are none of ours
    MOST_NAMES = 64

cdef long long SECOND = 1000000000
cdef long long TICK = 50000000
cdef long long PARTIAL = 1000000000  # for a request to become whole before the other lane waits for it
cdef long long NEVER = 1 << 62

cdef bytes LAST_CHUNK = b"0\r\n\r\n"
cdef bytes CRLF2 = b"\r\n\r\n"

cdef enum Mode:
    HELD = 0
    EVENTS = 1
    THROUGH = 2

cdef enum Framing:
    HEAD = 0
    LENGTH = 1
    UNTIL_CLOSE = 2
    CHUNKED = 3
    COMPLETE = 4

cdef enum Chunk:
    SIZE = 0
    PADDING = 1
    EXTENSION = 2
    SIZE_LF = 3
    DATA = 4
    DATA_CR = 5
    DATA_LF = 6
    TRAILER = 7
    TRAILER_NAME = 8
    TRAILER_LINE = 9
    TRAILER_LF = 10
    LAST_LF = 11


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


cdef class Conn:
    """One socket in the relay's epoll descriptor, with what could not be written to it yet."""

    cdef Relay _relay
    cdef int _fd
    cdef unsigned _mask
    cdef bint _closed, _said
    cdef Tls _tls  # None where bytes go as they are; what `_out` holds is sealed
    cdef char* _out
    cdef size_t _out_off, _out_len, _out_cap
    cdef long long _deadline, _due

    def __cinit__(self, *args):
        self._fd = -1
        self._deadline = self._due = NEVER

    def __dealloc__(self):
        free(self._out)
        if self._fd >= 0:
            epoll_close(self._fd)

    cdef int _ready(self, unsigned events) except -1:
        raise NotImplementedError

    cdef int _expired(self) except -1:
        raise NotImplementedError

    cdef int _flushed(self, int state) except -1:
        """What `_flush` came to."""
        raise NotImplementedError

    cdef void _watch(self, unsigned mask) noexcept:
        """Watch for these events. None at all means out of epoll: it reports a hang-up whether asked to or not."""
        cdef int op = EPOLL_CTL_MOD
        if mask == self._mask:
            return
        if self._mask == 0:
            op = EPOLL_CTL_ADD
        elif mask == 0:
            op = EPOLL_CTL_DEL
        vr_watch(self._relay._ep, op, self._fd, mask, <void*>self)
        self._mask = mask

    cdef int _open(self, Relay relay, int fd, unsigned mask) except -1:
        self._relay = relay
        self._fd = fd
        relay._open_conns.add(self)
        self._watch(mask)
        return 0

    cdef int _drop(self, bint close_it) except -1:
        """Leave the relay; idempotent. The descriptor is closed unless it goes on elsewhere."""
        if self._closed:
            return 0
        self._closed = True
        if close_it and self._tls is not None:
            self._part()
        # Closing takes a descriptor out of epoll only when nobody else has the socket: a fork, or aiohttp for a turn.
        self._watch(0)
        if close_it:
            epoll_close(self._fd)
        self._fd = -1
        self._tls = None  # it is large, and the wheel may hold us for a while
        free(self._out)
        self._out = NULL
        self._out_off = self._out_len = self._out_cap = 0
        self._relay._open_conns.discard(self)
        self._relay._grave.append(self)
        return 0

    cdef inline void _limit_at(self, long long deadline):
        """Moving a limit later is an assignment; moving it before the next look puts it into the wheel."""
        self._deadline = deadline
        if deadline < self._due:
            self._relay._arm(self)

    cdef bint _put(self, iovec* parts, int count) except? False:
        """Send at the end of the turn, what is large at once; False when the connection is dead."""
        cdef size_t size = 0
        cdef bint now
        cdef int i
        self._say()
        for i in range(count):
            size += parts[i].iov_len
        now = size > AT_ONCE and self._out_len == 0
        if self._tls is not None:
            return self._seal(parts, count, now)
        if now:
            return self._send_now(parts, count)
        self._keep(parts, count, 0)
        return True

    cdef bint _send_now(self, iovec* parts, int count) except? False:
        """Send, keeping what the socket does not take; False when the connection is dead."""
        cdef ssize_t taken
        if self._tls is not None:
            return self._seal(parts, count, True)
        taken = vr_send(self._fd, parts, count)
        if taken < 0 and not _blocked():
            return False
        self._keep(parts, count, taken if taken > 0 else 0)
        return True

    cdef int _keep(self, iovec* parts, int count, size_t taken) except -1:
        """Keep what comes after the first `taken` bytes."""
        cdef size_t rest
        cdef int i
        for i in range(count):
            if taken >= parts[i].iov_len:
                taken -= parts[i].iov_len
                continue
            rest = parts[i].iov_len - taken
            self._reserve(rest)
            memcpy(self._out + self._out_off + self._out_len, <char*>parts[i].iov_base + taken, rest)
            self._out_len += rest
            taken = 0
        return 0

    # ---- TLS

    cdef bint _seal(self, iovec* parts, int count, bint now) except? False:
        """Send over TLS, now or at the end of the turn, in records as large as they may be: each costs as much as a
        kilobyte in one. They are taken from TLS one by one, so that it keeps a buffer of one, and sent in one go."""
        cdef char record[RECORD]
        cdef size_t held = 0, at, more
        cdef vector[iovec] sealed
        cdef list owners = []
        cdef int i
        for i in range(count):
            at = 0
            while at < parts[i].iov_len:
                more = min(parts[i].iov_len - at, RECORD - held)
                memcpy(record + held, <char*>parts[i].iov_base + at, more)
                held += more
                at += more
                if held == RECORD:
                    if not self._tls.write(record, held):
                        return False
                    owners.append(self._said_over_tls(&sealed))
                    held = 0
        if held and not self._tls.write(record, held):
            return False
        owners.append(self._said_over_tls(&sealed))
        if now:
            return self._send_sealed(&sealed)
        self._keep(sealed.data(), sealed.size(), 0)
        return True

    cdef bytes _said_over_tls(self, vector[iovec]* sealed):
        """Add what TLS has to say, which belongs to the answer."""
        cdef bytes said = self._tls.said()
        cdef iovec part
        part.iov_base = PyBytes_AS_STRING(said)
        part.iov_len = PyBytes_GET_SIZE(said)
        sealed.push_back(part)
        return said

    cdef bint _send_sealed(self, vector[iovec]* sealed) except? False:
        """Send this behind what waits; False when the connection is dead."""
        cdef ssize_t taken = 0
        if self._out_len == 0:
            taken = vr_send(self._fd, sealed.data(), sealed.size())
            if taken < 0 and not _blocked():
                return False
        self._keep(sealed.data(), sealed.size(), taken if taken > 0 else 0)
        return True

    cdef bint _send_said(self) except? False:
        """Send what TLS itself has to say; False when the connection is dead."""
        cdef vector[iovec] sealed
        if not self._tls.speaks():
            return True
        said = self._said_over_tls(&sealed)
        return not said or self._send_sealed(&sealed)

    cdef ssize_t _take_sealed(self, char* by) except? -1:
        """Give TLS what the peer has sent, by way of these SEALED bytes; as `recv` answers."""
        cdef ssize_t size = recv(self._fd, by, SEALED, 0)
        if size > 0:
            self._tls.take(by, size)
        return size

    cdef ssize_t _plain(self) except? -1:
        """Read into the scratch buffer, as `recv` answers: over TLS what is plain, and all of it that there is, for
        what TLS keeps does not make the socket readable. An end that TLS was not told of is ECONNRESET."""
        cdef char* to = self._relay._scratch
        cdef ssize_t size = SEALED, got = 0
        cdef int why = EAGAIN
        if self._tls is None:
            return recv(self._fd, to, SCRATCH, 0)
        while size == SEALED and got + 2 * SEALED <= SCRATCH:  # a record may have begun before
            size = self._take_sealed(to + got)
            if size > 0:
                got += self._tls.read(to + got, SCRATCH - got, self._relay._view_of(to + got, SCRATCH - got))
            else:
                why = errno if size < 0 else ECONNRESET
        self._send_said()  # a part of the handshake, an alert, new keys
        if self._out_len:
            self._say()
        if got or self._tls.ended:
            return got
        return vr_failed(why if self._tls.words is None else ECONNRESET)

    cdef inline bint _ended(self):
        """Whether TLS has heard the last of the peer."""
        return self._tls is not None and (self._tls.ended or self._tls.words is not None)

    cdef int _part(self) except -1:
        """Tell the peer that this is an end, and no cut, if that can be said."""
        if self._out_len == 0:
            self._tls.part()
            self._send_said()
        return 0

    # ---- the end of a turn

    cdef int _say(self) except -1:
        """Let the turn end with a look at what is to be sent here."""
        if not self._said:
            self._said = True
            self._relay._unsent.append(self)
        return 0

    cdef int _reserve(self, size_t more) except -1:
        if self._out_off and self._out_off + self._out_len + more > self._out_cap:
            memmove(self._out, self._out + self._out_off, self._out_len)
            self._out_off = 0
        if self._out_len + more > self._out_cap:
            self._out = _grown(self._out, &self._out_cap, self._out_len + more)
        return 0

    cdef int _flush(self) except -2:
        """1: all is written; 0: something waits; -1: the connection is dead."""
        cdef ssize_t taken
        cdef iovec part
        while self._out_len:
            part.iov_base = self._out + self._out_off
            part.iov_len = self._out_len
            taken = vr_send(self._fd, &part, 1)
            if taken < 0:
                return 0 if _blocked() else -1
            self._out_off += taken
            self._out_len -= taken
        self._out_off = 0
        if self._out_cap > SMALL:
            free(self._out)
            self._out = NULL
            self._out_cap = 0
        return 1


cdef inline bint _blocked() noexcept nogil:
    """Whether a send failed only for now; EINTR cannot be, for nothing here waits."""
    return errno == EAGAIN or errno == ENOTCONN or errno == EINPROGRESS


cdef char* _grown(char* buffer, size_t* cap, size_t size) except NULL:
    """The buffer with room for `size` bytes."""
    cdef size_t room = 1024
    cdef char* made
    while room < size:
        room *= 2
    made = <char*>realloc(buffer, room)
    if made == NULL:
        raise MemoryError
    cap[0] = room
    return made


cdef bint _usage_told(bytes usage, Answered* said) noexcept:
    return usage is None or read_usage_into(
        <const unsigned char*>PyBytes_AS_STRING(usage), PyBytes_GET_SIZE(usage), said
    )


cdef class Listener(Conn):
    """A listening socket. Whoever opened it closes it; a copy of the descriptor is ours."""

    cdef object _context  # of TLS, if that is spoken here

    def accept(self, int most):
        """Take connections that are there; how many there were, `most` at most, or -1 if there is no descriptor for
        one. For a listener that is not watched."""
        if self._closed:
            return 0
        self._relay._now = vr_now()
        return self._accept(most)

    cdef int _accept(self, int most) except -2:
        cdef char peer[ADDRESS]
        cdef int turn, fd
        cdef Client client
        for turn in range(most):
            fd = vr_accept(self._fd, peer, sizeof(peer))
            if fd < 0:
                return turn if errno == EAGAIN or errno == EINTR or errno == ECONNABORTED else -1
            client = Client.__new__(Client)
            memcpy(client._remote, peer, sizeof(peer))
            client._fd = fd
            if self._context is not None:  # first: what fails here closes it
                client._tls = Tls(self._context, None)
                client._shaking = True
            client._open(self._relay, fd, EPOLLIN | EPOLLRDHUP)
            client._await(self._relay._handshake if client._shaking else self._relay._keepalive)
            self._relay._accepted = True
        return most

    cdef int _ready(self, unsigned events) except -1:
        # One at the first look, as most come alone and to hear that there is no other costs as much as to take it.
        if self._accept(ACCEPTS if self._relay._accepted else 1) < 0:
            # No descriptors are left: the clients wait in the listen queue, and we look again in a while.
            self._watch(0)
            self._limit_at(self._relay._now + SECOND)
        return 0

    cdef int _expired(self) except -1:
        self._watch(EPOLLIN | EPOLLEXCLUSIVE)
        return 0


cdef class Client(Conn):
    """One client's connection and the exchange that is under way on it."""

    cdef char* _in
    cdef size_t _in_len, _in_cap
    cdef size_t _head, _body, _searched  # sizes of the request whose head is known, and of what has been searched
    cdef size_t _framed  # the body's size as it came
    cdef bint _chunked, _more  # it came in chunks; and the last is not here
    cdef string _joined  # what was in them
    cdef string _said, _short  # the kept headers of the last request here, and its body's short form
    cdef Places _places  # of the request, once it is scanned
    cdef dict _headers
    cdef readonly object memo
    cdef Flow _flow  # of the kind of request that `memo` is of
    cdef unsigned long long _generation  # of that flow
    cdef str _path
    cdef object _exchange  # of the request that is under way; while it is `_riding`, the flow that it goes by
    cdef EventScanner _scanner
    cdef Ride _ride
    cdef tuple _lease  # of an engine, where its flow needs one
    cdef string _rates
    cdef Upstream _up
    cdef Pool _pool
    cdef bytes _request_head
    cdef vector[Edit] _edits
    cdef list _edited  # keeps the texts of Python's edits
    cdef readonly bint started  # something of the answer is out: it cannot be handed over any more
    cdef bint _committed, _retried, _riding, _scanned, _shaking
    cdef readonly long long bytes_out
    cdef int _why
    cdef long long _total, _first_ns
    cdef Limits _limits
    cdef char _remote[ADDRESS]  # the client's address; ends with a zero

    def __dealloc__(self):
        free(self._in)

    # ---- what Python asks of a request

    @property
    def path(self):
        """The path, one of those the relay was made for."""
        return self._path

    @property
    def headers(self):
        """Those of the request's headers that are kept, by their names in lower case."""
        cdef const char* p = self._said.data()
        cdef const char* end = p + self._said.size()
        cdef const char* colon
        cdef const char* stop
        if self._headers is None:
            self._headers = {}
            while p < end:
                colon = <const char*>memchr(p, 58, end - p)
                stop = <const char*>memchr(colon, 10, end - colon)
                self._headers[_text(p, colon - p)] = _text(colon + 1, stop - colon - 1)
                p = stop + 1
        return self._headers

    @property
    def remote(self):
        """The client's address, or an empty text."""
        return (<bytes>self._remote).decode()

    @property
    def body_size(self):
        """Bytes of the request's body."""
        return self._ride.bytes_in if self._riding else self._body

    @property
    def body(self):
        """A copy of the request's body. Only until the answer begins."""
        return PyBytes_FromStringAndSize(self._text_of_body(), self._body)

    @property
    def first_byte_s(self):
        """When the answer's first byte came, on the relay's clock; 0 before it did."""
        return self._first_ns / 1e9

    def scan(self):
        """`ext.body_scan.scan` of the body; False where it or the head is too large, or the body is not ordinary.

        After this `memo` is that of a request which said the same.
        """
        return self._scanned or self._scan()

    cdef bint _scan(self) except -1:
        cdef const unsigned char* body = <unsigned char*>self._text_of_body()
        cdef string* short = &self._relay._text
        if self._head > self._relay._max_head or self._body > self._relay._max_body:
            return False
        if not scan_into(body, self._body, self._relay._max_depth, short, &self._places):
            return False
        if short[0] != self._short:
            self._short.assign(short[0])
            self._forget_kind()
        if self.memo is None:
            self._recall()
        self._scanned = True
        return True

    cdef int _recall(self) except -1:
        """Another connection may have asked for the same."""
        known = self._relay._kinds.get(self._kind())
        if known is not None:
            self.memo, self._flow = known
            self._generation = self._relay._generation
        return 0

    cdef bytes _kind(self):
        """Path, kept headers and short form: a digest stands for them, since they hold the caller's key."""
        cdef string text = self._path.encode("ascii")
        text.push_back(0)
        text.append(self._said)
        text.push_back(0)
        text.append(self._short)
        return digest(&text)

    cdef void _forget_kind(self) noexcept:
        """The request is not of the kind of the last one."""
        self.memo = self._flow = None

    @property
    def short(self):
        """The short form of the body. After `scan`."""
        return PyBytes_FromStringAndSize(self._short.data(), self._short.size())

    @property
    def spans(self):
        """Where in the body its members are that may be spliced. After `scan`."""
        return spans_of(&self._places)

    def remember(self, memo, Flow flow=None):
        """Keep this as `memo` for whoever says the same but for its messages, and let it go by the flow if it can."""
        if len(self._relay._kinds) >= MOST_KINDS:
            self._relay._kinds.clear()
        self._relay._kinds[self._kind()] = memo, flow
        self.memo, self._flow = memo, flow
        self._generation = self._relay._generation

    def forward(self, Pool pool not None, bytes head not None, list edits not None, Limits limits not None):
        """Send the request there as soon as `decide` returns."""
        cdef Edit edit
        cdef bytes text
        self._edits.clear()
        for edit.start, edit.end, text in edits:
            edit.text, edit.size = PyBytes_AS_STRING(text), PyBytes_GET_SIZE(text)
            self._edits.push_back(edit)
        self._edited = edits
        self._toward(pool, head, limits)

    cdef void _toward(self, Pool pool, bytes head, Limits limits) noexcept:
        self._pool, self._request_head, self._limits = pool, head, limits
        self._total = self._relay._now + limits.total

    # ---- what Python asks of a request that went by a flow, and is to be its own from here on

    @property
    def flow(self):
        """The flow that the request goes by."""
        return self._exchange if self._riding else None

    @property
    def request_id(self):
        """Its id."""
        return PyUnicode_DecodeASCII(self._ride.id, GIVEN, NULL)

    @property
    def began_s(self):
        """When it was here, on the relay's clock."""
        return self._ride.began_s

    @property
    def lease(self):
        """What `Owner.lease` gave for it; None where its flow needs none."""
        return self._lease

    def take_grant(self):
        """What was reserved for it."""
        return (<Flow>self._exchange)._gate._grant(&self._ride, &self._rates)

    @property
    def scanner(self):
        """Of a stream, the scanner that it goes through; else None."""
        return self._scanner

    @property
    def passed(self):
        """The headers of its answer that are passed on."""
        return {} if self._up is None else self._up._headers()

    @property
    def output_s(self):
        """When the first output went out, on the relay's clock; 0 before."""
        return self._ride.first_byte_s

    @property
    def first_bytes_out(self):
        """How many bytes of the body went with that."""
        return self._ride.bytes_out

    # ---- limits

    cdef inline void _limit(self, long long span, int why):
        """From now on this may take so long, within the total."""
        cdef long long at = self._relay._now + span
        self._why = why
        if at >= self._total:
            at = self._total
            self._why = K_TOTAL
        self._limit_at(at)

    cdef void _await(self, long long span):
        self._total = NEVER
        self._limit(span, K_WAIT)

    cdef int _expired(self) except -1:
        if self._exchange is not None:
            self._fail(self._why, "")
        elif self._out_len or self._in_len == 0:
            self._drop(True)  # it takes nothing of its last answer, or it has nothing to ask
        else:
            self._hand_over(None)
        return 0

    # ---- reading

    cdef int _ready(self, unsigned events) except -1:
        if events & EPOLLOUT:
            self._flushed(self._flush())
            if self._closed:
                return 0
        if events & (EPOLLIN | EPOLLRDHUP | EPOLLHUP | EPOLLERR):
            self._readable()
        return 0

    cdef int _readable(self) except -1:
        cdef ssize_t size = self._receive()
        if size <= 0:
            if size < 0 and (errno == EAGAIN or errno == EINTR):
                return self._just_shaken()
            self._gone()
            return 0
        self._shaking = False
        self._in_len += size
        if self._exchange is None and self._out_len == 0:
            self._requests()
        elif self._in_len > self._head + self._framed + MOST_AHEAD:
            self._watch(self._mask & ~<unsigned>EPOLLIN | EPOLLRDHUP)
        if self._ended() and not self._closed:
            self._gone()
        return 0

    cdef int _just_shaken(self) except -1:
        """Once its handshake is done, a client has time to say something."""
        if self._shaking and self._tls.shaken:
            self._shaking = False
            self._await(self._relay._keepalive)
        return 0

    cdef ssize_t _receive(self) except? -1:
        """Read behind what is held; as `recv` answers. What is large is not copied: it stays where it was read."""
        cdef char* read
        cdef ssize_t size
        if self._tls is not None:
            size = self._plain()
            if size > 0:
                self._reserve_in(max(self._head + self._body, self._in_len + size))
                memcpy(self._in + self._in_len, self._relay._scratch, size)
            return size
        if self._in_len:
            self._reserve_in(max(self._head + self._body, self._in_len + LEAST_READ))
            return recv(self._fd, self._in + self._in_len, self._in_cap - self._in_len, 0)
        read = self._relay._scratch
        size = recv(self._fd, read, SCRATCH, 0)
        if size > SMALL:
            self._relay._scratch = self._relay._lend()
            self._let_go()
            self._in, self._in_cap = read, SCRATCH
        elif size > 0:
            self._reserve_in(size)
            memcpy(self._in, read, size)
        return size

    cdef int _reserve_in(self, size_t size) except -1:
        """Make room for so many bytes from the first on. What is large is lent by the relay: memory fresh from the
        system costs more than all else that is done to a large request."""
        cdef char* lent
        if size <= self._in_cap:
            return 0
        if not SMALL < size <= SCRATCH:
            self._in = _grown(self._in, &self._in_cap, size)
            return 0
        lent = self._relay._lend()
        memcpy(lent, self._in, self._in_len)
        self._let_go()
        self._in, self._in_cap = lent, SCRATCH
        return 0

    cdef int _let_go(self) except -1:
        """Hold no buffer."""
        if self._in_cap == SCRATCH:
            self._relay._take_back(self._in)
        else:
            free(self._in)
        self._in = NULL
        self._in_cap = 0
        return 0

    cdef int _drop(self, bint close_it) except -1:
        """What was read goes with the connection: the wheel may hold us for a while."""
        Conn._drop(self, close_it)
        self._let_go()
        self._joined = string()
        self._in_len = self._head = self._body = self._framed = 0
        return 0

    cdef int _gone(self) except -1:
        """The client has left: the work for it ends now."""
        if self._exchange is not None:
            self._fail(K_LEFT, "")
        self._drop(True)
        return 0

    cdef int _requests(self) except -1:
        """Take the request that is whole in the buffer, if there is one."""
        cdef const char* end
        cdef size_t least
        if self._in_len == 0:
            self._await(self._relay._keepalive)
            return 0
        if self._head == 0:
            least = self._in_len if self._in_len < 9 else 9
            if memcmp(self._in, b"POST /v1/", least) != 0:
                return self._hand_over(None)
            end = <const char*>memmem(self._in + self._searched, self._in_len - self._searched, <const char*>CRLF2, 4)
            if end == NULL:
                if self._in_len > MOST_HEAD:
                    return self._hand_over(None)
                self._searched = self._in_len - 3 if self._in_len > 3 else 0
                if self._why != K_WAIT or self._deadline > self._relay._now + PARTIAL:
                    self._await(PARTIAL)
                return 0
            if not self._recognise(end + 4 - self._in):
                return self._hand_over(None)
        if self._chunked and not self._unchunk():
            return self._hand_over(None)
        if self._in_len < self._head + self._framed or self._more:
            if self._deadline > self._relay._now + PARTIAL:
                self._await(PARTIAL)
            return 0
        return self._decide()

    cdef const char* _text_of_body(self) noexcept:
        return self._joined.data() if self._chunked else self._in + self._head

    cdef bint _unchunk(self) except -1:
        """Join the chunks that are there, from the first that was not; False where the body is not plainly chunked:
        with extensions, trailers, nothing in it, or more than a body may have. `_more` of it may be to come."""
        cdef const char* start = self._in + self._head
        cdef const char* end = self._in + self._in_len
        cdef const char* p
        cdef size_t size
        cdef int digits
        while True:
            p = start + self._framed
            size, digits = 0, 0
            while p < end and _is_hex(p[0]) and digits <= MOST_DIGITS:
                size = size * 16 + (p[0] - 48 if p[0] <= 57 else (p[0] | 32) - 87)
                digits += 1
                p += 1
            if digits > MOST_DIGITS or (p < end and (digits == 0 or p[0] != 13)):
                return False
            if end - p < 2:
                return True
            if p[1] != 10 or self._joined.size() + size > MOST_BODY:
                return False
            p += 2
            if <size_t>(end - p) < size + 2:
                return size > 0 or end == p or p[0] == 13
            if p[size] != 13 or p[size + 1] != 10:
                return False
            self._joined.append(p, size)
            self._framed = p + size + 2 - start
            if size == 0:
                self._more = False
                self._body = self._joined.size()
                return self._body > 0

    cdef bint _recognise(self, size_t size) except -1:
        """Whether this head is one of ours; then `_head`, `_body`, `headers` and `_path` are known."""
        cdef Field field
        cdef const char* end = self._in + size - 2  # past the last header's CRLF
        cdef const char* p
        cdef long long length = -1
        cdef bint chunked = False
        cdef int count = 0, types = 0
        cdef unsigned long long kept = 0
        cdef string* said = &self._relay._text
        if size > MOST_HEAD:
            return False
        p = self._request_line(end)
        if p == NULL:
            return False
        said.clear()
        while p < end:
            p = _field(p, end, &field)
            count += 1
            if p == NULL or count > MOST_HEADERS:
                return False
            if field.size == 0:
                continue
            if _named(&field, b"content-length", 14):
                if length >= 0:
                    return False
                length = _digits(field.value, field.length)
                if length < 0 or length > MOST_BODY:
                    return False
            elif _named(&field, b"transfer-encoding", 17):
                if chunked or not _same(field.value, field.length, b"chunked", 7):
                    return False
                chunked = True
            elif _named(&field, b"content-type", 12):
                types += 1
                if not _json(field.value, field.length):
                    return False
            elif _named(&field, b"connection", 10):
                if not _same(field.value, field.length, b"keep-alive", 10):
                    return False
            elif not self._other(&field, &kept, said):
                return False
        if chunked:
            if length >= 0:
                return False
            length = 0
        elif length <= 0:
            return False
        if types != 1 or not (kept >> self._relay._host) & 1:
            return False
        if said[0] != self._said:
            self._said.assign(said[0])
            self._forget_kind()
        self._headers = None
        self._scanned = False
        self._head, self._body, self._framed = size, length, length
        self._chunked = self._more = chunked
        return True

    cdef const char* _request_line(self, const char* end) except? NULL:
        """Past the line; NULL where it is not exactly POST, a path of ours, HTTP/1.1."""
        cdef const char* p = self._in + 5
        cdef const char* space
        cdef str path
        if end - self._in < 16 or memcmp(self._in, b"POST ", 5) != 0:
            return NULL
        space = <const char*>memchr(p, 32, end - p)
        if space == NULL or end - space < 11 or memcmp(space, b" HTTP/1.1\r\n", 11) != 0:
            return NULL
        path = self._relay._paths.find(p, space - p)
        if path is None:
            return NULL
        if path is not self._path:
            self._path = path
            self._forget_kind()
        return space + 11

    cdef bint _other(self, Field* field, unsigned long long* kept, string* said) except -1:
        """Keep a header that decisions read; False where it is there twice, is not ASCII, or is for the other lane."""
        cdef int at
        cdef const unsigned char* value = <const unsigned char*>field.value
        cdef const unsigned char* end = value + field.length
        value = vr_visible(value, end)
        while value < end:  # only a tab, or what is not ASCII, ends a run of visible ASCII here
            if value[0] >= 0x80:
                return False
            value += 1
        at = self._relay._kept.at(field.name, field.size)
        if at < 0:
            return not self._relay._foreign.begins(field.name, field.size)
        if (kept[0] >> at) & 1:
            return False
        kept[0] |= 1ULL << at
        said.append(field.name, field.size)
        said.append(b":")
        said.append(field.value, field.length)
        said.append(b"\n")  # which no value holds
        return True

    # ---- the exchange

    cdef int _decide(self) except -1:
        self._riding = False
        if self._relay.passing:
            if not self._scan():
                return self._hand_over(None)
            self._riding = self._flow is not None and self._is_good(self._flow) and self._rides(self._flow)
        exchange = self._flow if self._riding else self._relay._owner.decide(self)
        if exchange is None:
            self._pool = None
            return self._hand_over(None)
        self._exchange = exchange
        self._retried = self._committed = self.started = False
        self.bytes_out = self._first_ns = 0
        self._limit(self._limits.first_byte, K_FIRST_BYTE)
        return self._send()

    cdef bint _is_good(self, Flow flow) noexcept:
        return self._generation == self._relay._generation and self._relay._now < flow._until

    cdef bint _rides(self, Flow flow) except -1:
        """Go by the flow, if there is room for this request now."""
        self._ride.began_s = self._relay._now / 1e9
        self._ride.bytes_in = self._body
        if not flow._gate._admit(&self._ride, &self._rates):
            return False
        self._ride.remote, self._ride.remote_size = self._remote, strlen(self._remote)
        if flow._pool is None:
            self._lease = self._relay._owner.lease(self, flow.origin)
            if self._lease is None:
                flow._gate._withdraw(&self._ride)
                return False
            self._toward(self._lease[0], self._lease[1], flow._limits)
        else:
            self._lease = None
            self._toward(flow._pool, flow._head, flow._limits)
        self._edits.clear()
        flow._edits(&self._places, &self._edits)
        self._edited = flow._texts
        return True

    cdef object _python(self):
        """The exchange, for something to be asked of it: Python's own from now on."""
        if self._riding:
            exchange = self._relay._owner.resume(self)
            self._riding = False
            self._exchange, self._lease = exchange, None
        return self._exchange

    cdef int _send(self, bint fresh=False) except -1:
        """Send the request on an idle connection, or on a new one."""
        cdef Upstream up = None
        cdef list idle = self._pool._idle
        cdef int fd
        if not fresh and idle:
            up = idle.pop()
            up._reused = True
            up._limit_at(NEVER)
        else:
            fd = vr_connect(<const char*>self._pool._host, self._pool.port)
            if fd < 0:
                return self._fail(K_UNREACHABLE, _why_not(errno))
            up = Upstream.__new__(Upstream)
            up._pool = self._pool
            up._connecting = True
            up._open(self._relay, fd, EPOLLIN | EPOLLOUT)
            up._limit_at(self._relay._now + self._limits.connect)  # for the handshake of TLS, too
        self._up = up
        up._client = self
        return up._ask()

    cdef int _payload(self, char* data, size_t size, bint last) except -1:
        """A piece of the answer's body; `last` when it is the end of it."""
        cdef Upstream up = self._up
        if self._first_ns == 0 and size:
            self._first_ns = self._relay._now
        if up._mode == EVENTS:
            if size:
                self._events(self._scanner._feed(PyBytes_FromStringAndSize(data, size)))
        elif up._mode == THROUGH:
            if size:
                up._remember(data, size)
                self._through(data, size)
        else:
            up._hold(data, size)
            if up._body_len > MOST_ANSWER and 200 <= up._status < 300:
                self._begin_through()
            elif up._body_len > MOST_REFUSAL and not 200 <= up._status < 300:
                up._body_len = 0
                up._refused = last = True
                up._reusable = False
        if self._closed:
            return 0
        if last:
            return self._end()
        self._limit(self._limits.idle, K_IDLE)
        return 0

    cdef int _events(self, bytes events) except -1:
        cdef Py_ssize_t size = PyBytes_GET_SIZE(events)
        if size == 0:
            return 0
        if not self._committed:
            if self._riding and self._scanner.events:
                return self._begin_ride(events)
            first, self._committed = self._python().begin(events)
            if first:
                self._answering()
            return self._write(first)
        self.bytes_out += size
        return self._write_chunk(PyBytes_AS_STRING(events), size)

    cdef int _begin_ride(self, bytes events) except -1:
        """The first output of a stream that goes by its flow."""
        cdef string lines
        cdef string* head = &self._relay._text
        cdef Flow flow = <Flow>self._exchange
        cdef iovec part
        self._ride.first_byte_s = self._relay._now / 1e9
        self._ride.bytes_out = PyBytes_GET_SIZE(events)
        flow._lines(&self._up._passed, &lines)
        flow._gate._head(&self._ride, &lines, &self._rates, head)
        head.append(b"Transfer-Encoding: chunked\r\n")
        head.append(self._relay._date_line())
        self._committed = True
        self._answering()
        part.iov_base = <void*>head.data()
        part.iov_len = head.size()
        if not self._put(&part, 1):
            return self._gone()
        return self._write_chunk(PyBytes_AS_STRING(events), PyBytes_GET_SIZE(events))

    cdef int _begin_through(self) except -1:
        cdef Upstream up = self._up
        head = self._python().large(up._status, up._headers(), up._length)
        up._mode = THROUGH
        self._committed = True
        self._answering()
        self._write(head)
        if not self._closed:
            self._through(up._body, up._body_len)
            up._keep_tail()
        return 0

    cdef int _through(self, char* data, size_t size) except -1:
        cdef iovec part
        self.bytes_out += size
        if self._up._length >= 0:
            part.iov_base = data
            part.iov_len = size
            if not self._put(&part, 1):
                self._gone()
            return 0
        return self._write_chunk(data, size)

    cdef int _write_chunk(self, const char* data, size_t size) except -1:
        cdef iovec parts[3]
        cdef char line[20]
        parts[0].iov_base = line
        parts[0].iov_len = _hex_line(line, size)
        parts[1].iov_base = <void*>data
        parts[1].iov_len = size
        parts[2].iov_base = <void*>(<const char*>CRLF2)
        parts[2].iov_len = 2
        if not self._put(parts, 3):
            self._gone()
        return 0

    cdef int _write(self, bytes data) except -1:
        cdef iovec part
        part.iov_base = PyBytes_AS_STRING(data)
        part.iov_len = PyBytes_GET_SIZE(data)
        if part.iov_len and not self._put(&part, 1):
            self._gone()
        return 0

    cdef int _end(self) except -1:
        """The upstream's answer is whole."""
        cdef Upstream up = self._up
        cdef Answered said
        if up._mode == EVENTS and self._riding and self._committed and self._told(&said):
            return self._end_stream(&said)
        if up._mode != HELD:
            exchange = self._python()
            up._release()
            answer = exchange.ended(up._tail())
            up._let_go()
            if answer is None:
                return self._hopeless(self.started)
            return self._over(answer)
        if self._riding and up._is_plain() and read_answer_into(<unsigned char*>up._body, up._body_len, &said):
            return self._end_ride(&said)
        exchange, headers = self._python(), up._headers()
        up._release()
        body = PyBytes_FromStringAndSize(up._body, up._body_len)
        up._let_go()
        answer = exchange.whole(up._status, headers, body)
        if answer is None:
            return self._hand_over(exchange)
        return self._over(answer)

    cdef int _end_ride(self, const Answered* said) except -1:
        """The whole answer of a request that went by its flow."""
        cdef Upstream up = self._up
        cdef string* head = &self._relay._text
        cdef Flow flow = <Flow>self._exchange
        cdef Ride* ride = &self._ride
        cdef iovec parts[2]
        ride.ended_s = self._relay._now / 1e9
        ride.first_byte_s = self._first_ns / 1e9 if self._first_ns else ride.ended_s
        ride.bytes_out = up._body_len
        flow._gate._head(ride, &up._passed, &self._rates, head)
        head.append(b"Content-Length: ")
        put_whole(head, up._body_len)
        head.append(b"\r\n")
        head.append(self._relay._date_line())
        up._release()
        self._answering()
        parts[0].iov_base, parts[0].iov_len = <void*>head.data(), head.size()
        parts[1].iov_base, parts[1].iov_len = up._body, up._body_len
        self._off(said, self._put(parts, 2))
        up._let_go()  # where the reason lay
        return 0

    cdef bint _told(self, Answered* said) except -1:
        """Whether the stream is over as it should be, and says plainly what it used and why it ended."""
        cdef EventScanner scanner = self._scanner
        cdef const unsigned char* end
        said.prompt = said.cached = said.output = -1
        said.reason = NULL
        said.reason_size = 0
        if scanner.error is not None or scanner.oversized or not scanner._pending.empty():
            return False
        if scanner.finish_reason is not None:
            said.reason = PyUnicode_AsUTF8AndSize(scanner.finish_reason, &said.reason_size)
            end = <const unsigned char*>said.reason + said.reason_size
            if said.reason_size == 0 or vr_plain(<const unsigned char*>said.reason, end) != end:
                return False
        elif not scanner.done:
            return False
        return _usage_told(scanner.first_usage, said) and (
            scanner.usage is scanner.first_usage or _usage_told(scanner.usage, said)
        )

    cdef int _end_stream(self, const Answered* said) except -1:
        """The end of a stream of a request that went by its flow."""
        cdef iovec part
        self._ride.ended_s = self._relay._now / 1e9
        self._ride.bytes_out += self.bytes_out
        self._up._release()
        part.iov_base = PyBytes_AS_STRING(LAST_CHUNK)
        part.iov_len = PyBytes_GET_SIZE(LAST_CHUNK)
        return self._off(said, self._put(&part, 1))

    cdef int _off(self, const Answered* said, bint taken) except -1:
        """A request that went by its flow has got its whole answer, unless that was not `taken`."""
        cdef Flow flow = <Flow>self._exchange
        cdef Ride* ride = &self._ride
        self._exchange = None
        self._riding = False
        ride.prompt, ride.cached, ride.output = said.prompt, said.cached, said.output
        ride.reason, ride.reason_size = said.reason, said.reason_size
        if self._lease is not None:
            self._relay._owner.give_back(
                self._lease, said.prompt if said.prompt >= 0 else None, said.output if said.output > 0 else 0
            )
            self._lease = None
        flow._gate._settle(ride)
        self._clear()  # of the scanner, too, where the reason lies
        return self._said_all() if taken else self._gone()

    cdef int _over(self, bytes rest) except -1:
        """Write the last bytes of an answer."""
        self._answering()
        self._clear()
        self._write(rest)
        return 0 if self._closed else self._said_all()

    cdef int _clear(self) except -1:
        """No exchange is under way."""
        self._exchange = self._scanner = self._pool = None
        self.started = False
        self._total = NEVER
        return 0

    cdef int _said_all(self) except -1:
        self._limit(self._limits.stall, K_STALLED)
        return self._say()  # and when it is said, turn to the next

    cdef int _next(self) except -1:
        if self._relay._closing:
            return self._drop(True)
        self._watch(EPOLLIN | EPOLLRDHUP)
        return self._requests()

    cdef int _answering(self) except -1:
        """The answer begins: the request is not needed any more."""
        cdef size_t taken = self._head + self._framed
        if self.started:
            return 0
        self.started = True
        self._in_len -= taken
        if self._in_len:
            memmove(self._in, self._in + taken, self._in_len)
        elif self._in_cap > SMALL:
            self._let_go()
        self._head = self._body = self._framed = self._searched = 0
        if self._chunked:
            self._joined = string()
            self._chunked = False
        self._headers = None
        self._request_head = None
        self._edits.clear()
        self._edited = None
        return 0

    cdef int _flushed(self, int state) except -1:
        """Go on with the upstream or with the next request; while the client is slow, its upstream waits."""
        if state < 0:
            return self._gone()
        if state == 0:
            if self._up is not None:
                self._up._watch(0)
            self._watch(self._mask | EPOLLOUT)
            self._limit(self._limits.stall, K_STALLED)
        elif self._exchange is None:
            return self._next()
        elif self._mask & EPOLLOUT:
            self._watch(self._mask & ~<unsigned>EPOLLOUT)
            if self._up is not None:
                self._up._watch(EPOLLIN | EPOLLOUT if self._up._out_len else EPOLLIN)
                self._limit(self._limits.idle, K_IDLE)
        return 0

    cdef int _fail(self, int kind, str words) except -1:
        """The exchange ends without a whole answer. The upstream, if any, is told by closing its connection."""
        cdef bint begun = self.started
        exchange = self._python()
        if self._up is not None:
            self._up._client = None
            self._up._drop(True)
            self._up = None
        last = exchange.failed(kind, words)
        if kind == K_LEFT or kind == K_STALLED:
            self._exchange = self._scanner = None
            return self._drop(True)
        return self._over(last) if last is not None else self._hopeless(begun)

    cdef int _hopeless(self, bint begun) except -1:
        """Nothing can be said: cut off an answer that has begun, else the other lane may still help."""
        if not begun:
            return self._hand_over(self._exchange)
        self._exchange = self._scanner = None
        return self._drop(True)

    cdef int _hand_over(self, exchange) except -1:
        """Let the other lane go on with this connection."""
        cdef int fd = self._fd if self._tls is None else self._bridged()
        cdef bint whole = self._head > 0 and self._in_len == self._head + self._framed and not self._more
        data = PyBytes_FromStringAndSize(self._in, self._in_len)
        self._exchange = self._scanner = self._pool = None
        self._drop(False)
        self._relay._owner.hand_over(fd, data, exchange, self.remote, whole)
        return 0

    cdef int _bridged(self) except -1:
        """A descriptor of what the client says in plain text. Its own stays here, for TLS is spoken there."""
        cdef int ends[2]
        cdef Bridge outer, inner
        if vr_pair(ends) < 0:
            raise OSError(errno, _why_not(errno))
        self._watch(0)
        outer, inner = Bridge.__new__(Bridge), Bridge.__new__(Bridge)
        outer._other, inner._other = inner, outer
        outer._tls, self._tls = self._tls, None
        outer._out, outer._out_off, outer._out_len, outer._out_cap = (
            self._out, self._out_off, self._out_len, self._out_cap
        )
        self._out = NULL
        outer._open(self._relay, self._fd, 0)
        inner._open(self._relay, ends[0], 0)
        if outer._ended():
            outer._leave()
        else:
            outer._balance()
            outer._say()
        return ends[1]


cdef str _why_not(int number):
    return (<bytes>strerror(number)).decode()


cdef size_t _hex_line(char* line, size_t size) noexcept nogil:
    """A chunk's first line; its length."""
    cdef int digits = 1
    cdef int i
    while size >> (4 * digits):
        digits += 1
    for i in range(digits):
        line[i] = b"0123456789abcdef"[(size >> (4 * (digits - 1 - i))) & 15]
    line[digits] = 13
    line[digits + 1] = 10
    return digits + 2


cdef class Upstream(Conn):
    """One connection to an upstream, idle in its pool or answering one client."""

    cdef Pool _pool
    cdef Client _client
    cdef bint _connecting, _asking, _reused, _reusable, _refused, _coded
    cdef char* _body  # the head while it is incomplete, then what is held of the body or of its tail
    cdef size_t _body_len, _body_cap
    cdef Framing _framing
    cdef Mode _mode
    cdef Chunk _chunk
    cdef int _status, _digits
    cdef long long _length, _left
    cdef string _passed  # the lines of its head that are passed on
    cdef bint _twice  # one of them is there twice

    def __dealloc__(self):
        free(self._body)

    cdef int _expired(self) except -1:
        if self._client is None:
            self._forget()
            return self._drop(True)
        did = "accept a connection" if self._tls is None else "finish the TLS handshake"
        return self._client._fail(K_UNREACHABLE, f"it did not {did} in time ([timeouts] connect_s)")

    cdef int _forget(self) except -1:
        if self in self._pool._idle:
            self._pool._idle.remove(self)
        return 0

    # ---- the request

    cdef int _ask(self) except -1:
        """The client's request is to be sent, at the end of the turn or once there is a connection."""
        self._framing, self._mode, self._chunk = HEAD, HELD, SIZE
        self._body_len = 0
        self._refused = False
        self._asking = True
        if not self._said:
            self._said = True
            self._relay._asked.append(self)
        return 0

    cdef int _flush(self) except -2:
        if self._connecting:
            return 0
        if self._asking:
            self._asking = False
            if self._client is not None and not self._request(self._client):
                return -1
        return Conn._flush(self)

    cdef bint _request(self, Client client) except? False:
        """Send the client's request, its body edited; False when the connection is dead."""
        cdef vector[iovec] parts
        cdef iovec part
        cdef size_t at = 0
        cdef char* body = <char*>client._text_of_body()
        cdef Edit edit
        cdef string* line = &self._relay._text
        cdef size_t length = client._body
        for edit in client._edits:
            length += edit.size - (edit.end - edit.start)
        part.iov_base = PyBytes_AS_STRING(client._request_head)
        part.iov_len = PyBytes_GET_SIZE(client._request_head)
        parts.push_back(part)
        line.assign(b"content-length: ")
        put_whole(line, length)
        line.append(b"\r\n\r\n")
        part.iov_base = <void*>line.data()
        part.iov_len = line.size()
        parts.push_back(part)
        for edit in client._edits:
            part.iov_base = body + at
            part.iov_len = edit.start - at
            parts.push_back(part)
            part.iov_base = <void*>edit.text
            part.iov_len = edit.size
            parts.push_back(part)
            at = edit.end
        part.iov_base = body + at
        part.iov_len = client._body - at
        parts.push_back(part)
        return self._send_now(parts.data(), parts.size())

    cdef int _flushed(self, int state) except -1:
        if state < 0:
            return self._broken(self._cause())
        if self._mask and not self._connecting:
            self._watch(EPOLLIN if state else EPOLLIN | EPOLLOUT)
        return 0

    # ---- the answer

    cdef int _ready(self, unsigned events) except -1:
        cdef bint just = self._connecting
        if just and not self._connected(events):
            return 0
        if just or events & EPOLLOUT:
            self._flushed(self._flush())
            if self._closed:
                return 0
        if events & (EPOLLIN | EPOLLHUP | EPOLLERR):
            return self._readable()
        return 0

    cdef bint _connected(self, unsigned events) except -1:
        """Go on connecting; True once the connection can be used."""
        cdef int state
        if self._tls is None:
            state = vr_error(self._fd)
            if state:
                self._unreachable(_why_not(state))
                return False
            if not events & EPOLLOUT:
                return False
            if self._pool._tls is not None:
                self._tls = Tls(self._pool._tls, self._pool._name, self._pool._session)
        if self._tls is not None and not self._shaken():
            return False
        self._connecting = False
        self._limit_at(NEVER)
        return True

    cdef bint _shaken(self) except -1:
        """Go on with the handshake of TLS; True once it is done. Our last words of it go with the request."""
        cdef ssize_t size = self._take_sealed(self._relay._scratch)
        cdef int state
        if size == 0 or (size < 0 and not _blocked() and errno != EINTR):
            words = _why_not(errno) if size else "the connection was closed"
            self._unreachable(f"the TLS handshake broke off: {words}")
            return False
        state = self._tls.shake()
        if state == 1:
            return True
        self._send_said()
        if state < 0:
            self._unreachable(self._tls.words)
        else:
            self._watch(EPOLLIN if Conn._flush(self) else EPOLLIN | EPOLLOUT)
        return False

    cdef int _unreachable(self, str words) except -1:
        """There is no connection."""
        return self._drop(True) if self._client is None else self._client._fail(K_UNREACHABLE, words)

    cdef int _readable(self) except -1:
        cdef char* scratch = self._relay._scratch
        cdef ssize_t size = self._plain()
        if size < 0 and (errno == EAGAIN or errno == EINTR):
            return 0
        if size <= 0:
            return self._closed_by_peer(size == 0)
        if self._client is None:  # nothing was asked
            self._forget()
            return self._drop(True)
        if self._asking:  # the request is not out, so this is an answer to nothing, and nobody's
            return self._broken("it answered before it was asked")
        if self._framing == HEAD:
            self._read_head(scratch, size)
        else:
            self._read_body(scratch, size)
        if self._ended() and not self._closed:
            self._closed_by_peer(self._tls.ended)
        return 0

    cdef int _closed_by_peer(self, bint orderly) except -1:
        if self._client is None:
            self._forget()
            return self._drop(True)
        if self._framing == UNTIL_CLOSE and orderly:
            self._framing = COMPLETE
            return self._client._payload(NULL, 0, True)
        return self._broken(self._cause())

    cdef str _cause(self):
        """Why a connection is dead."""
        if self._tls is None or self._tls.ended:
            return "the connection was closed"
        return self._tls.words or "the connection was closed, and TLS was not: somebody may have cut it"

    cdef int _broken(self, str words) except -1:
        """The connection is dead. One that was idle before, and died before any answer, may not have seen the request:
        it is sent again on a new connection, once."""
        cdef Client client = self._client
        self._client = None
        self._drop(True)
        if client is None:
            return self._forget()
        client._up = None
        if self._reused and self._framing == HEAD and self._body_len == 0 and not client._retried:
            client._retried = True
            return client._send(True)
        return client._fail(K_UNREACHABLE if self._connecting else K_BROKE, words)

    cdef int _read_head(self, char* data, size_t size) except -1:
        """Collect the head, over interim answers; then read on in the body."""
        cdef char* end
        cdef size_t head
        if self._body_len:
            self._hold(data, size)
            data, size = self._body, self._body_len
        while True:
            end = <char*>memmem(data, size, <const char*>CRLF2, 4)
            if end == NULL:
                if size > MOST_HEAD:
                    return self._broken("its answer's head is too large")
                if self._body_len == 0:
                    self._hold(data, size)
                else:
                    memmove(self._body, data, size)
                    self._body_len = size
                return 0
            head = end + 4 - data
            if not self._understood(data, head):
                self._reused = False
                return self._broken("its answer is not HTTP/1.1 as it should be")
            data += head
            size -= head
            if self._status >= 200:
                break
            self._framing = HEAD
            self._reused = False  # the request was seen: it is not sent again
        # `data` may lie in the buffer that the body is held in; only what comes next writes there, and from its start
        self._body_len = 0
        if self._mode == EVENTS:
            self._client._scanner = self._scanner_of(self._client)
        return self._read_body(data, size)

    cdef EventScanner _scanner_of(self, Client client):
        """What the events of this answer go through."""
        cdef EventScanner scanner
        if client._riding and not self._twice:
            scanner = EventScanner.__new__(EventScanner)
            scanner.withhold_usage = (<Flow>client._exchange)._withholds
            return scanner
        return client._python().scan(self._headers())

    cdef bint _is_plain(self) noexcept:
        """An answer of the ordinary kind, of which Python need not know."""
        return self._status == 200 and not self._twice and not self._coded

    cdef dict _headers(self):
        """The headers that are passed on, the last of those with one name."""
        cdef dict headers = {}
        cdef const char* line = self._passed.data()
        cdef const char* end = line + self._passed.size()
        cdef const char* colon
        cdef const char* stop
        while line < end:
            colon = <const char*>memchr(line, 58, end - line)
            stop = <const char*>memchr(colon, 13, end - colon)
            headers[_text(line, colon - line)] = _text(colon + 2, stop - colon - 2)
            line = stop + 2
        return headers

    cdef int _pass_on(self, const Field* field) except -1:
        """Keep a line of the head for the client."""
        cdef string line
        line.append(b"\n")
        line.append(field.name, field.size)
        line.append(b": ")
        if self._passed.find(line.data() + 1, 0, line.size() - 1) == 0 or self._passed.find(line) != <size_t>-1:
            self._twice = True
        self._passed.append(line.data() + 1, line.size() - 1)
        self._passed.append(field.value, field.length)
        self._passed.append(b"\r\n")
        return 0

    cdef bint _understood(self, const char* head, size_t size) except -1:
        """Read status, framing and the headers that are passed on; False for what is not strictly HTTP/1.1."""
        cdef Field field
        cdef const char* end = head + size - 2
        cdef const char* p
        cdef bint chunked = False, events = False
        cdef int count = 0
        self._passed.clear()
        self._twice = self._coded = False
        if size < 16 or memcmp(head, b"HTTP/1.", 7) != 0 or head[8] != 32 or not 48 <= head[7] <= 49:
            return False
        self._status = <int>_digits(head + 9, 3)
        if self._status < 100 or self._status == 101 or (head[12] != 32 and head[12] != 13):
            return False  # 101: nobody asked for another protocol, and what follows is not HTTP
        p = <const char*>memchr(head, 10, size) + 1
        if (p - 2)[0] != 13:
            return False
        self._length = -1
        self._reusable = head[7] == 49
        while p < end:
            p = _field(p, end, &field)
            count += 1
            if p == NULL or count > 2 * MOST_HEADERS:
                return False
            if field.size == 0:
                continue
            if _named(&field, b"content-length", 14):
                if self._length >= 0:
                    return False
                self._length = _digits(field.value, field.length)
                if self._length < 0:
                    return False
                continue
            if _named(&field, b"transfer-encoding", 17):
                if chunked or not _same(field.value, field.length, b"chunked", 7):
                    return False
                chunked = True
                continue
            if _named(&field, b"connection", 10):
                self._reusable = self._reusable and _same(field.value, field.length, b"keep-alive", 10)
                continue
            self._coded = self._coded or _named(&field, b"content-encoding", 16)
            if self._relay._passed.at(field.name, field.size) >= 0 or self._relay._passed_families.begins(
                field.name, field.size
            ):
                self._pass_on(&field)
                if _named(&field, b"content-type", 12):
                    events = field.length >= 17 and memcmp(field.value, b"text/event-stream", 17) == 0
        if chunked and self._length >= 0:
            return False
        self._mode = EVENTS if events and not self._coded and 200 <= self._status < 300 else HELD
        self._chunk = SIZE
        self._digits = 0
        self._left = self._length
        if self._status == 204 or self._status == 304:
            self._framing = LENGTH
            self._length = self._left = 0
        elif chunked:
            self._framing = CHUNKED
            self._left = 0
        else:
            self._framing = LENGTH if self._length >= 0 else UNTIL_CLOSE
            self._reusable = self._reusable and self._length >= 0
        return True

    cdef int _read_body(self, char* data, size_t size) except -1:
        """Take the framing off, in place, and pass the payload on as one piece."""
        cdef size_t payload = size, used = size
        if self._framing == LENGTH:
            if <long long>size >= self._left:
                payload = used = self._left
                self._framing = COMPLETE
            self._left -= payload
        elif self._framing == CHUNKED:
            payload = self._unchunk(data, size, &used)
            if payload == <size_t>-1:
                self._reused = False
                return self._broken("its answer's chunks are malformed")
        if self._framing == COMPLETE and used < size:
            self._reusable = False  # it sent more than it was asked for
        if self._framing == COMPLETE or payload:
            return self._client._payload(data, payload, self._framing == COMPLETE)
        return 0

    cdef size_t _unchunk(self, char* data, size_t size, size_t* used) noexcept:
        """Move the payload together at the start of `data`; its size, or -1 for what is malformed."""
        cdef char* to = data
        cdef char* p = data
        cdef char* end = data + size
        cdef size_t run
        cdef char c
        while p < end:
            if self._chunk == DATA:
                run = end - p
                if <long long>run > self._left:
                    run = self._left
                if to != p:
                    memmove(to, p, run)
                to += run
                p += run
                self._left -= run
                if self._left == 0:
                    self._chunk = DATA_CR
                continue
            c = p[0]
            p += 1
            if self._chunk == SIZE:
                if _is_hex(c):
                    self._left = self._left * 16 + (c - 48 if c <= 57 else (c | 32) - 87)
                    self._digits += 1
                    if self._digits > 12:
                        return <size_t>-1
                elif self._digits == 0:
                    return <size_t>-1
                elif not self._after_size(c):
                    return <size_t>-1
            elif self._chunk == PADDING:
                if not self._after_size(c):
                    return <size_t>-1
            elif self._chunk == EXTENSION:
                if c == 13:
                    self._chunk = SIZE_LF
                elif not vr_text(c):
                    return <size_t>-1
            elif self._chunk == SIZE_LF:
                if c != 10:
                    return <size_t>-1
                self._digits = 0
                self._chunk = DATA if self._left else TRAILER
            elif self._chunk == DATA_CR:
                if c != 13:
                    return <size_t>-1
                self._chunk = DATA_LF
            elif self._chunk == DATA_LF:
                if c != 10:
                    return <size_t>-1
                self._chunk = SIZE
            elif self._chunk == TRAILER:
                self._chunk = LAST_LF if c == 13 else TRAILER_NAME
                if not (c == 13 or vr_token(c)):
                    return <size_t>-1
            elif self._chunk == TRAILER_NAME:
                if c == 58:
                    self._chunk = TRAILER_LINE
                elif not vr_token(c):
                    return <size_t>-1
            elif self._chunk == TRAILER_LINE:
                if c == 13:
                    self._chunk = TRAILER_LF
                elif not vr_text(c):
                    return <size_t>-1
            elif self._chunk == TRAILER_LF:
                if c != 10:
                    return <size_t>-1
                self._chunk = TRAILER
            else:
                if c != 10:
                    return <size_t>-1
                self._framing = COMPLETE
                break
        used[0] = p - data
        return to - data

    cdef bint _after_size(self, char c) noexcept:
        """What may follow a chunk's size: its extensions, the line's end, and blanks before either."""
        if c == 13:
            self._chunk = SIZE_LF
        elif c == 59:
            self._chunk = EXTENSION
        elif c == 32 or c == 9:
            self._chunk = PADDING
        else:
            return False
        return True

    cdef int _hold(self, const char* data, size_t size) except -1:
        """Add to what is held. `data` may lie in the same buffer, not before the end of what is held."""
        cdef size_t at = data - self._body if self._body != NULL else 0
        cdef bint inside = self._body != NULL and self._body <= data < self._body + self._body_cap
        if self._body_len + size > self._body_cap:
            self._body = _grown(self._body, &self._body_cap, self._body_len + size)
        if inside:
            data = self._body + at
        if size:
            memmove(self._body + self._body_len, data, size)
        self._body_len += size
        return 0

    cdef int _remember(self, const char* data, size_t size) except -1:
        """Keep the last of an answer that is too large to be held."""
        if size > TAIL:
            data += size - TAIL
            size = TAIL
        self._hold(data, size)
        return self._keep_tail()

    cdef int _keep_tail(self) except -1:
        if self._body_len > 2 * TAIL:
            memmove(self._body, self._body + self._body_len - TAIL, TAIL)
            self._body_len = TAIL
        if self._body_cap > MOST_ANSWER:
            self._body = _grown(self._body, &self._body_cap, 4 * TAIL)
        return 0

    cdef void _let_go(self) noexcept:
        """Hold nothing of the answer, and no buffer larger than most answers need."""
        self._body_len = 0
        if self._body_cap > SCRATCH:
            free(self._body)
            self._body = NULL
            self._body_cap = 0

    cdef bytes _tail(self):
        return PyBytes_FromStringAndSize(self._body, self._body_len) if self._mode == THROUGH else b""

    cdef int _release(self) except -1:
        """The answer is over: back to the pool, unless something speaks against it."""
        self._client._up = None
        self._client = None
        if not self._reusable or self._out_len or self._relay._closing or self._pool._keep <= 0:
            return self._drop(True)
        if self._tls is not None and not self._reused:
            self._pool._session = self._tls.session()
        self._watch(EPOLLIN)
        self._pool._idle.append(self)
        self._limit_at(self._relay._now + self._pool._keep)
        return 0


cdef class Bridge(Conn):
    """One of two ends: a client that speaks TLS, and a socket on which somebody else hears in plain text what it says.

    Nothing is read at one end while the other has something to write. `_other` is None once that is closed: then this
    one, a client's, closes when all is written.
    """

    cdef Bridge _other

    cdef int _ready(self, unsigned events) except -1:
        if events & EPOLLOUT:
            self._flushed(self._flush())
        if not self._closed and events & (EPOLLIN | EPOLLRDHUP | EPOLLHUP | EPOLLERR):
            self._readable()
        return 0

    cdef int _expired(self) except -1:
        return self._leave()

    cdef int _flushed(self, int state) except -1:
        if state < 0 or (state == 1 and self._other is None):
            return self._leave()
        if self._tls is not None:  # the other end has no limit: it may be busy with what came before
            self._limit_at(NEVER if state else self._relay._now + self._relay._stall)
        return self._balance()

    cdef int _readable(self) except -1:
        cdef ssize_t size = self._pass_on()
        if size < 0 and (errno == EAGAIN or errno == EINTR):
            return 0
        if size <= 0 or self._ended():
            return self._leave()
        return 0

    cdef ssize_t _pass_on(self) except? -1:
        """Give the other end what has come, to be written at the end of the turn; as `recv` answers."""
        cdef iovec part
        cdef ssize_t size
        if self._other is None:
            return 0
        part.iov_base = self._relay._scratch
        size = self._plain()
        if size > 0:
            part.iov_len = size
            if not self._other._put(&part, 1):
                return 0
        return size

    cdef int _balance(self) except -1:
        self._look()
        if self._other is not None:
            self._other._look()
        return 0

    cdef int _look(self) except -1:
        """Watch for what can be done."""
        cdef unsigned mask = 0
        if self._other is not None and self._other._out_len == 0:
            mask = EPOLLIN | EPOLLRDHUP
        if self._out_len:
            mask |= EPOLLOUT
        self._watch(mask)
        return 0

    cdef int _leave(self) except -1:
        """Close this end, and the other one: a client's once it has got all that was said to it."""
        cdef Bridge other = self._other
        self._other = None
        self._drop(True)
        if other is None:
            return 0
        other._other = None
        return other._say() if other._out_len and other._tls is not None else other._drop(True)

    cdef int _cut(self) except -1:
        """Close both ends now, with what has been said to the client."""
        cdef Bridge other = self._other
        if self._tls is None:
            while self._pass_on() > 0 and other._flush() == 1:
                pass
        self._other = None
        self._drop(True)
        if other is not None:
            other._other = None
            other._drop(True)
        return 0


cdef inline bint _is_hex(char c) noexcept nogil:
    return 48 <= c <= 57 or 97 <= (c | 32) <= 102


cdef class Relay:
    """The connections, their limits, and the way to Python. See `_relay.pyi`."""

    cdef int _ep
    cdef object _owner
    cdef Names _paths, _kept, _foreign, _passed, _passed_families
    cdef long long _now, _keepalive, _stall, _handshake, _ticked
    cdef set _open_conns
    cdef list _grave, _slots
    cdef list _asked, _unsent  # who has something to send when the turn ends: requests, which go first, and the rest
    cdef char* _scratch
    cdef char* _viewed  # by `_view`
    cdef object _view
    cdef string _text  # for one function's use at a time
    cdef string _date  # the last line of every head, and the empty one, of this second
    cdef time_t _second
    cdef public bint passing
    cdef bint _accepted  # somebody, in this turn
    cdef dict _kinds  # (memo, flow) by the digest of what is said
    cdef size_t _max_head, _max_body
    cdef int _max_depth
    cdef unsigned long long _generation  # of the flows that are good
    cdef int _host  # the place of `host` in `_kept`
    cdef vector[char*] _spare
    cdef bint _lent, _closing

    def __cinit__(
        self, owner, *, paths, kept, foreign, passed, passed_families, double keepalive_s, double stall_s,
        double handshake_s
    ):
        self._owner = owner
        self._paths = Names(paths)
        self._kept = Names(kept)
        self._host = self._kept.at(b"host", 4)
        if self._host < 0:
            raise ValueError("host must be kept: a request without it is not taken")
        self._foreign = Names(foreign)
        self._passed = Names(passed)
        self._passed_families = Names(passed_families)
        self._keepalive = <long long>(keepalive_s * SECOND)
        self._stall = <long long>(stall_s * SECOND)
        self._handshake = <long long>(handshake_s * SECOND)
        self._open_conns = set()
        self._grave = []
        self._asked, self._unsent = [], []
        self._slots = [[] for _ in range(SLOTS)]
        self._kinds = {}
        self._now = vr_now()
        self._ticked = self._now // TICK
        self._scratch = <char*>malloc(SCRATCH)
        self._ep = epoll_create1(EPOLL_CLOEXEC)
        if self._scratch == NULL or self._ep < 0:
            raise MemoryError

    def __dealloc__(self):
        cdef char* spare
        free(self._scratch)
        for spare in self._spare:
            free(spare)
        if self._ep >= 0:
            epoll_close(self._ep)

    cdef object _view_of(self, char* at, size_t size):
        """The scratch buffer from there on, as Python sees it. It is kept, for most are of all of it."""
        if at != self._viewed:
            self._viewed = at
            self._view = PyMemoryView_FromMemory(at, size, PyBUF_WRITE)
        return self._view

    cdef char* _lend(self) except NULL:
        """A buffer of SCRATCH bytes."""
        cdef char* lent
        self._lent = True
        if self._spare.empty():
            lent = <char*>malloc(SCRATCH)
            if lent == NULL:
                raise MemoryError
            return lent
        lent = self._spare.back()
        self._spare.pop_back()
        return lent

    cdef int _take_back(self, char* lent) except -1:
        if self._spare.size() < MOST_SPARE:
            self._spare.push_back(lent)
        else:
            free(lent)
        return 0

    cdef string _date_line(self) except *:
        cdef time_t second = time(NULL)
        if second != self._second:
            self._date = <bytes>self._owner.date()
            self._second = second
        return self._date

    def forget_flows(self):
        """No request goes by a flow that there is now; those under way go on."""
        self._kinds.clear()
        self._generation += 1

    def bound(self, size_t max_head, size_t max_body, int max_depth):
        """What is larger, or whose body is nested deeper, is not taken."""
        self._max_head, self._max_body, self._max_depth = max_head, max_body, max_depth

    def fileno(self):
        """The epoll descriptor, for an event loop to watch."""
        return self._ep

    @property
    def now_s(self):
        """The clock of this turn, in monotonic seconds."""
        return self._now / 1e9

    @property
    def connections(self):
        """How many connections are open, to both sides, listeners included."""
        return len(self._open_conns)

    def listen(self, int fd, bint watched=True, tls=None):
        """Accept from this listening socket: as connections come, or where it is not `watched`, when told to. The
        descriptor, not blocking, is ours from now on. With a `tls` context it is spoken there."""
        cdef Listener listener = Listener.__new__(Listener)
        listener._context = tls
        vr_for_all(fd)
        listener._open(self, fd, EPOLLIN | EPOLLEXCLUSIVE if watched else 0)
        return listener

    def take_back(self, int fd, bytes data not None, str remote not None):
        """Go on with a connection that was handed over, from the start of a request, of which this was read. The
        descriptor, not blocking, is ours from now on."""
        cdef Client client = Client.__new__(Client)
        cdef bytes address = remote.encode()
        self._now = vr_now()
        memcpy(client._remote, PyBytes_AS_STRING(address), min(PyBytes_GET_SIZE(address), ADDRESS - 1))
        client._open(self, fd, EPOLLIN | EPOLLRDHUP)
        try:
            client._reserve_in(PyBytes_GET_SIZE(data))
            memcpy(client._in, PyBytes_AS_STRING(data), PyBytes_GET_SIZE(data))
            client._in_len = PyBytes_GET_SIZE(data)
            client._requests()
        except Exception:
            self._bug(client)
        self._end_turn()

    def stop_listening(self):
        """Accept nothing more; what is in the listen queue stays there."""
        for conn in list(self._open_conns):
            if isinstance(conn, Listener):
                (<Conn>conn)._drop(True)
        self._grave.clear()

    def pump(self):
        """Handle what is ready, up to 256 descriptors, and what those who were accepted have said already: to come back
        for that would be a turn of the loop."""
        self._now = vr_now()
        self._accepted = False
        self._handle()
        if self._accepted:
            self._handle()
        self._end_turn()

    cdef int _handle(self) except -1:
        cdef epoll_event events[BATCH]
        cdef int count, i
        cdef Conn conn
        count = epoll_wait(self._ep, events, BATCH, 0)
        for i in range(count):
            conn = <Conn>events[i].data.ptr
            if conn._closed:
                continue
            try:
                conn._ready(events[i].events)
            except Exception:
                self._bug(conn)
        return 0

    cdef int _end_turn(self) except -1:
        """Send what was said in this turn, and what that leads to. Requests go first: upstreams work on them then."""
        cdef Py_ssize_t asked = 0, at = 0
        cdef Conn conn
        while asked < len(self._asked) or at < len(self._unsent):
            if asked < len(self._asked):
                conn = <Conn>self._asked[asked]
                asked += 1
            else:
                conn = <Conn>self._unsent[at]
                at += 1
            conn._said = False
            if conn._closed:
                continue
            try:
                conn._flushed(conn._flush())
            except Exception:
                self._bug(conn)
        if asked:
            self._asked.clear()
        if at:
            self._unsent.clear()
        if self._grave:
            self._grave.clear()
        return 0

    def tick(self):
        """End what is over its limit. To be called every `TICK_S`; that is how late a limit may act."""
        cdef long long tick, until
        cdef Conn conn
        cdef list due
        self._now = vr_now()
        if not self._lent and not self._spare.empty():
            free(self._spare.back())
            self._spare.pop_back()
        self._lent = False
        until = self._now // TICK
        tick = max(self._ticked, until - SLOTS) + 1
        self._ticked = until
        while tick <= until:
            due = self._slots[tick % SLOTS]
            self._slots[tick % SLOTS] = []
            for conn in due:
                if conn._closed or conn._due > until * TICK:
                    continue
                conn._due = NEVER
                if conn._deadline > self._now:
                    if conn._deadline < NEVER:
                        self._arm(conn)
                    continue
                conn._deadline = NEVER
                try:
                    conn._expired()
                except Exception:
                    self._bug(conn)
            tick += 1
        self._end_turn()

    cdef int _arm(self, Conn conn) except -1:
        """Look at this connection when its limit is due, or when the wheel has turned once."""
        cdef long long tick = conn._deadline // TICK + 1
        if tick > self._ticked + SLOTS - 1:
            tick = self._ticked + SLOTS - 1
        if tick <= self._ticked:
            tick = self._ticked + 1
        conn._due = tick * TICK
        (<list>self._slots[tick % SLOTS]).append(conn)
        return 0

    def cut_off(self):
        """End every exchange with what can still be said."""
        self._now = vr_now()
        for conn in list(self._open_conns):
            if isinstance(conn, Client) and (<Client>conn)._exchange is not None:
                try:
                    (<Client>conn)._fail(K_STOPPING, "")
                except Exception:
                    self._bug(conn)
        self._end_turn()

    def close(self):
        """Close every connection that is not busy, now, and the others once they are not. Idempotent."""
        self._closing = True
        self.stop_listening()
        for conn in list(self._open_conns):
            if isinstance(conn, Client):
                if (<Client>conn)._exchange is None:
                    (<Conn>conn)._drop(True)
            elif isinstance(conn, Bridge):
                (<Bridge>conn)._cut()
            elif (<Upstream>conn)._client is None:
                (<Conn>conn)._drop(True)
        self._grave.clear()

    cdef int _bug(self, Conn conn) except -1:
        """An error of ours: this exchange ends, everything else goes on."""
        cdef Client client = None
        if isinstance(conn, Client):
            client = <Client>conn
        elif isinstance(conn, Upstream):
            client = (<Upstream>conn)._client
        elif isinstance(conn, Bridge):
            (<Bridge>conn)._leave()
        exchange = None
        if client is not None:
            try:
                exchange = client._python()
            except Exception:
                exchange = None  # it cannot even be told what was under way
            client._exchange = None
            client._riding = False
            if client._up is not None:
                client._up._client = None
                client._up._drop(True)
                client._up = None
            client._drop(True)
        if not isinstance(conn, Listener):  # whom it could not accept is one, and the next one may be accepted
            conn._drop(True)
        self._owner.bug(exchange)
        return 0
