"""The event scanner: server-sent events from a byte stream in any split, with what billing and routing must know of
them.

Follows "Server-sent events" of the HTML standard: lines end with LF, CRLF or CR, an empty line ends an event, a line
that begins with a colon is a comment, several `data` lines are joined by LF. Nothing is decoded: UTF-8 may be split
anywhere. The JSON of ordinary chunks is not parsed. A few keys are looked for in its bytes; only where one has a value
of interest is the event decoded (`ext/_sse_json.py`). That is safe: inside a JSON string a quote is escaped, so text
that *talks* of "usage": {} does not match, and whatever matches elsewhere is decided by the decoder.

What always holds: the bytes answered so far, plus those withheld, plus those pending, are the bytes fed, in order;
every answer ends at an event boundary (unless an event is oversized), so a comment of ours may follow it; pending is
at most `max_event_bytes`; no byte is searched twice, so one byte at a time costs no more than linear.

This twin is the specification of `_sse.pyx`.
"""

from __future__ import annotations

import re

from ext._sse_json import Details, details, joined

_BOM = b"\xef\xbb\xbf"
_CR, _LF, _COLON = b"\r\n:"
_S = rb"[ \t\r\n]*"
_UNUSUAL = re.compile(
    rb'"(?:usage|usageMetadata)"' + _S + b":" + _S + rb"\{"
    rb'|"(?:finish_reason|stop_reason|finishReason)"' + _S + b":" + _S + b'"'
    rb'|"error"' + _S + b":" + _S + rb'["{]'
    rb'|"type"' + _S + b":" + _S + b'"error"'
)  # fmt: skip
_HAS_CHOICES = re.compile(rb'"(?:choices|candidates)"' + _S + b":" + _S + rb"\[" + _S + rb"[^\] \t\r\n]")
_HAS_DELTA = re.compile(rb'"delta"' + _S + b":")


