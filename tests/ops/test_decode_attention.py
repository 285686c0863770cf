"""Rotation, KV write and attention in one: what they are one after the other. The kernels' tests are on a card
(tests/gpu/test_decode_attention.py) and of device code on the host (test_attention_tiled.py).
"""

from __future__ import annotations

import pytest
import torch

from mii.ops import native
from mii.ops.decode_attention import decode_attention
from tests.ops.attention_cases import SENTINEL, Shape
from tests.ops.decode_attention_cases import CONTEXTS, make_decode_case


@pytest.mark.parametrize("rotates", [True, False])
@pytest.mark.parametrize("window", [0, 20])
def test_it_is_rotation_and_write_and_attention(window: int, rotates: bool) -> None:
    with native.reference_ops():
        decode = make_decode_case(CONTEXTS, Shape(window=window), rotates=rotates, shift=3)
        stored = decode.stored()
        out = decode.run()
    stored.check(out)
    assert torch.equal(decode.case.k_cache.nan_to_num(), stored.k_cache.nan_to_num())
    assert torch.equal(decode.case.v_cache.nan_to_num(), stored.v_cache.nan_to_num())


def test_rows_without_a_sequence_stay_and_write_nothing() -> None:
    decode = make_decode_case([0, 9, 0], Shape())
    free = decode.case.k_cache.isnan().sum()
    out = decode.run()
    assert bool((out[1:] == SENTINEL).all())
    assert free - decode.case.k_cache.isnan().sum() == decode.case.k_cache[0, :, 0].numel()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"out": torch.empty(3, 200)}, "out has shape"),
        ({"positions": torch.zeros(2, dtype=torch.int32)}, "must be"),
        ({"cos_sin": torch.zeros(9, 32)}, r"must be \[positions, 64\]"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(change: dict[str, torch.Tensor], message: str) -> None:
    decode = make_decode_case([5, 20], Shape())
    case, plan = decode.case, decode.case.plan()
    plan.update(case.batch)
    good = {
        "out": case.new_out(),
        "cos_sin": decode.cos_sin,
        "positions": decode.positions,
        "kv_slots": decode.kv_slots,
    }
    tensors = {"qkv": case.qkv, "k_cache": case.k_cache, "v_cache": case.v_cache, "batch": case.batch, "plan": plan}
    with pytest.raises(ValueError, match=message):
        decode_attention(**{**good, **tensors, **change}, scale=case.scale)  # type: ignore[arg-type]
