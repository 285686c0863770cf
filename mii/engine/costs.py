"""What can be counted from a model's spec alone."""

from __future__ import annotations

import torch

from mii.modeling.decoder import Decoder
from mii.modeling.parameters import Placement
from mii.modeling.spec import ModelSpec


def count_weights(spec: ModelSpec) -> int:
    """How many numbers a model of this spec consists of, or one rank's part of it."""
    return sum(tensor.numel() for tensor in _outline(spec))


def count_expert_weights(spec: ModelSpec) -> int:
    """How many of them belong to experts, of which a token meets a few."""
    return sum(tensor.numel() for tensor in _outline(spec) if tensor.dim() == 3)


def _outline(spec: ModelSpec) -> list[torch.Tensor]:
    """Every parameter, without memory."""
    model = Decoder(spec, Placement(torch.device("meta"), torch.bfloat16))
    return [parameter.tensor for _, parameter in model.parameters()]
