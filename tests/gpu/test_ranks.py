"""A model that is divided among GPUs says what it says on one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.parallel.test_script import TORCHRUN, by_rank, expected, launch
from tests.serving.deployments import wait_until

# Heads of a size that every kernel has, and more ranks than key heads.
OPTIONS = {"hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 2, "intermediate_size": 1024}


# However small a step is.
HALVES = "from mii.parallel.group import Group\nGroup.overlaps = lambda group, num_bytes, captured: True\n"


@pytest.mark.parametrize(
    ("peers", "capture", "before"), [("0", "", ""), ("1", "", HALVES), ("0", "1", HALVES), ("1", "1", "")]
)
@pytest.mark.parametrize("size", [2, 4])
def test_ranks_on_gpus_say_what_one_gpu_says(
    size: int,
    peers: str,
    capture: str,
    before: str,
    make_checkpoint: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if torch.cuda.device_count() < size:
        pytest.skip(f"needs {size} GPUs, there are {torch.cuda.device_count()}")
    folder = make_checkpoint(**OPTIONS)
    monkeypatch.setenv("MII_PEER_REDUCE", peers)
    monkeypatch.setenv("MII_CAPTURE_RANKS", capture)
    done = launch([*TORCHRUN, str(size)], tmp_path, folder, {"device": "cuda"}, before=before)
    assert done.returncode == 0, done.stderr
    assert "NCCL adds up" not in done.stderr
    assert by_rank(done.stdout)[0][0]["said"] == expected(folder, "cuda")


STANDS_STILL = """
import json, os, sys
import mii

pipe = mii.pipeline(sys.argv[1], device="cuda", dtype="fp32", progress=False)
sys.stdout.write(json.dumps({"rank": int(os.environ["RANK"]), "pid": os.getpid()}) + "\\n")
sys.stdout.flush()
while True:
    pipe(["DeepSpeed is"], max_new_tokens=400, ignore_eos=True)
"""


@pytest.mark.parametrize("peers", ["0", "1"])
def test_a_rank_that_stands_still_ends_the_group_within_ten_seconds(
    peers: str, make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """NCCL waits for it without end, so that only the watch beside the steps can find out."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs 2 GPUs")
    script = tmp_path / "script.py"
    script.write_text(STANDS_STILL)
    environment = {**os.environ, "MII_PEER_REDUCE": peers, "OMP_NUM_THREADS": "1"}
    command = [*TORCHRUN, "2", str(script), str(make_checkpoint(**OPTIONS))]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        try:
            assert run.stdout is not None
            found = [json.loads(run.stdout.readline()) for _ in range(2)]
            pids = {each["rank"]: each["pid"] for each in found}
            time.sleep(5)  # within steps
            os.kill(pids[1], signal.SIGSTOP)
            wait_until(lambda: not is_running(pids[0]), seconds=12)
            os.kill(pids[1], signal.SIGKILL)
            assert run.wait(60) != 0
            assert run.stderr is not None and "rank 1 of 2" in run.stderr.read()
        finally:
            run.kill()


def is_running(pid: int) -> bool:
    """Whether it is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
