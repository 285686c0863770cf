"""What loading decides and refuses: device, number format, sizes, memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mii.config import ModelConfig
from mii.engine import devices, load_engine, loading
from mii.engine.devices import choose_device, choose_dtype
from mii.errors import (
    CheckpointError,
    LoadError,
    OutOfMemoryError,
    UnsupportedDeviceError,
)
from tests.oracle import generate, small_engine

GIB = 1 << 30
CPU, CARD = torch.device("cpu"), torch.device("cuda", 0)


def config(folder: Path, **options: object) -> ModelConfig:
    return ModelConfig(model_name_or_path=str(folder), device="cpu", progress=False, **options)


def pretend_a_card(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] = (9, 0), count: int = 1) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Old Card")


def test_auto_takes_a_card_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == CPU
    pretend_a_card(monkeypatch)
    assert choose_device("auto") == CARD
    assert choose_device("cpu") == CPU


def test_a_card_that_is_not_there_is_an_error_that_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UnsupportedDeviceError, match=r"torch finds no NVIDIA GPU here.*use device='cpu'"):
        choose_device("cuda")
    pretend_a_card(monkeypatch, count=2)
    with pytest.raises(UnsupportedDeviceError, match="GPU 2 was asked for and this machine has 2, numbered from 0"):
        choose_device("cuda", 2)


def test_a_context_that_no_memory_holds_is_said_in_a_sentence(make_checkpoint: Callable[..., Path]) -> None:
    folder = make_checkpoint(max_position_embeddings=10**15)
    with pytest.raises(OutOfMemoryError, match=r"This machine ran out of memory.*max_length, which is 10{15}"):
        load_engine(config(folder))


def test_a_card_that_is_too_old_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_a_card(monkeypatch, capability=(7, 5))
    with pytest.raises(UnsupportedDeviceError, match=r"Old Card has compute capability 7\.5; mii's kernels need 8\.0"):
        choose_device("auto")


@pytest.mark.parametrize(
    ("requested", "stored", "device", "chosen"),
    [
        ("auto", "bfloat16", CPU, torch.bfloat16),
        ("auto", "float16", CARD, torch.float16),
        ("auto", "float32", CPU, torch.float32),
        ("auto", "float32", CARD, torch.bfloat16),
        ("auto", None, CPU, torch.bfloat16),
        ("fp32", "float16", CARD, torch.float32),
        ("bf16", "float16", CPU, torch.bfloat16),
    ],
)
def test_the_number_format(requested: str, stored: str | None, device: torch.device, chosen: torch.dtype) -> None:
    for name in ("dtype", "torch_dtype"):
        assert choose_dtype(requested, {name: stored}, device) is chosen


def test_a_number_format_that_models_do_not_run_in_is_refused_unless_another_is_asked_for() -> None:
    with pytest.raises(CheckpointError, match=r"dtype is 'float8_e4m3fn'.*Choose one with dtype='bf16', 'fp16'"):
        choose_dtype("auto", {"dtype": "float8_e4m3fn"}, CPU)
    assert choose_dtype("fp16", {"dtype": "float8_e4m3fn"}, CPU) is torch.float16


def test_weights_that_do_not_fit_are_refused_before_anything_is_read(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "free_memory", lambda device: 1000)
    monkeypatch.setattr(loading, "load_model", lambda *a, **k: pytest.fail("read weights that cannot fit"))
    with pytest.raises(OutOfMemoryError, match=r"The weights take .* GiB in float32 and 0\.0 GiB are free on cpu"):
        load_engine(config(tiny_llama, dtype="fp32"))


def test_a_fraction_that_leaves_no_room_for_the_cache_says_the_numbers(tiny_llama: Path) -> None:
    with pytest.raises(OutOfMemoryError, match=r"memory_fraction=1e-12 allows 0\.00 .* leaves no room"):
        load_engine(config(tiny_llama, memory_fraction=1e-12))


def test_the_cache_is_as_large_as_the_fraction_allows(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "free_memory", lambda device: GIB)
    engine = load_engine(config(tiny_llama, memory_fraction=0.01))
    assert engine.runner is not None
    assert engine.num_blocks == int(0.01 * GIB) // engine.runner.block_bytes


def test_reserve_leaves_bytes_free_and_allocate_counts_blocks(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "free_memory", lambda device: GIB)

    def blocks(mode: str, size: int) -> int:
        manager = {"memory_config": {"mode": mode, "size": size}}
        return load_engine(config(tiny_llama, inference_engine_config={"state_manager": manager})).num_blocks

    assert blocks("allocate", 77) == 77
    assert blocks("reserve", GIB - (1 << 20)) < blocks("reserve", GIB - (1 << 22))


def test_max_length_bounds_prompt_plus_answer(tiny_llama: Path) -> None:
    engine = small_engine(tiny_llama, max_length=20)
    assert [len(answer) for answer in generate(engine, [[5] * 12, [6] * 19], 50)] == [8, 1]
    with pytest.raises(CheckpointError, match="max_length=513 is more than the 512 positions that this model has"):
        small_engine(tiny_llama, max_length=513)


def test_nothing_stays_allocated_after_a_failed_load(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gc
    import weakref

    from mii.modeling.decoder import Decoder

    made: list[weakref.ref[Decoder]] = []
    original = loading.load_model

    def spy(*args: object, **options: object) -> Decoder:
        model = original(*args, **options)  # type: ignore[arg-type]
        made.append(weakref.ref(model))
        return model

    monkeypatch.setattr(loading, "load_model", spy)
    with pytest.raises(LoadError):
        load_engine(config(tiny_llama, memory_fraction=1e-12))
    gc.collect()
    assert [ref() for ref in made] == [None]


def test_available_memory_is_a_plausible_number() -> None:
    assert 1 << 20 < devices.free_memory(CPU) < 1 << 50
