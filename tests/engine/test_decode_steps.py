"""Which steps take their sequences' tokens along in decode attention: those in which nobody reads what another one
writes. The answers do not depend on it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mii.batching.data_classes import EngineRequest
from mii.engine import Engine
from mii.modeling import attention
from mii.modeling.attention import Attention
from tests.oracle import generate, random_prompts, small_engine

PLAIN = {"llama": {}, "opt": {}, "mistral": {}}
OTHERS = {"qwen3": {}, "gptj": {}, "phi": {}, "gpt_neox": {"rotary_pct": 0.25}}


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What attention is called with: "decode" or "apart", a layer each."""
    called: list[str] = []

    def watch(name: str, word: str) -> None:
        real = getattr(attention, name)

        def call(*args: Any, **options: Any) -> None:
            called.append(word)
            real(*args, **options)

        monkeypatch.setattr(attention, name, call)

    watch("decode_attention", "decode")
    watch("attention", "apart")
    return called


def layers_of(engine: Engine) -> list[Attention]:
    assert engine.runner is not None
    return [module for _, module in engine.runner.model.modules() if isinstance(module, Attention)]


@pytest.mark.parametrize(
    ("family", "at_once"), [*((name, True) for name in PLAIN), *((name, False) for name in OTHERS)]
)
def test_layers_that_rotate_whole_heads_without_norms_do_it_at_once(
    make_checkpoint: Callable[..., Path], family: str, at_once: bool
) -> None:
    engine = small_engine(make_checkpoint(family, **(PLAIN | OTHERS)[family]))
    layers = layers_of(engine)
    assert layers
    assert all(layer._decodes_at_once is at_once for layer in layers)
    engine.destroy()


def test_prompts_are_rotated_apart_and_tokens_after_them_at_once(tiny_llama: Path, steps: list[str]) -> None:
    engine = small_engine(tiny_llama)
    assert engine.runner is not None
    engine.runner._recorded.run = lambda key, body: body()  # type: ignore[method-assign]
    count = len(layers_of(engine))
    generate(engine, random_prompts(engine.vocab_size, [5, 20]), 4)
    steps_of_layers = ["".join({*steps[i : i + count]}) for i in range(0, len(steps), count)]
    assert steps_of_layers[:4] == ["apart", "decode", "decode", "decode"]
    engine.destroy()


def test_a_step_that_may_read_what_it_writes_itself_is_done_apart(tiny_llama: Path, steps: list[str]) -> None:
    """Of a prompt on cached blocks one token is left; another sequence of the step could be filling such a block."""
    engine = small_engine(tiny_llama, max_sequences=4)
    assert engine.runner is not None
    engine.runner._recorded.run = lambda key, body: body()  # type: ignore[method-assign]
    prompt = random_prompts(engine.vocab_size, [33])[0]
    answers = generate(engine, [prompt], 3)
    steps.clear()
    engine.add_request(EngineRequest(uid=0, prompt_ids=prompt, max_new_tokens=3))
    again: list[int] = []
    for output in engine.step():
        again += output.token_ids
    assert set(steps) == {"apart"}  # a single token, on blocks of the cache
    while engine.has_work:
        for output in engine.step():
            again += output.token_ids
    assert [again] == answers
    engine.destroy()
