# What all connections have in common: a descriptor in epoll, a limit, what waits to be written, TLS.


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
