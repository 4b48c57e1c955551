# distutils: language = c++
# cython: language_level=3, binding=False, boundscheck=False, wraparound=False, cdivision=True
"""The native twin of `_tally_py.py`, which is its specification."""

from libcpp.algorithm cimport lower_bound

from ext._tally_py import _rising
from ext import _tally_py as pure

cdef enum:
    CLASSES_ = 6

CLASSES = CLASSES_
assert pure.CLASSES == CLASSES


cdef class Histogram:
    """See the pure twin."""

    def __cinit__(self, bounds):
        self._bounds = _rising(bounds)
        self._counts.resize(self._bounds.size() + 1)

    def observe(self, double seconds):
        """Count one more."""
        self._observe(seconds)

    cdef void _observe(self, double seconds) noexcept:
        self._counts[lower_bound(self._bounds.begin(), self._bounds.end(), seconds) - self._bounds.begin()] += 1
        self._total_s += seconds

    @property
    def counts(self):
        """A copy, one for each bound and one for what is above."""
        return list(self._counts)

    @property
    def total_s(self):
        """The sum of what was observed."""
        return self._total_s

    def __repr__(self):
        return f"<Histogram of {sum(self._counts)}: {self._total_s:g} s>"


cdef class Tally:
    """See the pure twin."""

    def __cinit__(self, bounds):
        bounds = _rising(bounds)
        self.duration, self.first_byte = Histogram(bounds), Histogram(bounds)
        self.queue, self.load, self.upstream = Histogram(bounds), Histogram(bounds), Histogram(bounds)

    @property
    def statuses(self):
        """How many ended with a status of each class that there was, by its first digit."""
        return {each: self._statuses[each] for each in range(CLASSES_) if self._statuses[each]}

    def ended(self, int status, double duration_s):
        """Count a request that ended. Raises ValueError for what is no status."""
        if not 0 <= status < 100 * CLASSES_:
            raise ValueError(f"status is {status}; use 0 to {100 * CLASSES_ - 1}")
        self._ended(status, duration_s)

    cdef void _ended(self, int status, double duration_s) noexcept:
        self._statuses[status // 100] += 1
        self.duration._observe(duration_s)

    def failed(self):
        """Count one that ended with an error after its answer had begun."""
        self.errors += 1

    def answered(self, double first_byte_s, double upstream_s, double queue_s, double load_s):
        """Count an answer's waits."""
        self._answered(first_byte_s, upstream_s, queue_s, load_s)

    cdef void _answered(self, double first_byte_s, double upstream_s, double queue_s, double load_s) noexcept:
        self.first_byte._observe(first_byte_s)
        self.upstream._observe(upstream_s)
        if queue_s or load_s:
            self.queue._observe(queue_s)
            self.load._observe(load_s)
        else:
            self.unwaited += 1

    def used(self, long long input_tokens, long long cached_tokens, long long output_tokens):
        """Count tokens."""
        self._used(input_tokens, cached_tokens, output_tokens)

    cdef void _used(self, long long input_tokens, long long cached_tokens, long long output_tokens) noexcept:
        self.input_tokens += input_tokens
        self.cached_tokens += cached_tokens
        self.output_tokens += output_tokens

    def __repr__(self):
        return f"<Tally {self.statuses}>"
