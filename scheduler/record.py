"""The production log: everything that the core was told and what it answered, so that it can be run again.

A file is one opening, which holds what the core was made of, and entries of (now, event, commands). Replaying feeds the
events to a fresh core and compares the commands, decision for decision. Each is a msgpack value behind its length in
four bytes (big endian), so that a log cut off by a crash is whole up to its last entry.

A `RecordedCore` is a `Core`: whoever does not record pays nothing for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import chain, count
from pathlib import Path
from typing import Any, BinaryIO, get_args

import msgspec

from scheduler.commands import Admit, Command
from scheduler.core import Core
from scheduler.events import Arrived, Cancelled, Event, Finished
from scheduler.footprints import Footprints
from scheduler.ledger import readable_size
from scheduler.model import DeviceSpec, ModelSpec, SchedulerSettings, Ticket
from scheduler.policies.regret import TAIL_HELD, Regret
from scheduler.sequences import Steps

FORMAT = 1
LENGTH_BYTES = 4
MOST_BYTES = 1 << 30
EVENTS: dict[str, type] = {each.__name__: each for each in get_args(Event)}
COMMANDS: dict[str, type] = {each.__name__: each for each in get_args(Command)}


class LogError(ValueError):
    """A file that is not a log of ours; the message names it."""


class Opening(msgspec.Struct, frozen=True):
    """What a core is made of: the snapshot that a log begins with."""

    devices: tuple[DeviceSpec, ...]
    models: tuple[ModelSpec, ...]
    settings: SchedulerSettings
    engines_before: int = 0
    tail: float = TAIL_HELD
    footprints: dict[str, list[int]] = {}
    steps: Steps = {}
    format: int = FORMAT

    def core(self) -> Core:
        """A core as it was when the log was opened."""
        return Core(**self.parts())

    def parts(self) -> dict[str, Any]:
        """The arguments of such a core, new ones at each call."""
        return {
            "devices": self.devices,
            "models": self.models,
            "settings": self.settings,
            "engines_before": self.engines_before,
            "ordering": Regret(self.tail),
            "footprints": Footprints.of(self.footprints),
            "steps": self.steps,
        }


class Entry(msgspec.Struct, frozen=True):
    """One step."""

    now: float
    event: Event
    commands: tuple[Command, ...]


def free_path(path: str | Path) -> Path:
    """The path, or PATH.1, PATH.2 ...: a proxy that comes back after a crash must not write over what led to it."""
    numbered = (Path(f"{path}.{number}") for number in count(1))
    return next(each for each in chain((Path(path),), numbered) if not each.exists())


class Recorder:
    """Writes a log. Stops for good at `most_bytes`, so that the disk does not fill, or when it cannot be written: it
    closes the file and says why to `on_end`, once. What is there stays replayable.

    To write never raises: the core has decided by then, and a decision that its shell is not told is lost.
    """

    def __init__(
        self,
        path: str | Path,
        opening: Opening,
        most_bytes: int = MOST_BYTES,
        on_end: Callable[[str], None] = lambda _why: None,
    ) -> None:
        """Raises OSError where there can be no such file."""
        self._on_end = on_end
        self._file: BinaryIO = Path(path).open("wb")  # noqa: SIM115 - lives as long as the server
        self._most_bytes = self._left = most_bytes
        self._encoder = msgspec.msgpack.Encoder()
        self._write(opening)

    def entry(self, now: float, event: Event, commands: Sequence[Command]) -> None:
        """One step of the core."""
        self._write((now, _named(event), [_named(command) for command in commands]))

    def close(self) -> None:
        """Everything is on its way to the disk, as far as it takes it."""
        with suppress(OSError):
            self._file.close()

    def _write(self, value: object) -> None:
        if self._left < 0:
            return
        data = self._encoder.encode(value)
        self._left -= LENGTH_BYTES + len(data)
        if self._left < 0:
            self._end(f"it has reached {readable_size(self._most_bytes)}")
            return
        try:
            self._file.write(len(data).to_bytes(LENGTH_BYTES, "big") + data)
        except OSError as error:
            self._end(error.strerror or str(error))

    def _end(self, why: str) -> None:
        self._left = -1
        self.close()  # now: its last entries, and a file that is moved away, would wait for the server's end
        self._on_end(why)


class RecordedCore(Core):
    """A core that writes its log. `opening` is what it is made of."""

    def __init__(self, opening: Opening, recorder: Recorder) -> None:
        super().__init__(**opening.parts())
        self._recorder = recorder
        self._inside = False  # a step that the core takes within a step is not an event of its own

    def step(self, event: Event, now: float) -> list[Command]:
        """As the core's."""
        return self._recorded(event, now, lambda: Core.step(self, event, now))

    def arrive(self, ticket: Ticket, now: float) -> list[Command]:
        """As the core's."""
        return self._recorded(Arrived(ticket), now, lambda: Core.arrive(self, ticket, now))

    def finish(
        self, ticket_id: int, now: float, prompt_tokens: int | None = None, output_tokens: int | None = None
    ) -> list[Command]:
        """As the core's."""
        event = Finished(ticket_id, prompt_tokens, output_tokens)
        return self._recorded(event, now, lambda: Core.finish(self, ticket_id, now, prompt_tokens, output_tokens))

    def cancel(self, ticket_id: int, now: float) -> list[Command]:
        """As the core's."""
        return self._recorded(Cancelled(ticket_id), now, lambda: Core.cancel(self, ticket_id, now))

    def admit_now(self, ticket: Ticket, now: float) -> Admit | None:
        """As the core's: an arrival that was let in at once, or nothing."""
        admit = Core.admit_now(self, ticket, now)
        if admit is not None and not self._inside:
            self._recorder.entry(now, Arrived(ticket), [admit])
        return admit

    def _recorded(self, event: Event, now: float, step: Any) -> list[Command]:
        if self._inside:
            return list(step())
        self._inside = True
        try:
            commands: list[Command] = step()
        finally:
            self._inside = False
        self._recorder.entry(now, event, commands)
        return commands


