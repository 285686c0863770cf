"""Which rows of which rotary tables a step's tokens are rotated by.

Most models take one row a position. Two kinds of scaling look at the length of the context too:

  * "longrope" has other factors in contexts longer than the trained length. A table then holds the rows of short
    contexts and, from row `switch` on, those of long ones; a sequence that grows past the length is computed anew,
    since its keys were rotated by the short ones (see `Sequence.outgrown`).
  * "dynamic" and "prompt_ntk" rotate a prompt longer than the trained length by the base of its own length: steps with
    such prompts get tables made for them.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import torch

from mii.batching.scheduler import Chunk, Plan
from mii.errors import CheckpointError
from mii.modeling.rope import BY_LENGTH, rope_rows, rope_table, switch_length, trained_length
from mii.modeling.spec import RopeSpec


class Rotation:
    """The rotary tables of one engine.

    Args:
        ropes: The rotation of every layer; None for none.
        max_length: The longest context.
        device: Where the tables lie.

    Raises:
        CheckpointError: Layers differ in a way that one row number cannot serve.
    """

    def __init__(self, ropes: SequenceOf[RopeSpec | None], max_length: int, device: torch.device) -> None:
        distinct: list[RopeSpec] = []
        for rope in ropes:
            if rope is not None and rope not in distinct:
                distinct.append(rope)
        self._dynamic = next((rope for rope in distinct if rope.kind in BY_LENGTH), None)
        lengths = {switch_length(rope) for rope in distinct} - {0}
        if len(lengths) > 1 or (self._dynamic is not None and len(distinct) > 1):
            raise CheckpointError("The model's layers rotate by the context's length in different ways: not supported.")
        switch = max(lengths, default=0)
        self.switch = switch if switch < max_length else 0
        made = [self._table(rope, max_length, device) for rope in distinct]
        self.tables = [None if rope is None else made[distinct.index(rope)] for rope in ropes]

    def _table(self, rope: RopeSpec, max_length: int, device: torch.device) -> torch.Tensor:
        if not self.switch:
            return rope_table(rope, max_length, device)
        return torch.cat([rope_table(rope, self.switch, device), rope_table(rope, max_length, device, long=True)])

    def cache_salt(self, prompt_length: int) -> bytes | None:
        """What must agree besides the tokens for prompts to share KV blocks: a rotation that depends on length."""
        return str(prompt_length).encode() if self._rotates_by_length(prompt_length) else None

    def _rotates_by_length(self, prompt_length: int) -> bool:
        return self._dynamic is not None and prompt_length > trained_length(self._dynamic)

    def needs_own_tables(self, plan: Plan) -> bool:
        """Whether a prompt of the step is rotated by its length."""
        return self._dynamic is not None and any(
            self._rotates_by_length(chunk.sequence.prompt_length) for chunk in plan.chunks
        )

    def own_tables(self, plan: Plan, tokens: int) -> tuple[list[torch.Tensor | None], torch.Tensor]:
        """Tables with a row for each of a step's `tokens` tokens, for every layer, and the numbers of these rows."""
        rows = [self._rows(chunk) for chunk in plan.chunks]
        padding = rows[0].new_zeros(tokens - plan.num_tokens, rows[0].shape[1])
        device = next(table.device for table in self.tables if table is not None)
        own = torch.cat([*rows, padding]).to(device)
        numbers = torch.arange(tokens, dtype=torch.int32, device=device)
        return [None if table is None else own for table in self.tables], numbers

    def _rows(self, chunk: Chunk) -> torch.Tensor:
        length = chunk.sequence.prompt_length
        assert self._dynamic is not None
        if self._rotates_by_length(length):
            return rope_rows(self._dynamic, chunk.start, chunk.size, length)
        table = next(table for table in self.tables if table is not None)
        return table[chunk.start : chunk.start + chunk.size].cpu()
