"""Engines that are only numbers: how large a model is, how long it loads, how long an answer takes.

`REFERENCE` is the engine of the published comparisons; a TOML file describes another:

    sizes = ["5GiB", "16GiB"]        # dealt to the models in name order
    load_base_s = 2.0                # loading takes load_base_s + size / load_bytes_per_s
    load_bytes_per_s = 20e9
    service_base_s = 0.3             # an answer takes service_base_s + output_tokens / tokens_per_s
    tokens_per_s = 60.0
    sequences = 64
    sleep_memory = "128GiB"          # host memory to sleep in; without it eviction stops engines, which takes no time
    sleep_keeps = "2GiB"             # of a sleeper stays on the device; the rest of its size goes to host memory
    sleep_base_s = 0.2               # going to sleep takes sleep_base_s + rest / sleep_bytes_per_s, over the same link
    sleep_bytes_per_s = 22e9
    wake_base_s = 0.2
    wake_bytes_per_s = 22e9
    [models]                         # sizes of models by name, before any dealing
    "my-model" = "28GiB"
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from pathlib import Path

import msgspec

from scheduler.engines.estimate import COPY_BASE_S, COPY_BYTES_PER_S, OVERHEAD_GPU
from scheduler.model import DeviceSpec, ModelSpec
from scheduler.simulate.traces import Request

GiB = 1 << 30
DEVICE = "memory"
UNITS = {"GiB": GiB, "MiB": 1 << 20, "GB": 10**9, "MB": 10**6}
NO_LIMIT = 1 << 40


class EngineFileError(ValueError):
    """An engine file that cannot be used; the message names file and key."""


class Engine(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """See the module. `sizes` are dealt by (step x index) mod len(sizes) to the models in name order.

    What is said of sleep and wake by default is published of vLLM on one card; `REFERENCE` itself does not sleep.
    """

    sizes: tuple[int | str, ...] = (5 * GiB, 9 * GiB, 16 * GiB, 16 * GiB, 28 * GiB, 28 * GiB, 40 * GiB, 66 * GiB)
    step: int = 5
    models: dict[str, int | str] = {}
    load_base_s: float = 2.0
    load_bytes_per_s: float = 20e9
    service_base_s: float = 0.3
    tokens_per_s: float = 60.0
    sequences: int = 64
    sleep_memory: int | str | None = None
    sleep_keeps: int | str = OVERHEAD_GPU
    sleep_base_s: float = COPY_BASE_S
    sleep_bytes_per_s: float = COPY_BYTES_PER_S
    wake_base_s: float = COPY_BASE_S
    wake_bytes_per_s: float = COPY_BYTES_PER_S

    @property
    def sleep_memory_bytes(self) -> int:
        """Host memory for engines that sleep; 0: none does."""
        return 0 if self.sleep_memory is None else as_bytes(self.sleep_memory)

    def specs(self, names: Iterable[str]) -> list[ModelSpec]:
        """The scheduler's view of the models, in name order. Nothing is refused for a full queue."""
        return [self._spec(name, self._size(name, index)) for index, name in enumerate(sorted(set(names)))]

    def _size(self, name: str, index: int) -> int:
        stated = self.models.get(name)
        return as_bytes(stated if stated is not None else self.sizes[self.step * index % len(self.sizes)])

    def _spec(self, name: str, size: int) -> ModelSpec:
        keeps = None if self.sleep_memory is None else min(as_bytes(self.sleep_keeps), size)
        in_host = 0 if keeps is None else size - keeps
        return ModelSpec(
            name,
            size,
            DEVICE,
            max_sequences=self.sequences,
            kv_tokens=NO_LIMIT,
            max_queue=NO_LIMIT,
            load_estimate_s=self.load_base_s + size / self.load_bytes_per_s,
            sleep_keeps_bytes=keeps,
            sleep_host_bytes=in_host,
            wake_estimate_s=None if keeps is None else self.wake_base_s + in_host / self.wake_bytes_per_s,
        )

    def sleep_s(self, spec: ModelSpec) -> float:
        """Seconds that this model takes to fall asleep."""
        return self.sleep_base_s + spec.sleep_host_bytes / self.sleep_bytes_per_s

    def service_s(self, request: Request) -> float:
        """Seconds that the request keeps its place in the engine."""
        if request.duration_s is not None:
            return request.duration_s
        return self.service_base_s + request.output_tokens / self.tokens_per_s


REFERENCE = Engine()


def read_engine(name: str) -> Engine:
    """`reference`, or the engine that a TOML file describes. Raises EngineFileError."""
    if name == "reference":
        return REFERENCE
    try:
        engine = msgspec.convert(tomllib.loads(Path(name).read_text(encoding="utf-8")), Engine)
        if not engine.sizes:
            raise ValueError("sizes is empty")
        for size in (*engine.sizes, *engine.models.values(), engine.sleep_keeps, engine.sleep_memory):
            if size is not None:
                as_bytes(size)
    except OSError as error:
        raise EngineFileError(f"{name}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, msgspec.ValidationError, ValueError) as error:
        raise EngineFileError(f"{name}: {error}") from error
    return engine


def as_bytes(size: int | str) -> int:
    """A size in bytes; text may carry GiB, MiB, GB or MB. Raises ValueError."""
    if isinstance(size, int):
        value = float(size)
    else:
        text = size.strip()
        unit = next((each for each in UNITS if text.endswith(each)), "")
        try:
            value = float(text.removesuffix(unit)) * UNITS.get(unit, 1)
        except ValueError:
            raise ValueError(f"{size!r} is not a size; write 16GiB, 512MiB or a number of bytes") from None
    if not 0 < value < 1 << 60:
        raise ValueError(f"{size!r} is not a size above 0")
    return int(value)


def device(memory_bytes: int) -> DeviceSpec:
    """One device of so many bytes, all of them ours."""
    return DeviceSpec(DEVICE, DEVICE, memory_bytes)