class Difference(msgspec.Struct, frozen=True):
    """The first step at which a replay went another way."""

    number: int
    entry: Entry
    replayed: tuple[Command, ...]


class Replay(msgspec.Struct, frozen=True):
    """How a replay went."""

    events: int
    commands: int
    difference: Difference | None


def replay(path: str | Path) -> Replay:
    """Run a log again on a fresh core. Raises LogError, OSError."""
    entries = read_log(path)
    core = next(entries)
    assert isinstance(core, Opening)
    machine = core.core()
    events = commands = 0
    for entry in entries:
        assert isinstance(entry, Entry)
        events += 1
        answer = tuple(machine.step(entry.event, entry.now))
        commands += len(answer)
        if answer != entry.commands:
            return Replay(events, commands, Difference(events, entry, answer))
    return Replay(events, commands, None)


def read_log(path: str | Path) -> Iterator[Opening | Entry]:
    """The opening, then the entries, up to where the log was cut off. Raises LogError, OSError."""
    with Path(path).open("rb") as file:
        first = _read(file, path)
        if first is None:
            raise LogError(f"{path}: empty, or cut off before its first entry")
        try:
            opening = msgspec.convert(first, Opening)
        except msgspec.ValidationError as error:
            raise LogError(f"{path}: not a log of vramp: {error}") from error
        if opening.format != FORMAT:
            raise LogError(f"{path}: format {opening.format}; this vramp reads format {FORMAT}")
        yield opening
        number = 1
        while (value := _read(file, path)) is not None:
            try:
                now, event, commands = value
                yield Entry(now, _typed(EVENTS, event), tuple(_typed(COMMANDS, each) for each in commands))
            except (ValueError, TypeError, KeyError, msgspec.ValidationError) as error:
                raise LogError(f"{path}, entry {number}: {error}") from error
            number += 1


def _read(file: BinaryIO, path: str | Path) -> Any:
    size = int.from_bytes(head, "big") if len(head := file.read(LENGTH_BYTES)) == LENGTH_BYTES else None
    if size is None:
        return None
    data = file.read(size)
    if len(data) < size:
        return None
    try:
        return msgspec.msgpack.decode(data)
    except msgspec.DecodeError as error:
        raise LogError(f"{path}: not a log of vramp: {error}") from error


def _named(value: object) -> tuple[str, object]:
    return type(value).__name__, value


def _typed(kinds: dict[str, type], named: tuple[str, Any]) -> Any:
    name, fields = named
    return msgspec.convert(fields, kinds[name])
