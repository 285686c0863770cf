"""Qwen 1 in plain torch, from its published equations: transformers has no class for it without remote code.

    x += c_proj(attention(rope(c_attn(norm(x)))));  x += c_proj(w1(norm(x)) * silu(w2(norm(x))))

with RMS norms, biases of c_attn, and rotations in halves (technical report of Qwen, arXiv 2309.16609). Contexts longer
than the trained length n, by the released code:

    base of a prompt of L tokens and of its answer: base * a^(d / (d - 2)), a = 2^ceil(log2(L / n) + 1) - 1, 1 at least
    query at position p, after its rotation: * log_n(p + 1), 1 at least
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional

from tests.checkpoints import BYTE_VOCABULARY, byte_tokenizer
from tests.oracle import DTYPES, Oracle

Weights = dict[str, torch.Tensor]
DEFAULTS: dict[str, Any] = {
    "architectures": ["QWenLMHeadModel"],
    "model_type": "qwen",
    "hidden_size": 192,
    "intermediate_size": 688,
    "kv_channels": 64,
    "num_attention_heads": 3,
    "num_hidden_layers": 2,
    "layer_norm_epsilon": 1e-6,
    "max_position_embeddings": 512,
    "seq_length": 512,
    "vocab_size": BYTE_VOCABULARY + 2,
    "rotary_emb_base": 10000,
    "rotary_pct": 1.0,
    "no_bias": True,
    "use_dynamic_ntk": True,
    "use_logn_attn": True,
    "scale_attn_weights": True,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}


def write_qwen(folder: Path, model_type: str = "qwen", *, seed: int = 0, std: float = 0.12, **config: Any) -> Path:
    """Writes a checkpoint with random weights in the layout of Qwen's own, and returns its folder."""
    fields = {**DEFAULTS, "model_type": model_type, **config}
    generator = torch.Generator().manual_seed(seed)
    tensors: Weights = {}
    for name, shape in _shapes(fields).items():
        mean = 1.0 if ".ln_" in name else 0.0
        tensors[name] = mean + (0.1 if len(shape) == 1 else std) * torch.randn(shape, generator=generator)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(fields))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 2}))
    byte_tokenizer().save_pretrained(folder)
    return folder


def _shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, up, vocab = config["hidden_size"], config["intermediate_size"] // 2, config["vocab_size"]
    width = config["kv_channels"] * config["num_attention_heads"]
    shapes: dict[str, tuple[int, ...]] = {
        "transformer.wte.weight": (vocab, hidden),
        "transformer.ln_f.weight": (hidden,),
    }
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, hidden)
    matrices = {"attn.c_attn": (3 * width, hidden), "attn.c_proj": (hidden, width), "mlp.w1": (up, hidden)}
    matrices |= {"mlp.w2": (up, hidden), "mlp.c_proj": (hidden, up)}
    for layer in range(config["num_hidden_layers"]):
        at = f"transformer.h.{layer}"
        shapes |= {f"{at}.ln_1.weight": (hidden,), f"{at}.ln_2.weight": (hidden,)}
        for name, shape in matrices.items():
            shapes[f"{at}.{name}.weight"] = shape
            if name == "attn.c_attn" or not config["no_bias"]:
                shapes[f"{at}.{name}.bias"] = shape[:1]
    return shapes


class QwenOracle(Oracle):
    """The same surface as the oracle of the other families."""

    def __init__(self, folder: Path, dtype: str = "fp32", device: str = "cpu") -> None:
        self.device = device
        self._config = json.loads((folder / "config.json").read_text())
        stored = load_file(folder / "model.safetensors", device=device)
        self._weights = {name: tensor.to(DTYPES[dtype]) for name, tensor in stored.items()}
        self._prompt_length = 0  # 0: all of the tokens
        self.model = lambda ids: SimpleNamespace(logits=self._forward(ids[0])[None])

    def logits_along(self, prompt: list[int], answer: list[int]) -> torch.Tensor:
        self._prompt_length = len(prompt)
        try:
            return super().logits_along(prompt, answer)
        finally:
            self._prompt_length = 0

    def _forward(self, ids: torch.Tensor) -> torch.Tensor:
        weights = self._weights
        x = weights["transformer.wte.weight"][ids]
        for layer in range(self._config["num_hidden_layers"]):
            at = f"transformer.h.{layer}"
            x = x + self._attention(at, self._norm(f"{at}.ln_1", x))
            x = x + self._mlp(at, self._norm(f"{at}.ln_2", x))
        head = weights.get("lm_head.weight", weights["transformer.wte.weight"])
        return functional.linear(self._norm("transformer.ln_f", x), head)

    def _linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, self._weights[f"{name}.weight"], self._weights.get(f"{name}.bias"))

    def _norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self._config["layer_norm_epsilon"])
        return normed.to(x.dtype) * self._weights[f"{name}.weight"]

    def _attention(self, at: str, x: torch.Tensor) -> torch.Tensor:
        heads = self._config["num_attention_heads"]
        q, k, v = (
            part.unflatten(1, (heads, -1)).transpose(0, 1) for part in self._linear(f"{at}.attn.c_attn", x).chunk(3, 1)
        )
        q, k = self._rotate(q), self._rotate(k)
        if self._config["use_logn_attn"]:
            q = q * self._growth(len(x)).to(x)[:, None]
        scores = (q @ k.transpose(1, 2)) * self._config["kv_channels"] ** -0.5
        hidden = torch.ones(len(x), len(x), dtype=torch.bool, device=x.device).triu(1)
        mixed = scores.float().masked_fill(hidden, -torch.inf).softmax(-1).to(x.dtype) @ v
        return self._linear(f"{at}.attn.c_proj", mixed.transpose(0, 1).flatten(1))

    def _rotate(self, heads: torch.Tensor) -> torch.Tensor:
        width = int(heads.shape[2] * self._config["rotary_pct"])
        powers = torch.arange(0, width, 2, device=heads.device).float() / width
        base = self._base(self._prompt_length or heads.shape[1], width)
        angles = torch.arange(heads.shape[1], device=heads.device).float()[:, None] / base**powers
        cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)
        turned, kept = heads[..., :width].float(), heads[..., width:]
        first, second = turned.chunk(2, -1)
        return torch.cat([(turned * cos + torch.cat([-second, first], -1) * sin).to(heads.dtype), kept], -1)

    def _base(self, prompt: int, width: int) -> float:
        base, trained = self._config["rotary_emb_base"], self._config["seq_length"]
        if not self._config["use_dynamic_ntk"]:
            return base
        alpha = max(2 ** math.ceil(math.log(prompt / trained, 2) + 1) - 1, 1)
        return base * alpha ** (width / (width - 2))

    def _growth(self, length: int) -> torch.Tensor:
        trained = self._config["seq_length"]
        return torch.tensor([math.log(i, trained) if i > trained else 1.0 for i in range(1, length + 1)])

    def _mlp(self, at: str, x: torch.Tensor) -> torch.Tensor:
        gate = functional.silu(self._linear(f"{at}.mlp.w2", x))
        return self._linear(f"{at}.mlp.c_proj", self._linear(f"{at}.mlp.w1", x) * gate)
