"""Everything that has to be proven on a GPU, by one command, on a machine that may have no network.

    python -m pip download --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
        --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
        -d wheels pydantic==2.14.4 pydantic-core==2.50.5 typing-extensions typing-inspection annotated-types msgspec
    pip wheel --no-deps --no-build-isolation -w wheels .           # mii itself, with its CUDA library
    python benchmarks/card.py --wheels wheels --out results

The machine needs Python, torch, transformers, numpy, safetensors, rich, tqdm, pytest, pytest-timeout and pytest-xdist;
what else is missing there goes into the folder of wheels. `pydantic` needs the `pydantic-core` of its own version.

The parts, each with a time limit of its own and each selected by `--parts`:

    install     every wheel of the folder into a temporary site folder; the native library of the GPU loads
    tests       tests/gpu, six processes at once, each with its share of the GPU's memory; `<out>/families.md` is
                docs/families.md with the errors that they measured
    sanitizer   compute-sanitizer memcheck over GPU tests of norms, activations, products, experts and the engine
    offline     `mii bench offline`, for each of `--shapes`
    kernels     benchmarks/run_kernels.py
    check       benchmarks/check.py over the figures of the two before

For a machine with several GPUs there is benchmarks/card_many.py, with parts of its own.

The sanitizer looks at this project's kernels alone. That its filter matches them is proven each time: a kernel is made
to read out of bounds and has to be reported. A part in which nothing ran fails. What the parts print goes to
`<out>/card.txt`, figures to `<out>/*.json`, the outcome of all to `<out>/card.json` and, as a table, to the terminal.
Exits with 1 when a part fails.
"""

from __future__ import annotations

import re
import shutil
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from card_parts import (
    ROOT,
    Card,
    Outcome,
    Part,
    find_sanitizer,
    parser_of,
    pytest_on,
    read_arguments,
    read_from,
    read_json,
    read_report,
    run_parts,
    size_of,
)

LIMITS = {"install": 60, "tests": 1200, "sanitizer": 200, "offline": 200, "kernels": 150, "check": 20}
EACH_SANITIZED = 60  # seconds of one group under the sanitizer
OURS = "kns=3mii"  # names of our kernels start with _ZN3mii
QUIET = ["--report-api-errors", "no"]  # torch tries calls that may fail
FILTERS = (  # what the sanitizer is told, as far as its version takes it; padding tells neighbouring allocations apart
    [*QUIET, "--kernel-name", OURS, "--padding", "256"],
    [*QUIET, "--kernel-name", OURS],
    [*QUIET, "--kernel-regex", OURS],  # older ones
    QUIET,
)

# What runs under the sanitizer, by group: a file of tests/gpu and pytest's -k.
SANITIZED = {
    "norm": ("test_norm.py", "dtype0 or dtype2"),
    "activation": ("test_activation.py", "dtype0 or dtype2"),
    "linear": ("test_linear.py", "equals_torch and not 49152 and not 14336 and not 6144"),
    "moe": ("test_moe.py", "equal and bfloat16 and not 2048 and not 1024 and not 700 and not 300 and not 264"),
    "engine": ("test_engine.py", "replayed or preemption or stops_early"),
}

CHECK_INSTALL = """
import torch, mii
from mii.ops import native
assert torch.cuda.is_available(), "torch finds no GPU"
library = native.library(torch.device("cuda"))
assert library is not None, f"{mii.__file__} has no CUDA library: was the wheel built where nvcc is?"
print(mii.__file__, library.build_info(), torch.__version__, torch.cuda.get_device_name())
"""

# The second row lies a terabyte behind the first, where nothing was allocated.
READ_OUT_OF_BOUNDS = """
import torch
from mii.ops import abi, native
x, out = torch.ones(1, 4096, device="cuda"), torch.empty(2, 4096, device="cuda")
args = abi.MiiNorm(out=out.data_ptr(), x=x.data_ptr(), rows=2, width=4096, x_stride=1 << 38, out_stride=4096, eps=1e-6,
                   kind=abi.RMS, dtype=abi.DTYPE_CODES[x.dtype])
native.library(x.device).call("mii_norm", args, native.stream(x.device))
try:
    torch.cuda.synchronize()
except RuntimeError as error:
    print(error)
"""


# -- the parts ------------------------------------------------------------------------------------------------------


def install(card: Card, log: IO[str], limit: float) -> Outcome:
    wheels = sorted(map(str, card.wheels.glob("*.whl")))
    ours = [wheel for wheel in wheels if Path(wheel).name.startswith("mii-")]
    if len(ours) != 1:
        return Outcome("install", False, figures={"wheels of mii": len(ours)})
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile", "--no-cache-dir"]
    if card.run([*pip, "--target", str(card.site), *wheels], log, limit):
        return Outcome("install", False, figures={"pip": "failed"})
    code = card.run([sys.executable, "-c", CHECK_INSTALL], log, limit)
    return Outcome("install", code == 0, figures={"wheels": len(wheels), "library": "loads" if not code else "missing"})


def tests(card: Card, log: IO[str], limit: float) -> Outcome:
    report = card.work / "tests.xml"
    table = card.out / "families.md"
    shutil.copy(ROOT / "docs" / "families.md", table)
    command = [*pytest_on("tests/gpu", report), "-n", "6", "--durations=10", "--families-table", str(table)]
    code = card.run(command, log, limit)
    counts = read_report(report)
    good = code == 0 and counts["passed"] > 0
    return Outcome("tests", good, figures=counts | ({"stopped after s": round(limit)} if code == 124 else {}))


