"""Activations that share memory: what a model computes is the same wherever its buffers lie."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch

from mii.modeling import arena, liveness
from mii.modeling.arena import ActivationArena
from mii.modeling.blocks import BLOCKS
from mii.modeling.decoder import Decoder
from mii.modeling.liveness import ALWAYS, Claim, lay_out
from mii.modeling.models import find_family
from mii.modeling.parameters import Placement
from tests.oracle import final_logits, generate, random_prompts, small_engine
from tests.variants import Variant, all_variants

# One variant of each kind of block, and those whose MLPs have buffers of their own.
CHOSEN = {
    "Llama": "sequential",
    "Gemma 2": "sandwich",
    "OLMo-2": "normed_branch",
    "Bloom-normed residual": "normed_residual",
    "OPT-post-norm": "post_norm",
    "GPT-J": "parallel",
    "GPT-NeoX": "parallel_two_norms",
    "Mixtral": "experts",
    "Qwen2-MoE-shared": "experts",
    "Qwen2-MoE-dense layers by number": "experts",
}


def chosen(start: str) -> Variant:
    return next(each for each in all_variants() if f"{each.family}-{each.option}".startswith(start))


def side_by_side(claims: Mapping[str, Claim]) -> dict[str, int]:
    return lay_out({name: Claim(claim.size, ALWAYS) for name, claim in claims.items()})


def shuffled(seed: int) -> Callable[[Mapping[str, Claim]], dict[str, int]]:
    """Layouts in which other pairs of buffers share memory than in the best one."""

    def layout(claims: Mapping[str, Claim]) -> dict[str, int]:
        order = random.Random(seed).sample(sorted(claims), len(claims))
        places: dict[str, int] = {}
        for name in order:
            taken = [each for each in places if claims[each].life & claims[name].life]
            starts = sorted({0, *(places[each] + claims[each].size for each in taken)})
            free = [s for s in starts if not any(_overlap(s, claims[name], places[e], claims[e]) for e in taken)]
            places[name] = free[0]
        return places

    return layout


def _overlap(start: int, claim: Claim, other_start: int, other: Claim) -> bool:
    return start < other_start + other.size and other_start < start + claim.size


def test_every_kind_of_block_is_among_the_chosen() -> None:
    assert {*CHOSEN.values()} == {*BLOCKS, "experts"}


@pytest.mark.parametrize("start", CHOSEN)
def test_a_model_computes_the_same_wherever_its_buffers_lie(
    start: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = chosen(start).make(tmp_path)

    def computed() -> tuple[torch.Tensor, list[list[int]], int]:
        engine = small_engine(folder)
        assert engine.runner is not None
        assert CHOSEN[start] in (engine.runner.spec.block, "experts")
        prompts = random_prompts(engine.vocab_size, [40, 3, 17])
        logits, answers = final_logits(engine, prompts[0]), generate(engine, prompts, 8)
        size = engine.runner.arena.num_bytes
        engine.destroy()
        return logits, answers, size

    monkeypatch.setattr(arena, "lay_out", side_by_side)
    logits, answers, size = computed()
    for layout in (lay_out, *map(shuffled, range(3))):
        monkeypatch.setattr(arena, "lay_out", layout)
        again, same, less = computed()
        assert torch.equal(again, logits)
        assert same == answers
        assert less < size
    monkeypatch.setattr(arena, "rows_at_once", lambda *_: 5)  # MLPs are computed in pieces
    again, same, least = computed()
    assert torch.allclose(again, logits, atol=1e-4)
    assert same == answers
    assert least <= size


LLAMA3_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "num_hidden_layers": 2,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
}


@pytest.mark.parametrize(("device", "megabytes"), [("cpu", 847), ("cuda", 422)])
def test_steps_of_8192_tokens_of_an_8b_llama(device: str, megabytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the MLP has at once: the stream, also that of sampled rows, the normed stream, both projections and what is
    made of them; on a GPU projections of a quarter of the rows.
    """
    rows = arena.rows_at_once(8192, torch.device(device))
    monkeypatch.setattr(arena, "rows_at_once", lambda *_: rows)
    spec = find_family(LLAMA3_8B).read_spec(LLAMA3_8B)
    place = Placement(torch.device("meta"), torch.bfloat16)
    model = Decoder(spec, place)
    memory = ActivationArena(spec, place, 8192, 1024, model.up_width)
    assert round(memory.num_bytes / 1e6) == megabytes
    assert memory.views(3, 2).logits.shape == (2, 128256)
    assert memory.views(8192, 2).activated.shape == (rows, 14336)


def test_lives_name_stages() -> None:
    assert {stage for kind in BLOCKS.values() for stage in kind.hidden_life} <= set(liveness.STAGES)
