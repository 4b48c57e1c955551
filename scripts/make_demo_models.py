"""Make the demo's models: four real model folders in .models/, in about a minute, from nothing but this repository.

What they are and how they learn is in demo_training.py, which needs torch; this file decides what is missing and
must be quick to say "nothing".

A folder is made beside its place and renamed into it, so an interrupted run leaves nothing that looks finished; it
is kept until these scripts or their pages change.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
NAMES = ("demo-chat", "demo-code", "demo-story", "demo-embed")

Report = Callable[[float], None]  # told how much is done, from 0 to 1


def stamp() -> str:
    """A hash of what the models are made from."""
    hashed = hashlib.sha256()
    for source in (*sorted(HERE.glob("*demo*.py")), *sorted((HERE / "demo_pages").glob("*.md"))):
        hashed.update(source.read_bytes())
    return hashed.hexdigest()


def is_made(folder: Path) -> bool:
    """Whether a folder was made from just these scripts and pages."""
    mark = folder / "made-from.txt"
    return mark.exists() and mark.read_text(encoding="utf-8") == stamp()


def train(name: str, folder: Path, say: Report) -> None:
    """Hand over to the half of this that needs torch, imported only when there is something to make."""
    importlib.import_module("demo_training").write_model(name, folder, say)


def make(name: str, out: Path, say: Report, write: Callable[[str, Path, Report], None] = train) -> None:
    """Make one model folder under `out`, all of it or nothing."""
    folder, half = out / name, out / f".{name}.half"
    shutil.rmtree(half, ignore_errors=True)  # what an interrupted run left
    half.mkdir(parents=True)
    write(name, half, say)
    (half / "made-from.txt").write_text(stamp(), encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    half.rename(folder)


def make_all(names: list[str], out: Path) -> None:
    """Make the models with a bar on a terminal and a plain line each elsewhere."""
    if not sys.stderr.isatty():
        for name in names:
            started = time.monotonic()
            make(name, out, lambda done: None)
            print(f"models: {name} made in {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
        return
    with Progress(console=Console(stderr=True)) as bars:
        for name in names:
            bar = bars.add_task(name, total=1.0)
            make(name, out, lambda done, bar=bar: bars.update(bar, completed=done))  # type: ignore[misc]


def main() -> int:
    """Make what is missing or out of date. A few milliseconds when nothing is."""
    parser = argparse.ArgumentParser(description="Make the demo's tiny models from the pages in scripts/demo_pages/.")
    parser.add_argument("--only", choices=NAMES, action="append", help="just this one (may be repeated)")
    parser.add_argument("--out", type=Path, default=ROOT / ".models", help="where the folders go (default .models)")
    options = parser.parse_args()
    names = [name for name in options.only or NAMES if not is_made(options.out / name)]
    if names:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        print(f"models: making {', '.join(names)} in {options.out}", file=sys.stderr, flush=True)
        make_all(names, options.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
