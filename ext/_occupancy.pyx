# distutils: language = c++
# cython: language_level=3, binding=False
"""The native twin of `_occupancy_py.py`, which is its specification."""

from ext.errors import NotHeld


cdef class Occupancy:
    """See the pure twin."""

    def __init__(self, long long most=0):
        if most < 0:
            raise ValueError(f"most is {most}; use 0 or more")
        self.most = most

    def take(self):
        """Take a place if one is free."""
        return self._take()

    def give(self):
        """Give a place back. Raises NotHeld where none is taken."""
        if not self.taken:
            raise NotHeld("no place is taken")
        self._give()

    def __repr__(self):
        return f"<Occupancy {self.taken} of {self.most or 'any'}>"
