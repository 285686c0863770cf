"""csrc/native_build.py on sources of a few lines: what is compiled when, and what is said when it cannot be."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
import stat
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest

PATH = Path(__file__).resolve().parent.parent / "csrc" / "native_build.py"
pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ here")


@pytest.fixture
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module, working on a checkout of two headers and two sources."""
    spec = importlib.util.spec_from_file_location("native_build_under_test", PATH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    for name, folder in {"ROOT": ".", "SOURCES": "csrc", "LIBRARIES": "mii/_lib", "CACHE": "build/native"}.items():
        monkeypatch.setattr(module, name, tmp_path / folder)
    monkeypatch.setattr(module, "ISA_FLAGS", {isa: module.ISA_FLAGS[isa] for isa in ("plain", "amx")})
    for name in ("CXX", "CUDA_HOME", "CUDA_PATH", "MII_BUILD_JOBS", "NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MII_BUILD_CUDA", "0")
    write(tmp_path, "csrc/include/number.h", "#define NUMBER 41")
    write(tmp_path, "csrc/include/other.h", "#define OTHER 1")
    write(tmp_path, "csrc/cpu/library.cpp", '#include "number.h"\nint add(int); extern "C" ' + EXPORT)
    write(tmp_path, "csrc/cpu/isa/add.cpp", ADD)
    return module


EXPORT = '__attribute__((visibility("default"))) int answer() { return add(NUMBER); }\n'
ADD = """#include "other.h"
namespace MII_ISA { int one() { return OTHER; } }
namespace plain { int one(); }
#define IS_plain 1
#define NAMED(isa) NAMED_(isa)
#define NAMED_(isa) IS_##isa
#if NAMED(MII_ISA)
int add(int number) { return number + plain::one(); }
#endif
"""


def write(root: Path, name: str, text: str) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(text)


def program(root: Path, name: str, script: str) -> str:
    write(root, name, f"#!/bin/sh\n{script}\n")
    path = root / name
    path.chmod(path.stat().st_mode | stat.S_IEXEC)
    return str(path)


def run(build: ModuleType, only: str | None = None) -> list[str]:
    lines: list[str] = []
    build.build(only, say=lines.append)
    return lines


def compiled(lines: list[str]) -> set[str]:
    return {line.split()[1] for line in lines if line.startswith("[")}


def answer(root: Path) -> int:
    # a copy under a name of its own, since a library that is loaded stays the one it was
    copy = root / f"copy{len(list(root.glob('copy*')))}.so"
    shutil.copy(root / "mii/_lib/libmii_cpu.so", copy)
    return int(ctypes.CDLL(str(copy)).answer())


def test_a_fresh_build_compiles_every_variant_and_works(build: ModuleType, tmp_path: Path) -> None:
    objects = compiled(run(build))
    assert {"cpu/library.o", "cpu/add.plain.o"} <= objects
    assert answer(tmp_path) == 42


def test_nothing_changed_compiles_nothing(build: ModuleType) -> None:
    run(build)
    lines = run(build)
    assert compiled(lines) == set()
    assert any("up to date" in line for line in lines)


def test_a_changed_header_compiles_only_what_reads_it(build: ModuleType, tmp_path: Path) -> None:
    run(build)
    write(tmp_path, "csrc/include/number.h", "#define NUMBER 6")
    assert compiled(run(build)) == {"cpu/library.o"}
    assert answer(tmp_path) == 7


def test_a_touched_file_of_the_same_content_compiles_nothing(build: ModuleType, tmp_path: Path) -> None:
    run(build)
    os.utime(tmp_path / "csrc/cpu/library.cpp", (1, 1))
    assert compiled(run(build)) == set()


def test_changed_flags_compile_everything(build: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    first = compiled(run(build))
    monkeypatch.setattr(build, "CPU_FLAGS", (*build.CPU_FLAGS, "-DSOMETHING"))
    assert compiled(run(build)) == first


def test_a_library_that_was_replaced_is_linked_again(build: ModuleType, tmp_path: Path) -> None:
    run(build)
    (tmp_path / "mii/_lib/libmii_cpu.so").write_bytes(b"not a library")
    assert compiled(run(build)) == set()
    assert answer(tmp_path) == 42


def test_an_error_shows_command_and_message_and_keeps_the_old_library(build: ModuleType, tmp_path: Path) -> None:
    run(build)
    write(tmp_path, "csrc/cpu/library.cpp", "int broken(;\n")
    with pytest.raises(build.BuildError) as error:
        run(build)
    assert "-O3" in str(error.value)
    assert "library.cpp:1:" in str(error.value)
    assert answer(tmp_path) == 42
    assert list((tmp_path / "mii/_lib").iterdir()) == [tmp_path / "mii/_lib/libmii_cpu.so"]


def test_a_variant_that_the_compiler_cannot_do_is_left_out_with_a_note(
    build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse = 'case "$*" in *-mamx-tile*) echo "unknown option" >&2; exit 1;; esac\nexec g++ "$@"'
    monkeypatch.setenv("CXX", program(tmp_path, "old-g++", refuse))
    lines = run(build)
    assert any(line.startswith("note:") and "amx" in line for line in lines)
    assert "cpu/add.amx.o" not in compiled(lines)
    assert answer(tmp_path) == 42


def test_without_a_compiler_the_message_says_what_to_install(
    build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(build.BuildError, match=r"C\+\+ compiler.*apt-get install g\+\+"):
        run(build)


def test_a_wrong_cxx_is_named(build: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(build.BuildError, match="no-such-compiler"):
        run(build)


@pytest.mark.parametrize(
    ("variable", "value"), [("MII_BUILD_CUDA", "yes"), ("MII_BUILD_JOBS", "0"), ("MII_BUILD_JOBS", "many")]
)
def test_a_wrong_switch_is_named(build: ModuleType, monkeypatch: pytest.MonkeyPatch, variable: str, value: str) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(build.BuildError, match=f"{variable} is '{value}'"):
        run(build)


def test_without_cuda_a_stale_library_goes_and_a_note_says_why(build: ModuleType, tmp_path: Path) -> None:
    write(tmp_path, "mii/_lib/libmii_cuda.so", "stale")
    lines = run(build)
    assert any("no CUDA kernels" in line for line in lines)
    assert not (tmp_path / "mii/_lib/libmii_cuda.so").exists()


def test_building_the_cpu_library_alone_leaves_the_other(build: ModuleType, tmp_path: Path) -> None:
    write(tmp_path, "mii/_lib/libmii_cuda.so", "of another build")
    run(build, "cpu")
    assert (tmp_path / "mii/_lib/libmii_cuda.so").read_text() == "of another build"


def old_toolkit(root: Path, monkeypatch: pytest.MonkeyPatch, demanded: str) -> None:
    program(root, "toolkit/bin/nvcc", 'echo "Cuda compilation tools, release 11.8, V11.8.89"')
    monkeypatch.setenv("CUDA_HOME", str(root / "toolkit"))
    monkeypatch.setenv("MII_BUILD_CUDA", demanded)


def test_a_toolkit_that_is_too_old_is_passed_over(
    build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old_toolkit(tmp_path, monkeypatch, "")
    assert any("11.8" in line and "12.0" in line for line in run(build))


def test_a_toolkit_that_is_too_old_is_an_error_where_cuda_is_demanded(
    build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old_toolkit(tmp_path, monkeypatch, "1")
    with pytest.raises(build.BuildError, match=r"11\.8"):
        run(build)


NVCC = """[ "$1" = --version ] && exec echo "Cuda compilation tools, release 13.0, V13.0.88"
while [ $# -gt 1 ]; do [ "$1" = -o ] && : > "$2"; shift; done"""


def test_what_nvcc_adds_to_its_command_compiles_its_sources_again(
    build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program(tmp_path, "toolkit/bin/nvcc", NVCC)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "toolkit"))
    monkeypatch.setenv("MII_BUILD_CUDA", "1")
    write(tmp_path, "csrc/cuda/kernel.cu", "")
    assert "cuda/kernel.o" in compiled(run(build))
    assert compiled(run(build)) == set()
    monkeypatch.setenv("NVCC_APPEND_FLAGS", "--Ofast-compile=max")
    assert compiled(run(build)) == {"cuda/kernel.o"}


def test_builds_at_the_same_time_take_turns(build: ModuleType, tmp_path: Path) -> None:
    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(lambda _: run(build, "cpu"), range(3)))
    assert sum(1 for lines in results if compiled(lines)) == 1
    assert answer(tmp_path) == 42
