"""Packages mii: compiles csrc/ (see csrc/native_build.py) and ships the libraries in a wheel that serves every Python.

`pip install .` and `pip install -e .` do all of it; `python setup.py build_native` only compiles.
"""

import shutil
import sys
from pathlib import Path
from typing import ClassVar

from setuptools import Command, Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "csrc"))

import native_build  # noqa: E402


class BuildNative(Command):
    """Compiles csrc/ into mii/_lib and writes mii/version.py."""

    description = "compile the C++ and CUDA libraries into mii/_lib"
    user_options: ClassVar = [("only=", None, "build just this library: cpu or cuda")]

    def initialize_options(self) -> None:
        self.only: str | None = None

    def finalize_options(self) -> None:
        if self.only not in (None, "cpu", "cuda"):
            raise SystemExit(f"--only takes cpu or cuda, not {self.only!r}")

    def run(self) -> None:
        _write_version(self.distribution.get_version())
        try:
            native_build.build(self.only, say=lambda line: print(line, flush=True))
        except native_build.BuildError as error:
            raise SystemExit(f"error: {error}") from None


class BuildPy(build_py):
    """build_py after the native libraries, which it then ships as package data."""

    def run(self) -> None:
        self.run_command("build_native")
        if not self.editable_mode:
            # what an earlier build left there may be gone from the source since
            shutil.rmtree(Path(self.build_lib) / "mii", ignore_errors=True)
        super().run()


class BdistWheel(bdist_wheel):
    """The libraries are loaded with ctypes and use no Python API: any Python 3, this platform only."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


class BinaryDistribution(Distribution):
    """Makes setuptools treat the wheel as belonging to one platform although no extension module is declared."""

    def has_ext_modules(self) -> bool:
        return True


def _write_version(version: str) -> None:
    path = ROOT / "mii" / "version.py"
    text = f'"""Written by setup.py."""\n\n__version__ = "{version}"\n'
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


setup(
    cmdclass={"build_native": BuildNative, "build_py": BuildPy, "bdist_wheel": BdistWheel},
    distclass=BinaryDistribution,
)
