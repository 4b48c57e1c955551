"""Sizes as people write them ("4GiB", "512MiB", a count of bytes) and as we show them. One place for the project."""

from __future__ import annotations

import re
from typing import Final

UNITS: Final = {
    "B": 1,
    "KIB": 1 << 10,
    "MIB": 1 << 20,
    "GIB": 1 << 30,
    "TIB": 1 << 40,
    "PIB": 1 << 50,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "PB": 10**15,
}
_SIZE: Final = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", re.ASCII)


def byte_size(size: int | str) -> int:
    """Bytes of "4GiB", "1.5 GB", "4096" or 4096. Raises ValueError for anything else, negative numbers too."""
    if isinstance(size, int):
        if size < 0:
            raise ValueError(f"a size cannot be negative: {size}")
        return size
    match = _SIZE.fullmatch(size)
    unit = UNITS.get(match[2].upper() or "B") if match else None
    if match is None or unit is None:
        raise ValueError(f'not a size: "{size}"')
    # whole numbers stay exact: a float would lose bytes above 2**53
    return int(match[1]) * unit if match[1].isdigit() else int(float(match[1]) * unit)


def format_size(size: int) -> str:
    """The shortest form that `byte_size` reads back, to a tenth of a unit: "4GiB", "1.5GiB", "300B"."""
    for name, unit in (("PiB", 1 << 50), ("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if abs(size) >= unit:
            return f"{size / unit:.1f}".removesuffix(".0") + name
    return f"{size}B"
