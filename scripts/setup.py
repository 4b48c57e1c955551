"""Make .venv from the locks: what `make setup`, `make run` and `make test` call first.

Standard library only, and plain enough for an old python3, because it runs before anything is installed: it looks for
an interpreter that is new enough, checks what a build needs, and says what is missing with the line that installs it.

Nothing is resolved here. A lock is complete and goes to `pip install --no-deps`, so nothing of the size of a CUDA
toolkit arrives by surprise and two machines get the same versions. Each finished part leaves a stamp with the hash of
its inputs; a part that was cut off leaves none and is done again, so running the same command twice repairs. The
refused alternative, make rules on the lock files, compares times and is fooled by a checkout.
"""

from __future__ import annotations

import argparse
import fcntl
import glob
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
STAMPS = VENV / ".vramp"
PYTHON = VENV / "bin" / "python"
OLDEST, NEWEST = (3, 11), (3, 14)
CANDIDATES = ("python3.11", "python3.12", "python3.13", "python3.14", "python3")
# Installed sizes with room for the wheels while they are unpacked.
DISK_NEEDED = {"core": 0.4e9, "dev": 0.4e9, "engine-cpu": 5e9, "engine-cuda": 20e9}
OFFER = "To see vramp work without an engine: make run ENGINE=simulated"


class SetupError(Exception):
    """Something that the person at the keyboard can mend; the message says how."""


class Progress:
    """One line that rewrites itself on a terminal, and plain lines (one in five seconds at most) elsewhere."""

    def __init__(self) -> None:
        self._live = sys.stderr.isatty()
        self._next = 0.0

    def show(self, text: str) -> None:
        """Say where a long step stands."""
        if self._live:
            print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
        elif time.monotonic() >= self._next:
            print(text, file=sys.stderr, flush=True)
            self._next = time.monotonic() + 5

    def done(self, text: str) -> None:
        """Say that a step is over; this line stays."""
        print(f"\r\033[K{text}" if self._live else text, file=sys.stderr, flush=True)
        self._next = 0.0


def environment() -> dict[str, str]:
    """The environment of every child: byte code is written (engines start in half the time with it), pip is quiet."""
    env = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1", "PIP_PROGRESS_BAR": "off"}
    env.pop("PYTHONDONTWRITEBYTECODE", None)
    return env


# ------------------------------------------------------------------ what this machine has

PROBE = "import sys, sysconfig; print(*sys.version_info[:2], sysconfig.get_paths()['include']); import ensurepip, venv"


def probe(command: str) -> tuple[tuple[int, int], Path, bool] | None:
    """Version, header folder and whether it can make a venv, of one interpreter; None when there is none."""
    if shutil.which(command) is None:
        return None
    found = subprocess.run([command, "-c", PROBE], capture_output=True, text=True, check=False)
    parts = found.stdout.split(maxsplit=2)
    if len(parts) != 3:  # a version manager's shim for a version that is not installed
        return None
    return (int(parts[0]), int(parts[1])), Path(parts[2].strip()), found.returncode == 0


def find_python() -> str:
    """An interpreter that can build and run vramp: $PYTHON, or the first of CANDIDATES that is new enough."""
    asked = os.environ.get("PYTHON")
    missing: list[str] = []
    for command in (asked,) if asked else CANDIDATES:
        found = probe(command)
        if found is None or not OLDEST <= found[0] <= NEWEST:
            continue
        version, headers, can_venv = found
        name = "python{}.{}".format(*version)
        lacks = [] if can_venv else [f"the venv module ({name}-venv)"]
        lacks += [] if (headers / "Python.h").exists() else [f"Python.h ({name}-dev)"]
        if not lacks:
            return command
        missing += [f"{command} lacks {' and '.join(lacks)}; Debian, Ubuntu: apt-get install {name}-venv {name}-dev"]
    if missing:
        raise SetupError("\n".join(missing))
    where = f"PYTHON={asked} is not one" if asked else f"looked for {', '.join(CANDIDATES)}"
    raise SetupError(
        f"Python 3.{OLDEST[1]} to 3.{NEWEST[1]} is needed ({where}). "
        "Debian, Ubuntu: apt-get install python3.11-venv python3.11-dev, or name one with PYTHON="
    )


def check_compilers() -> None:
    """A C compiler for the extensions, and g++, which vLLM calls when the first log probabilities are asked for."""
    cc = os.environ.get("CC", "cc").split()[0]
    cxx = os.environ.get("CXX", "g++").split()[0]
    missing = [name for name in (cc, cxx) if shutil.which(name) is None]
    if missing:
        raise SetupError(f"no compiler: {', '.join(missing)} not found. Debian, Ubuntu: apt-get install gcc g++")


