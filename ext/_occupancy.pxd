"""Places that are counted, for other native modules."""


cdef class Occupancy:
    cdef readonly long long taken, most
    cdef public object on_give
    cdef inline bint _take(self) noexcept:
        if self.most and self.taken >= self.most:
            return False
        self.taken += 1
        return True
    cdef inline int _give(self) except -1:
        self.taken -= 1
        if self.on_give is not None:
            self.on_give()
        return 0
