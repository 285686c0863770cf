"""Products by an algorithm that was chosen for their shape: what torch multiplies, and as fast at least."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from mii.engine import choices
from mii.ops import products
from mii.ops.linear import linear, pack_linear
from tests.ops.kernel_checks import assert_close
from tests.oracle import generate, random_prompts, small_engine

SHAPES = ((4096, 4096, 24), (3072, 4096, 96), (1032, 2056, 7), (64, 8, 1), (128, 4096, 2000))


@pytest.fixture(autouse=True)
def nothing_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_chosen", {})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("features", "width", "rows"), SHAPES)
def test_a_chosen_product_is_the_product(
    features: int, width: int, rows: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "LEAST_GAIN", 0.0)  # whatever is fastest is taken
    weights = [torch.randn(features, width, device="cuda", dtype=dtype) / width**0.5 for _ in range(3)]
    times = products.choose(weights, rows)
    assert times is not None
    assert 0 < times.chosen <= times.first
    wide = torch.randn(rows, width + 128, device="cuda", dtype=dtype)
    for x in (wide[:, :width].contiguous(), wide[:, :width]):
        out = torch.full((rows, features), torch.nan, device="cuda", dtype=dtype)
        assert products.product(out, x, weights[1])
        algorithm = products.algorithm_of(weights[0], rows)
        products._chosen.clear()
        products.adopt(weights[0], rows, algorithm)
        again = torch.empty_like(out)
        assert products.product(again, x, weights[1])
        assert torch.equal(again, out)
        assert_close(out, (x.float() @ weights[1].float().t()).to(dtype), ulps=2)


def test_other_shapes_are_left_to_torch() -> None:
    weight = torch.randn(256, 512, device="cuda", dtype=torch.bfloat16)
    x, out = (torch.zeros(40, width, device="cuda", dtype=torch.bfloat16) for width in (513, 256))
    assert not products.product(out, x[:, :512], weight)
    products.adopt(weight, 41, bytes(64))
    assert not products.product(out, x[:, :512], weight)
    assert products.choose([torch.zeros(8, 8, device="cuda")], 4) is None


def test_what_does_not_begin_at_a_whole_line_is_multiplied_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "LEAST_GAIN", 0.0)
    weight = torch.randn(256, 512, device="cuda", dtype=torch.bfloat16)
    assert products.choose([weight], 40) is not None
    x = torch.randn(40 * 512 + 8, device="cuda", dtype=torch.bfloat16)[8:].view(40, 512)
    out = torch.empty(40, 256, device="cuda", dtype=torch.bfloat16)
    assert not products.product(out, x, weight)
    linear(out, x, pack_linear(weight))
    assert_close(out, (x.float() @ weight.float().t()).to(x.dtype), ulps=2)


def test_an_engine_says_the_same_with_what_it_chose(
    make_checkpoint: object, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = make_checkpoint(hidden_size=1024, intermediate_size=2048, num_attention_heads=8)  # type: ignore[operator]
    said = []
    for gain in (99.0, 0.0):  # nothing, and all that is timed
        monkeypatch.setattr(products, "LEAST_GAIN", gain)
        monkeypatch.setattr(products, "_chosen", {})
        monkeypatch.setattr(choices, "_LEAST_WEIGHT", 1)
        engine = small_engine(folder, device="cuda", dtype="fp16", max_tokens=64, max_sequences=32)
        assert bool(products._chosen) == (gain == 0.0)
        shutil.rmtree(tmp_path / "cache")
        said.append(generate(engine, random_prompts(engine.vocab_size, [5, 100, 40] * 8), 8))
        engine.destroy()
    agreeing = sum(one == other for one, other in zip(*said, strict=True))
    assert agreeing >= 22  # of 24: near ties may fall to the other side
