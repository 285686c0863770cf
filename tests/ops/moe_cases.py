"""Cases of the mixture-of-experts operations, shared by the tests on the CPU and on a card."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mii.ops import abi
from mii.ops.moe_routing import ExpertLists, ExpertRows, Routing
from mii.ops.moe_weights import ExpertWeights, pack_experts


@dataclass(frozen=True)
class MoeCase:
    """Sizes of one mixture of experts; `live` of the `tokens` are no padding."""

    tokens: int
    hidden: int
    width: int
    routing: Routing
    live: int | None = None
    crowded: bool = False  # most tokens go to one expert

    def counts(self, device: str) -> torch.Tensor | None:
        if self.live is None:
            return None
        counts = torch.zeros(abi.COUNTS, dtype=torch.int32, device=device)
        counts[abi.NUM_TOKENS] = self.live
        return counts

    @property
    def routed(self) -> int:
        return self.tokens if self.live is None else self.live

    def logits(self, dtype: torch.dtype, device: str, seed: int = 0) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        logits = torch.randn(self.tokens, self.routing.experts, generator=generator)
        if self.crowded:
            logits[:, self.routing.experts // 2] += 6
        return logits.to(device, dtype)

    def weights(self, dtype: torch.dtype, device: str, seed: int = 1) -> tuple[ExpertWeights, ExpertWeights]:
        """Of moe_up and moe_down."""
        generator = torch.Generator().manual_seed(seed)
        experts = self.routing.experts
        up = torch.randn(experts, 2 * self.width, self.hidden, generator=generator) * self.hidden**-0.5
        down = torch.randn(experts, self.hidden, self.width, generator=generator) * self.width**-0.5
        return pack_experts(up.to(device, dtype), gated=True), pack_experts(down.to(device, dtype), gated=False)

    def x(self, dtype: torch.dtype, device: str, seed: int = 2) -> torch.Tensor:
        return torch.randn(self.tokens, self.hidden, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def same_lists(got: ExpertRows, expected: ExpertRows, routed: int, top_k: int) -> None:
    """Equal, but for entries that nobody reads."""
    pairs = routed * top_k
    assert torch.equal(got.chosen[:pairs], expected.chosen[:pairs])
    torch.testing.assert_close(got.weights[:pairs], expected.weights[:pairs], rtol=2e-5, atol=1e-7)
    assert torch.equal(got.offsets, expected.offsets)
    assert torch.equal(got.pairs[:pairs], expected.pairs[:pairs])
    assert torch.equal(got.places[:pairs], expected.places[:pairs])
    tiles = int(expected.tiles[0, 0])
    assert int(got.tiles[0, 0]) == tiles
    assert torch.equal(got.tiles[1 : tiles + 1], expected.tiles[1 : tiles + 1])


def lists(case: MoeCase, device: str, kernel: int = abi.MOE_SIMPLE, tile_rows: int = 8) -> ExpertRows:
    return ExpertLists(case.routing, case.tokens, torch.device(device)).rows(case.tokens, kernel, tile_rows)


ROUTINGS = (
    Routing(8, 2),
    Routing(4, 4, renormalise=False),
    Routing(60, 4, renormalise=False, scale=0.7),
    Routing(128, 8),
    Routing(33, 6, scoring="sigmoid", scale=2.5),
    Routing(1, 1),
    Routing(300, 20, scoring="sigmoid", renormalise=False),
    Routing(160, 6, renormalise=False, scale=16.0, groups=8, top_groups=3),
    Routing(48, 5, scoring="sigmoid", scale=2.5, groups=6, top_groups=4),
    Routing(9, 3, groups=9, top_groups=3),
)
ROUTED_TOKENS = ((1, None), (3, None), (17, 9), (64, 0), (150, 150), (700, 513))
