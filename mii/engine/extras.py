"""What some requests ask of a step beyond a token drawn from the model's logits: changed logits, log-probabilities.

It follows a step on the device, launched one operation at a time after the step's graph or recording, so the steps of
requests that ask for none of it are not touched. Made when the first such request starts, gone when the last one ends.
"""

from __future__ import annotations

import torch

from mii.batching.scheduler import Chunk, Plan
from mii.engine.logits_processing import EditedRow, LogitsProcessor, holds_slot
from mii.engine.sampling import Sampler
from mii.engine.scoring import LaunchedScores, ScoredPrompt, Scorer
from mii.engine.sequence import Sequence
from mii.modeling.arena import ActivationArena
from mii.modeling.decoder import Decoder
from mii.modeling.forward import Forward

_FEW = 16


class Extras:
    """Follows the steps that special sequences are in.

    Args:
        model: The model.
        arena: The steps' buffers.
        sampler: Draws the tokens.
    """

    def __init__(self, model: Decoder, arena: ActivationArena, sampler: Sampler) -> None:
        self._processor = LogitsProcessor(sampler, model.place.device)
        self._scorer = Scorer(model, arena)
        self._live: list[tuple[Sequence, int]] = []
        self._next_look = _FEW

    @property
    def idle(self) -> bool:
        """Whether no special sequence has a slot any more, as far as the last step without one could tell."""
        return not self._live

    def add(self, sequence: Sequence) -> None:
        """A special sequence has been given a slot."""
        if len(self._live) >= self._next_look:
            self._look()
            self._next_look = 2 * len(self._live) + _FEW
        self._live.append((sequence, sequence.ticket))

    def _look(self) -> None:
        """Forgets the sequences that have lost their slot."""
        self._live = [owner for owner in self._live if holds_slot(*owner)]

    def follow(self, plan: Plan, forward: Forward, tokens: torch.Tensor) -> LaunchedScores | None:
        """Adds to a step that has been launched what its special sequences ask for.

        Args:
            plan: The step's.
            forward: The step's, with the logits that it sampled from.
            tokens: int32, what it sampled; those of changed logits are replaced.
        """
        edited: list[EditedRow] = []
        scored: dict[int, int] = {}
        prompts: list[ScoredPrompt] = []
        row = first = 0
        for chunk in plan.chunks:
            if chunk.sequence.special:
                prompts += _prompt_part(chunk, first)
                if chunk.samples:
                    edited += _edit(chunk, row)
                    if chunk.sequence.request.logprobs is not None:
                        scored[row] = chunk.sequence.request.logprobs
            row += chunk.samples
            first += chunk.size
        if edited:
            self._processor.draw(edited, forward.buffers.logits, tokens, forward.step)
        elif not (scored or prompts):
            self._look()
        return self._scorer.launch(scored, prompts, forward, tokens)


def _edit(chunk: Chunk, row: int) -> list[EditedRow]:
    """A sampled row that has to be drawn again, if it has."""
    sequence, length = chunk.sequence, chunk.start + chunk.size
    return [EditedRow(row, sequence, length < sequence.min_length)] if sequence.edits(length) else []


def _prompt_part(chunk: Chunk, first: int) -> list[ScoredPrompt]:
    """The prompt tokens that a chunk foretells, if they are wanted; `first`: its first row among the step's tokens."""
    sequence = chunk.sequence
    size = min(chunk.size, sequence.prompt_length - 1 - chunk.start)
    wanted = sequence.prompt_scores is not None and size > 0
    return [ScoredPrompt(sequence, chunk.start + 1, size, first)] if wanted else []
