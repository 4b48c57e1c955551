# distutils: language = c++
# cython: language_level=3, binding=False, boundscheck=False, wraparound=False, cdivision=True
"""The native twin of `_fair_queue_py.py`, which is its specification.

Tickets live in one vector, tenants' lines in another. A ticket stands in two doubly linked lists through the tickets
(its line's bucket, its class's arrivals), a line in its class's binary heap and knows its place there, so nothing is
ever searched for and nothing goes stale. Only ticket numbers are hashed, and only tickets with a deadline are in a
tree.
"""

from cpython.long cimport PyLong_AsLongLong
from cython.operator cimport dereference
from libcpp.algorithm cimport sort
from libcpp.pair cimport pair
from libcpp.set cimport set as ordered_set
from libcpp.unordered_map cimport unordered_map
from libcpp.vector cimport vector

from math import inf

from ext._fair_queue_py import FairQueueStats, _check_settings
from ext.errors import ClockWentBack, NeverFits, NotWaiting, QueueFull

ctypedef long long int64

cdef extern from *:
    int __builtin_ctz(unsigned int) noexcept nogil

cdef enum:
    NONE = -1
    MOST_CLASSES = 16
    MOST_BUCKETS = 32
    FEWEST_TENANTS = 1024

cdef int64 _MAX_WEIGHT = 1LL << 40
cdef int64 _MAX_COUNTER = 1LL << 62
cdef double _INF = inf

MAX_WEIGHT = _MAX_WEIGHT


cdef struct Links:
    int before
    int after


cdef struct Ends:
    int head
    int tail


cdef struct Ticket:
    int64 id
    int64 tokens
    int64 sequences
    int64 prefix
    double overdue_s
    double deadline_s
    int line
    int bucket
    int passed
    Links in_bucket
    Links in_arrivals


cdef struct Line:
    int64 counter
    int64 serial
    int klass
    int size
    int place  # in the class's heap; NONE: no tickets
    unsigned int filled  # one bit per bucket that has tickets
    Ends[MOST_BUCKETS] buckets


cdef struct LatencyClass:
    double patience_s
    Ends arrivals
    int64 waiting
    int64 last_left
    int64 serial
    Py_ssize_t forget_above


cdef inline int64 _above_zero(object amount, str what) except -1:
    cdef int64 value = PyLong_AsLongLong(amount)
    if value < 1:
        raise ValueError(f"{what} is {value}; use 1 or more")
    if value > _MAX_WEIGHT:
        raise OverflowError(f"{what} is {value}; use at most {_MAX_WEIGHT}")
    return value


