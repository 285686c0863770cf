"""What a rank takes of its host's memory while it loads its part: processes, and a checkpoint of some hundred MB."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._C._distributed_c10d import TCPStore

from mii.benchmark.random_checkpoint import RandomCheckpoint
from mii.benchmark.shapes import SHAPES
from mii.benchmark.start import write_checkpoint

SIZES = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 12, "vocab_size": 1000}
HEADS = {"num_attention_heads": 16, "num_key_value_heads": 16}
FIELDS = {**SHAPES["llama3-8b"], **SIZES, **HEADS}
MIB = 1 << 20

# Counts the bytes that are asked of the checkpoint, and reads the most memory that was resident since before the load.
RANK = """
import json, sys
from pathlib import Path
import torch
from torch._C._distributed_c10d import TCPStore
from mii.config import ModelConfig
from mii.engine import build_engine
from mii.engine.costs import count_weights
from mii.launch.loop import leave
from mii.modeling.checkpoint import open_checkpoint
from mii.parallel.ranks import Ranks

def resident(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))

folder, rank, size, port = sys.argv[1], *map(int, sys.argv[2:])
torch.set_num_threads(1)
torch.randn(64, 64).bfloat16() @ torch.randn(64, 64).bfloat16()
manager = {"memory_config": {"mode": "allocate", "size": 16}, "max_ragged_batch_size": 64}
options = {"inference_engine_config": {"state_manager": manager}, "tensor_parallel": size, "max_length": 128}
config = ModelConfig(model_name_or_path=folder, device="cpu", progress=False, **options)
store = TCPStore("127.0.0.1", port, size + 1, False, wait_for_workers=False)
ranks = Ranks(store, rank, size, torch.device("cpu"))
Path("/proc/self/clear_refs").write_text("5")
before, own, asked = resident("VmRSS"), resident("RssAnon"), 0
with ranks.loading(), open_checkpoint(folder) as checkpoint:
    get = checkpoint.get
    def counted(*arguments):
        global asked
        part = get(*arguments)
        asked += part.numel() * 2
        return part
    checkpoint.get = counted
    engine = build_engine(config, checkpoint, False, ranks)
    spec = engine.runner.spec
    found = {"peak": resident("VmHWM") - before, "own": resident("RssAnon") - own}
    print(json.dumps({**found, "asked": asked, "part": 2 * count_weights(spec)}))
    sys.stdout.flush()
if rank:
    engine.follow()
engine.destroy()
leave()
"""


def loaded(folder: Path, size: int) -> list[dict[str, int]]:
    """What each rank says after it has loaded its part."""
    store = TCPStore("127.0.0.1", 0, size + 1, True, wait_for_workers=False)
    words = [sys.executable, "-c", RANK, str(folder)]
    started = [
        subprocess.Popen([*words, str(rank), str(size), str(store.port)], stdout=subprocess.PIPE, text=True)
        for rank in range(size)
    ]
    outputs = [process.communicate(timeout=240)[0] for process in started]
    assert [process.returncode for process in started] == [0] * size
    return [json.loads(output.splitlines()[-1]) for output in outputs]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A folder, and the bytes of its tensors."""
    folder = tmp_path_factory.mktemp("large")
    return folder, write_checkpoint(folder, RandomCheckpoint(FIELDS, torch.device("cpu")))


@pytest.mark.parametrize("size", [4])  # two do the same, with larger parts
def test_a_rank_reads_its_part_and_takes_no_more_memory_than_that(checkpoint: tuple[Path, int], size: int) -> None:
    folder, whole = checkpoint
    assert whole > 300 * MIB
    for found in loaded(folder, size):
        part = found["part"]
        assert part < whole / size + 5 * MIB  # all have the embedding and the norms
        assert part <= found["asked"] < part + 4 * MIB  # and what tells checkpoints apart
        assert found["own"] < part + 64 * MIB
        # Pages of the file that are mapped count as well, as long as the kernel needs their memory for nothing else.
        assert found["peak"] < found["own"] + whole + 64 * MIB < part + 2048 * MIB
