"""Which model a session asks for next, and when: learned from what sessions asked for one after the other.

An agent's planner is followed by its coder, the coder by its embedder: first-order steps, counted over all sessions,
because a new session should profit from those before it. A step keeps how often it was taken, and the mean and the
spread of its time, as TCP keeps them of round trips: from request to request, and, where it is known, from the end of
the answer, which does not depend on how long that waited and took. Old counts fade: a row is halved whenever it is
full. Steps outlive a restart (`steps`, `restore`), sessions do not: a new one profits from the steps all the same.

The hot path pays nothing: arrivals are noted in batches and read when somebody asks what to expect, `MOST_UNREAD` of
them at most; of a flood the rates say enough. A step is O(1). Nothing here grows without limit: `MOST_SESSIONS`, the
oldest forgotten first, and `MOST_NEXT` steps from each model.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Iterable, Sequence
from itertools import islice
from math import prod
from typing import Annotated

import msgspec

from scheduler.model import Ticket

MOST_SESSIONS = 10_000
MOST_UNREAD = 128
MOST_NEXT = 16  # models that are known to follow one model; the rarest makes way for a new one
ROW_FULL = 64.0  # steps counted from one model until all of them count half
EPISODE_S = 300.0  # a session that was silent for longer begins anew
LATEST = 64  # sessions that a forecast looks at: what many do is known by rate
MEAN_GAIN, SPREAD_GAIN = 1 / 8, 1 / 4  # RFC 6298's
LATE_SPREADS, LATE_S = 4.0, 1.0  # a step that is later than its mean by so much is not coming
UNSEEN = 1.0  # counted for what was never seen: one sight of a step makes it an even bet, not a certainty

Arrival = tuple[float, str, Ticket]  # when, for which model, and as what
Session = tuple[str, str]  # the tenant, and what it calls its session ("" for all that it does not name)


Count = Annotated[float, msgspec.Meta(ge=0.0, le=ROW_FULL)]
Seconds = Annotated[float, msgspec.Meta(ge=0.0, le=EPISODE_S)]
Taken = tuple[Seconds, Seconds]  # mean and spread


class LearnedStep(msgspec.Struct, frozen=True):
    """A step as it is kept: how often it was taken, by what counts of it still, and how long it took."""

    weight: Count
    after_request: Taken
    after_answer: Taken | None = None


Steps = dict[str, dict[str, LearnedStep]]  # by the model before and the one after


class Expected(msgspec.Struct, frozen=True):
    """A model's next use, as sessions foretell it: probably at `at_s`, hardly after `until_s`. `after` is the model
    that the likeliest of these sessions asked for last."""

    probability: float
    at_s: float
    until_s: float
    after: str


class _Delay:
    """How long something takes: mean and spread."""

    __slots__ = ("mean_s", "spread_s")

    def __init__(self, mean_s: float, spread_s: float | None = None) -> None:
        self.mean_s = mean_s
        self.spread_s = mean_s / 2 if spread_s is None else spread_s

    def add(self, seconds: float) -> None:
        self.spread_s += SPREAD_GAIN * (abs(seconds - self.mean_s) - self.spread_s)
        self.mean_s += MEAN_GAIN * (seconds - self.mean_s)

    @property
    def late_s(self) -> float:
        return self.mean_s + LATE_SPREADS * self.spread_s + LATE_S


class _Step:
    """From one model to another: after the request for the one, and after its answer."""

    __slots__ = ("after_answer", "after_request", "weight")

    def __init__(self) -> None:
        self.weight = 0.0
        self.after_request: _Delay | None = None
        self.after_answer: _Delay | None = None

    def took(self, asked_s: float, answered_s: float | None, now: float) -> None:
        self.weight += 1.0
        self.after_request = _learned(self.after_request, now - asked_s)
        if answered_s is not None and asked_s <= answered_s <= now:
            self.after_answer = _learned(self.after_answer, now - answered_s)

    def next_s(self, asked_s: float, answered_s: float | None) -> tuple[float, float]:
        """When it is taken next, and until when it may be."""
        since_s, delay = asked_s, self.after_request
        if self.after_answer is not None and answered_s is not None and answered_s >= asked_s:
            since_s, delay = answered_s, self.after_answer
        assert delay is not None
        return since_s + delay.mean_s, since_s + delay.late_s


def _learned(delay: _Delay | None, seconds: float) -> _Delay:
    if delay is None:
        return _Delay(max(0.0, seconds))
    delay.add(max(0.0, seconds))
    return delay


def _kept(step: _Step) -> LearnedStep:
    asked, answered = step.after_request, step.after_answer
    assert asked is not None
    taken = None if answered is None else (answered.mean_s, answered.spread_s)
    return LearnedStep(step.weight, (asked.mean_s, asked.spread_s), taken)


def _restored(kept: LearnedStep) -> _Step:
    step = _Step()
    step.weight = kept.weight
    step.after_request = _Delay(*kept.after_request)
    step.after_answer = None if kept.after_answer is None else _Delay(*kept.after_answer)
    return step


class _Row:
    """The steps from one model. total == sum of their weights."""

    __slots__ = ("steps", "total")

    def __init__(self) -> None:
        self.steps: dict[str, _Step] = {}
        self.total = 0.0

    def took(self, model: str, asked_s: float, answered_s: float | None, now: float) -> None:
        step = self.steps.get(model)
        if step is None:
            if len(self.steps) >= MOST_NEXT:
                rarest = min(self.steps, key=lambda name: self.steps[name].weight)
                self.total -= self.steps.pop(rarest).weight
            step = self.steps[model] = _Step()
        step.took(asked_s, answered_s, now)
        self.total += 1.0
        if self.total >= ROW_FULL:
            self._halve()

    def _halve(self) -> None:
        for step in self.steps.values():
            step.weight /= 2
        self.total /= 2


class Sequences:
    """What sessions did and are likely to do. `answered(model, at_s)`: when a model's last answer before that ended."""

    def __init__(self, answered: Callable[[str, float], float | None] = lambda _name, _at_s: None) -> None:
        self._answered = answered
        self._last: OrderedDict[Session, tuple[str, float]] = OrderedDict()  # the latest at the end
        self._rows: dict[str, _Row] = {}
        self._unread: deque[Arrival] = deque(maxlen=MOST_UNREAD)
        self.changed = False  # since somebody who keeps them set it back

    def __len__(self) -> int:
        return len(self._last)

    def note(self, arrivals: Iterable[Arrival]) -> None:
        """Requests have come."""
        self._unread.extend(arrivals)

    def _read(self) -> None:
        for at_s, model, ticket in self._unread:
            self.saw((ticket.tenant, ticket.session), model, at_s)
        self._unread.clear()

    def saw(self, session: Session, model: str, at_s: float) -> None:
        """A session asked for a model."""
        last = self._last.pop(session, None)
        if last is not None:
            before, when = last
            if at_s - when <= EPISODE_S:
                self._rows.setdefault(before, _Row()).took(model, when, self._answered(before, at_s), at_s)
                self.changed = True
        self._last[session] = (model, at_s)
        if len(self._last) > MOST_SESSIONS:
            self._last.popitem(last=False)

    def keep(self, models: Iterable[str]) -> None:
        """Forget all models but these."""
        known = set(models)
        if not known:
            self._last.clear()
            self._unread.clear()
        self._rows = {name: row for name, row in self._rows.items() if name in known}

    def steps(self) -> Steps:
        """What was learned so far, to be kept. Arrivals that nobody has read yet stay unread: how long an answer took
        is looked up when they are, so that reading them at another moment would be another decision. O(steps)."""
        return {name: {after: _kept(step) for after, step in row.steps.items()} for name, row in self._rows.items()}

    def restore(self, steps: Steps, models: Collection[str]) -> None:
        """What was kept, as far as it is of these models, within this version's bounds."""
        for name in steps.keys() & set(models):
            row = self._rows[name] = _Row()
            known = [(after, kept) for after, kept in steps[name].items() if after in models]
            row.steps = {after: _restored(kept) for after, kept in known[:MOST_NEXT]}
            row.total = sum(step.weight for step in row.steps.values())

    def expected(self, now: float) -> dict[str, Expected]:
        """What the latest sessions are about to ask for, each model with the chance that any of them does.

        O(`MOST_UNREAD` + `LATEST` x `MOST_NEXT`) at most.
        """
        self._read()
        steps: dict[str, list[tuple[float, float, float, str]]] = {}
        for model, since_s in islice(reversed(self._last.values()), LATEST):
            if now - since_s > EPISODE_S:
                break
            row = self._rows.get(model)
            if row is None:
                continue
            answered_s = self._answered(model, now)
            for name, step in row.steps.items():
                at_s, until_s = step.next_s(since_s, answered_s)
                if now <= until_s:
                    share = step.weight / (row.total + UNSEEN)
                    steps.setdefault(name, []).append((share, at_s, until_s, model))
        return {name: _together(each) for name, each in steps.items()}


def _together(steps: Sequence[tuple[float, float, float, str]]) -> Expected:
    """The chance that any of them is taken; the likeliest says when."""
    none = prod(1.0 - share for share, *_ in steps)
    _, at_s, until_s, after = max(steps)
    return Expected(1.0 - none, at_s, until_s, after)
