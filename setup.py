"""Builds the native twins of `ext`, if it can. All other settings are in pyproject.toml.

Without Cython or a C++ compiler the installation still succeeds and the pure twins run: slower, and said aloud here, at
start, on the health page and by `vramp --version`.
"""

import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# No fused multiply-add: the twins must agree to the last bit on every machine.
FLAGS = [] if sys.platform == "win32" else ["-O3", "-std=c++17", "-ffp-contract=off"]


class BuildOrSayWhyNot(build_ext):
    """Builds what can be built and names what could not."""

    def run(self) -> None:
        """Build; a module that fails is left out (`optional`), and named at the end."""
        super().run()
        missing = [ext.name for ext in self.extensions if not Path(self.get_ext_fullpath(ext.name)).exists()]
        if missing:
            shout(f"not built: {', '.join(missing)} (the compiler's message is above)")


def shout(reason: str) -> None:
    """Say that the pure twins will run."""
    print(f"\n{'*' * 78}\nvramp: native extensions {reason}.\nThe slower pure Python twins will run.", file=sys.stderr)
    print(f"Install a C++ compiler and run: pip install -e .\n{'*' * 78}\n", file=sys.stderr)


def extensions() -> list[Extension]:
    """One C++ extension per .pyx file; none where Cython is missing."""
    try:
        from Cython.Build import cythonize
    except ImportError as error:
        shout(f"not built: {error}")
        return []
    modules = [
        Extension(
            f"ext.{source.stem}",
            [str(source)],
            language="c++",
            include_dirs=["ext"],
            depends=sorted(map(str, (*Path("ext").glob("*.h"), *Path("ext").glob("lane/*.pxi")))),
            extra_compile_args=FLAGS,
        )
        for source in sorted(Path("ext").glob("_*.pyx"))
    ]
    generated = cythonize(modules, build_dir="build/cython", compiler_directives={"language_level": "3"})
    for each in generated:
        each.optional = True  # set here because cythonize makes new extensions and forgets it
    return generated


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildOrSayWhyNot})