class EventScanner:
    """One stream's scanner. `feed` costs about a memory scan of the data; nothing raises but a wrong type.

    `withhold_usage`: take out the chat chunk that carries usage and no choices (the client did not ask for it). An
    event above `max_event_bytes` is passed on raw as it comes, counted as output, and not looked into: `oversized`
    says so.
    """

    def __init__(self, withhold_usage: bool = False, max_event_bytes: int = 1 << 20) -> None:
        if max_event_bytes < 1:
            raise ValueError(f"max_event_bytes is {max_event_bytes}; use 1 or more")
        self.withhold_usage = withhold_usage
        self.max_event_bytes = max_event_bytes
        self.events = 0  # with data, [DONE] among them
        self.output_events = 0  # with choices, candidates or a delta: not comments, usage only, pings, [DONE]
        self.usage: bytes | None = None  # JSON of the last usage object, as it was sent
        self.first_usage: bytes | None = None  # the first one: Anthropic's message_start has the input tokens
        self.finish_reason: str | None = None
        self.error: bytes | None = None  # JSON of the last in-band error; the whole data where it has no error member
        self.done = False  # [DONE] was seen, as all of an event's data
        self.oversized = False
        self._pending = bytearray()  # the event in progress
        self._line = 0  # where its unfinished line begins
        self._seen = 0  # how far that was searched for its end
        self._first_line = True
        self._after_cr = False  # a LF at the start of the next data belongs to the last line end
        self._cut_last = False  # the last event was withheld
        self._raw = False  # the event in progress is oversized: its bytes are gone already
        self._carried = False  # ... and so is the beginning of its unfinished line
        self._fields = False  # the event in progress has lines that are no comments
        self._named_error = False
        self._data_at = self._data_end = self._data_lines = 0  # its last data line, and how many it has
        self._bom = 0  # how many of its bytes are a byte order mark

    def feed(self, data: bytes) -> bytes:
        """The bytes to forward now: whole events and comments. The very object `data` when all of it goes and nothing
        waited.
        """
        if not isinstance(data, bytes):
            raise TypeError(f"data is {type(data).__name__}; use bytes")
        if not data:
            return data
        whole = not self._pending
        buffer: bytes | bytearray = data
        if not whole:
            self._pending += data
            buffer = self._pending
        boundary, cuts = self._scan(buffer)
        size = len(buffer)
        if not self._raw and size - boundary > self.max_event_bytes:
            self._raw = self.oversized = True
        if self._raw:
            self._carried = size > self._line
            boundary = size
        if whole and boundary == size and not cuts:
            self._shift(size, size)
            return data
        answer = _without(buffer, boundary, cuts)
        self._shift(boundary, size)
        if whole:
            self._pending += data[boundary:]
        else:
            del self._pending[:boundary]
        return answer

    def flush(self) -> bytes:
        """The rest, at the end of the stream, which ends the last line and event too. Afterwards the scanner is as at
        a stream's start.
        """
        rest = bytes(self._pending)
        size = len(rest)
        cuts: list[tuple[int, int]] = []
        if size > self._line:
            self._end_line(rest, 0, self._line, size)
        if self._raw or self._data_lines:
            self._end_event(rest, 0, size, size, cuts)
        self._pending.clear()
        self._begin()
        self._line = self._seen = 0
        self._raw = self._carried = self._after_cr = self._cut_last = False
        self._first_line = True
        return b"" if cuts else rest

    # -- lines and events; positions are offsets into the buffer, whose event in progress begins at `start`

    def _scan(self, buffer: bytes | bytearray) -> tuple[int, list[tuple[int, int]]]:
        """Go through all finished lines: where the last event ended, and the spans to withhold."""
        size, start = len(buffer), 0
        cuts: list[tuple[int, int]] = []
        if self._after_cr and buffer[self._seen] == _LF:
            self._seen = self._line = self._line + 1
            if self._line == 1 and not self._fields and not self._raw:
                start = 1
                if self._cut_last:
                    cuts.append((0, 1))
        self._after_cr = False
        lf = cr = -1  # kept until passed, so that a stream of only one of them is searched once for the other
        while True:
            if lf < self._seen:
                lf = _position(buffer, b"\n", self._seen)
            if cr < self._seen:
                cr = _position(buffer, b"\r", self._seen)
            end = min(lf, cr)
            if end == size:
                break
            after = end + 1
            if buffer[end] == _CR:
                if after == size:
                    self._after_cr = True
                elif buffer[after] == _LF:
                    after += 1
            if self._end_line(buffer, start, self._line, end):
                self._end_event(buffer, start, end, after, cuts)
                start = after
            elif not self._fields and not self._raw:
                start, self._cut_last, self._bom = (
                    after,
                    False,
                    0,
                )  # a comment between events goes at once: it is a sign of life
            self._line = self._seen = after
        self._seen = size
        return start, cuts

    def _end_line(self, buffer: bytes | bytearray, start: int, line: int, end: int) -> bool:
        """Take note of a line; whether it is the empty one that ends an event."""
        if self._first_line:
            self._first_line = False
            if buffer.startswith(_BOM, line, end):
                line += len(_BOM)
                self._bom = len(_BOM)
        carried, self._carried = self._carried, False
        if not self._raw and end - start > self.max_event_bytes:
            self._raw = self.oversized = True
        if end == line and not carried:
            return True
        if self._raw or buffer[line] == _COLON:
            return False
        self._fields = True
        if buffer.startswith(b"data", line, end):
            self._data_line(buffer, line + 4, end)
        elif buffer.startswith(b"event:", line, end):
            self._named_error = bytes(buffer[line + 6 : end]).removeprefix(b" ") == b"error"
        return False

    def _data_line(self, buffer: bytes | bytearray, at: int, end: int) -> None:
        if at < end and buffer[at] != _COLON:
            return
        at = min(at + 1, end)
        if buffer.startswith(b" ", at, end):
            at += 1
        self._data_at, self._data_end = at, end
        self._data_lines += 1

    def _end_event(
        self, buffer: bytes | bytearray, start: int, end: int, after: int, cuts: list[tuple[int, int]]
    ) -> None:
        self._cut_last = False
        if self._raw:
            self.events += 1
            self.output_events += 1
            self._raw = False
        elif self._data_lines:
            one = self._data_lines == 1
            payload = (
                bytes(buffer[self._data_at : self._data_end]) if one else joined(bytes(buffer[start + self._bom : end]))
            )
            if self._look(payload):
                cuts.append((start, after))
                self._cut_last = True
        self._begin()

    def _begin(self) -> None:
        self._fields = self._named_error = False
        self._data_at = self._data_end = self._data_lines = self._bom = 0

    def _shift(self, boundary: int, size: int) -> None:
        """Make the offsets relative to the boundary: what came before it has gone."""
        if boundary == size:
            self._line = self._seen = 0
        else:
            self._line -= boundary
            self._seen -= boundary
            self._data_at -= boundary
            self._data_end -= boundary

    def _look(self, payload: bytes) -> bool:
        """Count an event and note what it says; whether to withhold it."""
        self.events += 1
        if payload == b"[DONE]":
            self.done = True
            return False
        found = Details()
        if self._named_error or _UNUSUAL.search(payload):
            found = details(payload)
            self._note(found, payload)
        if _HAS_CHOICES.search(payload) or (found.usage is None and _HAS_DELTA.search(payload)):
            self.output_events += 1
        return self.withhold_usage and found.only_usage

    def _note(self, found: Details, payload: bytes) -> None:
        if found.usage is not None:
            self.usage = found.usage
            if self.first_usage is None:
                self.first_usage = found.usage
        if found.finish_reason is not None:
            self.finish_reason = found.finish_reason
        if found.error is not None or self._named_error:
            self.error = payload if found.error is None else found.error

    def __repr__(self) -> str:
        return (
            f"<EventScanner {self.events} events, {self.output_events} with output, {len(self._pending)} bytes pending>"
        )


def _position(buffer: bytes | bytearray, wanted: bytes, at: int) -> int:
    found = buffer.find(wanted, at)
    return len(buffer) if found < 0 else found


def _without(buffer: bytes | bytearray, end: int, cuts: list[tuple[int, int]]) -> bytes:
    kept, at = [], 0
    for first, last in cuts:
        kept.append(bytes(buffer[at:first]))
        at = last
    kept.append(bytes(buffer[at:end]))
    return b"".join(kept)
