"""Rotary scalings that GGUF files say in keys or keep as tensors of divisors. Judged by transformers' logits."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoConfig

from mii.modeling.checkpoint import open_checkpoint
from tests.checkpoints import write_checkpoint
from tests.modeling.gguf_files import convert
from tests.modeling.test_gguf_architectures import SHAPE, as_folder, logits, rms

LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192}  # fmt: skip
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 24.0,
}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.5}
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0, 1.1, 1.5, 2.0],
        "long_factor": [1.0, 2.0, 3.0, 4.5], "original_max_position_embeddings": 16}  # fmt: skip


def scaled(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    rms(writer, config)
    rope = config["rope_parameters"]
    writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
    writer.add_rope_scaling_factor(rope["factor"])
    if "original_max_position_embeddings" in rope:
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if "beta_fast" in rope:
        writer.add_rope_scaling_yarn_beta_fast(rope["beta_fast"])


def long_rope(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    rms(writer, config)
    writer.add_rope_scaling_orig_ctx_len(config["rope_parameters"]["original_max_position_embeddings"])
    writer.add_sliding_window(64)


def llama3_divisors(head_dim: int) -> np.ndarray:
    """As the converter computes them."""
    frequencies = 1.0 / LLAMA3["rope_theta"] ** (np.arange(0, head_dim, 2) / head_dim)
    divisors = []
    for wavelength in 2 * np.pi / frequencies:
        if wavelength < 8192 / 4.0:
            divisors.append(1.0)
        elif wavelength > 8192 / 1.0:
            divisors.append(8.0)
        else:
            smooth = (8192 / wavelength - 1.0) / (4.0 - 1.0)
            divisors.append(1 / ((1 - smooth) / 8.0 + smooth))
    return np.array(divisors, dtype=np.float32)


ROPES: dict[str, tuple[str, Callable[..., None], dict[str, Any], dict[str, Any]]] = {
    "linear": ("llama", scaled, LINEAR, {}),
    "yarn": ("llama", scaled, YARN, {}),
    "llama3": ("llama", rms, LLAMA3, {"rope_freqs__weight": llama3_divisors(64)}),
    "longrope": (
        "phi3",
        long_rope,
        LONG,
        {"rope_factors_long__weight": LONG["long_factor"], "rope_factors_short__weight": LONG["short_factor"]},
    ),
}


@pytest.mark.parametrize("kind", ROPES)
def test_rope_scaling_is_understood(tmp_path: Path, kind: str) -> None:
    architecture, keys, rope, extra = copy.deepcopy(ROPES[kind])  # transformers adds to it
    folder = tmp_path / "hf"
    folder.mkdir()
    fields = {"head_dim": 64} if kind == "llama3" else {}
    if kind == "longrope":
        fields = {"original_max_position_embeddings": 16, "sliding_window": 64}
    write_checkpoint(folder, architecture, tokenizer=False, **{**SHAPE, **fields, "rope_parameters": rope})
    with open_checkpoint(convert(folder, tmp_path / "m.gguf", architecture, keys, **extra)) as checkpoint:
        parameters = checkpoint.config["rope_parameters"]
        for name, value in ROPES[kind][2].items():
            assert parameters[name] == pytest.approx(value), name
        again = as_folder(checkpoint, tmp_path / "again")
    torch.testing.assert_close(logits(again), logits(folder), rtol=1e-4, atol=1e-4)


def test_rope_divisors_that_are_not_llama_3s_keep_their_values(tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    folder.mkdir()
    write_checkpoint(folder, "llama", tokenizer=False, **SHAPE)
    path = convert(folder, tmp_path / "m.gguf", "llama", rms, rope_freqs__weight=[1.0, 3.0, 2.0, 5.0])
    config = open_checkpoint(path).config
    assert config["rope_parameters"]["rope_type"] == "longrope"
    assert config["rope_parameters"]["short_factor"] == [1.0, 3.0, 2.0, 5.0]
    AutoConfig.for_model(**config)
