"""The machine code of kernels whose rings the copy engine refills: what is read is read before it is given back.

A warp loads fragments from a place of a ring (LDSM) and then arrives at a barrier (SYNCS.ARRIVE), whereupon the copy
engine writes over the place. The assembler may move the arrival up past the products that take the fragments, and on a
card it then overtakes the loads. No run on the host shows that, and on a card few runs do.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest

SOURCES = Path(__file__).resolve().parent.parent.parent / "csrc"
REGISTERS = 4  # that a load brings, of the kind x4, and that a product takes of its first operand

KERNEL = re.compile(r"\s*\.section\s+\.text\.([^,\s]+),")
INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z0-9_.]+)\s*([^;]*);")
REGISTER = re.compile(r"\bR(\d+)\b")


def unread_loads(code: str) -> Iterator[tuple[str, str, list[str]]]:
    """Of each arrival in a disassembly (kernel, arrival, the loads before it that nothing has used by then)."""
    kernel, loads = "", {}
    for line in code.splitlines():
        if section := KERNEL.match(line):
            kernel, loads = section[1], {}
        found = INSTRUCTION.match(line)
        if found is None:
            continue
        condition, name, operands = found.groups()
        registers = [int(number) for number in REGISTER.findall(operands)]
        loaded = registers.pop(0) if name.startswith("LDSM") else None
        used = set(registers[1:3] if name.startswith("HMMA") else registers)
        if name.startswith("HMMA"):  # its second operand is a pair of registers, which may be the later half of a load
            used |= {register + 1 for register in registers[1:3]}
        for first in [first for first in loads if used & set(range(first, first + REGISTERS))]:
            del loads[first]
        if loaded is not None:
            loads[loaded] = line.strip()
        if name.startswith("SYNCS.ARRIVE"):
            yield kernel, line.strip(), list(loads.values())
        if condition is None and (name in ("BRA", "EXIT") or name.startswith("RET")):
            loads = {}


def listing(*instructions: str) -> str:
    """As nvdisasm prints a kernel."""
    return "\n".join(["\t.section\t.text.some_kernel,", *(f"  /*0010*/  {one} ;" for one in instructions)])


LOADS = ("LDSM.16.M88.4 R12, [R87]", "LDSM.16.M88.4 R40, [R87+0x800]")
PRODUCTS = ("HMMA.16816.F32.BF16 R56, R12, R24, R56", "HMMA.16816.F32.BF16 R56, R24, R42, R56")
ARRIVAL = "@!P0 SYNCS.ARRIVE.TRANS64.A1T0 RZ, [R82+URZ+0x30], RZ"


def test_an_arrival_after_the_products_leaves_nothing_unread() -> None:
    assert [loads for _, _, loads in unread_loads(listing(*LOADS, *PRODUCTS, ARRIVAL))] == [[]]


def test_an_arrival_that_overtakes_a_product_is_found() -> None:
    [(kernel, arrival, loads)] = unread_loads(listing(*LOADS, PRODUCTS[0], ARRIVAL, PRODUCTS[1]))
    assert (kernel, ARRIVAL in arrival, len(loads)) == ("some_kernel", True, 1)
    assert LOADS[1] in loads[0]


@pytest.mark.parametrize("source", ["linear", "moe"])
def test_kernels_have_read_what_they_give_back(source: str, tmp_path: Path) -> None:
    arrivals = list(unread_loads(disassemble(source, tmp_path)))
    assert len(arrivals) >= 10
    assert [found for found in arrivals if found[2]] == []


def disassemble(source: str, folder: Path) -> str:
    """csrc/cuda/<source>.cu as it is compiled for Hopper cards; skips where a tool is missing."""
    build, disassembler = native_build(), nvdisasm()
    try:
        compiler = build._nvcc().command
    except build.BuildError as error:
        pytest.skip(str(error))
    if disassembler is None:
        pytest.skip("no nvdisasm")
    environment = {name: value for name, value in os.environ.items() if name != "NVCC_APPEND_FLAGS"}
    program = folder / f"{source}.cubin"
    files = [f"-I{SOURCES / 'include'}", str(SOURCES / "cuda" / f"{source}.cu"), "-o", str(program)]
    flags = (*build.CUDA_LANGUAGE, *build.CUDA_HOPPER, "-cubin")
    subprocess.run([compiler, *flags, *files], check=True, env=environment, timeout=200)
    printed = subprocess.run([disassembler, "-c", str(program)], check=True, capture_output=True, text=True, timeout=60)
    return printed.stdout


def native_build() -> Any:
    """csrc/native_build.py, which lies outside of every package."""
    spec = spec_from_file_location("native_build_of_reads", SOURCES / "native_build.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[spec.name] = module  # where its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


def nvdisasm() -> str | None:
    """Of the package nvidia-cuda-nvdisasm, or of a toolkit."""
    try:
        package = distribution("nvidia-cuda-nvdisasm")
    except PackageNotFoundError:
        return shutil.which("nvdisasm") or shutil.which("/usr/local/cuda/bin/nvdisasm")
    return next((str(package.locate_file(file)) for file in package.files or () if file.name == "nvdisasm"), None)