def check_disk(parts: list[str]) -> None:
    """Refuse before the download, not when the disk is full."""
    needed, free = sum(DISK_NEEDED[part] for part in parts), shutil.disk_usage(ROOT).free
    if free < needed:
        raise SetupError(
            f"{ROOT} has {free / 1e9:.1f} GB free and {needed / 1e9:.1f} GB are needed for {', '.join(parts)}. "
            f"Free some, or check vramp out on a larger disk. {OFFER}"
        )


def engine_part(choice: str) -> str | None:
    """Which engine lock this machine takes: by its GPU when `choice` is auto. Raises SetupError where none fits."""
    if choice in ("simulated", "none"):
        return None
    if choice in ("cpu", "cuda"):
        return f"engine-{choice}"
    system, machine = platform.system(), platform.machine()
    if (system, machine) != ("Linux", "x86_64"):
        raise SetupError(f"vLLM is installed here for Linux on x86_64 only; this is {system} on {machine}. {OFFER}")
    libc, version = platform.libc_ver()
    if libc != "glibc" or [int(n) for n in re.findall(r"\d+", version)[:2]] < [2, 28]:
        raise SetupError(
            f"vLLM's wheels need glibc 2.28 or newer; this is {libc or 'another C library'} {version}. {OFFER}"
        )
    return "engine-cuda" if glob.glob("/proc/driver/nvidia/gpus/*") else "engine-cpu"


# ------------------------------------------------------------------ installing


def read_lock(part: str) -> list[str]:
    """The `name==version` lines of a lock."""
    lines = (ROOT / "requirements" / f"{part}.lock").read_text(encoding="utf-8").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def site_packages() -> Path:
    """Where the environment keeps its packages."""
    return next(VENV.glob("lib/python3.*/site-packages"))


def installed_names() -> set[str]:
    """The distributions that pip has finished with: it writes INSTALLER last but for the record."""
    infos = site_packages().glob("*.dist-info/INSTALLER")
    return {canonical(info.parent.name.split("-")[0]) for info in infos}


def canonical(name: str) -> str:
    """The name as package indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def drop_half_installed() -> None:
    """Forget packages whose unpacking was cut off; pip would take them for installed because they have metadata."""
    for info in site_packages().glob("*.dist-info"):
        if not (info / "INSTALLER").exists():
            shutil.rmtree(info)


def torch_options() -> list[str]:
    """Where a CPU torch comes from: what pip is configured with, or TORCH_INDEX, asked for torch alone so that an
    index with namesakes of other packages is never consulted for them."""
    index = os.environ.get("TORCH_INDEX")
    return ["--index-url", index] if index else []


def pip_install(part: str, progress: Progress) -> None:
    """Install a lock as it stands. torch goes in a pip of its own, beside the other: it is a fifth of the time, may
    need another index, and its absence must be noticed early. Raises SetupError with the log's end."""
    lines = read_lock(part)
    drop_half_installed()
    torch = [line for line in lines if part == "engine-cpu" and line.startswith("torch==")]
    rest = [line for line in lines if line not in torch]
    # Byte code is written afterwards for all packages at once, on all cores.
    base = [str(PYTHON), "-m", "pip", "install", "--no-deps", "--no-compile"]
    commands = {part: [*base, *rest]}
    if torch:
        commands["torch"] = [*base, *torch_options(), *torch]
    running = {name: start(name, command) for name, command in commands.items()}
    wanted = {canonical(line.split("==")[0]) for line in lines}
    try:
        while running:
            for name, process in list(running.items()):
                if process.poll() is not None:
                    del running[name]
                    if process.returncode:
                        raise SetupError(explain(name, torch))
            time.sleep(0.2)
            fetched = sum(count_collected(name) for name in commands)
            ready = len(wanted & installed_names())
            progress.show(f"{part}: fetched {min(fetched, len(lines))}, installed {ready} of {len(lines)} packages")
    finally:
        for process in running.values():
            process.terminate()
            process.wait()


def log_path(name: str) -> Path:
    """Where the output of one step is kept."""
    return STAMPS / f"{name}.log"


def start(name: str, command: list[str]) -> subprocess.Popen[bytes]:
    """Start a step with its output in its log."""
    with open(log_path(name), "wb") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment(), cwd=ROOT)


