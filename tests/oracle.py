"""transformers as the oracle: the same weights, the same format, greedy."""

from __future__ import annotations

import copy
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from mii.batching.data_classes import EngineRequest
from mii.config import ModelConfig
from mii.engine import Engine, load_engine

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Oracle:
    """A checkpoint in transformers, on one device."""

    def __init__(self, folder: Path, dtype: str = "fp32", device: str = "cpu") -> None:
        from transformers import AutoConfig, AutoModelForCausalLM

        # Some versions take torch's fused attention for models with a soft cap, and that leaves the cap out.
        capped = getattr(AutoConfig.from_pretrained(folder), "attn_logit_softcapping", None) is not None
        options = {"attn_implementation": "eager"} if capped else {}
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype], **options)
        self.model = self.model.to(device).eval()
        self.device = device

    @cached_property
    def exact(self) -> Oracle | None:
        """The same rounded weights, computed in float32; None where there is no such model."""
        if not isinstance(self.model, torch.nn.Module):
            return None
        twin = copy.copy(self)
        twin.model = copy.deepcopy(self.model).float()
        return twin

    @torch.inference_mode()
    def greedy(self, prompt: list[int], new_tokens: int, **options: Any) -> list[int]:
        """The answer's tokens; end-of-text is ignored unless `eos_token_id` is given."""
        self.forget_long_contexts()
        options = {"eos_token_id": None, **options}
        ids = torch.tensor([prompt], device=self.device)
        out = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=0,
            **options,
        )
        return out[0, len(prompt) :].tolist()

    @torch.inference_mode()
    def logits(self, prompt: list[int]) -> torch.Tensor:
        """Logits of the last token, [vocab], in float32 on the CPU."""
        self.forget_long_contexts()
        return self.model(torch.tensor([prompt], device=self.device)).logits[0, -1].float().cpu()

    @torch.inference_mode()
    def logits_along(self, prompt: list[int], answer: list[int]) -> torch.Tensor:
        """What each token of an answer was chosen from, [len(answer), vocab], in float32 on the CPU."""
        ids = torch.tensor([prompt + answer], device=self.device)
        return self.model(ids).logits[0, len(prompt) - 1 : -1].float().cpu()

    def forget_long_contexts(self) -> None:
        """A dynamically scaled rotation keeps the base of the longest context seen until a short one comes by."""
        self.model(torch.tensor([[1]], device=self.device))


def small_engine(folder: Path, **options: Any) -> Engine:
    """An engine with little memory and small steps, so that short tests cross chunks and blocks."""
    return load_engine(small_config(folder, **options))


def small_config(folder: Path, **options: Any) -> ModelConfig:
    """The config of `small_engine`."""
    manager = {
        "max_ragged_batch_size": options.pop("max_tokens", 32),
        "max_ragged_sequence_count": options.pop("max_sequences", 16),
        "max_tracked_sequences": 64,
        "memory_config": {"mode": "allocate", "size": options.pop("blocks", 96)},
    }
    settings = {"device": "cpu", "dtype": "fp32", "block_size": 16, "progress": False, **options}
    return ModelConfig(model_name_or_path=str(folder), inference_engine_config={"state_manager": manager}, **settings)


def generate(engine: Engine, prompts: list[list[int]], new_tokens: int, **request: Any) -> list[list[int]]:
    """Every prompt's answer in one batch."""
    for uid, prompt in enumerate(prompts):
        engine.add_request(EngineRequest(uid=uid, prompt_ids=prompt, max_new_tokens=new_tokens, **request))
    return drain(engine, len(prompts))


def drain(engine: Engine, count: int) -> list[list[int]]:
    answers: list[list[int]] = [[] for _ in range(count)]
    while engine.has_work:
        for output in engine.step():
            answers[output.uid] += output.token_ids
    return answers


def final_logits(engine: Engine, prompt: list[int], chunk: int = 32) -> torch.Tensor:
    """Logits of a prompt's last token, [vocab] in float32 on the CPU, fed a chunk at a time."""
    uid = 10**6
    for start in range(0, len(prompt), chunk):
        logits = engine.put([uid], [prompt[start : start + chunk]])[0]
    engine.flush(uid)
    return logits.float().cpu()


def tolerance(logits: torch.Tensor, dtype: str, exact: torch.Tensor | None = None) -> float:
    """The largest difference of a logit that is allowed, by the largest logit: 1e-4 of it in float32, 8 units in its
    last place in the 16-bit formats, or twice what transformers itself is away from the float32 logits `exact` of the
    same weights, where that is more.

    There (8 bits of mantissa in bfloat16, 11 in float16) a logit is the sum of hundreds of rounded products whose order
    differs between two correct programs; how far rounding carries depends on the model, which `exact` shows.
    """
    share = 1e-4 if dtype == "fp32" else 8 * torch.finfo(DTYPES[dtype]).eps
    rounding = 0.0 if exact is None or dtype == "fp32" else 2 * float((logits - exact).abs().max())
    return max(float(share * logits.abs().max()), rounding)


def assert_greedy_but_for_ties(oracle: Oracle, prompt: list[int], answer: list[int], dtype: str) -> None:
    """Follows an answer through the oracle's logits: each token is its best one, or within rounding of it."""
    rows = oracle.logits_along(prompt, answer)
    exact = rows if dtype == "fp32" or oracle.exact is None else oracle.exact.logits_along(prompt, answer)
    for row, exact_row, token in zip(rows, exact, answer, strict=True):
        assert row.max() - row[token] <= tolerance(row, dtype, exact_row), (
            f"token {token} is not the best by {row.max() - row[token]}"
        )


def random_prompts(vocab: int, lengths: list[int], seed: int = 0) -> list[list[int]]:
    """Prompts of random ids above the special ones."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, vocab, (length,), generator=generator).tolist() for length in lengths]
