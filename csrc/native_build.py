"""Compiles csrc/ into mii/_lib/libmii_cpu.so and, where nvcc is found, mii/_lib/libmii_cuda.so.

`setup.py` calls this for every install; by hand: `python setup.py build_native [--only=cpu|cuda]`. It needs a C++
compiler and nothing from Python packages, above all not torch: one library serves every Python and torch version.

Objects are cached in build/native under a hash of the command, the compiler's version, the source and every header that
it read (the compiler's own dependency file says which), so an unchanged checkout compiles nothing.

Environment: CXX (C++ compiler), CUDA_HOME (toolkit), MII_BUILD_CUDA (0: never, 1: must, unset: when nvcc is there),
MII_BUILD_JOBS (compilers at once; by default as many as cores and memory allow), and nvcc's own NVCC_APPEND_FLAGS and
NVCC_PREPEND_FLAGS.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "csrc"
LIBRARIES = ROOT / "mii" / "_lib"
CACHE = ROOT / "build" / "native"

CPU_FLAGS = ("-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-pthread", "-Wall", "-Wextra")
# What each variant of csrc/cpu/isa may use. The order is the link order: where two objects hold the same inline
# function of the standard library the linker keeps the first, which must be the one that runs on every machine.
ISA_FLAGS = {
    "plain": (),
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "avx512": ("-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512cd"),
}
ISA_FLAGS["avx512_bf16"] = (*ISA_FLAGS["avx512"], "-mavx512bf16")
ISA_FLAGS["amx"] = (*ISA_FLAGS["avx512_bf16"], "-mavx512vnni", "-mamx-tile", "-mamx-bf16", "-mamx-int8")

CUDA_MINIMUM = (12, 0)  # the first toolkit that knows sm_90a
CUDA_LANGUAGE = ("-O3", "-std=c++17", "--expt-relaxed-constexpr")
CUDA_HOPPER = ("-gencode", "arch=compute_90a,code=sm_90a")
CUDA_FLAGS = (
    *(*CUDA_LANGUAGE, "-cudart", "static", "-Xcompiler", "-fPIC,-fvisibility=hidden"),
    # compute_80 stays in as PTX, which the driver compiles for cards that are newer than both
    *("-gencode", "arch=compute_80,code=[sm_80,compute_80]", *CUDA_HOPPER),
)
BYTES_PER_JOB = 2 << 30


class BuildError(Exception):
    """The build cannot go on; the message says what is missing or what the compiler said."""


@dataclass(frozen=True)
class Compiler:
    """A compiler's command and the first line that tells its version, with what it takes from the environment."""

    command: str
    version: str


@dataclass(frozen=True)
class Object:
    """One compilation: `command` is complete but for the dependency file, the output and the source."""

    source: Path
    output: Path
    command: tuple[str, ...]
    version: str

    @property
    def dependency_file(self) -> Path:
        return self.output.with_suffix(".d")

    @property
    def key_file(self) -> Path:
        return self.output.with_suffix(".key")

    def key(self) -> str:
        """Hash of all that the object depends on, as far as the last compilation told."""
        digest = hashlib.sha256(repr((self.command, self.version)).encode())
        for path in sorted({self.source, *_dependencies(self.dependency_file)}):
            digest.update(str(path).encode() + b"\0" + path.read_bytes())
        return digest.hexdigest()

    def is_fresh(self) -> bool:
        try:
            return self.output.exists() and self.key_file.read_text() == self.key()
        except OSError:
            return False

    def compile(self) -> float:
        """Compiles, and returns the seconds that it took."""
        started = time.monotonic()
        self.output.parent.mkdir(parents=True, exist_ok=True)
        self.key_file.unlink(missing_ok=True)
        _run([*self.command, "-MMD", "-MF", str(self.dependency_file), "-c", str(self.source), "-o", str(self.output)])
        self.key_file.write_text(self.key())
        return time.monotonic() - started


@dataclass(frozen=True)
class Target:
    """One library: its objects in link order and the link command, complete but for output and objects."""

    kind: str
    objects: tuple[Object, ...]
    link: tuple[str, ...]

    @property
    def path(self) -> Path:
        return LIBRARIES / f"libmii_{self.kind}.so"


