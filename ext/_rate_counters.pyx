# distutils: language = c++
# cython: language_level=3, binding=False, cdivision=True
"""The native twin of `_rate_counters_py.py`, which is its specification: the same sums in the same order, so the same
answers to the last bit.
"""

from cpython.long cimport PyLong_AsLongLong

from math import inf

from ext._rate_counters_py import Remaining
from ext.errors import ClockWentBack

ctypedef long long int64

cdef double _WINDOW_S = 60.0
cdef double _INF = inf
cdef int64 _MAX_UNITS = 1LL << 62
cdef Py_ssize_t _FEWEST_KEYS = 1024

WINDOW_S = _WINDOW_S
MAX_UNITS = _MAX_UNITS


cdef inline int64 _count(object amount, str what) except -1:
    # Taken as objects because a C argument would cut a float to an integer in silence.
    cdef int64 count = PyLong_AsLongLong(amount)
    if count < 0:
        raise ValueError(f"{what} is {count}; use 0 or more")
    if count > _MAX_UNITS:
        raise OverflowError(f"{what} is {count}; use at most {_MAX_UNITS}")
    return count


cdef inline double _later(double a, double b) noexcept:
    return b if b > a else a


cdef int64 _left(double reset_s, int64 per_minute) noexcept:
    if per_minute == 0:
        return -1
    cdef double left = (_WINDOW_S - reset_s) * per_minute / _WINDOW_S + 1e-6
    return <int64>left if left > 0 else 0


cdef class _Key:
    cdef double requests_at, tokens_at  # when the bucket is full again


cdef class RateCounters:
    """Two limits for each of any number of keys. See the pure twin."""

    cdef dict _full_at
    cdef double _now
    cdef Py_ssize_t _forget_above

    def __cinit__(self):
        self._full_at = {}
        self._now = -_INF
        self._forget_above = _FEWEST_KEYS

    def __len__(self):
        return len(self._full_at)

    def reserve(self, str key not None, tokens, double now, requests_per_minute=0, tokens_per_minute=0):
        """Take one request and `tokens` from the key's limits: 0.0, or the seconds until both would be allowed."""
        cdef double requests_at, tokens_at, wait_s = 0.0
        cdef _Key full_at
        cdef int64 cost = _count(tokens, "tokens")
        cdef int64 request_limit = _count(requests_per_minute, "requests_per_minute")
        cdef int64 token_limit = _count(tokens_per_minute, "tokens_per_minute")
        self._advance(now)
        full_at = self._full_at.get(key)
        requests_at = now if full_at is None else full_at.requests_at
        tokens_at = now if full_at is None else full_at.tokens_at
        if request_limit:
            requests_at = _later(requests_at, now) + _WINDOW_S / request_limit
            wait_s = _later(wait_s, requests_at - now - _WINDOW_S)
        if token_limit:
            if cost > token_limit:
                return _INF
            tokens_at = _later(tokens_at, now) + cost * (_WINDOW_S / token_limit)
            wait_s = _later(wait_s, tokens_at - now - _WINDOW_S)
        if wait_s > 1e-9:
            return wait_s
        if full_at is None:
            full_at = self._full_at[key] = _Key.__new__(_Key)
        full_at.requests_at = requests_at
        full_at.tokens_at = tokens_at
        return 0.0

    def settle(self, str key not None, reserved, used, double now, tokens_per_minute=0):
        """Correct a reservation by what the answer really used."""
        cdef _Key full_at
        cdef int64 more = -_count(reserved, "reserved") + _count(used, "used")
        cdef int64 token_limit = _count(tokens_per_minute, "tokens_per_minute")
        self._advance(now)
        if not token_limit:
            return
        full_at = self._full_at.get(key)
        if full_at is None:
            full_at = self._full_at[key] = _Key.__new__(_Key)
            full_at.requests_at = full_at.tokens_at = now
        full_at.tokens_at = _later(full_at.tokens_at, now) + more * (_WINDOW_S / token_limit)

    def remaining(self, str key not None, double now, requests_per_minute=0, tokens_per_minute=0):
        """What the rate-limit headers say. Changes nothing but the clock."""
        cdef double requests_s = 0.0, tokens_s = 0.0
        cdef _Key full_at
        cdef int64 request_limit = _count(requests_per_minute, "requests_per_minute")
        cdef int64 token_limit = _count(tokens_per_minute, "tokens_per_minute")
        self._advance(now)
        full_at = self._full_at.get(key)
        if full_at is not None:
            requests_s = _later(full_at.requests_at - now, 0.0)
            tokens_s = _later(full_at.tokens_at - now, 0.0)
        return Remaining(
            _left(requests_s, request_limit), _left(tokens_s, token_limit),
            requests_s if request_limit else -1.0, tokens_s if token_limit else -1.0,
        )

    cdef int _advance(self, double now) except -1:
        cdef _Key at
        if now != now:
            raise ValueError("now is NaN; use seconds of a monotonic clock")
        if now < self._now:
            raise ClockWentBack(f"now is {now}, it was {self._now} before")
        self._now = now
        if len(self._full_at) > self._forget_above:
            for key in list(self._full_at):
                at = self._full_at[key]
                if _later(at.requests_at, at.tokens_at) <= now:
                    del self._full_at[key]
            self._forget_above = max(_FEWEST_KEYS, 2 * len(self._full_at))
        return 0

    def __repr__(self):
        return f"<RateCounters {len(self._full_at)} keys>"
