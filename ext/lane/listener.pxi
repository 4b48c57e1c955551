# Sockets that accept clients.


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
