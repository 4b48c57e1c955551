# Clients: requests in, answers out.


cdef bint _usage_told(bytes usage, Answered* said) noexcept:
    return usage is None or read_usage_into(
        <const unsigned char*>PyBytes_AS_STRING(usage), PyBytes_GET_SIZE(usage), said
    )


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
            return self._bare() if self._shaking and self._tls.bare else self._gone()
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
            self._relay._viewed = NULL
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
        with extensions, trailers, nothing in it, or more than a body may have. `_more` of it may be to come.

        An upstream's answer has a reader of its own: it joins in place and passes on part of a chunk; here every byte
        stays as it came, for the ordinary lane may get the connection yet."""
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

    cdef int _bare(self) except -1:
        """It speaks no TLS, but can be told."""
        cdef int fd = self._fd
        self._tls = None
        self._drop(False)
        self._relay._owner.refuse_bare(fd, self.remote)
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
