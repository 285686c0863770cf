"""Tiles in shared memory and their descriptors for Hopper's products, read back as the PTX ISA says hardware does."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

# The operand that a descriptor names, element by element (canonical layouts of the 128-byte swizzle): `along_elements`
# has M or N across rows and k along elements, `along_rows` N along elements and k across rows.
PROGRAM = """
#include <cstdio>
#include <cstdlib>
#include <vector>
#include "mii/wgmma_layout.h"

std::vector<uint16_t> memory(1 << 17);

uint16_t at(uint32_t address) { return memory[(address ^ ((address >> 7 & 7) << 4)) / 2]; }
uint32_t start_of(uint64_t d) { return uint32_t(d & 0x3fff) << 4; }
uint32_t leading_of(uint64_t d) { return uint32_t(d >> 16 & 0x3fff) << 4; }
uint32_t stride_of(uint64_t d) { return uint32_t(d >> 32 & 0x3fff) << 4; }

uint16_t along_elements(uint64_t d, int n, int k) {
  return at(start_of(d) + n / 8 * stride_of(d) + n % 8 * 128 + k * 2);
}
uint16_t along_rows(uint64_t d, int n, int k) {
  return at(start_of(d) + n / 64 * leading_of(d) + k / 8 * stride_of(d) + k % 8 * 128 + n % 64 * 2);
}

template <int kRows, int D>
int check(uint32_t base) {
  using Tile = mii::Panels<kRows, D>;
  for (int row = 0; row < kRows; ++row) {
    for (int column = 0; column < D; ++column) {
      memory[(base + Tile::offset(row, column / 8)) / 2 + column % 8] = uint16_t(row * D + column);
    }
  }
  int wrong = 0;
  const uint64_t whole = mii::matrix_descriptor(base, 16, Tile::kStrideBytes);
  for (int first = 0; first < kRows; first += 32) {
    const uint64_t rows = mii::matrix_descriptor(base + Tile::elements_at(first, 0), 16, Tile::kStrideBytes);
    for (int step = 0; step < D / 16; ++step) {
      const uint64_t d = mii::advanced(rows, Tile::elements_at(0, step));
      if (d >> 62 != 1 || d != mii::advanced(whole, Tile::elements_at(first, step))) ++wrong;
      for (int n = 0; n < kRows - first; ++n) {
        for (int k = 0; k < 16; ++k) wrong += along_elements(d, n, k) != uint16_t((first + n) * D + 16 * step + k);
      }
    }
  }
  const uint64_t values = mii::matrix_descriptor(base, Tile::kPanelBytes, Tile::kStrideBytes);
  for (int step = 0; step < kRows / 16; ++step) {
    const uint64_t d = mii::advanced(values, Tile::rows_at(step));
    for (int n = 0; n < D; ++n) {
      for (int k = 0; k < 16; ++k) wrong += along_rows(d, n, k) != uint16_t((16 * step + k) * D + n);
    }
  }
  return wrong;
}

// Boxes of 64 elements one after the other make a tile: the copy engine swizzles chunks of 16 bytes by their addresses.
template <int kRows, int kBoxRows>
int check_boxes(uint32_t base) {
  int wrong = 0;
  for (int chunk = 0; chunk < kRows * 8; ++chunk) {
    const int box = chunk / (kBoxRows * 8), within = chunk % (kBoxRows * 8);
    const uint32_t plain = base + box * (mii::Panels<kRows, 64>::kBytes / (kRows / kBoxRows)) + 16 * within;
    wrong += (plain ^ (plain >> 7 & 7) << 4) != base + mii::Panels<kRows, 64>::offset(chunk / 8, chunk % 8);
  }
  return wrong;
}

int main() {
  int wrong = 0;
  for (uint32_t base : {0u, 1024u, 131072u, 196608u}) {
    wrong += check<128, 64>(base) + check<128, 128>(base) + check<64, 256>(base) + check<64, 64>(base);
    wrong += check<256, 64>(base) + check_boxes<64, 64>(base) + check_boxes<128, 128>(base);
    wrong += check_boxes<128, 64>(base) + check_boxes<256, 128>(base);
  }
  std::printf("%d\\n", wrong);
}
"""


def test_descriptors_name_the_elements_that_were_copied(tmp_path: Path) -> None:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++")
    source, program = tmp_path / "layout.cpp", tmp_path / "layout"
    source.write_text(PROGRAM)
    include = Path(__file__).resolve().parent.parent.parent / "csrc" / "include"
    subprocess.run(
        [compiler, "-std=c++17", "-O1", "-fsanitize=address", f"-I{include}", source, "-o", program], check=True
    )
    assert subprocess.run([program], capture_output=True, text=True, check=True).stdout.strip() == "0"
