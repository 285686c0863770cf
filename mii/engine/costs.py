"""What can be counted from a model's spec alone."""

from __future__ import annotations

import torch

from mii.modeling.decoder import Decoder
from mii.modeling.parameters import Placement
from mii.modeling.spec import ModelSpec


def count_weights(spec: ModelSpec) -> int:
    """How many numbers a model of this spec consists of, or one rank's part of it."""
    outline = Decoder(spec, Placement(torch.device("meta"), torch.bfloat16))
    return sum(parameter.tensor.numel() for _, parameter in outline.parameters())
