# Clients that speak TLS, on their way to the other lane.


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
