"""A model that is divided among GPUs says what it says on one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.parallel.test_script import TORCHRUN, by_rank, expected, launch

# Heads of a size that every kernel has, and more ranks than key heads.
OPTIONS = {"hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 2, "intermediate_size": 1024}


@pytest.mark.parametrize(("peers", "capture"), [("0", ""), ("1", ""), ("0", "1"), ("1", "1")])
@pytest.mark.parametrize("size", [2, 4])
def test_ranks_on_gpus_say_what_one_gpu_says(
    size: int,
    peers: str,
    capture: str,
    make_checkpoint: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if torch.cuda.device_count() < size:
        pytest.skip(f"needs {size} GPUs, there are {torch.cuda.device_count()}")
    folder = make_checkpoint(**OPTIONS)
    monkeypatch.setenv("MII_PEER_REDUCE", peers)
    monkeypatch.setenv("MII_CAPTURE_RANKS", capture)
    done = launch([*TORCHRUN, str(size)], tmp_path, folder, {"device": "cuda"})
    assert done.returncode == 0, done.stderr
    assert "NCCL adds up" not in done.stderr
    assert by_rank(done.stdout)[0][0]["said"] == expected(folder, "cuda")
