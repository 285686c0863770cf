"""Device code of attention compiled for the host, against the stand-ins of tests/ops/device."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent


def device_library(name: str, folder: Path) -> ctypes.CDLL:
    """tests/ops/device/<name>.cpp as a library; skips the test where g++ or CUDA's headers are not there."""
    nvcc, compiler = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc"), shutil.which("g++")
    headers = [path for path in _header_folders(nvcc) if (path / "cuda_bf16.h").exists()]
    if compiler is None or not headers:
        pytest.skip("no g++, or no headers of CUDA")
    target = folder / f"{name}.so"
    includes = [f"-I{path}" for path in (HERE / "device", HERE.parents[1] / "csrc" / "include", headers[0])]
    # fibers jump from stack to stack, which hardened libraries forbid
    flags = ["-std=c++17", "-O1", "-U_FORTIFY_SOURCE", "-w", "-Wno-psabi", "-shared", "-fPIC", *includes]
    subprocess.run([compiler, *flags, HERE / "device" / f"{name}.cpp", "-o", target], check=True)
    return ctypes.CDLL(str(target))


def _header_folders(nvcc: str | None) -> list[Path]:
    """Beside nvcc, which may be a script that calls the one of a toolkit, and where toolkits are."""
    beside = [Path(nvcc).resolve().parent.parent / "include"] if nvcc else []
    return [*beside, *Path("/usr/local").glob("cuda*/include")]
