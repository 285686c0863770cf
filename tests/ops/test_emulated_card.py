"""Kernels for a GPU run on the host, compiled against an emulation of one (tests/ops/emulation/card.h)."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent


def run(name: str, folder: Path) -> str:
    """Compiles and runs tests/ops/emulation/<name>.cpp; what it prints."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++")
    program = folder / name
    folders = [f"-I{HERE / 'emulation'}", f"-I{ROOT / 'csrc' / 'include'}"]  # the emulation's headers come first
    source = str(HERE / "emulation" / f"{name}.cpp")
    subprocess.run([compiler, "-std=c++17", "-O1", "-w", *folders, source, "-o", str(program)], check=True, timeout=120)
    result = subprocess.run([str(program)], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout
    return result.stdout


def test_the_streamed_product_is_right_in_any_order_of_threads_and_copies(tmp_path: Path) -> None:
    assert run("linear_stream", tmp_path).count("right") == 11


def test_the_experts_products_are_right_in_any_order_of_threads_and_copies(tmp_path: Path) -> None:
    assert run("moe", tmp_path).count("right") == 13
