"""Which products an engine times when it starts, and what it makes of the times; the timing itself is in tests/gpu."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mii.engine import choices
from mii.engine.choices import choose_products
from mii.engine.kept_choices import kept_path
from mii.engine.runner import Runner
from mii.logging import logger
from mii.ops import linear_hopper, products
from mii.ops.linear import LinearWeight
from mii.ops.products import Times
from tests.oracle import small_engine

HIDDEN, QKV, UP, DOWN, VOCAB = 64, 128, 256, 128, 512


class Timed(list[tuple[tuple[int, ...], int, int]]):
    """Stands in for `choose`: shape, rows and number of weights of each call."""

    def __call__(self, weights: Sequence[torch.Tensor], rows: int, *, seconds: float) -> Times:
        assert len({weight.shape for weight in weights}) == 1
        self.append((tuple(weights[0].shape), rows, len(weights)))
        if rows == 32:
            products.adopt(weights[0], rows, bytes(range(64)))
        return Times(10.0, 8.0 if rows == 32 else 10.0)


@pytest.fixture
def runner(make_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Runner:
    """Of an engine whose weights lie as they do on a GPU: row-major."""
    folder = make_checkpoint(
        hidden_size=HIDDEN, num_attention_heads=4, num_key_value_heads=2, intermediate_size=DOWN, vocab_size=VOCAB
    )
    runner = small_engine(folder, max_tokens=2000, max_sequences=40).runner
    assert runner is not None
    for _, _, module in choices._multiplied(runner.model):
        assert module.packed is not None
        data = module.packed.unpacked()
        module.packed = LinearWeight(data, *data.shape, data.dtype, packed=False)
    monkeypatch.setattr(choices, "_LEAST_WEIGHT", 1)
    monkeypatch.setattr(choices, "_warm_up", lambda weight, rows: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU/of some kind")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(products, "_chosen", {})
    monkeypatch.setattr(linear_hopper, "_fast_memory", lambda device: True)
    return runner


def test_large_steps_come_first_and_then_those_of_decode(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    timed = Timed()
    monkeypatch.setattr(choices, "choose", timed)
    said = choose_products(runner)
    layers = runner.spec.num_layers
    shapes = {(QKV, HIDDEN), (HIDDEN, HIDDEN), (UP, HIDDEN), (HIDDEN, DOWN)}
    assert {(shape, rows) for shape, rows, _ in timed[:4]} == {(shape, 2000) for shape in shapes}
    assert all(count == layers for _, _, count in timed[:4])
    small = timed[4:]
    assert {rows for _, rows, _ in small} == {24, 32, 40}  # up to 16 rows a kernel of our own multiplies
    assert {shape for shape, _, _ in small} == {*shapes, (VOCAB, HIDDEN)}
    assert [rows for _, rows, _ in small] == sorted(rows for _, rows, _ in small)
    assert said == f"0 known; 5 of {len(timed)} by another algorithm than the first, up to 25 % faster"


def test_what_was_chosen_is_known_from_then_on(runner: Runner, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    timed = Timed()
    monkeypatch.setattr(choices, "choose", timed)
    choose_products(runner)
    chosen, count = dict(products._chosen), len(timed)
    products._chosen.clear()
    said = choose_products(runner)
    assert len(timed) == count
    assert {shape: algorithm.raw for shape, algorithm in products._chosen.items()} == {
        shape: algorithm.raw for shape, algorithm in chosen.items()
    }
    (path,) = (tmp_path / "mii").iterdir()
    assert path.name.startswith("products-a_GPU_of_some_kind-")
    assert said == f"{count} known from {path}"
    kept = json.loads(path.read_text())
    kept.popitem()
    kept[name := next(iter(kept))] = "00"  # no algorithm
    path.write_text(json.dumps(kept))
    assert choose_products(runner).startswith(f"{count - 2} known; ")
    assert len(timed) == count + 2
    assert json.loads(path.read_text())[name] != "00"


@pytest.mark.parametrize("text", ["", "[]", '{"a": 1}', '{"a": "xy"}'])
def test_a_file_that_cannot_be_read_is_as_good_as_none(
    text: str, runner: Runner, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    timed = Timed()
    monkeypatch.setattr(choices, "choose", timed)
    path = kept_path(runner.device)
    assert path is not None
    path.parent.mkdir()
    path.write_text(text)
    logger.addHandler(caplog.handler)
    assert choose_products(runner).startswith("0 known; ")
    logger.removeHandler(caplog.handler)
    assert f"{path} cannot be read" in caplog.text
    assert len(timed) > 10


def no_home(path: Path) -> Path:
    raise RuntimeError("Could not determine home directory.")


@pytest.mark.parametrize("folder", ["/proc/none", "/etc/passwd", ""])
def test_nothing_is_kept_where_nothing_can_be_written(
    folder: str, runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choices, "choose", Timed())
    monkeypatch.setenv("XDG_CACHE_HOME", folder)
    if not folder:
        monkeypatch.setattr(Path, "expanduser", no_home)
    for _ in range(2):
        assert choose_products(runner).startswith("0 known; 5 of ")


def test_large_steps_are_timed_in_the_pieces_in_which_they_are_computed(
    runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed, views = Timed(), runner.arena.views
    monkeypatch.setattr(choices, "choose", timed)
    monkeypatch.setattr(runner.arena, "views", lambda *size: replace(views(*size), up=views(*size).up[:600]))
    choose_products(runner)
    in_mlp = {(UP, HIDDEN): 500, (HIDDEN, DOWN): 500}  # 2,000 in four pieces of at most 600
    assert {shape: rows for shape, rows, _ in timed[:4]} == {(QKV, HIDDEN): 2000, (HIDDEN, HIDDEN): 2000, **in_mlp}
    timed.clear()
    monkeypatch.setattr(choices, "read_kept", lambda path: {})
    monkeypatch.setattr(runner.model, "halves", lambda tokens, captured: [slice(0, 1000), slice(1000, 2000)])
    choose_products(runner)
    assert {rows for _, rows, _ in timed[:4]} == {1000, 500}


def test_what_is_left_when_the_time_is_up_is_left(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    timed = Timed()
    monkeypatch.setattr(choices, "choose", timed)
    monkeypatch.setattr(choices, "SECONDS", -1.0)
    said = choose_products(runner)
    assert said.startswith("0 known; 0 of 0 ")
    assert said.endswith(" left for another start")
    monkeypatch.setattr(choices, "ASKED_FOR", False)
    assert choose_products(runner) == "left to cuBLASLt: MII_CHOOSE_PRODUCTS=0"
    assert not timed


def test_where_memory_is_short_the_others_are_left(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    def choose(weights: Sequence[torch.Tensor], rows: int, *, seconds: float) -> Times:
        if rows > 24 or len(timed) == 5:
            raise torch.OutOfMemoryError
        timed.append(rows)
        return Times(10.0, 10.0)

    timed: list[int] = []
    monkeypatch.setattr(choices, "MOST_ROWS", 2000)  # no large steps
    monkeypatch.setattr(choices, "choose", choose)
    assert choose_products(runner) == (
        "0 known; 0 of 5 by another algorithm than the first, up to 0 % faster; there is no memory to time more"
    )


def test_nothing_is_chosen_without_a_library_for_it(runner: Runner) -> None:
    assert choose_products(runner).endswith("; others are left to torch")
    assert not products._chosen