def count_collected(name: str) -> int:
    """How many packages pip has begun to fetch, or found in place."""
    return len(re.findall(r"^(?:Collecting|Requirement already)", log_path(name).read_text(errors="replace"), re.M))


def explain(name: str, torch: list[str]) -> str:
    """What a failed pip means to the person who waited for it."""
    text = log_path(name).read_text(errors="replace")
    if name == "torch" and "No matching distribution" in text:
        return (
            f"{torch[0]} is not on the index that pip is configured with. Builds of torch for the CPU have an index of "
            f"their own: name it with TORCH_INDEX=URL (pytorch.org, 'Get started', pip, CPU shows it). {OFFER}"
        )
    tail = "\n".join(f"  {line}" for line in text.splitlines()[-15:])
    again = "The same command goes on from here."
    return f"pip failed on {name}; the whole log is {log_path(name)} and ends with\n{tail}\n{again}"


def build(progress: Progress) -> None:
    """Compile the extensions in place and put vramp on the environment's path."""
    progress.show("vramp: compiling the extensions")
    command = [str(PYTHON), "-m", "pip", "install", "--no-deps", "--no-build-isolation", "-e", "."]
    if start("project", command).wait():
        raise SetupError(explain("project", []))


def compile_bytecode(progress: Progress) -> None:
    """Byte code for every package. Cost: 30 s on two cores with an engine; without it the first start pays more."""
    progress.show("compiling byte code")
    # The exit code only says that some package carries a file for another Python.
    start("bytecode", [str(PYTHON), "-m", "compileall", "-q", "-j", "0", str(site_packages())]).wait()


# ------------------------------------------------------------------ what is done, what is left


def digest(part: str) -> str:
    """A hash of everything that a part is made from."""
    if part == "project":
        sources = [ROOT / "pyproject.toml", ROOT / "setup.py", *sorted((ROOT / "ext").glob("*.p[yx]*"))]
    else:
        sources = [ROOT / "requirements" / f"{part}.lock"]
    hashed = hashlib.sha256()
    for path in sources:
        if path.exists():
            hashed.update(path.name.encode() + b"\0" + path.read_bytes())
    return hashed.hexdigest()


def is_done(part: str) -> bool:
    """Whether a part was finished from just these inputs."""
    stamp = STAMPS / part
    return PYTHON.exists() and stamp.exists() and stamp.read_text() == digest(part)


def ensure_venv(progress: Progress) -> None:
    """The environment itself: made anew when its interpreter has gone, mended when pip was not finished."""
    asked = [str(PYTHON), "-m", "pip", "--version"]
    if PYTHON.exists() and subprocess.run(asked, capture_output=True, check=False).returncode == 0:
        return
    python = find_python()
    progress.show(f"making .venv with {python}")
    command = [python, "-m", "venv", "--clear", str(VENV)]
    made = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    if made.returncode:
        raise SetupError(f"{python} -m venv failed:\n{made.stdout}{made.stderr}")


def set_up(parts: list[str], progress: Progress) -> None:
    """Bring every part up to date. Idempotent; costs a few milliseconds when nothing is left to do."""
    left = [part for part in (*parts, "project") if not is_done(part)]
    if not left:
        return
    started = time.monotonic()
    check_compilers()
    check_disk([part for part in left if part != "project"])
    ensure_venv(progress)
    STAMPS.mkdir(exist_ok=True)
    for part in left:
        if part == "project":
            build(progress)
        else:
            pip_install(part, progress)
    if left != ["project"]:
        compile_bytecode(progress)
    for part in left:
        (STAMPS / part).write_text(digest(part))
    progress.done(f"setup: {', '.join(left)} ready after {time.monotonic() - started:.0f} s")


def main() -> int:
    """Set up what the command line asks for; 0, or 1 with one message and its remedy."""
    parser = argparse.ArgumentParser(description="Make .venv from the locks in requirements/.")
    parser.add_argument("--engine", default="auto", choices=["auto", "cpu", "cuda", "simulated", "none"])
    parser.add_argument("--dev", action="store_true", help="tests, linters and load tests too")
    options = parser.parse_args()
    try:
        engine = engine_part(options.engine)
        parts = ["core", *([engine] if engine else []), *(["dev"] if options.dev else [])]
        (ROOT / ".state").mkdir(exist_ok=True)
        with open(ROOT / ".state" / "setup.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # `make run` and `make test` side by side: one sets up, one waits
            set_up(parts, Progress())
    except SetupError as error:
        print(f"setup: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nsetup: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
