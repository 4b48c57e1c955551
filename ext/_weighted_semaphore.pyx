# distutils: language = c++
# cython: language_level=3, binding=False, boundscheck=False, wraparound=False, cdivision=True
"""The native twin of `_weighted_semaphore_py.py`, which is its specification.

Tickets live in one vector of slots; a line is a doubly linked list through them, so leaving it is O(1) and nothing is
allocated per ticket once the vector has grown. A ticket number is a serial number and its slot, which makes looking it
up an index and a comparison. Refused: a hash table, whose allocations cost more than all the rest.
"""

from cpython.long cimport PyLong_AsLongLong
from cython.operator cimport dereference
from libcpp.pair cimport pair
from libcpp.set cimport set as ordered_set
from libcpp.vector cimport vector

from math import inf

from ext._weighted_semaphore_py import SemaphoreStats
from ext.errors import ClockWentBack, NeverFits, NotHeld, NotWaiting, QueueFull

ctypedef long long int64

cdef int64 _MAX_UNITS = 1LL << 62
cdef int _MAX_CLASSES = 64
cdef int _SLOT_BITS = 22  # four million live tickets, and two million million tickets in a life
cdef int64 _SLOT_MASK = (1LL << 22) - 1
cdef double _INF = inf
cdef int _NONE = -1

MAX_UNITS = _MAX_UNITS
MAX_CLASSES = _MAX_CLASSES


cdef inline int64 _units(object amount, str what) except -1:
    # Taken as objects because a C argument would cut a float to an integer in silence.
    cdef int64 units = PyLong_AsLongLong(amount)
    if units < 0:
        raise ValueError(f"{what} is {units}; use 0 or more")
    if units > _MAX_UNITS:
        raise OverflowError(f"{what} is {units}; use at most {_MAX_UNITS}")
    return units


cdef inline bint _fits(int64 amount, int64 free) noexcept nogil:
    return amount <= free or amount == 0


cdef class Capacity:
    """Counts what is held of two units; nobody waits here. See the pure twin."""

    cdef readonly int64 tokens, sequences, held_tokens, held_sequences

    def __init__(self, tokens, sequences=_MAX_UNITS):
        self.tokens = _units(tokens, "tokens")
        self.sequences = _units(sequences, "sequences")
        self.held_tokens = 0
        self.held_sequences = 0

    @property
    def free_tokens(self):
        """What may still be taken; negative while holders of a shrunken capacity finish."""
        return self.tokens - self.held_tokens

    @property
    def free_sequences(self):
        """What may still be taken; negative while holders of a shrunken capacity finish."""
        return self.sequences - self.held_sequences

    cdef inline bint _has_room(self, int64 tokens, int64 sequences) noexcept nogil:
        return _fits(tokens, self.tokens - self.held_tokens) and _fits(sequences, self.sequences - self.held_sequences)

    cdef inline void _take(self, int64 tokens, int64 sequences) noexcept nogil:
        self.held_tokens += tokens
        self.held_sequences += sequences

    def fits(self, tokens, sequences=1):
        """Whether `try_take` would succeed. Both units must fit."""
        return self._has_room(_units(tokens, "tokens"), _units(sequences, "sequences"))

    def try_take(self, tokens, sequences=1):
        """Take both units or neither; False when one does not fit."""
        cdef int64 want_tokens = _units(tokens, "tokens"), want_sequences = _units(sequences, "sequences")
        if not self._has_room(want_tokens, want_sequences):
            return False
        self._take(want_tokens, want_sequences)
        return True

    def give(self, tokens, sequences=1):
        """Give back what `try_take` took."""
        cdef int64 back_tokens = _units(tokens, "tokens"), back_sequences = _units(sequences, "sequences")
        if back_tokens > self.held_tokens or back_sequences > self.held_sequences:
            raise NotHeld(f"gave back {tokens} tokens and {sequences} sequences to {self!r}")
        self._take(-back_tokens, -back_sequences)

    def resize(self, tokens, sequences=_MAX_UNITS):
        """Set the capacity; what is held stays held, so free may become negative."""
        cdef int64 new_tokens = _units(tokens, "tokens"), new_sequences = _units(sequences, "sequences")
        self.tokens = new_tokens
        self.sequences = new_sequences

    def __repr__(self):
        return (
            f"<Capacity tokens {self.held_tokens}/{self.tokens} held,"
            f" sequences {self.held_sequences}/{self.sequences} held>"
        )


cdef struct Slot:
    int64 ticket  # 0: free
    int64 tokens
    int64 sequences
    double deadline_s
    int priority  # of a waiting ticket; _NONE: it holds its weight
    int before
    int after


cdef struct Line:
    int head
    int tail


