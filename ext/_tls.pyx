# cython: language_level=3, binding=False, boundscheck=False, wraparound=False
"""TLS of one connection, between buffers: sealed bytes from and to a socket on one side, plain ones on the other.

It is CPython's own `ssl.SSLObject` over two `MemoryBIO`s, so there is one OpenSSL in the process, with one trust store
and one set of settings for both lanes. What it costs beside OpenSSL itself is a dozen calls for a request.
Refused: linking OpenSSL (a second one beside Python's, with headers to build and a version to follow), uvloop's
transports (five times a request's cost), and TLS in the kernel (Python's `ssl` gives nobody the keys).

Nothing here waits, or raises what a peer can cause: `words` says why the connection cannot be used any more, `bare`
that this is because the peer speaks HTTP without TLS, `ended` that it has ended the connection as TLS demands. An end
without that may be somebody else's, who cuts an answer short.
"""

from cpython.buffer cimport PyBUF_READ, PyBUF_WRITE
from cpython.bytes cimport PyBytes_FromStringAndSize
from cpython.memoryview cimport PyMemoryView_FromMemory

import ssl

from ext.tls_words import why


cdef class Tls:
    """One connection's TLS."""

    def __cinit__(self, context, str name, session=None):
        """The peer's certificate must be for `name`; without one the peer is a client. `session`: an earlier one with
        it to go on with, or None."""
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._object = context.wrap_bio(
            self._incoming, self._outgoing, server_side=name is None, server_hostname=name, session=session
        )
        inner = getattr(self._object, "_sslobj", self._object)  # around which its own are functions in Python
        self._read, self._write = inner.read, inner.write

    cdef int shake(self) except -2:
        """Go on with the handshake. 1: it is done; 0: the peer is to say something; -1: it failed."""
        try:
            self._object.do_handshake()
        except ssl.SSLWantReadError:
            return 0
        except ssl.SSLError as error:
            self.words = why(error)
            self.bare = self.bare or error.reason == "HTTP_REQUEST"
            return -1
        self.shaken = True
        return 1

    cdef int take(self, const char* data, size_t size) except -1:
        """What came from the peer."""
        self._incoming.write(PyBytes_FromStringAndSize(data, size))  # a view is dearer than the copy
        return 0

    cdef ssize_t read(self, char* to, size_t room, object view) except -1:
        """All plain text that is there; its size. There must be room for all that was taken and for a record more,
        which is what the `view` shows. What comes before it is the handshake."""
        cdef ssize_t got = 0, size
        if not self.shaken and self.shake() <= 0:
            return 0
        while True:
            try:
                size = self._read(room - got, view)
            except ssl.SSLWantReadError:
                return got
            except ssl.SSLError as error:
                self.words = why(error)
                return got
            if size == 0:
                self.ended = True
                return got
            got += size
            if not self._incoming.pending:  # to ask for more would end in an exception, which costs as much again
                return got
            view = PyMemoryView_FromMemory(to + got, room - got, PyBUF_WRITE)

    cdef bint write(self, const char* data, size_t size) except -1:
        """Seal this; False when the connection cannot be used any more."""
        try:
            self._write(PyMemoryView_FromMemory(<char*>data, size, PyBUF_READ))
        except ssl.SSLError as error:
            self.words = why(error)
            return False
        return True

    cdef bint speaks(self) except -1:
        """Whether something is to be sent to the peer."""
        return self._outgoing.pending > 0

    cdef bytes said(self):
        """What is to be sent to the peer, once."""
        return self._outgoing.read()

    cdef int part(self) except -1:
        """Say that nothing more will come from us. What the peer answers is not waited for."""
        try:
            self._object.unwrap()
        except ssl.SSLError:  # it wants to read that answer, or never came to an understanding with the peer
            pass
        return 0

    cdef object session(self):
        """What a later connection to this peer can go on with, without certificates."""
        return self._object.session