def sanitizer(card: Card, log: IO[str], limit: float) -> Outcome:
    tool = find_sanitizer()
    if tool is None:
        return Outcome("sanitizer", False, figures={"compute-sanitizer": "not found"})
    memcheck = [tool, "--tool", "memcheck"]
    end = time.monotonic() + limit
    options = working_filter(card, log, memcheck, limit)
    if options is None:
        return Outcome("sanitizer", False, figures={"planted error": "not reported"})
    figures: dict[str, Any] = {"with": " ".join(options)}
    for group, (name, wanted) in SANITIZED.items():
        left = min(EACH_SANITIZED, end - time.monotonic())
        figures[group] = sanitize(card, log, [*memcheck, *options], name, wanted, left) if left > 5 else "no time left"
    return Outcome("sanitizer", all(figures[group].endswith("clean") for group in SANITIZED), figures=figures)


def working_filter(card: Card, log: IO[str], memcheck: list[str], limit: float) -> list[str] | None:
    """The narrowest options under which the planted error is reported; None where it is under none."""
    for options in FILTERS:
        command = [*memcheck, *options, sys.executable, "-c", READ_OUT_OF_BOUNDS]
        start = size_of(log)
        card.run(command, log, limit / 4, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        if errors_reported(log, start):
            return options
    return None


def errors_reported(log: IO[str], start: int) -> int | None:
    """What the sanitizer's last line since `start` says; None where it did not come to its end."""
    found = re.findall(r"ERROR SUMMARY: (\d+) error", read_from(Path(log.name), start))
    return int(found[-1]) if found else None


def sanitize(card: Card, log: IO[str], memcheck: list[str], name: str, wanted: str, limit: float) -> str:
    """Runs tests under the sanitizer; how it went, in a word or two."""
    if not (card.work / "tests/gpu" / name).exists():
        return f"no tests/gpu/{name}"
    report = card.work / f"sanitized-{name}.xml"
    command = [*memcheck, *pytest_on(f"tests/gpu/{name}", report), *(["-k", wanted] if wanted else [])]
    # Each tensor an allocation of its own, so that a read past one is noticed. Not for what is captured in graphs.
    uncached = {} if name == "test_engine.py" else {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    begin, start = time.monotonic(), size_of(log)
    code = card.run(command, log, limit, **uncached)
    return outcome_of(code, read_report(report), errors_reported(log, start), time.monotonic() - begin)


def outcome_of(code: int, counts: dict[str, Any], errors: int | None, seconds: float) -> str:
    """How tests under the sanitizer went: whether they came to their end, and what it found."""
    if code == 124:
        return f"stopped after {seconds:.0f} s"
    if errors:
        return f"{errors} errors"
    if code or errors is None or not counts["passed"]:
        return f"exit code {code}, {counts['passed']} passed, {counts['failed']} failed"
    return f"{counts['passed']} passed in {seconds:.0f} s, clean"


def offline(card: Card, log: IO[str], limit: float, shapes: Sequence[str], options: Sequence[str]) -> Outcome:
    figures: dict[str, Any] = {}
    end = time.monotonic() + limit
    for shape in shapes:
        target = card.out / f"offline-{shape}.json"
        timeline = card.out / f"timeline-{shape}.json"
        files = ["--json", str(target), "--timeline", str(timeline)]
        command = [sys.executable, "-m", "mii", "bench", "offline", "--shape", shape, *files, *options]
        code = card.run(command, log, end - time.monotonic())
        figures[shape] = f"{len(read_json(target).get('rows', []))} rows" if code == 0 else f"exit code {code}"
    return Outcome("offline", all(text.endswith("rows") for text in figures.values()), figures=figures)


def kernels(card: Card, log: IO[str], limit: float) -> Outcome:
    target = card.out / "kernels.json"
    code = card.run([sys.executable, "benchmarks/run_kernels.py", "--json", str(target)], log, limit)
    cases = read_json(target).get("cases", [])
    return Outcome("kernels", code == 0 and bool(cases), figures={"cases": len(cases), "exit code": code})


def check(card: Card, log: IO[str], limit: float) -> Outcome:
    results = [*card.out.glob("offline-*.json"), *card.out.glob("kernels.json")]
    start = size_of(log)
    code = card.run([sys.executable, "benchmarks/check.py", *map(str, sorted(results))], log, limit)
    short = [line.strip() for line in read_from(Path(log.name), start).splitlines() if "SHORT" in line]
    return Outcome("check", code == 0, figures={"files": len(results), "short": len(short), "failures": short})


def main(arguments: Sequence[str] | None = None) -> int:
    parser = parser_of(LIMITS, within=2400.0)
    parser.add_argument("--shapes", nargs="+", default=["llama3-8b"], help="for the part offline")
    parser.add_argument("--offline", default="", metavar="OPTIONS", help="more options of mii bench offline")
    args = read_arguments(parser, LIMITS, arguments)
    rows = partial(offline, shapes=args.shapes, options=args.offline.split())
    parts: dict[str, Part] = {"install": install, "tests": tests, "sanitizer": sanitizer, "offline": rows}
    return run_parts(args, parts | {"kernels": kernels, "check": check})


if __name__ == "__main__":
    sys.exit(main())
