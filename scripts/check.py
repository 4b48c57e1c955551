"""What must be clean before a commit: `make check` runs all of it, .pre-commit-config.yaml each as a hook of its own.

One list for both, so that a hook never passes what the other refuses. Run with the interpreter of .venv.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTHON = sys.executable
BIN = Path(PYTHON).parent
SCRIPTS = ("setup", "lock", "check", "make_demo_models", "demo_training")

CHECKS: dict[str, list[str]] = {
    "ruff": [str(BIN / "ruff"), "check", "."],
    "format": [str(BIN / "ruff"), "format", "--check", "."],
    "mypy": [PYTHON, "-m", "mypy"],
    "mypy-scripts": [PYTHON, "-m", "mypy", *(f"scripts/{name}.py" for name in SCRIPTS)],
    "cython-lint": [
        str(BIN / "cython-lint"),
        *sorted(str(path.relative_to(ROOT)) for kind in ("*.pyx", "lane/*.pxi") for path in ROOT.glob(f"ext/{kind}")),
    ],
    "architecture": [PYTHON, "-m", "pytest", "-q", "tests/architecture"],
}


def main(names: list[str]) -> int:
    """Run the named checks, or all of them, to the end; 1 when any found something."""
    unknown = [name for name in names if name not in CHECKS]
    if unknown:
        print(f"check: no check named {', '.join(unknown)}; there are {', '.join(CHECKS)}", file=sys.stderr)
        return 2
    env = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}"}  # cython-lint starts pycodestyle
    failed = []
    for name in names or CHECKS:
        print(f"check: {name}", flush=True)
        if subprocess.run(CHECKS[name], cwd=ROOT, env=env, check=False).returncode:
            failed.append(name)
    print(f"check: {', '.join(failed)} found something" if failed else "check: all clean", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
