"""What the programs share that prove things on GPUs (card.py, card_many.py): parts with time limits, and their log."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parent.parent
SHOWN_LINES = {"offline": 40, "kernels": 80, "all-reduce": 20, "replicas": 10, "starts": 10}  # where all went well


@dataclass
class Outcome:
    """How a part ended. `figures` are short facts for the table and the JSON file."""

    part: str
    good: bool
    seconds: float = 0.0
    figures: dict[str, Any] = field(default_factory=dict)

    @property
    def summary(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in self.figures.items() if not isinstance(value, list))


@dataclass(frozen=True)
class Card:
    """Where things are: `work` is a temporary folder with the site folder, and copies of tests and benchmarks.

    They are copies, so that a `mii` without native libraries beside them is never taken for the one of the wheel.
    """

    wheels: Path
    out: Path
    work: Path
    deadline: float

    @property
    def site(self) -> Path:
        return self.work / "site"

    @property
    def log(self) -> Path:
        return self.out / "card.txt"

    def left(self, limit: float) -> float:
        """Seconds that something may take: its own limit, and what is left of all."""
        return max(1.0, min(limit, self.deadline - time.monotonic()))

    def run(self, command: Sequence[str], log: IO[str], limit: float, **environment: str) -> int:
        """Runs a command in the work folder, output into `log`; its exit code, or 124 when it was stopped."""
        print("$", " ".join(command), file=log, flush=True)
        paths = os.pathsep.join([str(self.site), str(self.work)])
        process = subprocess.Popen(
            command,
            cwd=self.work,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": paths, "PYTHONUNBUFFERED": "1", **environment},
            start_new_session=True,
        )
        try:
            return process.wait(self.left(limit))
        except subprocess.TimeoutExpired:
            print(f"stopped after {self.left(limit):.0f} s", file=log, flush=True)
            return 124
        finally:
            end_session(process)


Part = Callable[[Card, IO[str], float], Outcome]
"""What runs a part: of (card, log, seconds that it may take)."""


def end_session(process: subprocess.Popen[bytes]) -> None:
    """Ends a command and whatever it left running in its session."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def size_of(log: IO[str]) -> int:
    """Bytes that were written until now, by us and by commands."""
    log.flush()
    return os.fstat(log.fileno()).st_size


def read_from(path: Path, start: int) -> str:
    with open(path, "rb") as file:
        file.seek(start)
        return file.read().decode(errors="replace")


def pytest_on(path: str, report: Path) -> list[str]:
    quiet = ["-q", "-p", "no:cacheprovider", "-p", "no:benchmark"]
    return [sys.executable, "-m", "pytest", path, *quiet, f"--junit-xml={report}"]


def read_report(path: Path) -> dict[str, Any]:
    """Counts of a JUnit file, and the names of what failed; zeros where pytest did not come to write it."""
    counts: dict[str, Any] = {"passed": 0, "failed": 0, "skipped": 0}
    if not path.exists():
        return counts
    failures = []
    for case in ElementTree.parse(path).iter("testcase"):
        kinds = {child.tag for child in case}
        failed = bool(kinds & {"failure", "error"})
        counts["failed" if failed else "skipped" if "skipped" in kinds else "passed"] += 1
        failures += [f"{case.get('classname')}::{case.get('name')}"] * failed
    return counts | ({"failures": failures} if failures else {})


def read_json(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text())) if path.exists() else {}


def find_sanitizer() -> str | None:
    """On the path, or where the CUDA toolkit puts it."""
    places = [os.environ.get("CUDA_HOME", "/usr/local/cuda"), "/usr/local/cuda"]
    candidates = [f"{place}/{folder}/compute-sanitizer" for place in places for folder in ("bin", "compute-sanitizer")]
    return shutil.which("compute-sanitizer") or next((path for path in candidates if os.access(path, os.X_OK)), None)