def build(only: str | None = None, say: Callable[[str], None] = print) -> list[Path]:
    """Brings the libraries up to date and returns their paths.

    Args:
        only: "cpu" or "cuda" to build just that one and leave the other alone.
        say: takes the progress lines.

    Raises:
        BuildError: no compiler, a compiler's error, or CUDA demanded (MII_BUILD_CUDA=1 or only="cuda") without nvcc.
    """
    if not sys.platform.startswith("linux"):
        raise BuildError(f"mii builds on Linux only; this is {sys.platform}.")
    jobs = _job_count()
    with _locked(CACHE / "lock"):
        targets = [] if only == "cuda" else [_cpu_target(say)]
        if only != "cpu":
            targets += _cuda_targets(required=only == "cuda", say=say)
        _compile([o for t in targets for o in t.objects if not o.is_fresh()], jobs, say)
        for target in targets:
            _link(target, say)
    return [target.path for target in targets]


def _cpu_target(say: Callable[[str], None]) -> Target:
    """The CPU library: csrc/cpu/*.cpp once, csrc/cpu/isa/*.cpp once per variant that the compiler can do."""
    cxx = _cxx()
    base = [cxx.command, *CPU_FLAGS, f"-I{SOURCES / 'include'}", f"-I{SOURCES / 'cpu'}"]
    variants = {isa: flags for isa, flags in ISA_FLAGS.items() if _accepts(base, flags, _isa_probe(isa))}
    for isa in ISA_FLAGS.keys() - variants.keys():
        say(f"note: {cxx.command} cannot compile for {isa}; processors that have it will use the next best variant.")
    have = [f"-DMII_HAVE_{isa.upper()}" for isa in variants]
    objects = [
        _object(source, "cpu", source.stem, (*base, *have), cxx) for source in _sources(SOURCES / "cpu", "*.cpp")
    ]
    for isa, flags in variants.items():
        for source in sorted((SOURCES / "cpu" / "isa").glob("*.cpp")):
            command = (*base, *have, *flags, f"-DMII_ISA={isa}")
            objects.append(_object(source, "cpu", f"{source.stem}.{isa}", command, cxx))
    return Target("cpu", tuple(objects), (cxx.command, "-shared", "-pthread"))


# To read the header itself would take half a second: a compiler that takes the flags has what they are for in its own.
_ISA_PROBE = "#if !__has_include(<immintrin.h>)\n#error\n#endif\nint main() {}\n"


def _isa_probe(isa: str) -> str:
    return "int main() {}\n" if isa == "plain" else _ISA_PROBE


def _cuda_targets(required: bool, say: Callable[[str], None]) -> list[Target]:
    """The CUDA library, or nothing (with a note, and without a stale library) where it is not to be built."""
    wish = os.environ.get("MII_BUILD_CUDA", "")
    if wish not in ("", "0", "1"):
        raise BuildError(f"MII_BUILD_CUDA is {wish!r}; it takes 0 (never), 1 (must) or nothing (when nvcc is found).")
    required = required or wish == "1"
    try:
        if wish == "0" and not required:
            raise BuildError("MII_BUILD_CUDA=0 asks for none")
        return [_cuda_target(_nvcc())]
    except BuildError as reason:
        if required:
            raise
        (LIBRARIES / "libmii_cuda.so").unlink(missing_ok=True)
        say(f"note: no CUDA kernels in this build ({reason}); it will serve CPUs.")
        return []


def _cuda_target(nvcc: Compiler) -> Target:
    host = ("-ccbin", os.environ["CXX"]) if os.environ.get("CXX") else ()
    base = (nvcc.command, *CUDA_FLAGS, *host, f"-I{SOURCES / 'include'}", f"-I{SOURCES / 'cuda'}")
    objects = [_object(source, "cuda", source.stem, base, nvcc) for source in _sources(SOURCES / "cuda", "*.cu")]
    return Target("cuda", tuple(objects), (nvcc.command, *host, "-shared", "-cudart", "static"))


def _object(source: Path, kind: str, name: str, command: Sequence[str], compiler: Compiler) -> Object:
    return Object(source, CACHE / kind / f"{name}.o", tuple(command), compiler.version)


def _sources(folder: Path, pattern: str) -> list[Path]:
    found = sorted(folder.glob(pattern))
    if not found:
        raise BuildError(f"{folder} holds no {pattern}: the checkout is incomplete.")
    return found


def _compile(objects: Sequence[Object], jobs: int, say: Callable[[str], None]) -> None:
    """Compiles what is not fresh, `jobs` at a time; the first error stops what has not started yet."""
    # the largest sources first, so that the last one to finish is a short one
    objects = sorted(objects, key=lambda o: (o.source.suffix != ".cu", -o.source.stat().st_size))
    started = time.monotonic()
    with ThreadPoolExecutor(jobs) as pool:
        pending = {pool.submit(o.compile): o for o in objects}
        for count, done in enumerate(as_completed(pending), 1):
            try:
                own = done.result()
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise
            so_far = time.monotonic() - started
            say(f"[{count}/{len(objects)}] {pending[done].output.relative_to(CACHE)} {own:.1f} s ({so_far:.0f} s)")


