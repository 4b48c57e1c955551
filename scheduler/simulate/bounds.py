"""What no scheduler can beat: linear programs solved with HiGHS, cached by trace, sizes and memory.

B1, load cost in arrival order. Between two successive requests for model m, x in [0, 1] is the part of m that is kept.
Minimise the sum of L_m (1 - x), subject at every request to: the kept parts of the other models and the model asked for
fit into memory. Integral, and equal to Belady's rule, for equal sizes; a valid lower bound otherwise.

B2, requests on time when the order is free: see `_OnTime`.

scipy is an extra (`pip install 'vramp[sim]'`) and is imported only here.
"""

from __future__ import annotations

import hashlib
import importlib
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from scheduler.model import ModelSpec
from scheduler.simulate.traces import Request

VERSION = 1  # of the programs: a change here makes cached results stale


class NoSolver(RuntimeError):
    """scipy is not installed, or HiGHS gave up."""


def load_cost_bound(requests: Sequence[Request], models: Mapping[str, ModelSpec], memory_bytes: int) -> float:
    """B1 in load seconds: the first load of every model included. Cost: a program of a column a request."""
    key = ("b1", memory_bytes, _fingerprint(requests, models))
    return _cached(key, lambda: _solve_load_cost(requests, models, memory_bytes))


def _solve_load_cost(requests: Sequence[Request], models: Mapping[str, ModelSpec], memory_bytes: int) -> float:
    solver, sparse = _libraries()
    sequence = [r.model for i, r in enumerate(requests) if not i or requests[i - 1].model != r.model]
    last: dict[str, int] = {}
    fixed = 0.0
    costs: list[float] = []
    entries: list[tuple[int, int, int]] = []
    for time, name in enumerate(sequence):
        if name in last:
            column = len(costs)
            costs.append(models[name].load_estimate_s)
            entries += [(t, column, models[name].memory_bytes) for t in range(last[name] + 1, time)]
        else:
            fixed += models[name].load_estimate_s
        last[name] = time
    if not costs:
        return fixed
    scale = float(memory_bytes)
    rows, columns, sizes = zip(*entries, strict=True)
    matrix = sparse.csr_matrix(([size / scale for size in sizes], (rows, columns)), shape=(len(sequence), len(costs)))
    room = [1.0 - models[name].memory_bytes / scale for name in sequence]
    result = solver([-cost for cost in costs], A_ub=matrix, b_ub=room, bounds=(0, 1), method="highs")
    if result.status != 0:
        raise NoSolver(f"HiGHS: {result.message}")
    return float(fixed + sum(costs) + result.fun)


def on_time_bound(
    requests: Sequence[Request],
    models: Mapping[str, ModelSpec],
    memory_bytes: int,
    deadline_s: float,
    service_s: Sequence[float],
    slot_s: float = 1.0,
) -> float:
    """B2 in requests: at most so many can be let in within `deadline_s` of their arrival, by any scheduler that loads
    one model at a time. Cost: seconds to minutes; a program of some columns a request, model and slot."""
    key = ("b2", memory_bytes, deadline_s, slot_s, _fingerprint(requests, models))
    return _cached(key, lambda: _OnTime(requests, models, memory_bytes, deadline_s, service_s, slot_s).solve())


