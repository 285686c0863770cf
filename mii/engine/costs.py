"""What a model's steps cost, from its spec and the card's data sheet: bytes to read, products to compute."""

from __future__ import annotations

import torch

from mii.modeling.decoder import Decoder
from mii.modeling.parameters import Placement
from mii.modeling.spec import ModelSpec


def count_weights(spec: ModelSpec) -> int:
    """How many numbers a model of this spec consists of, or one rank's part of it."""
    outline = Decoder(spec, Placement(torch.device("meta"), torch.bfloat16))
    return sum(parameter.tensor.numel() for _, parameter in outline.parameters())
