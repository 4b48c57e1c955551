# Upstreams: requests out, answers in.


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


cdef inline bint _is_hex(char c) noexcept nogil:
    return 48 <= c <= 57 or 97 <= (c | 32) <= 102
