"""How long a start takes: a process of its own, from its first instruction to the first token of an engine.

The checkpoint is written before, with random weights, into shared memory where there is room: so its bytes are in
memory, as those of a file that was read lately are in the page cache.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch

from mii.benchmark.random_checkpoint import RandomCheckpoint
from mii.benchmark.rows import Row

_SHARD = 2 << 30
_SHARED_MEMORY = Path("/dev/shm")

_FIRST_TOKEN = """
import json, sys, time
from mii.batching.data_classes import EngineRequest
from mii.config import ModelConfig
from mii.engine import load_engine
engine = load_engine(ModelConfig(model_name_or_path=sys.argv[1], progress=False, **json.loads(sys.argv[2])))
engine.add_request(EngineRequest(uid=0, prompt_ids=list(range(10, 42)), max_new_tokens=2))
while not engine.step():
    pass
now = time.time()
print(json.dumps({"now": now, "phases": engine.start_report.as_dict()}))
"""


def write_checkpoint(folder: Path, checkpoint: RandomCheckpoint) -> int:
    """Writes it as a folder of safetensors, in shards with their index; returns the bytes of its tensors."""
    from safetensors.torch import save_file

    (folder / "config.json").write_text(json.dumps(checkpoint.config))
    shards: list[list[str]] = [[]]
    size = total = 0
    for name in checkpoint.names():
        bytes_of = checkpoint.stored_bytes(name)
        if shards[-1] and size + bytes_of > _SHARD:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size, total = size + bytes_of, total + bytes_of
    files: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file({name: checkpoint.get(name).contiguous() for name in names}, folder / file)
        files |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    return total


def start_row(config: Mapping[str, Any], options: Mapping[str, Any], runs: int = 3) -> Row:
    """Seconds from the start of a process to an engine's first token, the median of some; no tokenizer takes part.

    Args:
        config: Fields of config.json.
        options: Of `ModelConfig`, plain JSON values.
        runs: Processes, one after the other.
    """
    checkpoint = RandomCheckpoint(config, torch.device("cpu"))
    with tempfile.TemporaryDirectory(prefix="mii-start-", dir=place_for(checkpoint)) as name:
        size = write_checkpoint(Path(name), checkpoint)
        samples, phases = [], {}
        for _ in range(runs):
            begin = time.time()
            command = [sys.executable, "-c", _FIRST_TOKEN, name, json.dumps(dict(options))]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            found = json.loads(done.stdout.splitlines()[-1])
            samples.append(found["now"] - begin)
            phases = found["phases"]
    return Row("start", median(samples), "s", False, None, samples, {"bytes": size, "phases_of_the_last": phases})


def place_for(checkpoint: RandomCheckpoint) -> str | None:
    """Shared memory, if twice the checkpoint fits into it; else where temporary files go."""
    needed = 2 * sum(checkpoint.stored_bytes(name) for name in checkpoint.names())
    there = _SHARED_MEMORY.is_dir() and shutil.disk_usage(_SHARED_MEMORY).free > needed
    return str(_SHARED_MEMORY) if there else None
