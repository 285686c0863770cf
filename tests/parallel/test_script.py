"""Scripts that a launcher starts in several processes: real processes, real sockets."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import mii
from tests.parallel.test_sharded_models import NINE_HEADS

SCRIPT = """
import json, os, sys
import mii

folder, options, calls = sys.argv[-3], json.loads(sys.argv[-2]), json.loads(sys.argv[-1])
for option in options:
    pipe = mii.pipeline(folder, **{"device": "cpu", "dtype": "fp32", "progress": False, **option})
    said = [[str(each) for each in pipe(["DeepSpeed is", "Seattle is"], max_new_tokens=12, **call)] for call in calls]
    pieces = [piece for step in pipe.stream("A", max_new_tokens=6, do_sample=False) for piece in step]
    streamed = "".join(piece.generated_text for piece in pieces)
    line = json.dumps({"rank": int(os.environ["RANK"]), "first": pipe.is_rank_0, "said": said, "streamed": streamed})
    sys.stdout.write(line + "\\n")  # one write: the ranks share a pipe
    pipe.destroy()
"""
CALLS: list[dict[str, Any]] = [{"do_sample": False}, {"seed": 7, "top_k": 50}]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]


def launch(
    command: list[str], tmp_path: Path, folder: Path, *options: dict[str, Any], before: str = ""
) -> subprocess.CompletedProcess[str]:
    """Runs the script with one pipeline after the other, one for each of `options`; `before`: what it does first."""
    script = tmp_path / "script.py"
    script.write_text(before + SCRIPT)
    environment = {**os.environ, "MII_LOG_LEVEL": "warning", "OMP_NUM_THREADS": "1"}
    arguments = [str(script), str(folder), json.dumps(options or [{}]), json.dumps(CALLS)]
    return subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True, timeout=240)


def by_rank(output: str) -> list[list[dict[str, Any]]]:
    """What each rank said of each of its pipelines."""
    found: dict[int, list[dict[str, Any]]] = {}
    for each in (json.loads(line) for line in output.splitlines() if line.startswith("{")):
        found.setdefault(each["rank"], []).append(each)
    return [found[rank] for rank in sorted(found)]


def expected(folder: Path, device: str = "cpu") -> list[list[str]]:
    with mii.pipeline(str(folder), device=device, dtype="fp32", progress=False) as pipe:
        return [
            [str(each) for each in pipe(["DeepSpeed is", "Seattle is"], max_new_tokens=12, **call)] for call in CALLS
        ]


def test_torchrun_divides_a_model_and_the_ranks_that_are_to_answer_do(
    make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder = make_checkpoint(**NINE_HEADS)
    done = launch([*TORCHRUN, "3"], tmp_path, folder, {}, {"all_rank_output": True, "seed": 1})
    assert done.returncode == 0, done.stderr
    ranks = by_rank(done.stdout)
    assert [rank[0]["rank"] for rank in ranks] == [0, 1, 2]
    assert [rank[0]["first"] for rank in ranks] == [True, False, False]
    assert [rank[0]["said"] for rank in ranks] == [expected(folder), [[], []], [[], []]]
    streamed, *others = [rank[0]["streamed"] for rank in ranks]
    assert streamed and others == ["", ""]
    assert [rank[1]["said"] for rank in ranks] == [expected(folder)] * 3
    assert [rank[1]["streamed"] for rank in ranks] == [streamed] * 3  # how many steps a piece is of may differ


@pytest.mark.skipif(shutil.which("deepspeed") is None, reason="deepspeed is not installed here: pip install deepspeed")
def test_deepspeed_divides_a_model(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_checkpoint(**NINE_HEADS)
    port = str(29500 + os.getpid() % 5000)
    done = launch(["deepspeed", "--num_gpus", "2", "--master_port", port], tmp_path, folder)
    assert done.returncode == 0, done.stderr
    assert by_rank(done.stdout)[0][0]["said"] == expected(folder)


def test_a_wrong_size_is_refused_once_and_ends_every_rank(tiny_llama: Path, tmp_path: Path) -> None:
    done = launch([*TORCHRUN, "2"], tmp_path, tiny_llama, {"tensor_parallel": 1})
    assert done.returncode != 0
    assert done.stderr.count("LauncherError: tensor_parallel=1 and 2 processes were started (WORLD_SIZE)") == 1


def test_what_one_rank_cannot_do_is_said_once(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    done = launch([*TORCHRUN, "2"], tmp_path, make_checkpoint(num_attention_heads=1))
    assert done.returncode != 0
    assert done.stderr.count("tensor_parallel=2: the model has 1 attention heads") == 1


def test_a_size_without_a_launcher_is_explained(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(mii.errors.LauncherError, match=r"WORLD_SIZE is 2 and RANK is not set.*unset WORLD_SIZE"):
        mii.pipeline(str(tiny_llama), device="cpu")


def test_a_rank_whose_others_do_not_come_says_whom_it_waits_for(tiny_llama: Path) -> None:
    code = (
        "import sys, mii, mii.parallel.script as s; s._PATIENCE_SECONDS = 0.1; mii.pipeline(sys.argv[1], device='cpu')"
    )
    alone = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9"}
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tiny_llama)], env={**os.environ, **alone}, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stderr is not None
        said = next(line for line in process.stderr if "waits" in line)
        assert "rank 1 still waits for the others of 2 ranks at 127.0.0.1:9" in said
        assert "unset WORLD_SIZE" in said
    finally:
        process.kill()
        process.communicate()
