# distutils: language = c++
# cython: language_level=3, binding=False, boundscheck=False, wraparound=False, cdivision=True
"""The native twin of `_backlog_py.py`, which is its specification: the same sums in the same order, so the same answers
to the last bit.

The moments are in one sorted vector, first to last; those before `_first` have left. Most leave at the front and come
at the back, so little is moved. Refused: a tree, which costs more than it saves below some 100,000 tickets.
"""

from libcpp.algorithm cimport lower_bound, upper_bound
from libcpp.vector cimport vector

ctypedef double* doublep


cdef class Backlog:
    """Sums over the waiting tickets of one model. See the pure twin."""

    cdef vector[double] _dues
    cdef Py_ssize_t _first
    cdef double _epoch, _k2, _k2t, _k2tt, _k3, _k3t, _k3tt, _k3ttt

    def __len__(self):
        return self._size()

    def __repr__(self):
        return f"<Backlog {self._size()} waiting>"

    def add(self, double since_s, double due_s):
        """A ticket waits."""
        _check(since_s, due_s)
        if self._size() == 0:
            self._clear(since_s)
        cdef double* place = upper_bound[doublep, double](self._begin(), self._end(), due_s)
        self._dues.insert(self._dues.begin() + (place - self._dues.data()), due_s)
        self._count(since_s, due_s, 1.0)

    def remove(self, double since_s, double due_s):
        """It waits no more."""
        _check(since_s, due_s)
        cdef Py_ssize_t place = <Py_ssize_t>self._dues.size() - self._on_time(due_s)
        if place == <Py_ssize_t>self._dues.size() or self._dues[place] != due_s:
            raise ValueError(f"nobody who waits is due at {due_s}")
        self._take_out(place)
        self._count(since_s, due_s, -1.0)

    def on_time(self, double at_s):
        """How many are on time if let in at this moment."""
        return self._on_time(at_s)

    def weight(self, double now, double scale):
        """What their ages weigh together."""
        if scale == 0.0:
            raise ZeroDivisionError("scale is 0")
        return self._weight(now, scale)

    def gain(self, double at_s, double later_s, double regret, double scale):
        """What letting them in at this moment gains over doing it later."""
        if scale == 0.0:
            raise ZeroDivisionError("scale is 0")
        return self._on_time(at_s) - regret * self._on_time(later_s) + self._weight(at_s, scale)

    cdef inline Py_ssize_t _size(self) noexcept:
        return <Py_ssize_t>self._dues.size() - self._first

    cdef inline double* _begin(self) noexcept:
        return self._dues.data() + self._first

    cdef inline double* _end(self) noexcept:
        return self._dues.data() + self._dues.size()

    cdef inline Py_ssize_t _on_time(self, double at_s) noexcept:
        return self._end() - lower_bound[doublep, double](self._begin(), self._end(), at_s)

    cdef inline double _weight(self, double now, double scale) noexcept:
        cdef double t = now - self._epoch
        cdef double square = self._k2 * t * t - 2.0 * self._k2t * t + self._k2tt
        cdef double cube = self._k3 * t * t * t - 3.0 * self._k3t * t * t + 3.0 * self._k3tt * t - self._k3ttt
        cdef double weight = 0.5 * (square / (scale * scale) + cube / (scale * scale * scale))
        return weight if weight > 0.0 else 0.0

    cdef inline void _take_out(self, Py_ssize_t place) noexcept:
        """By moving whichever side is shorter; the room before `_first` is given up once it is most of the vector."""
        cdef Py_ssize_t i
        if place - self._first > self._size() // 2:
            self._dues.erase(self._dues.begin() + place)
            return
        for i in range(place, self._first, -1):
            self._dues[i] = self._dues[i - 1]
        self._first += 1
        if self._first > self._size():
            self._dues.erase(self._dues.begin(), self._dues.begin() + self._first)
            self._first = 0

    cdef inline void _clear(self, double epoch) noexcept:
        self._epoch = epoch
        self._k2 = self._k2t = self._k2tt = 0.0
        self._k3 = self._k3t = self._k3tt = self._k3ttt = 0.0

    cdef inline void _count(self, double since_s, double due_s, double sign) noexcept:
        cdef double t = since_s - self._epoch
        cdef double k = 1.0 / (due_s - since_s)
        cdef double k2 = sign * k * k
        cdef double k3 = k2 * k
        self._k2 += k2
        self._k2t += k2 * t
        self._k2tt += k2 * t * t
        self._k3 += k3
        self._k3t += k3 * t
        self._k3tt += k3 * t * t
        self._k3ttt += k3 * t * t * t


cdef inline int _check(double since_s, double due_s) except -1:
    if not since_s < due_s:
        raise ValueError(f"a ticket that waits since {since_s} is due at {due_s}; use a patience above 0")
    return 0