def run_part(part: str, run: Callable[[IO[str], float], Outcome], card: Card, limit: float) -> Outcome:
    """Runs one part with its log; one that breaks is a part that failed, and the next one runs."""
    begin = time.monotonic()
    if card.deadline - begin < 5:
        return Outcome(part, False, figures={"not run": "no time left"})
    with open(card.log, "a") as log:
        try:
            outcome = run(log, card.left(limit))
        except Exception as error:
            print(repr(error), file=log)
            outcome = Outcome(part, False, figures={"error": repr(error)})
    outcome.seconds = round(time.monotonic() - begin, 1)
    return outcome


def write(outcomes: Sequence[Outcome], card: Card) -> None:
    """After every part, so that the file is there even if the machine goes away."""
    (card.out / "card.json").write_text(json.dumps([asdict(outcome) for outcome in outcomes], indent=1) + "\n")


def parser_of(limits: Mapping[str, float], within: float) -> argparse.ArgumentParser:
    """The options of every program that runs parts."""
    parser = argparse.ArgumentParser(description="Proves on a GPU what only a GPU can prove.")
    parser.add_argument("--wheels", type=Path, required=True, metavar="FOLDER", help="wheels to install, mii's too")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "card-results")), metavar="FOLDER")
    parser.add_argument("--parts", nargs="+", choices=limits, default=list(limits), metavar="PART")
    parser.add_argument("--skip", nargs="+", choices=limits, default=[], metavar="PART")
    parser.add_argument("--limit", action="append", default=[], metavar="PART=SECONDS", help="another time limit")
    parser.add_argument("--within", type=float, default=within, metavar="SECONDS", help=f"for all (default: {within})")
    return parser


def read_arguments(
    parser: argparse.ArgumentParser, limits: Mapping[str, float], arguments: Sequence[str] | None
) -> argparse.Namespace:
    args = parser.parse_args(arguments)
    others = {part: float(seconds) for part, _, seconds in (text.partition("=") for text in args.limit)}
    args.limits = {**limits, **others}
    # Without an installed wheel no part runs.
    args.parts = ["install", *(part for part in args.parts if part != "install" and part not in args.skip)]
    return args


def run_parts(args: argparse.Namespace, parts: Mapping[str, Part]) -> int:
    """Runs the chosen parts one after the other; 1 when one of them fails."""
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="mii-card-") as folder:
        card = Card(args.wheels.resolve(), args.out.resolve(), Path(folder), time.monotonic() + args.within)
        for name in ("tests", "benchmarks"):
            shutil.copytree(ROOT / name, card.work / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
        shutil.copy(ROOT / "pyproject.toml", card.work)
        card.log.write_text("")
        outcomes: list[Outcome] = []
        for part in args.parts:
            start = card.log.stat().st_size
            run = partial(parts[part], card)
            outcomes.append(run_part(part, run, card, args.limits[part]))
            write(outcomes, card)
            print_part(outcomes[-1], read_from(card.log, start))
            if part == "install" and not outcomes[-1].good:
                break
    print_table(outcomes)
    return 0 if all(outcome.good for outcome in outcomes) else 1


def print_part(outcome: Outcome, text: str) -> None:
    """The end of the log: of a benchmark its table, of a part that failed what went wrong."""
    lines = text.splitlines()
    print(f"== {outcome.part}", flush=True)
    wanted = SHOWN_LINES.get(outcome.part, 5 if outcome.good else 40)
    print("\n".join(lines[-wanted:]), flush=True)


def print_table(outcomes: Sequence[Outcome]) -> None:
    print(f"\n{'part':<12} {'':<6} {'s':>6}  what came of it")
    for outcome in outcomes:
        print(f"{outcome.part:<12} {'ok' if outcome.good else 'FAILED':<6} {outcome.seconds:6.1f}  {outcome.summary}")
        for name in outcome.figures.get("failures", [])[:20]:
            print(f"{'':<29}{name}")
