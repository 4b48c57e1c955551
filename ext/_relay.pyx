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

Its parts are in `lane/`: `client`, `upstream`, `bridge` and `listener` are `conn`ections, `flow` is where they go,
`fields` are how they read a head. They know each other's innards, so they are compiled as one module.

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

cdef extern from "_sockets.h":
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


include "lane/fields.pxi"
include "lane/flow.pxi"
include "lane/conn.pxi"
include "lane/listener.pxi"
include "lane/client.pxi"
include "lane/upstream.pxi"
include "lane/bridge.pxi"


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
    cdef char* _viewed  # by `_view`; NULL once another buffer is the scratch buffer
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