cdef class WeightedSemaphore:
    """Two units, priority classes, FIFO inside a class, deadlines. See the pure twin."""

    cdef Capacity _capacity
    cdef vector[Slot] _slots
    cdef vector[int] _unused
    cdef vector[Line] _lines
    cdef ordered_set[pair[double, int64]] _deadlines
    cdef double _now
    cdef int64 _serial
    cdef int64 _acquired, _parked, _woken, _released, _cancelled, _expired, _refused, _peak_waiting, _held
    cdef readonly int64 waiting

    def __cinit__(self, tokens, sequences=_MAX_UNITS, classes=1):
        cdef int _
        cdef Line empty
        if not 1 <= classes <= _MAX_CLASSES:
            raise ValueError(f"classes is {classes}; use 1 to {_MAX_CLASSES}")
        self._capacity = Capacity(tokens, sequences)
        empty.head = empty.tail = _NONE
        for _ in range(classes):
            self._lines.push_back(empty)
        self._now = -_INF

    # -- counts

    @property
    def tokens(self):
        """Capacity."""
        return self._capacity.tokens

    @property
    def sequences(self):
        """Capacity."""
        return self._capacity.sequences

    @property
    def held_tokens(self):
        """The sum of what is granted and not yet released."""
        return self._capacity.held_tokens

    @property
    def held_sequences(self):
        """The sum of what is granted and not yet released."""
        return self._capacity.held_sequences

    @property
    def free_tokens(self):
        """Capacity less held; negative after a shrink until holders finish."""
        return self._capacity.free_tokens

    @property
    def free_sequences(self):
        """Capacity less held; negative after a shrink until holders finish."""
        return self._capacity.free_sequences

    @property
    def next_deadline_s(self):
        """When `expire` next has something to do; infinity when nobody has a deadline."""
        return _INF if self._deadlines.empty() else self._first_deadline().first

    def stats(self):
        """All counts in one value."""
        return SemaphoreStats(
            self._acquired, self._parked, self._woken, self._released, self._cancelled, self._expired,
            self._refused, self.waiting, self._peak_waiting, self._held,
        )

    # -- asking

    def try_acquire(self, tokens, sequences=1, priority=0):
        """A ticket that holds the weight, or 0 when it does not fit or would overtake. Never waits."""
        cdef int64 want_tokens = _units(tokens, "tokens"), want_sequences = _units(sequences, "sequences")
        cdef int line = self._line(priority)
        self._refuse_above(want_tokens, want_sequences)
        if not self._may_enter(want_tokens, want_sequences, line):
            return 0
        cdef Slot* slot = &self._slots[self._new_slot()]
        slot.tokens = want_tokens
        slot.sequences = want_sequences
        slot.priority = _NONE
        self._capacity._take(want_tokens, want_sequences)
        self._held += 1
        self._acquired += 1
        return slot.ticket

    def park(self, tokens, sequences=1, priority=0, double deadline_s=_INF):
        """A ticket that waits its turn, until `deadline_s` on the clock of `expire`; after `try_acquire` said 0."""
        cdef int64 want_tokens = _units(tokens, "tokens"), want_sequences = _units(sequences, "sequences")
        cdef int line = self._line(priority)
        self._refuse_above(want_tokens, want_sequences)
        if deadline_s != deadline_s:
            raise ValueError("deadline_s is NaN; use seconds on the caller's monotonic clock")
        if self._may_enter(want_tokens, want_sequences, line):
            raise ValueError("the weight fits now; use try_acquire first")
        cdef int i = self._new_slot()
        cdef Slot* slot = &self._slots[i]
        slot.tokens = want_tokens
        slot.sequences = want_sequences
        slot.deadline_s = deadline_s
        if deadline_s != _INF:
            self._deadlines.insert(pair[double, int64](deadline_s, slot.ticket))
        self._enter(i, line)
        self._parked += 1
        if self.waiting > self._peak_waiting:
            self._peak_waiting = self.waiting
        return slot.ticket

    # -- giving back

    def release(self, ticket):
        """Give back a granted ticket's weight; the tickets that this granted."""
        cdef int i = self._find(PyLong_AsLongLong(ticket))
        if i == _NONE or self._slots[i].priority != _NONE:
            raise NotHeld(f"ticket {ticket} holds nothing")
        self._capacity._take(-self._slots[i].tokens, -self._slots[i].sequences)
        self._held -= 1
        self._released += 1
        self._free_slot(i)
        return self._grant()

    def cancel(self, ticket):
        """Take a waiting ticket out of its line; the tickets that this granted."""
        cdef int i = self._find(PyLong_AsLongLong(ticket))
        if i == _NONE or self._slots[i].priority == _NONE:
            raise NotWaiting(f"ticket {ticket} does not wait")
        self._leave(i)
        self._free_slot(i)
        self._cancelled += 1
        return self._grant()

    def expire(self, double now):
        """The tickets whose deadline is `now` or earlier, by deadline, and those granted because they left."""
        cdef list expired = []
        cdef int64 ticket
        if now != now:
            raise ValueError("now is NaN; use seconds of a monotonic clock")
        if now < self._now:
            raise ClockWentBack(f"now is {now}, it was {self._now} before")
        self._now = now
        while not self._deadlines.empty() and self._first_deadline().first <= now:
            ticket = self._first_deadline().second
            expired.append(ticket)
            self._drop(self._find(ticket))
        self._expired += len(expired)
        return expired, self._grant() if expired else []

    def resize(self, tokens, sequences=_MAX_UNITS):
        """Set the capacity: the tickets granted by growth, and the waiting ones refused as they cannot fit."""
        cdef list refused = []
        cdef int64 old_tokens = self._capacity.tokens, old_sequences = self._capacity.sequences
        cdef size_t i
        cdef int64 ticket
        self._capacity.resize(tokens, sequences)
        if self._capacity.tokens < old_tokens or self._capacity.sequences < old_sequences:
            for i in range(self._slots.size()):
                if self._never_fits(&self._slots[i]):
                    refused.append(self._slots[i].ticket)
            refused.sort()
            for ticket in refused:
                self._drop(self._find(ticket))
            self._refused += len(refused)
        return self._grant(), refused

    # -- inside

    cdef inline int _line(self, object priority) except -1:
        cdef int64 line = PyLong_AsLongLong(priority)
        if line < 0 or line >= <int64>self._lines.size():
            raise ValueError(f"priority is {priority}; use 0 to {self._lines.size() - 1}")
        return <int>line

    cdef inline int _refuse_above(self, int64 tokens, int64 sequences) except -1:
        if tokens > self._capacity.tokens or sequences > self._capacity.sequences:
            self._refused += 1
            raise NeverFits(f"weight {tokens} tokens, {sequences} sequences is above the capacity of {self!r}")
        return 0

    cdef inline bint _may_enter(self, int64 tokens, int64 sequences, int priority) noexcept:
        cdef int i
        if self.waiting:
            for i in range(priority + 1):
                if self._lines[i].head != _NONE:
                    return False
        return self._capacity._has_room(tokens, sequences)

    cdef bint _never_fits(self, Slot* slot) noexcept:
        if slot.ticket == 0 or slot.priority == _NONE:
            return False
        return slot.tokens > self._capacity.tokens or slot.sequences > self._capacity.sequences

    cdef list _grant(self):
        cdef list granted = []
        cdef int i, line = 0, lines = self._lines.size()
        cdef Slot* slot
        if not self.waiting:
            return granted
        while line < lines:
            i = self._lines[line].head
            if i == _NONE:
                line += 1
                continue
            slot = &self._slots[i]
            if not self._capacity._has_room(slot.tokens, slot.sequences):
                break
            granted.append(slot.ticket)
            self._leave(i)
            self._capacity._take(slot.tokens, slot.sequences)
            self._held += 1
            self._woken += 1
        return granted

    cdef inline void _enter(self, int i, int priority) noexcept:
        cdef Slot* slot = &self._slots[i]
        cdef Line* line = &self._lines[priority]
        slot.priority = priority
        slot.before = line.tail
        slot.after = _NONE
        if line.tail == _NONE:
            line.head = i
        else:
            self._slots[line.tail].after = i
        line.tail = i
        self.waiting += 1

    cdef inline int _leave(self, int i) except -1:
        cdef Slot* slot = &self._slots[i]
        cdef Line* line = &self._lines[slot.priority]
        if slot.before == _NONE:
            line.head = slot.after
        else:
            self._slots[slot.before].after = slot.after
        if slot.after == _NONE:
            line.tail = slot.before
        else:
            self._slots[slot.after].before = slot.before
        if slot.deadline_s != _INF:
            self._deadlines.erase(pair[double, int64](slot.deadline_s, slot.ticket))
        slot.priority = _NONE
        self.waiting -= 1
        return 0

    cdef int _drop(self, int i) except -1:
        self._leave(i)
        self._free_slot(i)
        return 0

    cdef inline pair[double, int64] _first_deadline(self) noexcept:
        cdef ordered_set[pair[double, int64]].iterator first = self._deadlines.begin()
        return dereference(first)

    cdef inline int _find(self, int64 ticket) noexcept:
        cdef int64 i = ticket & _SLOT_MASK
        if ticket <= 0 or i >= <int64>self._slots.size() or self._slots[i].ticket != ticket:
            return _NONE
        return <int>i

    cdef inline int _new_slot(self) except -1:
        cdef int i
        if self._unused.empty():
            if <int64>self._slots.size() > _SLOT_MASK:
                raise QueueFull(f"{self._slots.size()} tickets are held or wait already")
            i = <int>self._slots.size()
            self._slots.resize(i + 1)
        else:
            i = self._unused.back()
            self._unused.pop_back()
        self._serial += 1
        self._slots[i].ticket = (self._serial << _SLOT_BITS) | i
        self._slots[i].deadline_s = _INF
        return i

    cdef inline int _free_slot(self, int i) except -1:
        self._slots[i].ticket = 0
        self._unused.push_back(i)
        return 0

    def __repr__(self):
        return (
            f"<WeightedSemaphore tokens {self.held_tokens}/{self.tokens} held,"
            f" sequences {self.held_sequences}/{self.sequences} held, {self.waiting} waiting>"
        )
