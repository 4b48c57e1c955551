"""The gate of requests of one kind. Theory: `_gate.pyx`."""

from collections.abc import Callable, Iterable

from ext.occupancy import Occupancy
from ext.rate_counters import Meter
from ext.tally import Tally

def siphash(text: bytes, key: bytes) -> bytes:
    """SipHash-2-4 of the text, 16 bytes, under a key of 16."""

class Form:
    """A line of which some fields differ: (what stands before the field, the field as `ext.relay.Field`).

    A `sparse` form leaves out a field that nobody told, with its text.
    """

    def __init__(self, fields: Iterable[tuple[bytes, int]], *, sparse: bool = False) -> None: ...

class Gate:
    """What requests of one kind take, and what is written of them.

    `limits` are the meters of the key and of the model; `stated` tokens and `guessed` ones are reserved with what the
    body's size says. `facts` are lines of the answer's head: before the id, between it and the milliseconds upstream,
    after those. `forms` are (form, who takes its line).
    """

    def __init__(
        self,
        *,
        flying: Occupancy,
        slots: Occupancy | None,
        limits: tuple[Meter | None, Meter | None],
        stated: int,
        guessed: int,
        bytes_per_token: int,
        tally: Tally,
        facts: tuple[bytes, bytes, bytes],
        forms: list[tuple[Form, Callable[[bytes], None]]],
    ) -> None: ...
