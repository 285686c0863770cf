"""Routing of a mixture of experts: which experts each token goes to, and the lists that their products work from.

    score = softmax(logits) or sigmoid(logits)                                        in float
    chosen = the top_k largest score + bias, ties to the lower expert                 (Shazeer et al., arXiv 1701.06538)
    weight = scale * score[chosen], divided before by the sum of the chosen scores where `renormalise` says so

Of several groups of neighbouring experts a token chooses from the `top_groups` best ones only. A group counts by its
largest score + bias (DeepSeek-V2, arXiv 2405.04434, section 2.2.2), with sigmoid scores by the sum of its two largest
(DeepSeek-V3, arXiv 2412.19437, section 2.1.2).

A pair is a token and one of its choices, number `token * top_k + choice`; a row is a place in the list of pairs sorted
by expert. How many rows an expert gets changes from step to step, so it is kept on the device: kernels read `offsets`
and `tiles`, and their launches depend on upper bounds only. Padding behind the step's tokens gets no rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mii.ops import abi, native


@dataclass(frozen=True, slots=True)
class Routing:
    """How tokens choose experts.

    Args:
        experts: How many there are.
        top_k: How many a token goes to.
        scoring: One of `abi.MOE_SCORINGS`.
        renormalise: Whether the weights of a token add up to `scale`.
        scale: Factor on all weights.
        groups: Of experts, all of one size. top_groups: How many of them a token chooses from.
    """

    experts: int
    top_k: int
    scoring: str = "softmax"
    renormalise: bool = True
    scale: float = 1.0
    groups: int = 1
    top_groups: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.top_k <= self.experts or self.scoring not in abi.MOE_SCORINGS:
            raise ValueError(
                f"routing: {self.top_k} of {self.experts} experts by {self.scoring!r}; a token goes to one at "
                f"least and at most all of them, by one of {', '.join(abi.MOE_SCORINGS)}"
            )
        if self.groups < 1 or self.experts % self.groups or not 1 <= self.top_groups <= self.groups:
            raise ValueError(
                f"routing: {self.top_groups} of {self.groups} groups of {self.experts} experts; groups are of one "
                "size, and a token chooses from one at least and at most all of them"
            )
        if self.top_k > self.group_size * self.top_groups:
            raise ValueError(
                f"routing: {self.top_groups} groups of {self.group_size} experts are too few to choose {self.top_k} "
                "from"
            )

    @property
    def group_size(self) -> int:
        """Experts of a group."""
        return self.experts // self.groups


@dataclass(frozen=True, slots=True)
class ExpertRows:
    """The lists of one step, for up to `tokens` tokens; int32 but for the weights.

    Args:
        chosen: [tokens * top_k], by pair: its expert.
        weights: [tokens * top_k] float32, by pair.
        offsets: [experts + 1]: expert e has rows offsets[e] .. offsets[e + 1].
        pairs: [tokens * top_k], by row: its pair.
        places: [tokens * top_k], by pair: its row.
        tiles: [most tiles + 1, 4]: their number, then (expert, first row, rows, 0) of each run of up to `tile_rows`
            rows of one expert.
        tile_rows: As above.
        kernel: Which kernel the products of this step take: one of the MOE_ codes of `abi`.
        sizes: [chunks, half of the experts]: scratch of the routing's kernel.
    """

    tokens: int
    chosen: torch.Tensor
    weights: torch.Tensor
    offsets: torch.Tensor
    pairs: torch.Tensor
    places: torch.Tensor
    tiles: torch.Tensor
    tile_rows: int
    kernel: int
    sizes: torch.Tensor


class ExpertLists:
    """Memory for the lists of the largest step, handed out as views for fewer tokens."""

    def __init__(self, routing: Routing, max_tokens: int, device: torch.device) -> None:
        self.routing, self.max_tokens, self._device = routing, max_tokens, device
        pairs = max_tokens * routing.top_k

        def empty(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self._chosen, self._pairs, self._places = empty(pairs), empty(pairs), empty(pairs)
        self._weights, self._offsets = empty(pairs, dtype=torch.float32), empty(routing.experts + 1)
        self._tiles = empty(1 + most_tiles(routing, max_tokens, 8), 4)
        self._sizes = empty(-(-max_tokens // abi.MOE_CHUNK), -(-routing.experts // 2))

    @property
    def num_bytes(self) -> int:
        lists = (self._chosen, self._weights, self._offsets, self._pairs, self._places)
        tensors = (*lists, self._tiles, self._sizes)
        return sum(t.numel() * t.element_size() for t in tensors)

    def rows(self, tokens: int, kernel: int, tile_rows: int) -> ExpertRows:
        """The lists of a step of up to `tokens` tokens, whose products run on `kernel` by tiles of `tile_rows` rows."""
        pairs, tiles = tokens * self.routing.top_k, 1 + most_tiles(self.routing, tokens, tile_rows)
        return ExpertRows(
            tokens,
            self._chosen[:pairs],
            self._weights[:pairs],
            self._offsets,
            self._pairs[:pairs],
            self._places[:pairs],
            self._tiles[:tiles],
            tile_rows,
            kernel,
            self._sizes,
        )


def most_tiles(routing: Routing, tokens: int, tile_rows: int) -> int:
    """The most tiles that so many tokens can need, however they choose."""
    pairs = tokens * routing.top_k
    return min(routing.experts, pairs) + pairs // tile_rows


def route(
    rows: ExpertRows,
    logits: torch.Tensor,
    routing: Routing,
    *,
    bias: torch.Tensor | None = None,
    counts: torch.Tensor | None = None,
) -> None:
    """Chooses experts and fills the lists.

    Args:
        rows: Out; its tokens are those of `logits`.
        logits: [tokens, experts], rows may be strided.
        routing: The rules.
        bias: [experts] float32, added to the scores for the choice only, or None.
        counts: The step's counts (`MII_COUNTS` in abi/base.h), of which the number of tokens is read on the device;
            None: all tokens count.

    Raises:
        ValueError: Shapes or dtypes that do not fit together.
    """
    _check(rows, logits, routing, bias)
    library = native.library(logits.device)
    if library is not None and logits.dtype in abi.DTYPE_CODES and library.has("mii_moe_route"):
        args = abi.MiiMoeRoute(
            rows.chosen.data_ptr(),
            rows.weights.data_ptr(),
            rows.offsets.data_ptr(),
            rows.pairs.data_ptr(),
            rows.places.data_ptr(),
            rows.tiles.data_ptr(),
            logits.data_ptr(),
            native.pointer(bias),
            native.pointer(counts),
            rows.sizes.data_ptr(),
            rows.tokens,
            logits.stride(0),
            routing.experts,
            routing.top_k,
            abi.MOE_SCORINGS[routing.scoring],
            routing.renormalise,
            rows.tile_rows,
            routing.groups,
            routing.top_groups,
            routing.scale,
            abi.DTYPE_CODES[logits.dtype],
        )
        if library.call("mii_moe_route", args, native.stream(logits.device)):
            return
    route_reference(rows, logits, routing, bias=bias, counts=counts)


def _check(rows: ExpertRows, logits: torch.Tensor, routing: Routing, bias: torch.Tensor | None) -> None:
    if logits.shape != (rows.tokens, routing.experts) or logits.stride(1) != 1:
        raise ValueError(
            f"route: logits {tuple(logits.shape)} must be [{rows.tokens}, {routing.experts}] and contiguous along a row"
        )
    if bias is not None and (bias.shape != (routing.experts,) or bias.dtype != torch.float32):
        raise ValueError(f"route: bias {tuple(bias.shape)} {bias.dtype} must be [{routing.experts}] of float32")


def route_reference(
    rows: ExpertRows,
    logits: torch.Tensor,
    routing: Routing,
    *,
    bias: torch.Tensor | None = None,
    counts: torch.Tensor | None = None,
) -> None:
    """`route` in plain torch. Nothing waits for the device, so it can be part of a CUDA graph."""
    score = scores(logits, routing)
    value = score if bias is None else score + bias
    chosen = _largest(_of_best_groups(value, routing), routing.top_k)
    weights = score.gather(1, chosen)
    if routing.renormalise:
        weights = weights / (weights.sum(dim=1, keepdim=True) + 1e-20)
    rows.weights.copy_((weights * routing.scale).flatten())
    rows.chosen.copy_(chosen.flatten())
    if counts is not None:  # padding goes to an expert that does not exist, behind all others
        padding = torch.arange(rows.tokens, device=logits.device) >= counts[abi.NUM_TOKENS]
        chosen = chosen.masked_fill(padding[:, None], routing.experts)
    experts, pairs = chosen.flatten().sort(stable=True)
    rows.pairs.copy_(pairs)
    rows.places.scatter_(0, pairs, torch.arange(len(pairs), dtype=torch.int32, device=pairs.device))
    rows.offsets.copy_(torch.searchsorted(experts, torch.arange(routing.experts + 1, device=logits.device)))
    _fill_tiles(rows, routing)


def scores(logits: torch.Tensor, routing: Routing) -> torch.Tensor:
    """[tokens, experts] in float."""
    logits = logits.float()
    return logits.softmax(dim=1) if routing.scoring == "softmax" else logits.sigmoid()


def _of_best_groups(value: torch.Tensor, routing: Routing) -> torch.Tensor:
    """[tokens, experts], minus infinity outside the groups that each token chooses from."""
    if routing.groups == 1:
        return value
    groups = value.unflatten(1, (routing.groups, -1))
    count = min(2 if routing.scoring == "sigmoid" else 1, routing.group_size)
    best = _largest(groups.topk(count, dim=2).values.sum(dim=2), routing.top_groups)
    others = torch.ones(groups.shape[:2], dtype=torch.bool, device=value.device).scatter_(1, best, False)
    return groups.masked_fill(others[:, :, None], -torch.inf).flatten(1)


def _largest(score: torch.Tensor, count: int) -> torch.Tensor:
    """[tokens, count] indices of the largest, in falling order; the lower index first among equals."""
    return score.sort(dim=1, descending=True, stable=True).indices[:, :count]


def _fill_tiles(rows: ExpertRows, routing: Routing) -> None:
    device, tiles = rows.offsets.device, rows.tiles[1:]
    sizes = rows.offsets.diff()
    ends = ((sizes + rows.tile_rows - 1) // rows.tile_rows).cumsum(0)
    index = torch.arange(len(tiles), device=device)
    expert = torch.searchsorted(ends, index, right=True).clamp(max=routing.experts - 1)
    before = torch.where(expert > 0, ends[(expert - 1).clamp(min=0)], 0)
    start = (index - before) * rows.tile_rows
    tiles[:, 0], tiles[:, 1] = expert, rows.offsets[expert] + start
    tiles[:, 2] = (sizes[expert] - start).clamp(0, rows.tile_rows)
    tiles[:, 3] = 0
    rows.tiles[0] = 0
    rows.tiles[0, 0] = ends[-1]
