"""The least time that requests can take on a machine, from the bytes they move and the products they need.

Counted: every weight matrix read once a step (of experts, as many as that many tokens hit on average when each chooses
at random), keys and values read once for each generated token, two FLOPs for each
weight and token, four for each query, key and channel of attention. Matrix products and attention come one after the
other, as in any engine without kernels that overlap them; each takes the longer of its memory time and its arithmetic
time at the rates of `MachineLimits`. Norms, rotations, sampling and the host count as nothing: nobody reaches 100 %.
A model that is divided among ranks takes as long as the largest part, which is rank 0's; sums over ranks count as
nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mii.benchmark.limits import MachineLimits
from mii.benchmark.shapes import Job
from mii.modeling.decoder import Decoder
from mii.modeling.parameters import Placement
from mii.modeling.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class Roofline:
    """A model's cost, or that of one rank's part of it, against the limits of its device.

    Args:
        body: Weights of all matrices but the head: each works on every token.
        head: Weights of the head: it works on sampled tokens only.
        experts: Weights of all experts of all layers: each works on the tokens that chose it.
        chosen: Share of the experts that a token goes to.
        attention_width: Query heads times head size, over all layers.
        kv_bytes: Bytes of keys and values of one token, over all layers.
        element_size: Bytes of one weight.
    """

    limits: MachineLimits
    body: int
    head: int
    attention_width: int
    kv_bytes: int
    element_size: int
    experts: int = 0
    chosen: float = 1.0

    @classmethod
    def of(cls, spec: ModelSpec, dtype: torch.dtype, limits: MachineLimits) -> Roofline:
        outline = Decoder(spec, Placement(torch.device("meta"), dtype)).parameters()
        tensors = [p.tensor for path, p in outline if path.startswith("blocks.")]
        matrices = [tensor.numel() for tensor in tensors if tensor.dim() == 2]
        return cls(
            limits=limits,
            body=sum(matrices),
            head=spec.hidden_size * spec.vocab_span.size,
            attention_width=spec.num_layers * spec.q_size,
            kv_bytes=spec.kv_bytes_per_token(dtype.itemsize),
            element_size=dtype.itemsize,
            experts=sum(tensor.numel() for tensor in tensors if tensor.dim() == 3),
            chosen=1.0 if spec.experts is None else spec.experts.top_k / spec.experts.count,
        )

    def products(self, fed: int, sampled: int, steps: int) -> float:
        """Seconds of the matrix products for `fed` tokens, of which `sampled` reach the head, in `steps` steps."""
        active, hit = self.chosen * self.experts, self.experts * (1 - (1 - self.chosen) ** (fed / steps))
        arithmetic = 2 * ((self.body + active) * fed + self.head * sampled) / self.limits.matmul
        return max(arithmetic, steps * (self.body + self.head + hit) * self.element_size / self.limits.bandwidth)

    def decode_step(self, batch: int, context: float) -> float:
        """Seconds of one step in which `batch` sequences of `context` tokens generate one token each."""
        attention = max(
            batch * context * self.kv_bytes / self.limits.bandwidth,
            4 * batch * context * self.attention_width / self.limits.matmul,
        )
        return self.products(batch, batch, 1) + attention

    def workload(self, jobs: Sequence[Job]) -> float:
        """Seconds of all requests given at once, when every step is as full as they allow."""
        prompts = [len(job.prompt_ids) for job in jobs]
        fed = sum(prompt + job.new_tokens - 1 for prompt, job in zip(prompts, jobs, strict=True))
        sampled = sum(job.new_tokens for job in jobs)
        # token i of a prompt attends to i tokens; generated token j of a request reads prompt + j of them
        prompt_pairs = sum(p * (p + 1) // 2 for p in prompts)
        decode_pairs = sum((j.new_tokens - 1) * (2 * p + j.new_tokens) // 2 for p, j in zip(prompts, jobs, strict=True))
        attention = 4 * prompt_pairs * self.attention_width / self.limits.matmul + max(
            4 * decode_pairs * self.attention_width / self.limits.matmul,
            decode_pairs * self.kv_bytes / self.limits.bandwidth,
        )
        return self.products(fed, sampled, max(job.new_tokens for job in jobs)) + attention
