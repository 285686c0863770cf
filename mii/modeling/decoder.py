"""A decoder-only model: embedding, blocks, final norm, head. Families choose the block and map the names."""

from __future__ import annotations

import torch

from mii.modeling.layers import Embedding, Forward, Norm, PreNormBlock
from mii.modeling.parameters import Linear, Module, Placement
from mii.modeling.spec import ModelSpec
from mii.ops.gather import gather
from mii.ops.linear import LinearWeight, linear, pack_linear


class Decoder(Module):
    """Computes logits [samples, vocab] for the sampled rows of a step."""

    def __init__(self, spec: ModelSpec, place: Placement) -> None:
        self.spec, self.place = spec, place
        self.embedding = Embedding(place, spec.vocab_size, spec.hidden_size)
        self.blocks = [PreNormBlock(place, spec, layer) for layer in range(spec.num_layers)]
        self.norm = Norm(place, spec.hidden_size, spec.norm_eps)
        self.head = None if spec.tied_embeddings else Linear(place, spec.hidden_size, {"": spec.vocab_size})
        self.tied_head: LinearWeight | None = None
        self.up_width = self.blocks[0].mlp.up.out_features

    def forward(self, forward: Forward) -> torch.Tensor:
        buffers = forward.buffers
        self.embedding(buffers.residual, forward.ids)
        for index, block in enumerate(self.blocks):
            block(forward, first=index == 0)
        if not len(buffers.logits):
            return buffers.logits  # a step of unfinished prompts only
        return self.project(forward)

    def project(self, forward: Forward) -> torch.Tensor:
        """Logits of the rows that `forward.sample_rows` names, from what the last block left for every token."""
        buffers = forward.buffers
        gather(buffers.last, buffers.branch, forward.sample_rows)
        gather(buffers.last_residual, buffers.residual, forward.sample_rows)
        self.norm(buffers.last_normed, buffers.last, buffers.last_residual)
        if self.head is not None:
            return self.head(buffers.logits, buffers.last_normed)
        assert self.tied_head is not None
        linear(buffers.logits, buffers.last_normed, self.tied_head)
        return buffers.logits

    def finish(self) -> None:
        """Called when every weight is there."""
        for _, module in self.modules():
            if isinstance(module, Linear):
                module.finish()
        if self.head is None:
            self.tied_head = pack_linear(self.embedding.weight.tensor)
