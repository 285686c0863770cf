"""Writes small model folders with random weights, saved by transformers itself, so that they are as real as its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

SPECIAL_TOKENS = ("<unk>", "<s>", "</s>")
BYTE_VOCABULARY = len(SPECIAL_TOKENS) + 256
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<s>' + m['role'] + '\\n' + m['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\\n' }}{% endif %}"
)
# Small, and odd where a power of two would hide a mistake: three query heads to a key head, as SmolLM2 has them.
DEFAULTS: dict[str, Any] = {
    "hidden_size": 192,
    "intermediate_size": 344,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "vocab_size": BYTE_VOCABULARY + 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def write_checkpoint(
    folder: Path,
    model_type: str = "llama",
    *,
    dtype: str = "float32",
    seed: int = 0,
    std: float = 0.12,
    shard_size: str = "5GB",
    generation: dict[str, Any] | None = None,
    tokenizer: bool = True,
    stacked: bool = False,
    plain_routing: bool = False,
    **config: Any,
) -> Path:
    """Writes a causal language model with random weights and returns its folder.

    Args:
        folder: Where to write; it exists.
        model_type: As in config.json, for example "llama" or "mistral".
        dtype: Name of the torch dtype that the weights are stored in.
        seed: Of the weights.
        std: Standard deviation of the matrices. It is large, so that logits differ by far more than rounding does.
        shard_size: transformers' `max_shard_size`, to get several files.
        generation: Fields of generation_config.json, for example several ends of text.
        tokenizer: Write a byte-level tokenizer too.
        stacked: Keep the experts of a layer in one tensor, as transformers has them in memory.
        plain_routing: Make each token's choice of experts so clear that no rounding changes it (`_settle_routing`).
        config: Fields of config.json that override `DEFAULTS`.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = AutoConfig.for_model(model_type, **{**DEFAULTS, "initializer_range": std, **config})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(fields, dtype=torch.float32)
        _randomise_vectors(model)
        if plain_routing:
            _settle_routing(model)
    model = model.to(getattr(torch, dtype))
    for name, value in (generation or {}).items():
        setattr(model.generation_config, name, value)
    model.save_pretrained(folder, max_shard_size=shard_size, **({"save_original_format": False} if stacked else {}))
    if tokenizer:
        byte_tokenizer().save_pretrained(folder)
    return folder


def _randomise_vectors(model: Any) -> None:
    """Norm weights start at one and biases at zero, where a missing one would not show."""
    import torch

    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=0.0 if name.endswith("bias") else 1.0, std=0.1)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):  # of the choice of experts
            torch.nn.init.normal_(buffer, std=0.02)


def _settle_routing(model: Any) -> None:
    """Lets the experts follow from the token alone, by a wide margin: its embedding has a number for each expert, which
    no layer writes to and the routers read. In 16 bits a choice between two experts that are nearly alike would hang
    on the last bit, and two right programs would go different ways.
    """
    import torch

    routers = {name: parameter for name, parameter in model.named_parameters() if name.endswith(".gate.weight")}
    experts, hidden = next(iter(routers.values())).shape
    embedding = model.get_input_embeddings().weight
    with torch.no_grad():
        order = torch.rand(len(embedding), experts) + _outside_groups(model.config, len(embedding), experts)
        chosen = order.argsort(dim=1).argsort(dim=1) < model.config.num_experts_per_tok
        numbers = torch.rand(len(embedding), experts)
        embedding[:, :experts] = 0.3 * torch.where(chosen, 2 + numbers, numbers - 0.5)
        for name, parameter in model.named_parameters():
            if name in routers:
                parameter.copy_(torch.eye(experts, hidden))
            elif name.endswith("post_attention_layernorm.weight"):
                parameter[:experts] = 1
            elif name.endswith(("o_proj.weight", "o_proj.bias", "down_proj.weight")):
                parameter[:experts] = 0
            elif name.endswith("experts.down_proj"):
                parameter[:, :experts] = 0


def _outside_groups(config: Any, tokens: int, experts: int) -> Any:
    """[tokens, experts], 1 outside the groups that a token may choose from."""
    import torch

    groups, best = getattr(config, "n_group", None) or 1, getattr(config, "topk_group", None) or 1
    outside = torch.rand(tokens, groups).argsort(dim=1).argsort(dim=1) >= best
    return outside.float().repeat_interleave(experts // groups, dim=1)


def byte_tokenizer() -> Any:
    """A tokenizer whose tokens are the 256 bytes and three special tokens: every text has an encoding."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = [*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    inner = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[], unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