cdef class FairQueue:
    """Latency classes, fair tenants, ageing, batches. See the pure twin."""

    cdef readonly int64 limit, max_tokens, max_sequences
    cdef readonly int ageing_share, max_passes
    cdef readonly bint shortest_first
    cdef int _class_count, _turns
    cdef LatencyClass[MOST_CLASSES] _classes
    cdef vector[vector[int]] _orders  # per class: a heap of lines with tickets, by counter, then serial
    cdef list _tenants  # per class: tenant -> line
    cdef vector[Line] _lines
    cdef vector[int] _unused_lines
    cdef vector[Ticket] _tickets
    cdef vector[int] _unused_tickets
    cdef unordered_map[int64, int] _by_id
    cdef ordered_set[pair[double, int64]] _deadlines
    cdef double _now
    cdef int64 _waiting_tokens, _peak_waiting
    cdef int64 _pushed, _taken, _cancelled, _expired, _refused, _aged, _passes

    def __cinit__(
        self,
        limit=1000,
        max_tokens=_MAX_WEIGHT,
        max_sequences=_MAX_WEIGHT,
        patience_s=(0.1, 0.5, 2.0, 10.0, 60.0),
        ageing_share=4,
        max_passes=8,
        shortest_first=False,
    ):
        cdef int i
        _check_settings(limit, patience_s, ageing_share, max_passes)
        self.limit = limit
        self.max_tokens = _above_zero(max_tokens, "max_tokens")
        self.max_sequences = _above_zero(max_sequences, "max_sequences")
        self.ageing_share = ageing_share
        self.max_passes = max_passes
        self.shortest_first = shortest_first
        self._class_count = len(patience_s)
        self._tenants = [{} for _ in patience_s]
        self._orders.resize(self._class_count)
        for i in range(self._class_count):
            self._classes[i].patience_s = patience_s[i]
            self._classes[i].arrivals.head = self._classes[i].arrivals.tail = NONE
            self._classes[i].forget_above = FEWEST_TENANTS
        self._now = -_INF

    # -- looking

    def __len__(self):
        return self._by_id.size()

    def __contains__(self, ticket):
        return isinstance(ticket, int) and self._find(ticket) != NONE

    @property
    def next_deadline_s(self):
        """When `expire` next has something to do; infinity when nobody has a deadline."""
        return _INF if self._deadlines.empty() else dereference(self._deadlines.begin()).first

    def stats(self):
        """All counts in one value."""
        cdef int i
        cdef size_t tenants = 0
        for i in range(self._class_count):
            tenants += self._orders[i].size()
        return FairQueueStats(
            self._pushed, self._taken, self._cancelled, self._expired, self._refused, self._aged, self._passes,
            self._by_id.size(), self._waiting_tokens, self._peak_waiting, tenants,
            tuple([self._classes[i].waiting for i in range(self._class_count)]),
        )

    def head(self):
        """Whose turn it is at the time of the last call; None when nobody waits."""
        cdef bint aged = False
        cdef int i = self._next(self._now, True, &aged)
        return None if i == NONE else self._tickets[i].id

    @property
    def next_overdue_s(self):
        """When the first of those who wait becomes, or became, overdue; infinity when nobody waits."""
        cdef double first_s = _INF
        cdef int klass, oldest
        for klass in range(self._class_count):
            oldest = self._classes[klass].arrivals.head
            if oldest != NONE and self._tickets[oldest].overdue_s < first_s:
                first_s = self._tickets[oldest].overdue_s
        return first_s

    def oldest(self, latency_class):
        """The ticket of the class that came first; None when none waits."""
        cdef int oldest = self._classes[self._class(latency_class)].arrivals.head
        return None if oldest == NONE else self._tickets[oldest].id

    def count(self, latency_class):
        """How many of the class wait."""
        return self._classes[self._class(latency_class)].waiting

    def counter(self, str tenant not None, latency_class):
        """The tenant's virtual token counter in the class: what it was charged, or was lifted to. 0 if unknown."""
        line = (<dict>self._tenants[self._class(latency_class)]).get(tenant)
        return 0 if line is None else self._lines[<int>line].counter

    def worst_wait_s(self, latency_class, double tokens_per_s):
        """The longest that a ticket of the class can wait: the formula of the pure twin."""
        if not tokens_per_s > 0:
            raise ValueError(f"tokens_per_s is {tokens_per_s}; use a number above 0")
        grants = self.limit * (self.ageing_share + self.max_passes)
        return self._classes[self._class(latency_class)].patience_s + grants * <object>self.max_tokens / tokens_per_s

    # -- coming and going

    def push(
        self,
        ticket,
        str tenant not None,
        tokens,
        double now,
        sequences=1,
        latency_class=2,
        double deadline_s=_INF,
        expected_output=0,
        prefix=0,
        overdue_s=None,
    ):
        """Let a ticket wait."""
        cdef int klass = self._class(latency_class)
        cdef Ticket entry
        cdef int64 expected = PyLong_AsLongLong(expected_output)
        entry.tokens = _above_zero(tokens, "tokens")
        entry.sequences = _above_zero(sequences, "sequences")
        if expected < 0 or expected > _MAX_WEIGHT:
            raise ValueError(f"expected_output is {expected}; use 0 to {_MAX_WEIGHT} tokens")
        if deadline_s != deadline_s:
            raise ValueError("deadline_s is NaN; use seconds on the clock of now")
        entry.overdue_s = now + self._classes[klass].patience_s if overdue_s is None else <double>overdue_s
        if overdue_s is not None and entry.overdue_s != entry.overdue_s:
            raise ValueError("overdue_s is NaN; use seconds on the clock of now")
        entry.id = PyLong_AsLongLong(ticket)
        entry.prefix = PyLong_AsLongLong(prefix)
        if self._by_id.count(entry.id):
            raise ValueError(f"ticket {ticket} waits already")
        self._check_clock(now)
        self._check_door(entry.tokens, entry.sequences)
        self._now = now
        entry.line = self._line_of(klass, tenant)
        entry.deadline_s = deadline_s
        entry.bucket = _bucket(expected) if self.shortest_first else 0
        entry.passed = 0
        self._add(entry, klass)

    def cancel(self, ticket):
        """Take a waiting ticket out. Raises `NotWaiting` if it does not wait."""
        cdef int i = self._find(PyLong_AsLongLong(ticket))
        if i == NONE:
            raise NotWaiting(f"ticket {ticket} does not wait")
        self._remove(i)
        self._cancelled += 1

    def expire(self, double now):
        """Take out the tickets whose deadline is `now` or earlier, by deadline."""
        cdef list expired = []
        cdef int64 ticket
        self._check_clock(now)
        self._now = now
        while not self._deadlines.empty() and dereference(self._deadlines.begin()).first <= now:
            ticket = dereference(self._deadlines.begin()).second
            expired.append(ticket)
            self._remove(self._find(ticket))
        self._expired += len(expired)
        return expired

    def charge(self, str tenant not None, latency_class, tokens):
        """Add to a tenant's counter what only turned out later; below 0 gives back."""
        cdef int klass = self._class(latency_class)
        cdef int64 amount = PyLong_AsLongLong(tokens)
        if not -_MAX_WEIGHT <= amount <= _MAX_WEIGHT:
            raise ValueError(f"tokens is {tokens}; use {-_MAX_WEIGHT} to {_MAX_WEIGHT}")
        line = (<dict>self._tenants[klass]).get(tenant)
        if line is not None:
            self._charge(<int>line, amount)

    # -- the next batch

    def take(self, budget_tokens, budget_sequences, double now):
        """The tickets that go now, all together within the budget."""
        cdef int64 tokens = PyLong_AsLongLong(budget_tokens), sequences = PyLong_AsLongLong(budget_sequences)
        cdef vector[pair[int64, int64]] batch  # prefix, ticket
        cdef vector[int] aside  # did not fit; the first is the head, for which room is kept
        cdef Ticket* ticket
        cdef bint aged = False, prefixes = False
        cdef int i
        self._check_clock(now)
        self._now = now
        while tokens > 0 and sequences > 0 and self._may_pass(aside):
            i = self._next(now, aside.empty(), &aged)
            if i == NONE:
                break
            ticket = &self._tickets[i]
            if ticket.tokens > tokens or ticket.sequences > sequences:
                self._leave_line(i)
                aside.push_back(i)
                continue
            tokens -= ticket.tokens
            sequences -= ticket.sequences
            prefixes |= ticket.prefix != 0
            batch.push_back(pair[int64, int64](ticket.prefix, ticket.id))
            self._go(i, aged, NONE if aside.empty() else aside[0])
        while not aside.empty():
            self._enter_line(aside.back(), True)
            aside.pop_back()
        return _grouped(batch) if prefixes else [entry.second for entry in batch]

    cdef inline bint _may_pass(self, vector[int]& aside) noexcept:
        if aside.empty():
            return True
        return self._tickets[aside[0]].passed < self.max_passes and <int>aside.size() <= self.max_passes

    cdef inline int _next(self, double now, bint ageing, bint* aged) noexcept:
        """The ticket whose turn it is; `aged` when it is one out of turn because it is overdue."""
        cdef int klass, oldest
        cdef Line* line
        aged[0] = False
        if ageing and self._turns >= self.ageing_share - 1:
            oldest = self._longest_overdue(now)
            if oldest != NONE:
                aged[0] = True
                return oldest
        for klass in range(self._class_count):
            if not self._orders[klass].empty():
                line = &self._lines[self._orders[klass][0]]
                return line.buckets[__builtin_ctz(line.filled)].head
        return NONE

    cdef inline int _longest_overdue(self, double now) noexcept:
        cdef int klass, first, oldest = NONE
        for klass in range(self._class_count):
            first = self._classes[klass].arrivals.head
            if first != NONE and self._tickets[first].overdue_s <= now:
                if oldest == NONE or self._tickets[first].overdue_s < self._tickets[oldest].overdue_s:
                    oldest = first
        return oldest

    cdef inline int _go(self, int i, bint aged, int passed) except -1:
        cdef int line = self._tickets[i].line
        cdef int64 tokens = self._tickets[i].tokens
        # Charged while it still stands in the order, so that a line which stays is moved once.
        self._charge(line, tokens)
        self._remove(i)
        if aged:
            self._turns = 0
        elif self._turns < self.ageing_share - 1:
            self._turns += 1
        self._taken += 1
        self._aged += aged
        if passed != NONE:
            self._tickets[passed].passed += 1
            self._passes += 1
        return 0

    # -- tickets

    cdef inline int _class(self, object latency_class) except -1:
        cdef int64 klass = PyLong_AsLongLong(latency_class)
        if klass < 0 or klass >= self._class_count:
            raise ValueError(f"latency_class is {latency_class}; use 0 to {self._class_count - 1}")
        return <int>klass

    cdef inline int _check_door(self, int64 tokens, int64 sequences) except -1:
        if tokens > self.max_tokens or sequences > self.max_sequences:
            self._refused += 1
            raise NeverFits(
                f"weight {tokens} tokens, {sequences} sequences is above {self.max_tokens} and {self.max_sequences}"
            )
        if <int64>self._by_id.size() >= self.limit:
            self._refused += 1
            raise QueueFull(f"{self.limit} tickets wait already")
        return 0

    cdef inline int _check_clock(self, double now) except -1:
        if now != now:
            raise ValueError("now is NaN; use seconds of a monotonic clock")
        if now < self._now:
            raise ClockWentBack(f"now is {now}, it was {self._now} before")
        return 0

    cdef inline int _find(self, int64 ticket) noexcept:
        cdef unordered_map[int64, int].iterator found = self._by_id.find(ticket)
        return NONE if found == self._by_id.end() else dereference(found).second

    cdef inline int _add(self, Ticket& entry, int klass) except -1:
        cdef int i
        if self._unused_tickets.empty():
            i = <int>self._tickets.size()
            self._tickets.push_back(entry)
        else:
            i = self._unused_tickets.back()
            self._unused_tickets.pop_back()
            self._tickets[i] = entry
        self._by_id[entry.id] = i
        if entry.deadline_s != _INF:
            self._deadlines.insert(pair[double, int64](entry.deadline_s, entry.id))
        self._enter_line(i, False)
        self._enter_arrivals(i, &self._classes[klass])
        self._pushed += 1
        self._waiting_tokens += entry.tokens
        if <int64>self._by_id.size() > self._peak_waiting:
            self._peak_waiting = <int64>self._by_id.size()
        return 0

    cdef inline int _remove(self, int i) except -1:
        cdef Ticket* ticket = &self._tickets[i]
        cdef Line* line = &self._lines[ticket.line]
        cdef LatencyClass* klass = &self._classes[line.klass]
        self._leave_line(i)
        self._leave_arrivals(ticket, klass)
        if ticket.deadline_s != _INF:
            self._deadlines.erase(pair[double, int64](ticket.deadline_s, ticket.id))
        self._by_id.erase(ticket.id)
        self._waiting_tokens -= ticket.tokens
        if klass.waiting == 0:
            klass.last_left = line.counter
        self._unused_tickets.push_back(i)
        return 0

    cdef inline void _enter_arrivals(self, int i, LatencyClass* klass) noexcept:
        cdef Ends* ends = &klass.arrivals
        self._tickets[i].in_arrivals.before = ends.tail
        self._tickets[i].in_arrivals.after = NONE
        if ends.tail == NONE:
            ends.head = i
        else:
            self._tickets[ends.tail].in_arrivals.after = i
        ends.tail = i
        klass.waiting += 1

    cdef inline void _leave_arrivals(self, Ticket* ticket, LatencyClass* klass) noexcept:
        cdef Links links = ticket.in_arrivals
        if links.before == NONE:
            klass.arrivals.head = links.after
        else:
            self._tickets[links.before].in_arrivals.after = links.after
        if links.after == NONE:
            klass.arrivals.tail = links.before
        else:
            self._tickets[links.after].in_arrivals.before = links.before
        klass.waiting -= 1

    # -- tenants' lines

    cdef int _line_of(self, int klass, str tenant) except -1:
        cdef dict tenants = <dict>self._tenants[klass]
        cdef int i
        cdef Line* line
        known = tenants.get(tenant)
        if known is None:
            i = self._new_line(klass)
            tenants[tenant] = i
        else:
            i = known
        line = &self._lines[i]
        if line.size == 0:
            line.counter = max(line.counter, self._least(klass))
        return i

    cdef int _new_line(self, int klass) except -1:
        cdef int i, bucket
        cdef Line* line
        self._forget_idle(klass)
        if self._unused_lines.empty():
            i = <int>self._lines.size()
            self._lines.resize(i + 1)
        else:
            i = self._unused_lines.back()
            self._unused_lines.pop_back()
        line = &self._lines[i]
        self._classes[klass].serial += 1
        line.serial = self._classes[klass].serial
        line.klass = klass
        line.counter = line.size = line.filled = 0
        line.place = NONE
        for bucket in range(MOST_BUCKETS):
            line.buckets[bucket].head = line.buckets[bucket].tail = NONE
        return i

    cdef inline int64 _least(self, int klass) noexcept:
        """The counter to which a tenant that comes back is lifted."""
        if self._orders[klass].empty():
            return self._classes[klass].last_left
        return self._lines[self._orders[klass][0]].counter

    cdef int _forget_idle(self, int klass) except -1:
        cdef dict tenants = <dict>self._tenants[klass]
        cdef int64 least
        cdef int i
        if len(tenants) < self._classes[klass].forget_above:
            return 0
        least = self._least(klass)
        for tenant, line in list(tenants.items()):
            i = line
            if self._lines[i].size == 0 and self._lines[i].counter <= least:
                del tenants[tenant]
                self._unused_lines.push_back(i)
        self._classes[klass].forget_above = max(<Py_ssize_t>FEWEST_TENANTS, 2 * len(tenants))
        return 0

    cdef inline int _enter_line(self, int i, bint first) except -1:
        cdef Ticket* ticket = &self._tickets[i]
        cdef Line* line = &self._lines[ticket.line]
        cdef Ends* ends = &line.buckets[ticket.bucket]
        ticket.in_bucket.before = NONE if first else ends.tail
        ticket.in_bucket.after = ends.head if first else NONE
        if ends.head == NONE:
            ends.head = ends.tail = i
            line.filled |= 1u << ticket.bucket
        elif first:
            self._tickets[ends.head].in_bucket.before = i
            ends.head = i
        else:
            self._tickets[ends.tail].in_bucket.after = i
            ends.tail = i
        line.size += 1
        if line.size == 1:
            self._orders[line.klass].push_back(ticket.line)
            self._sift_up(&self._orders[line.klass], <int>self._orders[line.klass].size() - 1)
        return 0

    cdef inline void _leave_line(self, int i) noexcept:
        cdef Ticket* ticket = &self._tickets[i]
        cdef Line* line = &self._lines[ticket.line]
        cdef Ends* ends = &line.buckets[ticket.bucket]
        cdef Links links = ticket.in_bucket
        if links.before == NONE:
            ends.head = links.after
        else:
            self._tickets[links.before].in_bucket.after = links.after
        if links.after == NONE:
            ends.tail = links.before
        else:
            self._tickets[links.after].in_bucket.before = links.before
        if ends.head == NONE:
            line.filled &= ~(1u << ticket.bucket)
        line.size -= 1
        if line.size == 0:
            self._leave_order(line)

    # -- a class's order: a binary heap of its lines (Williams 1964) in which each line knows its place

    cdef inline void _charge(self, int i, int64 tokens) noexcept:
        cdef Line* line = &self._lines[i]
        line.counter = max(-_MAX_COUNTER, min(_MAX_COUNTER, line.counter + tokens))
        if line.place != NONE:
            self._settle(&self._orders[line.klass], line.place)

    cdef inline void _leave_order(self, Line* line) noexcept:
        cdef vector[int]* order = &self._orders[line.klass]
        cdef int place = line.place, last = order.back()
        order.pop_back()
        line.place = NONE
        if place < <int>order.size():
            order[0][place] = last
            self._settle(order, place)

    cdef inline void _settle(self, vector[int]* order, int place) noexcept:
        self._sift_down(order, self._sift_up(order, place))

    cdef inline bint _before(self, int a, int b) noexcept:
        cdef Line* left = &self._lines[a]
        cdef Line* right = &self._lines[b]
        return left.counter < right.counter or (left.counter == right.counter and left.serial < right.serial)

    cdef inline int _sift_up(self, vector[int]* order, int place) noexcept:
        cdef int line = order[0][place], parent
        while place:
            parent = (place - 1) // 2
            if not self._before(line, order[0][parent]):
                break
            order[0][place] = order[0][parent]
            self._lines[order[0][place]].place = place
            place = parent
        order[0][place] = line
        self._lines[line].place = place
        return place

    cdef inline void _sift_down(self, vector[int]* order, int place) noexcept:
        cdef int line = order[0][place], size = <int>order.size(), child
        while 2 * place + 1 < size:
            child = 2 * place + 1
            if child + 1 < size and self._before(order[0][child + 1], order[0][child]):
                child += 1
            if not self._before(order[0][child], line):
                break
            order[0][place] = order[0][child]
            self._lines[order[0][place]].place = place
            place = child
        order[0][place] = line
        self._lines[line].place = place

    def __repr__(self):
        waiting = ", ".join([str(self._classes[i].waiting) for i in range(self._class_count)])
        size = f"{self._by_id.size()}/{self.limit} waiting ({waiting} by class)"
        return f"<FairQueue {size}, {self._waiting_tokens} tokens>"


cdef int _bucket(int64 expected) noexcept:
    """The number of binary digits: what comes next doubles."""
    cdef int digits = 0
    while expected and digits < MOST_BUCKETS - 1:
        expected >>= 1
        digits += 1
    return digits


cdef list _grouped(vector[pair[int64, int64]]& batch):
    """The batch with tickets of one prefix next to each other, groups and members in the order of their grants."""
    cdef unordered_map[int64, int] first_of
    cdef vector[pair[int, int]] places  # of the group's first, own
    cdef int i, group, size = <int>batch.size()
    for i in range(size):
        group = i
        if batch[i].first:
            if not first_of.count(batch[i].first):
                first_of[batch[i].first] = i
            group = first_of[batch[i].first]
        places.push_back(pair[int, int](group, i))
    sort(places.begin(), places.end())
    return [batch[place.second].second for place in places]
