"""The least time that requests can take on a machine, from the bytes they move and the products they need.

Counted: every weight matrix read once a step (of experts, as many as that many tokens hit on average when each chooses
at random), keys and values read once for each generated token, two FLOPs for each weight and token, four for each
query, key and channel of attention. What the last layer does behind its attention counts for sampled tokens alone, in
models that narrow their last layer so (`Forward.tail`). Matrix products and attention come one after the other, as in
any engine without kernels that overlap them; each takes the longer of its memory time and its arithmetic time at the
rates of `MachineLimits`. Norms, rotations, sampling and the host count as nothing: nobody reaches 100 %.
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
        body: Weights of all matrices but the head and the tail: each works on every token.
        head: Weights of the head: it works on sampled tokens only.
        tail: Weights of the last layer's matrices that work on sampled tokens only.
        experts: Weights of all experts of all layers: each works on the tokens that chose it.
        tail_experts: Those of them that work on sampled tokens only, in the last layer.
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
    tail: int = 0
    tail_experts: int = 0

    @classmethod
    def of(cls, spec: ModelSpec, dtype: torch.dtype, limits: MachineLimits) -> Roofline:
        model = Decoder(spec, Placement(torch.device("meta"), dtype))
        tensors = {path: p.tensor for path, p in model.parameters() if path.startswith("blocks.")}
        last = f"blocks.{spec.num_layers - 1}."
        behind = {path for path in tensors if path.startswith(last) and not path.startswith(f"{last}attention.qkv.")}
        behind = behind if model.narrows else set()

        def weights(dim: int, *, tail: bool) -> int:
            return sum(t.numel() for path, t in tensors.items() if t.dim() == dim and tail == (path in behind))

        return cls(
            limits=limits,
            body=weights(2, tail=False),
            head=spec.hidden_size * spec.vocab_span.size,
            attention_width=spec.num_layers * spec.q_size,
            kv_bytes=spec.kv_bytes_per_token(dtype.itemsize),
            element_size=dtype.itemsize,
            experts=weights(3, tail=False) + weights(3, tail=True),
            chosen=1.0 if spec.experts is None else spec.experts.top_k / spec.experts.count,
            tail=weights(2, tail=True),
            tail_experts=weights(3, tail=True),
        )

    def products(self, fed: int, sampled: int, steps: int) -> float:
        """Seconds of the matrix products for `fed` tokens, of which `sampled` reach the head, in `steps` steps."""
        everywhere = self.body + self.chosen * (self.experts - self.tail_experts)
        of_sampled = self.head + self.tail + self.chosen * self.tail_experts
        hit = self.experts * (1 - (1 - self.chosen) ** (fed / steps))
        arithmetic = 2 * (everywhere * fed + of_sampled * sampled) / self.limits.matmul
        weights = self.body + self.tail + self.head + hit
        return max(arithmetic, steps * weights * self.element_size / self.limits.bandwidth)

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
