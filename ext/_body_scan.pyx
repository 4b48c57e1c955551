# distutils: language = c++
# cython: language_level=3, binding=False, boundscheck=False, wraparound=False, cdivision=True
"""The native twin of `_body_scan_py.py`, where the theory is.

One pass, which checks the whole grammar of JSON. Inside strings 64 bytes are looked at together: a prompt is mostly one
long string.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.unicode cimport PyUnicode_DecodeUTF8
from libc.string cimport memcmp
from libcpp.string cimport string

cdef extern from "_text.h":
    const unsigned char* vr_plain(const unsigned char* p, const unsigned char* end) noexcept nogil

ctypedef const unsigned char* Text

cdef enum:
    MOST_DEPTH = 1024
    MOST_ANSWER_DEPTH = 128
    MOST_COPIED = 4096  # a value of ours longer than this is left to the whole decoder

cdef enum Kind:
    BAD = 0
    OTHER = 1
    TEXT = 2
    ESCAPED_TEXT = 3  # a string with an escape beyond the one-letter ones
    LIST = 4


cdef inline Text _blanks(Text p, Text end) noexcept nogil:
    while p < end and (p[0] == 32 or p[0] == 10 or p[0] == 13 or p[0] == 9):
        p += 1
    return p


cdef inline bint _digit(Text p, Text end) noexcept nogil:
    return p < end and 48 <= p[0] <= 57


cdef inline bint _hex(unsigned char c) noexcept nogil:
    return 48 <= c <= 57 or 97 <= (c | 32) <= 102


cdef inline bint _more(Text p) noexcept nogil:
    return (p[0] & 0xC0) == 0x80


cdef Text _multibyte(Text p, Text end) noexcept nogil:
    """Past one UTF-8 sequence of two to four bytes (Unicode, table 3-7); NULL where it is none."""
    cdef unsigned char a = p[0], b
    if end - p < 2:
        return NULL
    b = p[1]
    if 0xC2 <= a <= 0xDF:
        return p + 2 if _more(p + 1) else NULL
    if 0xE0 <= a <= 0xEF:
        if end - p < 3 or not _more(p + 1) or not _more(p + 2):
            return NULL
        if (a == 0xE0 and b < 0xA0) or (a == 0xED and b > 0x9F):
            return NULL
        return p + 3
    if 0xF0 <= a <= 0xF4:
        if end - p < 4 or not _more(p + 1) or not _more(p + 2) or not _more(p + 3):
            return NULL
        if (a == 0xF0 and b < 0x90) or (a == 0xF4 and b > 0x8F):
            return NULL
        return p + 4
    return NULL


cdef Text _string(Text p, Text end, bint* escaped, bint* coded) noexcept nogil:
    """Past a string whose opening quote is at `p`; NULL where it is none. `coded`: it holds a \\u escape."""
    cdef unsigned char c
    p += 1
    while True:
        p = vr_plain(p, end)
        if p == end:
            return NULL
        c = p[0]
        if c == 34:
            return p + 1
        if c >= 0x80:
            p = _multibyte(p, end)
            if p == NULL:
                return NULL
            continue
        if c != 92 or end - p < 2:
            return NULL
        escaped[0] = True
        c = p[1]
        p += 2
        if c == 117:
            coded[0] = True
            if end - p < 4 or not (_hex(p[0]) and _hex(p[1]) and _hex(p[2]) and _hex(p[3])):
                return NULL
            p += 4
        elif not (c == 110 or c == 34 or c == 92 or c == 116 or c == 114 or c == 47 or c == 98 or c == 102):
            return NULL


cdef Text _number(Text p, Text end) noexcept nogil:
    if p[0] == 45:
        p += 1
    if not _digit(p, end):
        return NULL
    if p[0] == 48:
        p += 1
    else:
        while _digit(p, end):
            p += 1
    if p < end and p[0] == 46:
        p += 1
        if not _digit(p, end):
            return NULL
        while _digit(p, end):
            p += 1
    if p < end and (p[0] | 32) == 101:
        p += 1
        if p < end and (p[0] == 43 or p[0] == 45):
            p += 1
        if not _digit(p, end):
            return NULL
        while _digit(p, end):
            p += 1
    return p


cdef inline Text _word(Text p, Text end, const char* word, Py_ssize_t size) noexcept nogil:
    return p + size if end - p >= size and memcmp(p, word, size) == 0 else NULL


cdef inline Text _scalar(Text p, Text end) noexcept nogil:
    if p[0] == 116:
        return _word(p, end, b"true", 4)
    if p[0] == 102:
        return _word(p, end, b"false", 5)
    if p[0] == 110:
        return _word(p, end, b"null", 4)
    return _number(p, end)


cdef Text _nested(Text p, Text end, int depth, int most) noexcept nogil:
    """Past the object or array that opens at `p`, `depth` levels down; NULL where it is none or too deep."""
    cdef char kinds[MOST_DEPTH]
    cdef int level = 0
    cdef bint escaped = False, coded = False
    while True:
        # a container opens at p
        if depth + level > most or level >= MOST_DEPTH:
            return NULL
        kinds[level] = p[0]
        level += 1
        p = _blanks(p + 1, end)
        if p == end:
            return NULL
        if p[0] == kinds[level - 1] + 2:  # "[" and "]", "{" and "}" are two apart
            p = _closed(p, end, kinds, &level)
            if p == NULL or level == 0:
                return p
        while True:
            # a member begins at p
            if kinds[level - 1] == 123:
                if p == end or p[0] != 34:
                    return NULL
                p = _string(p, end, &escaped, &coded)
                if p == NULL:
                    return NULL
                p = _blanks(p, end)
                if p == end or p[0] != 58:
                    return NULL
                p = _blanks(p + 1, end)
            if p == end:
                return NULL
            if p[0] == 91 or p[0] == 123:
                break
            p = _string(p, end, &escaped, &coded) if p[0] == 34 else _scalar(p, end)
            if p == NULL:
                return NULL
            p = _closed(_blanks(p, end), end, kinds, &level)
            if p == NULL or level == 0:
                return p


cdef Text _closed(Text p, Text end, const char* kinds, int* level) noexcept nogil:
    """From the end of a value to the next member: over closing brackets and one comma. `level` 0: all is closed."""
    while True:
        if p == end:
            return NULL
        if p[0] == 44:
            return _blanks(p + 1, end)
        if p[0] != kinds[level[0] - 1] + 2:
            return NULL
        level[0] -= 1
        p += 1
        if level[0] == 0:
            return p
        p = _blanks(p, end)


cdef Text _value(Text p, Text end, int most, Kind* kind) noexcept nogil:
    """Past a member of the top level."""
    cdef bint escaped = False, coded = False
    if p[0] == 34:
        p = _string(p, end, &escaped, &coded)
        kind[0] = ESCAPED_TEXT if coded else TEXT
        return p
    kind[0] = LIST if p[0] == 91 else OTHER
    if p[0] == 91 or p[0] == 123:
        return _nested(p, end, 2, most)
    return _scalar(p, end)


cdef inline Text _member(Text p, Text end, Text* key, Py_ssize_t* size) noexcept nogil:
    """From a member of an object to its value; NULL where it is none, or its key is written with escapes."""
    cdef bint escaped = False, coded = False
    if p == end or p[0] != 34:
        return NULL
    key[0] = p + 1
    p = _string(p, end, &escaped, &coded)
    if p == NULL or escaped:
        return NULL
    size[0] = p - 1 - key[0]
    p = _blanks(p, end)
    if p == end or p[0] != 58:
        return NULL
    p = _blanks(p + 1, end)
    return p if p < end else NULL


cdef enum:
    UNWANTED = 0
    WANTED = 1
    SHRUNK = 2  # only its type matters, and of a list whether it is empty
    NOTED = 3  # only whether it is there, and no empty list
    SPLICED = 4  # and above: SPLICED and its place in `Places`


cdef inline bint _is(Text key, Py_ssize_t size, const char* name, Py_ssize_t name_size) noexcept nogil:
    return size == name_size and memcmp(key, name, size) == 0


cdef int _rank(Text key, Py_ssize_t size) noexcept nogil:
    """What is to be done with a member of the top level. One chain, which compiles to a switch over the sizes."""
    if size == 5:
        if _is(key, size, b"model", 5):
            return SPLICED
        if _is(key, size, b"input", 5):
            return SHRUNK
        if _is(key, size, b"query", 5) or _is(key, size, b"items", 5) or _is(key, size, b"texts", 5):
            return NOTED
    elif size == 8:
        if _is(key, size, b"messages", 8):
            return SHRUNK
        if _is(key, size, b"priority", 8):
            return SPLICED + 2
    elif size == 14:
        if _is(key, size, b"stream_options", 14):
            return SPLICED + 1
    elif size == 6:
        if _is(key, size, b"stream", 6):
            return WANTED
        if (
            _is(key, size, b"prompt", 6)
            or _is(key, size, b"text_1", 6)
            or _is(key, size, b"text_2", 6)
            or _is(key, size, b"data_1", 6)
            or _is(key, size, b"data_2", 6)
        ):
            return NOTED
    elif size == 1:
        if key[0] == 110:
            return WANTED
    elif size == 10:
        if _is(key, size, b"max_tokens", 10) or _is(key, size, b"dimensions", 10):
            return WANTED
    elif size == 17:
        if _is(key, size, b"max_output_tokens", 17):
            return WANTED
    elif size == 21:
        if _is(key, size, b"max_completion_tokens", 21):
            return WANTED
    elif size == 7:
        if _is(key, size, b"queries", 7):
            return NOTED
    elif size == 9:
        if _is(key, size, b"documents", 9):
            return NOTED
    elif size == 12:
        if _is(key, size, b"instructions", 12) or _is(key, size, b"conversation", 12):
            return NOTED
    elif size == 13:
        if _is(key, size, b"prompt_embeds", 13):
            return NOTED
    elif size == 20:
        if _is(key, size, b"previous_response_id", 20):
            return NOTED
    elif size == 23:
        if _is(key, size, b"previous_input_messages", 23):
            return NOTED
    return UNWANTED


cdef bint scan_into(Text first, Py_ssize_t size, int most, string* short_form, Places* places) noexcept:
    """Fill in both, which the caller keeps; False for what is not ordinary."""
    cdef Text end = first + size, p, key, value
    cdef Py_ssize_t key_size = 0
    cdef int rank, at
    cdef Kind kind = BAD
    short_form.clear()
    p = _blanks(first, end)
    if p == end or p[0] != 123 or most < 1:
        return False
    p += 1
    places.first = p - first
    for at in range(SPLICED_MEMBERS):
        places.end[at] = 0
    while True:
        value = _member(_blanks(p, end), end, &key, &key_size)
        if value == NULL:
            return False
        p = _value(value, end, most, &kind)
        if p == NULL:
            return False
        rank = _rank(key, key_size)
        if rank != UNWANTED:
            if rank >= SPLICED:
                at = rank - SPLICED
                if places.end[at]:
                    return False
                places.start[at], places.end[at] = value - first, p - first
            short_form.append(b'{"' if short_form.empty() else b',"')
            short_form.append(<const char*>key, key_size)
            short_form.append(b'":')
            if kind == LIST and (rank == SHRUNK or rank == NOTED):
                short_form.append(b"[]" if _blanks(value + 1, end)[0] == 93 else b"[0]")
            elif kind == TEXT and rank == SHRUNK:
                short_form.append(b'""')
            elif rank == NOTED:
                short_form.append(b"null" if value[0] == 110 else b"0")
            elif p - value <= MOST_COPIED:
                short_form.append(<const char*>value, p - value)
            else:
                return False
        p = _blanks(p, end)
        if p == end:
            return False
        if p[0] == 44:
            p += 1
            continue
        if p[0] != 125 or _blanks(p + 1, end) != end:
            return False
        short_form.append(b"{}" if short_form.empty() else b"}")
        return True


cdef dict spans_of(const Places* places):
    """The places as `scan` answers them."""
    cdef dict spans = {"": (places.first, places.first)}
    if places.end[0]:
        spans["model"] = (places.start[0], places.end[0])
    if places.end[1]:
        spans["stream_options"] = (places.start[1], places.end[1])
    if places.end[2]:
        spans["priority"] = (places.start[2], places.end[2])
    return spans


def scan(body not None, int max_depth):
    """See the pure twin."""
    cdef const unsigned char[::1] view
    cdef string short_form
    cdef Places places
    cdef Text first
    cdef Py_ssize_t size
    if isinstance(body, bytes):
        first, size = <Text>PyBytes_AS_STRING(body), PyBytes_GET_SIZE(body)
    else:
        view = body
        if view.shape[0] == 0:
            return None
        first, size = &view[0], view.shape[0]
    if not scan_into(first, size, max_depth, &short_form, &places):
        return None
    return PyBytes_FromStringAndSize(short_form.data(), short_form.size()), spans_of(&places)


# ---- answers

cdef enum:
    PROMPT, INPUT, COMPLETION, OUTPUT, CACHE_READ, CACHED, COUNTS

cdef struct Said:
    long long count[COUNTS]  # -1: not said
    Text reason  # NULL: not said
    Py_ssize_t reason_size

# What the members are of an answer, of one of its choices, of its usage, of that one's details. Each at most once.
cdef enum Part:
    ANSWER, CHOICE, USAGE, DETAILS


cdef Text _number_said(Text p, Text end, long long* count) noexcept nogil:
    """Past a count or null; NULL for all other values."""
    cdef Text digit = p
    if p[0] == 110:
        return _word(p, end, b"null", 4)
    p = _number(p, end)
    if p == NULL or p - digit > 15:
        return NULL
    count[0] = 0
    while digit < p:
        if not 48 <= digit[0] <= 57:
            return NULL
        count[0] = count[0] * 10 + digit[0] - 48
        digit += 1
    return p


cdef Text _reason_said(Text p, Text end, Said* said) noexcept nogil:
    """Past a text without escapes, not empty, or null; NULL for all other values."""
    cdef bint escaped = False, coded = False
    cdef Text text = p + 1
    if p[0] == 110:
        return _word(p, end, b"null", 4)
    if p[0] != 34:
        return NULL
    p = _string(p, end, &escaped, &coded)
    if p == NULL or escaped or p - 1 == text:
        return NULL
    said.reason, said.reason_size = text, p - 1 - text
    return p


cdef Text _choices_said(Text p, Text end, Said* said) noexcept nogil:
    """Past an array of choices, of which the first is noted, or null; NULL for all other values."""
    cdef Said first, other
    cdef bint begun = False
    if p[0] == 110:
        return _word(p, end, b"null", 4)
    if p[0] != 91:
        return NULL
    p = _blanks(p + 1, end)
    if p < end and p[0] == 93:
        return p + 1
    first.reason = NULL
    while p < end:
        other.reason = NULL
        p = _object_said(p, end, CHOICE, &other if begun else &first)
        begun = True
        if p == NULL:
            return NULL
        p = _blanks(p, end)
        if p < end and p[0] == 93:
            if said.reason == NULL:  # else the answer itself said why it stopped
                said.reason, said.reason_size = first.reason, first.reason_size
            return p + 1
        if p == end or p[0] != 44:
            return NULL
        p = _blanks(p + 1, end)
    return NULL


cdef int _member_said(Text key, Py_ssize_t size, Part part) noexcept nogil:
    """Which member of this part it is: a count, or from COUNTS on another one that is read; -1 for the rest."""
    if part == ANSWER:
        if _is(key, size, b"usage", 5):
            return COUNTS
        if _is(key, size, b"choices", 7):
            return COUNTS + 1
        return COUNTS + 2 if _is(key, size, b"stop_reason", 11) else -1
    if part == CHOICE:
        return COUNTS + 2 if _is(key, size, b"finish_reason", 13) else -1
    if part == DETAILS:
        return CACHED if _is(key, size, b"cached_tokens", 13) else -1
    if _is(key, size, b"prompt_tokens", 13):
        return PROMPT
    if _is(key, size, b"completion_tokens", 17):
        return COMPLETION
    if _is(key, size, b"input_tokens", 12):
        return INPUT
    if _is(key, size, b"output_tokens", 13):
        return OUTPUT
    if _is(key, size, b"cache_read_input_tokens", 23):
        return CACHE_READ
    if _is(key, size, b"prompt_tokens_details", 21) or _is(key, size, b"input_tokens_details", 20):
        return COUNTS + 3
    return -1


cdef Text _object_said(Text p, Text end, Part part, Said* said) noexcept nogil:
    """Past an object, with what it says noted; NULL where it is none, or says a thing twice or oddly."""
    cdef Text key = NULL
    cdef Py_ssize_t size = 0
    cdef Kind kind = BAD
    cdef int which
    cdef unsigned seen = 0
    if p[0] != 123:
        return NULL
    p = _blanks(p + 1, end)
    if p < end and p[0] == 125:
        return p + 1
    while True:
        p = _member(p, end, &key, &size)
        if p == NULL:
            return NULL
        which = _member_said(key, size, part)
        if which >= 0:
            if (seen >> which) & 1:
                return NULL
            seen |= 1u << which
        if which < 0:
            p = _value(p, end, MOST_ANSWER_DEPTH, &kind)
        elif which < COUNTS:
            p = _number_said(p, end, &said.count[which])
        elif which == COUNTS + 1:
            p = _choices_said(p, end, said)
        elif which == COUNTS + 2:
            p = _reason_said(p, end, said)
        elif p[0] == 110:
            p = _word(p, end, b"null", 4)
        else:
            p = _object_said(p, end, USAGE if which == COUNTS else DETAILS, said)
        if p == NULL:
            return NULL
        p = _blanks(p, end)
        if p < end and p[0] == 125:
            return p + 1
        if p == end or p[0] != 44:
            return NULL
        p = _blanks(p + 1, end)


cdef inline long long _said_first(long long one, long long two) noexcept nogil:
    return one if one >= 0 else two


cdef bint read_answer_into(Text p, Py_ssize_t size, Answered* answered) noexcept:
    """What a plain answer says of itself; False where it is not ordinary JSON."""
    cdef Said said
    answered.prompt = answered.cached = answered.output = -1
    if not _whole_said(p, size, ANSWER, &said, answered):
        return False
    answered.reason = <const char*>said.reason
    answered.reason_size = 0 if said.reason == NULL else said.reason_size
    return True


cdef bint read_usage_into(Text p, Py_ssize_t size, Answered* answered) noexcept:
    """Take the counts that an event's usage tells; the others stay as they are. False where it is not ordinary JSON."""
    cdef Said said
    return _whole_said(p, size, USAGE, &said, answered)


cdef bint _whole_said(Text p, Py_ssize_t size, Part part, Said* said, Answered* answered) noexcept:
    cdef Text end = p + size
    cdef int i
    for i in range(COUNTS):
        said.count[i] = -1
    said.reason = NULL
    p = _blanks(p, end)
    if p == end:
        return False
    p = _object_said(p, end, part, said)
    if p == NULL or _blanks(p, end) != end:
        return False
    answered.prompt = _said_first(_said_first(said.count[PROMPT], said.count[INPUT]), answered.prompt)
    answered.cached = _said_first(_said_first(said.count[CACHED], said.count[CACHE_READ]), answered.cached)
    answered.output = _said_first(_said_first(said.count[COMPLETION], said.count[OUTPUT]), answered.output)
    return True


cdef inline object _known(long long count):
    return count if count >= 0 else None


def read_answer(bytes body not None):
    """See the pure twin."""
    cdef Answered said
    if not read_answer_into(<Text>PyBytes_AS_STRING(body), PyBytes_GET_SIZE(body), &said):
        return None
    reason = None if said.reason == NULL else PyUnicode_DecodeUTF8(said.reason, said.reason_size, NULL)
    return _known(said.prompt), _known(said.cached), _known(said.output), reason
