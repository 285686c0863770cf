"""Rotary embedding and KV write: the reference against transformers', the kernels against the reference."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from transformers.models.gptj.modeling_gptj import apply_rotary_pos_emb as rotate_gptj
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as rotate_llama
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from mii.ops import abi
from mii.ops import rope_kv as rope_kv_module
from mii.ops.rope_kv import rope_kv, rope_kv_reference
from tests.ops.kernel_checks import DTYPES, assert_close, kernels_only, poisoned


class Heads(NamedTuple):
    q: int
    kv: int
    dim: int
    rotary: int


# Full and partial rotation; pairs that fit packs of 8, only packs of 2, only single elements; more heads than one trip
# of a CTA takes; a head wider than a warp holds; no key-value heads in common ratios.
HEADS = (
    Heads(32, 8, 128, 128),
    Heads(9, 3, 64, 64),
    Heads(4, 4, 80, 80),
    Heads(3, 1, 80, 32),
    Heads(6, 2, 80, 20),
    Heads(2, 2, 96, 96),
    Heads(3, 1, 96, 24),
    Heads(4, 2, 256, 64),
    Heads(1, 1, 512, 512),
    Heads(96, 8, 128, 128),
    Heads(5, 1, 20, 10),
    Heads(2, 1, 8, 2),
    Heads(3, 3, 7, 6),
)


def _angles(rows: int, rotary_dim: int) -> torch.Tensor:
    """[rows, rotary_dim]: cosines, then sines, of the usual frequencies."""
    frequencies = 10000.0 ** (-torch.arange(0, rotary_dim, 2) / rotary_dim)
    angles = torch.arange(rows)[:, None] * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=1)


def _options(heads: Heads, **more: object) -> dict[str, object]:
    return {"q_heads": heads.q, "kv_heads": heads.kv, "head_dim": heads.dim, "rotary_dim": heads.rotary, **more}


def test_half_split_rotation_equals_llama() -> None:
    heads = Heads(4, 2, 16, 16)
    qkv, table = torch.randn(5, 8 * 16), _angles(40, 16)
    positions = torch.tensor([0, 39, 7, 7, 1], dtype=torch.int32)
    q, k, _ = qkv.view(5, 8, 16).split((4, 2, 2), dim=1)
    cos, sin = table[positions.long()].chunk(2, dim=1)
    q, k = rotate_llama(q, k, torch.cat((cos, cos), 1), torch.cat((sin, sin), 1), unsqueeze_dim=1)
    out = qkv.clone()
    rope_kv_reference(out, None, None, table, positions, None, **_options(heads))  # type: ignore[arg-type]
    assert_close(out, torch.cat((q.flatten(1), k.flatten(1), qkv[:, 96:]), 1), ulps=2)


def test_interleaved_partial_rotation_equals_gptj() -> None:
    heads = Heads(2, 2, 16, 8)
    qkv, table = torch.randn(5, 6 * 16), _angles(40, 8)
    positions = torch.tensor([0, 39, 7, 7, 1], dtype=torch.int32)
    q, k, v = qkv.view(5, 6, 16).split((2, 2, 2), dim=1)
    cos, sin = table[positions.long()].chunk(2, dim=1)
    q, k = (
        torch.cat((rotate_gptj(part[None, ..., :8], sin[None], cos[None])[0], part[..., 8:]), dim=-1) for part in (q, k)
    )
    out = qkv.clone()
    rope_kv_reference(out, None, None, table, positions, None, **_options(heads, interleaved=True))  # type: ignore[arg-type]
    assert_close(out, torch.cat((q.flatten(1), k.flatten(1), v.flatten(1)), 1), ulps=2)


def test_head_norms_come_before_the_rotation_as_in_qwen3() -> None:
    heads = Heads(2, 1, 8, 8)
    modules = Qwen3RMSNorm(8, eps=1e-6), Qwen3RMSNorm(8, eps=1e-6)
    for module in modules:
        module.weight.data.normal_()
    qkv, table, positions = torch.randn(3, 4 * 8), _angles(9, 8), torch.tensor([1, 5, 8], dtype=torch.int32)
    q, k, v = qkv.view(3, 4, 8).split((2, 1, 1), dim=1)
    normed = torch.cat((modules[0](q).flatten(1), modules[1](k).flatten(1), v.flatten(1)), dim=1).detach()
    out = qkv.clone()
    weights = {"q_norm": modules[0].weight.data, "k_norm": modules[1].weight.data}
    rope_kv_reference(out, None, None, table, positions, None, **_options(heads, **weights))  # type: ignore[arg-type]
    rope_kv_reference(normed, None, None, table, positions, None, **_options(heads))  # type: ignore[arg-type]
    assert_close(out, normed, ulps=2)


def test_keys_and_values_land_in_their_slots_and_nowhere_else() -> None:
    heads = Heads(1, 2, 4, 4)
    qkv, positions = torch.randn(3, 5 * 4), torch.zeros(3, dtype=torch.int32)
    k_cache, v_cache = (poisoned(3, 2, 16, 4, dtype=torch.float32, device="cpu") for _ in range(2))
    slots = torch.tensor([2 * 16 + 5, -1, 3], dtype=torch.int32)
    rope_kv_reference(qkv, k_cache, v_cache, None, positions, slots, **_options(heads))  # type: ignore[arg-type]
    for cache, first in ((k_cache, 4), (v_cache, 12)):
        assert torch.equal(cache[2, :, 5], qkv[0, first : first + 8].view(2, 4))
        assert torch.equal(cache[0, :, 3], qkv[2, first : first + 8].view(2, 4))
        assert cache.isnan().sum() == cache.numel() - 16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qkv": torch.empty(3, 31)}, r"\[tokens, 32\]"),
        ({"positions": torch.zeros(2, dtype=torch.int32)}, r"must be \[3\] int32"),
        ({"cos_sin": torch.empty(9, 8, dtype=torch.float64)}, "float32 with an even rotary_dim"),
        ({"k_cache": torch.empty(2, 1, 16, 8)}, "go together"),
        ({"k_cache": torch.empty(2, 2, 16, 8), "v_cache": torch.empty(2, 2, 16, 8)}, "in qkv's dtype"),
        ({"q_norm": torch.empty(4)}, r"must be \[8\]"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(change: dict[str, torch.Tensor], message: str) -> None:
    good = {
        "qkv": torch.empty(3, 32),
        "k_cache": None,
        "v_cache": None,
        "cos_sin": torch.empty(9, 8),
        "positions": torch.zeros(3, dtype=torch.int32),
        "kv_slots": torch.zeros(3, dtype=torch.int32),
    }
    with pytest.raises(ValueError, match=message):
        rope_kv(**{**good, **change}, **_options(Heads(2, 1, 8, 8)))  # type: ignore[arg-type]


def check_kernel(device: str, dtype: torch.dtype, heads: Heads, interleaved: bool) -> None:
    """One head layout against the reference: with and without norms, rotation, cache, padding and spare row width."""
    block_size = 16
    for tokens, normed, rotates, cached, extra in (
        (0, False, True, True, 0),
        (1, False, True, True, 0),
        (7, True, True, True, 8),
        (7, True, False, True, 0),
        (7, False, False, True, 0),
        (7, False, True, False, 3),
        (33, False, True, True, 8),
        (33, True, True, True, 0),
    ):
        width = (heads.q + 2 * heads.kv) * heads.dim
        qkv = torch.randn(tokens, width + extra, device=device).to(dtype)
        table = _angles(60, heads.rotary).to(device) if rotates else None
        positions = torch.randint(-2, 63, (tokens,), dtype=torch.int32, device=device)
        slots = torch.randperm(6 * block_size, device=device)[:tokens].to(torch.int32)
        slots[tokens // 2 : tokens // 2 + 1] = -1
        weights = {
            name: torch.randn(heads.dim, device=device).to(dtype)
            if normed and (name == "k_norm" or tokens > 7)
            else None
            for name in ("q_norm", "k_norm")
        }
        kind = abi.RMS_PLUS1 if tokens > 7 else abi.RMS
        options = _options(heads, interleaved=interleaved, norm_kind=kind, norm_eps=1e-5, **weights)
        runs = []
        for _ in range(2):
            caches = [poisoned(6, heads.kv, block_size, heads.dim, dtype=dtype, device=device) for _ in range(2)]
            runs.append((qkv.clone(), *(caches if cached else (None, None))))
        (own, *own_caches), (theirs, *their_caches) = runs
        with kernels_only(rope_kv_module):
            rope_kv(own[:, :width], *own_caches, table, positions, slots if cached else None, **options)  # type: ignore[arg-type]
        rope_kv_reference(theirs[:, :width], *their_caches, table, positions, slots if cached else None, **options)  # type: ignore[arg-type]
        assert torch.equal(own[:, width:], theirs[:, width:])
        ulps = 2 if dtype != torch.float32 else 5
        assert_close(own, theirs, ulps)
        for mine, other in zip(own_caches if cached else (), their_caches, strict=False):
            assert torch.equal(mine.isnan(), other.isnan())
            assert_close(mine.nan_to_num(), other.nan_to_num(), ulps)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    "heads", [heads for heads in HEADS if heads.q < 32], ids=lambda heads: "-".join(map(str, heads))
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernel_equals_reference(native_device: str, dtype: torch.dtype, heads: Heads, interleaved: bool) -> None:
    check_kernel(native_device, dtype, heads, interleaved)
