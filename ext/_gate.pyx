# distutils: language = c++
# cython: language_level=3, binding=False, boundscheck=False, wraparound=False, cdivision=True
"""The gate of requests of one kind, native: what they take before they go, and what is written when they have ended.

Python decides on the first request of a kind, and makes a gate of what it found: who asks, which limits count it, where
it goes and why, what its answer's head and its lines in the logs say. Those that follow take the same steps here, on
the same counters, without an object for each. Only the ordinary course is known here: a request admitted at once, an
answer of 200 that says plainly what it used. All else is Python's (`proxy.server.fast`), and so is this gate's
specification.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.unicode cimport PyUnicode_DecodeASCII
from libc.math cimport llrint
from libc.stdint cimport uint64_t
from libc.string cimport memchr, memcmp, memcpy

from ext._json_lines cimport put_steps, put_whole
from ext._rate_counters cimport LINES, Short, cancel, grant_of, header_lines, reserve, settle

import os

cdef extern from *:
    """
    #include <time.h>
    static inline double vr_wall(void) {
        struct timespec t;
        clock_gettime(CLOCK_REALTIME, &t);
        return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
    }
    """
    double vr_wall() noexcept nogil

# What differs between two lines of one form: `ext.relay.Field`.
cdef enum:
    NOTHING, AT, AT_MS, ID, REMOTE, FIRST_BYTE, DURATION, IN, OUT, PROMPT, CACHED, OUTPUT, REASON

cdef uint64_t[2] _random  # an id is no secret, and the system's own randomness costs a call into the kernel
_seed = os.urandom(16)
memcpy(_random, PyBytes_AS_STRING(_seed), 16)
_random[0] |= 1


cdef inline uint64_t _next() noexcept nogil:
    """xorshift128+ (Vigna, https://arxiv.org/abs/1404.0390)."""
    cdef uint64_t a = _random[0]
    cdef uint64_t b = _random[1]
    _random[0] = b
    a ^= a << 23
    _random[1] = a ^ b ^ (a >> 17) ^ (b >> 26)
    return _random[1] + b


cdef void _new_id(char* id) noexcept nogil:
    """As `proxy.server.handler.new_request_id` makes one: 96 random bits."""
    cdef uint64_t bits = 0
    cdef int i
    memcpy(id, b"req-", 4)
    for i in range(GIVEN - 4):
        if i % 16 == 0:
            bits = _next()
        id[4 + i] = b"0123456789abcdef"[bits & 15]
        bits >>= 4


cdef extern from "_siphash.h":
    void vr_siphash(const unsigned char* key, const unsigned char* text, size_t size, unsigned char* out) noexcept nogil

_secret = os.urandom(16)


def siphash(bytes text not None, bytes key not None):
    """SipHash-2-4 of the text, 16 bytes, under a key of 16."""
    cdef unsigned char[16] out
    if len(key) != 16:
        raise ValueError(f"the key has {len(key)} bytes; use 16")
    vr_siphash(<const unsigned char*>PyBytes_AS_STRING(key), <const unsigned char*>PyBytes_AS_STRING(text),
               PyBytes_GET_SIZE(text), out)
    return PyBytes_FromStringAndSize(<char*>out, 16)


cdef bytes digest(const string* text):
    """What stands for a text that must not be kept: nobody can choose two of one digest, or find one from it."""
    cdef unsigned char[16] out
    vr_siphash(<const unsigned char*>PyBytes_AS_STRING(_secret), <const unsigned char*>text.data(), text.size(), out)
    return PyBytes_FromStringAndSize(<char*>out, 16)


cdef class Form:
    """A line of which only some fields differ from request to request.

    `fields` are (what stands before it, which of `Field`): the text is written as it is, then the field. A `sparse`
    form leaves out a field that nobody told, with its text.
    """

    def __init__(self, fields, *, bint sparse=False):
        cdef bytes text
        for text, field in fields:
            self._texts.push_back(string(PyBytes_AS_STRING(text), PyBytes_GET_SIZE(text)))
            self._fields.push_back(field)
        self._sparse = sparse

    cdef bytes _line(self, const Ride* ride, double at_s):
        cdef string line
        cdef size_t i
        cdef long long count
        cdef int field
        line.reserve(640)
        for i in range(self._fields.size()):
            field = self._fields[i]
            count = 0
            if PROMPT <= field <= OUTPUT:
                count = ride.prompt if field == PROMPT else ride.cached if field == CACHED else ride.output
            if self._sparse and (count < 0 or (field == REASON and not ride.reason_size)):
                continue
            if self._sparse and field == REMOTE and not ride.remote_size:
                continue
            line.append(self._texts[i])
            if field == NOTHING:
                continue
            elif field == AT:
                put_steps(&line, at_s)
            elif field == AT_MS:
                put_steps(&line, <double>llrint(at_s * 1000) / 1000)
            elif field == ID:
                _quoted(&line, ride.id, GIVEN)
            elif field == REMOTE:
                _quoted(&line, ride.remote, ride.remote_size)
            elif field == FIRST_BYTE:
                put_steps(&line, ride.first_byte_s - ride.began_s)
            elif field == DURATION:
                put_steps(&line, ride.ended_s - ride.began_s)
            elif field == IN:
                put_whole(&line, ride.bytes_in)
            elif field == OUT:
                put_whole(&line, ride.bytes_out)
            elif field == REASON:
                if ride.reason_size:
                    _quoted(&line, ride.reason, ride.reason_size)
                else:
                    line.append(b"null")
            elif count < 0:
                line.append(b"null")
            else:
                put_whole(&line, count)
        return PyBytes_FromStringAndSize(line.data(), line.size())


cdef inline void _quoted(string* line, const char* text, size_t size) noexcept:
    """What takes no escapes: ids, addresses, and what was read from JSON without any."""
    line.push_back(34)
    line.append(text, size)
    line.push_back(34)


cdef void _append(string* head, const string* lines, bint limited) noexcept:
    """The upstream's lines; without its limits where the caller has its own here, which are not the caller's."""
    cdef const char* line = lines.data()
    cdef const char* end = line + lines.size()
    cdef const char* following
    if not limited or lines.find(b"x-ratelimit-") == <size_t>-1:
        head.append(lines[0])
        return
    while line < end:
        following = <const char*>memchr(line, 10, end - line) + 1
        if following - line < 12 or memcmp(line, b"x-ratelimit-", 12) != 0:
            head.append(line, following - line)
        line = following


cdef class Gate:
    """What requests of one kind have in common. `limits` are the meters of the key and of the model, or None.

    `stated` tokens and `guessed` ones more are reserved with what the body's size says. `facts` are lines of the
    answer's head: before the id, between it and the milliseconds upstream, after those. `forms` are (form, who takes
    its line).
    """

    def __init__(
        self,
        *,
        Occupancy flying not None,
        Occupancy slots,
        tuple limits not None,
        long long stated,
        long long guessed,
        int bytes_per_token,
        Tally tally not None,
        tuple facts not None,
        list forms not None,
    ):
        self.flying, self.slots, self.tally = flying, slots, tally
        self.key, self.model = limits
        self._stated, self._guessed, self._bytes_per_token = stated, guessed, bytes_per_token
        self._facts, self._wait, self._rest = facts
        self._forms = forms

    cdef bint _admit(self, Ride* ride, string* rates) noexcept:
        """Take all that the request needs, or nothing. `bytes_in` and `began_s` are known."""
        cdef char lines[LINES]
        cdef long long guessed
        cdef Short short
        rates.clear()
        if self.slots is not None and not self.slots._take():
            return False
        if self.key is not None or self.model is not None:
            guessed = self._guessed + ride.bytes_in // self._bytes_per_token
            if not reserve(
                self.key, self.model, self._stated, guessed, ride.began_s, &ride.key_cost, &ride.model_cost, &short
            ):
                if self.slots is not None:
                    self.slots.taken -= 1  # nobody can have begun to wait since
                return False
            rates.assign(lines, header_lines(lines, self.key, self.model, ride.began_s))
        self.flying._take()
        _new_id(ride.id)
        ride.first_byte_s = 0.0
        ride.bytes_out = 0
        return True

    cdef int _withdraw(self, const Ride* ride) except -1:
        """As if it had not been admitted."""
        if self.slots is not None:
            self.slots._give()
        cancel(self.key, self.model, ride.key_cost, ride.model_cost)
        return self.flying._give()

    cdef object _grant(self, const Ride* ride, const string* rates):
        """What was reserved, for Python to settle."""
        if self.key is None and self.model is None:
            return None
        headers = PyUnicode_DecodeASCII(rates.data(), rates.size(), NULL)
        return grant_of(self.key, self.model, ride.key_cost, ride.model_cost, headers)

    cdef void _head(self, const Ride* ride, const string* passed, const string* rates, string* head) noexcept:
        """All of an answer's head but its framing and its date. `passed` are the upstream's lines."""
        head.assign(b"HTTP/1.1 200 OK\r\n")
        _append(head, passed, rates.size() > 0)
        head.append(self._facts)
        head.append(ride.id, GIVEN)
        head.append(self._wait)
        put_whole(head, llrint((ride.first_byte_s - ride.began_s) * 1000))
        head.append(self._rest)
        head.append(rates[0])
        head.append(b"server: vramp\r\n")

    cdef int _settle(self, Ride* ride) except -1:
        """An answer ended as it should: count it, write its lines, give back what it held."""
        cdef long long used = -1
        cdef double first_byte_s = ride.first_byte_s - ride.began_s
        cdef double at_s
        if self.slots is not None:
            self.slots._give()
        self.flying._give()
        if ride.prompt >= 0:
            used = ride.prompt + (ride.output if ride.output > 0 else 0)
        settle(self.key, self.model, ride.key_cost, ride.model_cost, used, ride.ended_s)
        self.tally._ended(200, ride.ended_s - ride.began_s)
        self.tally._answered(first_byte_s, first_byte_s, 0.0, 0.0)
        self.tally._used(
            ride.prompt if ride.prompt > 0 else 0,
            ride.cached if ride.cached > 0 else 0,
            ride.output if ride.output > 0 else 0,
        )
        if self._forms:
            at_s = vr_wall()
            for form, take in self._forms:
                take((<Form>form)._line(ride, at_s))
        return 0