def _link(target: Target, say: Callable[[str], None]) -> None:
    """Links the library beside its place and moves it there in one step, so that a reader sees the old or the new."""
    key_file = CACHE / f"{target.kind}.key"
    wanted = repr([target.link, *(o.key_file.read_text() for o in target.objects)])
    if target.path.exists() and key_file.exists() and key_file.read_text() == wanted + _hash(target.path):
        say(f"{target.path.relative_to(ROOT)} is up to date")
        return
    LIBRARIES.mkdir(parents=True, exist_ok=True)
    fresh = target.path.with_suffix(f".{os.getpid()}.tmp")
    try:
        _run([*target.link, "-o", str(fresh), *(str(o.output) for o in target.objects)])
        key_file.write_text(wanted + _hash(fresh))
        os.replace(fresh, target.path)
    finally:
        fresh.unlink(missing_ok=True)
    say(f"built {target.path.relative_to(ROOT)} ({target.path.stat().st_size / 1e6:.1f} MB)")


def _cxx() -> Compiler:
    wish = os.environ.get("CXX")
    for command in [wish] if wish else ["g++", "c++", "clang++"]:
        if shutil.which(command):
            return Compiler(command, _version(command))
    what = f"CXX names {wish!r}, which is not on the PATH" if wish else "none of g++, c++ and clang++ is on the PATH"
    raise BuildError(
        f"mii needs a C++ compiler: {what}. Install one (Debian, Ubuntu: apt-get install g++; Fedora, RHEL: "
        "dnf install gcc-c++) or set CXX to it."
    )


def _nvcc() -> Compiler:
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    places = [f"{home}/bin/nvcc" for home in homes if home] + ["nvcc", "/usr/local/cuda/bin/nvcc"]
    command = next((found for place in places if (found := shutil.which(place))), None)
    if command is None:
        raise BuildError("nvcc is neither on the PATH nor in CUDA_HOME nor in /usr/local/cuda")
    version = _version(command)
    release = re.search(r"release (\d+)\.(\d+)", version)
    if release is None or (int(release[1]), int(release[2])) < CUDA_MINIMUM:
        raise BuildError(f"{command} is {version!r}; CUDA {CUDA_MINIMUM[0]}.{CUDA_MINIMUM[1]} or later is needed")
    return Compiler(command, version + "".join(f" {name}={value}" for name, value in _own_flags()))


def _own_flags() -> Iterator[tuple[str, str]]:
    """What nvcc adds to its command by itself."""
    for name in ("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS"):
        if value := os.environ.get(name):
            yield name, value


def _version(command: str) -> str:
    lines = _run([command, "--version"]).splitlines()
    return next((line for line in lines if "release" in line), lines[0] if lines else "")


def _accepts(base: Sequence[str], flags: Sequence[str], source: str) -> bool:
    command = [*base, *flags, "-fsyntax-only", "-x", "c++", "-"]
    return subprocess.run(command, input=source, text=True, capture_output=True).returncode == 0


def _run(command: Sequence[str]) -> str:
    """Runs a command and returns what it printed; on failure raises with the command and its words."""
    result = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, errors="replace")
    if result.returncode:
        raise BuildError(f"this command failed with code {result.returncode}:\n{shlex.join(command)}\n{result.stdout}")
    return result.stdout


def _dependencies(path: Path) -> list[Path]:
    """The files named in a compiler's dependency file (make syntax)."""
    if not path.exists():
        return []
    _, _, names = path.read_text().replace("\\\n", " ").partition(": ")
    return [Path(name.replace("\\ ", " ")) for name in re.split(r"(?<!\\)\s+", names.strip()) if name]


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _job_count() -> int:
    wish = os.environ.get("MII_BUILD_JOBS", "")
    if wish:
        if not wish.isdigit() or int(wish) < 1:
            raise BuildError(f"MII_BUILD_JOBS is {wish!r}; it takes a whole number of at least 1.")
        return int(wish)
    with open("/proc/meminfo") as lines:
        free = next((int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable")), BYTES_PER_JOB)
    return max(1, min(len(os.sched_getaffinity(0)), free // BYTES_PER_JOB))


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Two builds in one checkout take turns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
