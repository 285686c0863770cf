"""Weights read ahead through page-locked memory are those of the checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mii.modeling.checkpoint import open_checkpoint, read_ahead
from mii.modeling.checkpoint.read_ahead import ReadAhead
from mii.modeling.models import load_model
from tests.modeling.test_read_ahead import weights_of


@pytest.mark.parametrize("chunk", [3000, 16 << 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parameters_equal_those_of_a_plain_load(
    tiny_llama: Path, dtype: torch.dtype, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read_ahead, "_CHUNK", chunk)
    device = torch.device("cuda")
    with open_checkpoint(tiny_llama) as checkpoint:
        plain = weights_of(load_model(checkpoint, device, dtype))
    for _ in range(3):  # buffers are used again while copies are under way
        with ReadAhead(open_checkpoint(tiny_llama), device) as reader:
            read = weights_of(load_model(reader, device, dtype))
        assert all(torch.equal(plain[name], read[name]) for name in plain)
