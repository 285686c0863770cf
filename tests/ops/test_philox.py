"""Philox4x32-10 against the known answers of its authors' library, in numpy, torch and C++."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from mii.ops.philox import philox4x32, random62

# Random123, tests/kat_vectors: counter, key, result
ONES, PI = (0xFFFFFFFF,) * 6, (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0)
KNOWN = [
    ((0,) * 6, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (ONES, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (PI, (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
]
PROGRAM = """
#include <cstdio>
#include <cstdlib>
#include "mii/philox.h"
int main(int, char** a) {
  auto word = [&](int i) { return static_cast<uint32_t>(strtoul(a[i], nullptr, 0)); };
  const mii::Philox x = mii::philox4x32(mii::Philox{{word(1), word(2), word(3), word(4)}}, word(5), word(6));
  printf("%u %u %u %u %llu\\n", x.word[0], x.word[1], x.word[2], x.word[3],
         static_cast<unsigned long long>(mii::random62(strtoll(a[7], nullptr, 0), static_cast<int32_t>(word(8)))));
}
"""


@pytest.mark.parametrize(("words", "expected"), KNOWN)
def test_numpy_gives_the_known_answers(words: tuple[int, ...], expected: tuple[int, ...]) -> None:
    inputs = [np.array([word], dtype=np.int64) for word in words]
    assert tuple(int(word[0]) for word in philox4x32(tuple(inputs[:4]), tuple(inputs[4:]))) == expected


@pytest.mark.parametrize(("words", "expected"), KNOWN)
def test_torch_gives_the_known_answers(words: tuple[int, ...], expected: tuple[int, ...]) -> None:
    inputs = [torch.tensor([word], dtype=torch.int64) for word in words]
    assert tuple(int(word) for word in philox4x32(tuple(inputs[:4]), tuple(inputs[4:]))) == expected


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The C++ header in a program of its own."""
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler here")
    folder = tmp_path_factory.mktemp("philox")
    (folder / "philox.cpp").write_text(PROGRAM)
    include = Path(__file__).parents[2] / "csrc" / "include"
    subprocess.run([compiler, "-std=c++17", f"-I{include}", folder / "philox.cpp", "-o", folder / "philox"], check=True)
    return folder / "philox"


def run(program: Path, words: tuple[int, ...], seed: int, position: int) -> tuple[int, ...]:
    arguments = [str(value) for value in (*words, seed, position)]
    result = subprocess.run([program, *arguments], check=True, capture_output=True, text=True)
    return tuple(int(word) for word in result.stdout.split())


@pytest.mark.parametrize(("words", "expected"), KNOWN)
def test_cpp_gives_the_known_answers(program: Path, words: tuple[int, ...], expected: tuple[int, ...]) -> None:
    assert run(program, words, 0, 0)[:4] == expected


@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1, -1, -(2**63), 0x123456789ABCDEF])
def test_the_bits_of_a_position_are_the_same_in_cpp_numpy_and_torch(program: Path, seed: int) -> None:
    for position in (0, 1, 2**31 - 1):
        expected = run(program, (0,) * 6, seed, position)[4]
        assert int(random62(np.int64(seed), np.int64(position))) == expected
        assert int(random62(torch.tensor(seed), torch.tensor(position))) == expected
        assert 0 <= expected < 2**62


def test_bits_of_neighbouring_seeds_and_positions_are_uniform() -> None:
    seeds, positions = torch.meshgrid(torch.arange(256), torch.arange(256), indexing="ij")
    bits = random62(seeds, positions).flatten()
    share = torch.stack([(bits >> bit & 1).double().mean() for bit in range(62)])
    assert (share - 0.5).abs().max() < 5 * 0.5 / len(bits) ** 0.5  # five standard deviations
    assert len(bits.unique()) == len(bits)