class _OnTime:
    """Time in slots; y[m,t] is the part of m that is resident throughout slot t, z[m,e] the part whose load ends in
    slot e. Whatever a schedule does within a slot is decided in its favour, so this is a bound with slots of any width:

    - y[m,t] <= y[m,t-1] + z[m,t-1] + z[m,t].
    - Memory counts in slot t what is resident throughout it, or certainly loads throughout it.
    - The link: in slots s..t, loads that end there take at least min(L_m, (e - s) slots) of it.
    - A request that comes in slot k is served from what is there (v <= y[m,k-1] + z[m,k-1] + z[m,k]) or by a load
      that ends by its deadline (u[e] <= z[m,e]), and its model stays while it decodes: v, and the sum of those u[e]
      that would still decode, are at most y[m,t] in every slot that the decoding certainly fills.
    - Requests of one model, slot, deadline slot and length are one column with a weight.
    """

    WINDOWS = (4, 8, 16, 64)  # slots over which the link is counted

    def __init__(
        self,
        requests: Sequence[Request],
        models: Mapping[str, ModelSpec],
        memory_bytes: int,
        deadline_s: float,
        service_s: Sequence[float],
        slot_s: float,
    ) -> None:
        self._names = sorted({request.model for request in requests})
        self._loads = [models[name].load_estimate_s / slot_s for name in self._names]  # in slots
        self._sizes = [models[name].memory_bytes / memory_bytes for name in self._names]
        index = {name: number for number, name in enumerate(self._names)}
        groups: dict[tuple[int, int, int, int], int] = {}
        for request, service in zip(requests, service_s, strict=True):
            first = int(request.at_s / slot_s)
            last = int((request.at_s + deadline_s) / slot_s)
            key = (index[request.model], first, last, int(service / slot_s) - 1)
            groups[key] = groups.get(key, 0) + 1
        self._groups = groups
        self._slots = max(last for _, _, last, _ in groups) + max(0, *(hold for _, _, _, hold in groups)) + 2
        self._rows: list[int] = []
        self._columns: list[int] = []
        self._values: list[float] = []
        self._limits: list[float] = []
        self._gains: list[float] = []

    def solve(self) -> float:
        """The largest weight of requests served in time."""
        solver, sparse = _libraries()
        self._gains = [0.0] * (2 * len(self._names) * self._slots)
        self._residency()
        self._memory()
        self._link()
        for (model, first, last, hold), weight in self._groups.items():
            self._request(model, first, last, hold, weight)
        shape = (len(self._limits), len(self._gains))
        matrix = sparse.csr_matrix((self._values, (self._rows, self._columns)), shape=shape)
        costs = [-gain for gain in self._gains]
        result = solver(costs, A_ub=matrix, b_ub=self._limits, bounds=(0, 1), method="highs")
        if result.status != 0:
            raise NoSolver(f"HiGHS: {result.message}")
        return float(-result.fun)

    def _y(self, model: int, slot: int) -> int:
        return model * self._slots + slot

    def _z(self, model: int, slot: int) -> int:
        return (len(self._names) + model) * self._slots + slot

    def _at_most(self, terms: Sequence[tuple[int, float]], limit: float) -> None:
        row = len(self._limits)
        self._limits.append(limit)
        for column, value in terms:
            self._rows.append(row)
            self._columns.append(column)
            self._values.append(value)

    def _here(self, model: int, slot: int) -> list[tuple[int, float]]:
        """Minus whatever may have been resident at some moment of the slot without a later load."""
        terms = [(self._z(model, slot), -1.0)]
        if slot:
            terms += [(self._y(model, slot - 1), -1.0), (self._z(model, slot - 1), -1.0)]
        return terms

    def _residency(self) -> None:
        for model, load in enumerate(self._loads):
            for slot in range(self._slots):
                self._at_most([(self._y(model, slot), 1.0), *self._here(model, slot)], 0.0)
                if slot + 1 < load:  # the first load takes its time
                    self._at_most([(self._z(model, slot), 1.0)], 0.0)

    def _memory(self) -> None:
        for slot in range(self._slots):
            terms = []
            for model, (size, load) in enumerate(zip(self._sizes, self._loads, strict=True)):
                terms.append((self._y(model, slot), size))
                # a load that ends in slot e fills the slots e + 1 - floor(L) to e - 1
                ends = range(slot + 1, min(self._slots, slot + int(load)))
                terms += [(self._z(model, end), size) for end in ends]
            self._at_most(terms, 1.0)

    def _link(self) -> None:
        for width in self.WINDOWS:
            for start in range(0, max(1, self._slots - width), max(1, width // 4)):
                ends = range(start, min(start + width, self._slots))
                terms = [
                    (self._z(model, end), min(load, float(end - start)))
                    for model, load in enumerate(self._loads)
                    for end in ends
                    if end > start
                ]
                self._at_most(terms, float(len(ends)))
        everything = [
            (self._z(model, end), load) for model, load in enumerate(self._loads) for end in range(self._slots)
        ]
        self._at_most(everything, float(self._slots))

    def _request(self, model: int, first: int, last: int, hold: int, weight: int) -> None:
        there = self._column(weight)
        ends = range(first, last + 1)
        loaded = [self._column(weight) for _ in ends]
        self._at_most([(there, 1.0), *((column, 1.0) for column in loaded)], 1.0)
        self._at_most([(there, 1.0), *self._here(model, first)], 0.0)
        for end, column in zip(ends, loaded, strict=True):
            self._at_most([(column, 1.0), (self._z(model, end), -1.0)], 0.0)
        for slot in range(first + 1, last + hold + 1):
            terms = [(column, 1.0) for end, column in zip(ends, loaded, strict=True) if end < slot <= end + hold]
            if slot <= first + hold:
                terms.append((there, 1.0))
            if terms:
                self._at_most([*terms, (self._y(model, slot), -1.0)], 0.0)

    def _column(self, weight: int) -> int:
        self._gains.append(float(weight))
        return len(self._gains) - 1


def _libraries() -> tuple[Any, Any]:
    """linprog and scipy.sparse: an extra, and slow to import."""
    try:
        return importlib.import_module("scipy.optimize").linprog, importlib.import_module("scipy.sparse")
    except ImportError as error:
        raise NoSolver("the bounds need scipy: pip install scipy, or leave them out with --no-bounds") from error


def _fingerprint(requests: Sequence[Request], models: Mapping[str, ModelSpec]) -> str:
    digest = hashlib.sha256(msgspec.msgpack.encode([(r.at_s, r.model, r.output_tokens) for r in requests]))
    digest.update(msgspec.msgpack.encode(sorted((m.name, m.memory_bytes, m.load_estimate_s) for m in models.values())))
    return digest.hexdigest()


def _cached(key: tuple[object, ...], solve: Any) -> float:
    """Bounds are exact and slow, so they are kept between runs; a cache that cannot be written costs only time."""
    folder = Path(tempfile.gettempdir()) / "vramp-bounds"
    path = folder / hashlib.sha256(repr((VERSION, key)).encode()).hexdigest()[:32]
    try:
        return float(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        value = float(solve())
    try:
        folder.mkdir(exist_ok=True)
        path.write_text(repr(value), encoding="ascii")
    except OSError:
        pass
    return value
