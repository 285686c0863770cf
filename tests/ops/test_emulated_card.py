"""Kernels for a GPU run on the host, compiled against an emulation of one (tests/ops/emulation/card.h)."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent


def run(name: str, folder: Path, *headers: Path) -> str:
    """Compiles and runs tests/ops/emulation/<name>.cpp, with further folders of headers; what it prints."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++")
    program = folder / name
    emulated = (*headers, HERE / "emulation")  # come before the kernels' own
    folders = [f"-I{folder}" for folder in (*emulated, ROOT / "csrc" / "include")]
    source = str(HERE / "emulation" / f"{name}.cpp")
    # threads jump from stack to stack, which hardened libraries forbid
    flags = ["-std=c++17", "-O1", "-U_FORTIFY_SOURCE", "-w", "-pthread", *folders]
    subprocess.run([compiler, *flags, source, "-o", str(program)], check=True, timeout=120)
    result = subprocess.run([str(program)], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout
    return result.stdout


def test_the_streamed_product_is_right_in_any_order_of_threads_and_copies(tmp_path: Path) -> None:
    assert run("linear_stream", tmp_path).count("right") == 12


def test_the_product_in_boxes_is_right_in_any_order_of_threads_copies_and_products(tmp_path: Path) -> None:
    assert run("linear_wide", tmp_path).count("right") == 14


def test_the_experts_products_are_right_in_any_order_of_threads_and_copies(tmp_path: Path) -> None:
    assert run("moe", tmp_path).count("right") == 31


def test_norms_of_branches_are_right_in_each_way_that_a_row_is_held(tmp_path: Path) -> None:
    assert run("norm", tmp_path, HERE / "emulation" / "cuda").count("right") >= 100


def test_cards_add_up_right_whatever_word_comes_first(tmp_path: Path) -> None:
    assert run("all_reduce", tmp_path, HERE / "emulation" / "cuda").count("right") == 9
