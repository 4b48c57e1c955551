# distutils: language = c++
# cython: language_level=3, binding=False, boundscheck=False, wraparound=False, cdivision=True
"""The native twin of `_json_lines_py.py`, where the theory is.

It writes what lines are made of: plain ASCII texts, numbers of 64 bits, true, false and null. With anything else in it
the whole line is the pure twin's.
"""

from cpython.bool cimport PyBool_Check
from cpython.bytes cimport PyBytes_FromStringAndSize
from cpython.float cimport PyFloat_AS_DOUBLE, PyFloat_CheckExact
from cpython.long cimport PyLong_AsLongLongAndOverflow, PyLong_CheckExact
from cpython.unicode cimport PyUnicode_CheckExact, PyUnicode_GET_LENGTH
from libc.math cimport fabs, llrint
from libcpp.string cimport string

from ext import _json_lines_py as pure

cdef extern from "_text.h":
    const unsigned char* vr_plain(const unsigned char* p, const unsigned char* end) noexcept

cdef extern from "Python.h":
    bint PyUnicode_IS_COMPACT_ASCII(object text)
    unsigned char* PyUnicode_1BYTE_DATA(object text)

cdef enum:
    STEPS = 10000

cdef double LARGE = pure.LARGE
cdef string _line  # kept for its memory


cdef bint _text(object text) except -1:
    """Write a text between quotes; False where it would take escapes."""
    cdef const unsigned char* data
    cdef Py_ssize_t size = PyUnicode_GET_LENGTH(text)
    if not PyUnicode_IS_COMPACT_ASCII(text):
        return False
    data = PyUnicode_1BYTE_DATA(text)
    if vr_plain(data, data + size) != data + size:
        return False
    _line.push_back(34)
    _line.append(<const char*>data, size)
    _line.push_back(34)
    return True


cdef bint _name(object name) except -1:
    """Write a name, which takes no escapes, and a colon."""
    if not PyUnicode_CheckExact(name) or not PyUnicode_IS_COMPACT_ASCII(name):
        return False
    _line.push_back(34)
    _line.append(<const char*>PyUnicode_1BYTE_DATA(name), PyUnicode_GET_LENGTH(name))
    _line.append(b'":')
    return True


cdef void put_whole(string* line, unsigned long long number) noexcept:
    cdef char digits[20]
    cdef int at = 20
    while True:
        at -= 1
        digits[at] = <char>(48 + number % 10)
        number //= 10
        if number == 0:
            break
    line.append(digits + at, 20 - at)


cdef void _signed(string* line, long long number) noexcept:
    cdef unsigned long long size = <unsigned long long>number
    if number < 0:
        line.push_back(45)
        size = -size
    put_whole(line, size)


cdef void put_steps(string* line, double value) noexcept:
    """Write it as Python writes a float of whole steps: at least one digit behind the point, no zeros at the end."""
    cdef long long steps = llrint(value * STEPS)
    cdef int rest, unit = STEPS // 10
    if steps < 0:
        line.push_back(45)
        steps = -steps
    put_whole(line, steps // STEPS)
    line.push_back(46)
    rest = <int>(steps % STEPS)
    while True:
        line.push_back(<char>(48 + rest // unit))
        rest %= unit
        if rest == 0:
            return
        unit //= 10


cdef bint _value(object value) except -1:
    """Write one value; False where it is none of ours."""
    cdef long long number
    cdef int overflow = 0
    if value is None:
        _line.append(b"null")
    elif PyUnicode_CheckExact(value):
        return _text(value)
    elif PyFloat_CheckExact(value):
        if not fabs(PyFloat_AS_DOUBLE(value)) < LARGE:
            return False
        put_steps(&_line, PyFloat_AS_DOUBLE(value))
    elif PyLong_CheckExact(value):
        number = PyLong_AsLongLongAndOverflow(value, &overflow)
        if overflow:
            return False
        _signed(&_line, number)
    elif PyBool_Check(value):
        _line.append(b"true" if value is True else b"false")
    else:
        return False
    return True


def line(tuple names not None, tuple values not None, bint sparse=False):
    """See the pure twin."""
    cdef Py_ssize_t i
    cdef object value
    _line.clear()
    _line.push_back(123)
    if len(names) == len(values):
        for i in range(len(names)):
            value = values[i]
            if sparse and (value is None or (PyUnicode_CheckExact(value) and PyUnicode_GET_LENGTH(value) == 0)):
                continue
            if _line.size() > 1:
                _line.push_back(44)
            if not _name(names[i]):
                break
            if not _value(value):
                break
        else:
            _line.append(b"}\n")
            return PyBytes_FromStringAndSize(_line.data(), _line.size())
    return pure.line(names, values, sparse)
