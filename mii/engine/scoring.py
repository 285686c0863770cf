"""Log-probabilities of tokens, for requests that ask for them: of the model's own logits, in float32.

What is asked of an answer comes from the logits that a step samples from. Of a prompt's tokens there are none, so the
last matrix product is done again for its rows, as many at a time as the step's buffer of logits holds.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

from mii.batching.data_classes import TokenLogprob
from mii.engine.sequence import Sequence
from mii.modeling.arena import ActivationArena
from mii.modeling.decoder import Decoder
from mii.modeling.forward import Forward
from mii.ops.logits import Scores, score, upload
from mii.ops.shard_scores import score_shards


class ScoredPrompt(NamedTuple):
    """Tokens `start` .. `start + size - 1` of a prompt, which rows `row` .. of the step's tokens foretell."""

    sequence: Sequence
    start: int
    size: int
    row: int

    @property
    def tokens(self) -> list[int]:
        return self.sequence.tokens[self.start : self.start + self.size]


class HostScores:
    """Scores of some rows on their way to the host, in one copy that nobody waits for."""

    def __init__(self, parts: SequenceOf[Scores]) -> None:
        packed = torch.cat(
            [torch.cat([each.chosen[:, None], each.top, each.top_ids.view(torch.float32)], 1) for each in parts]
        )
        self._host = packed
        if packed.is_cuda:
            self._host = torch.empty_like(packed, device="cpu", pin_memory=True)
            self._host.copy_(packed, non_blocking=True)

    def entries(self, tokens: Iterable[int], alternatives: Iterable[int]) -> list[TokenLogprob]:
        """An entry for each row, with its token and as many alternatives as it asks for; once the copy is there."""
        packed = self._host.numpy()
        k = packed.shape[1] // 2
        values, ids = packed[:, : k + 1].tolist(), packed[:, k + 1 :].view(np.int32).tolist()
        return [
            TokenLogprob(token, value[0], tuple(map(TokenLogprob, top[:wanted], value[1 : wanted + 1])))
            for token, wanted, value, top in zip(tokens, alternatives, values, ids, strict=True)
        ]


class LaunchedScores:
    """The scores of one step.

    Args:
        rows: Sampled rows whose tokens are scored, and how many alternatives each asks for.
        answers: Their scores.
        prompts: Parts of prompts that are scored.
        prompt_tokens: Their scores, one part after the other.
    """

    def __init__(
        self,
        rows: dict[int, int],
        answers: HostScores | None,
        prompts: SequenceOf[ScoredPrompt],
        prompt_tokens: HostScores | None,
    ) -> None:
        self._rows, self._answers = rows, answers
        self._prompts, self._prompt_tokens = prompts, prompt_tokens

    def read(self, tokens: SequenceOf[int]) -> dict[int, TokenLogprob]:
        """The entries of sampled rows, once the step is over; those of prompts go to their sequences.

        Args:
            tokens: What the step sampled.
        """
        if self._prompt_tokens is not None:
            wanted = [_prompt_alternatives(each.sequence) for each in self._prompts for _ in range(each.size)]
            ids = [token for each in self._prompts for token in each.tokens]
            entries = self._prompt_tokens.entries(ids, wanted)
            for part in self._prompts:
                theirs, entries = entries[: part.size], entries[part.size :]
                if part.sequence.prompt_scores is not None:
                    part.sequence.prompt_scores[part.start : part.start + part.size] = theirs
        if self._answers is None:
            return {}
        entries = self._answers.entries([tokens[row] for row in self._rows], self._rows.values())
        return dict(zip(self._rows, entries, strict=True))


class Scorer:
    """Scores tokens of a step that has been launched.

    Args:
        model: Whose head makes logits of prompt tokens.
        arena: The steps' buffers.
    """

    def __init__(self, model: Decoder, arena: ActivationArena) -> None:
        self._model, self._arena = model, arena

    def launch(
        self, rows: dict[int, int], prompts: SequenceOf[ScoredPrompt], forward: Forward, tokens: torch.Tensor
    ) -> LaunchedScores | None:
        """Starts to score; None where there is nothing to score.

        Args:
            rows: Sampled rows to score, and how many alternatives each asks for.
            prompts: Parts of prompts to score. Afterwards the step's logits are gone.
            forward: The step.
            tokens: int32 [samples], what it sampled in the end.
        """
        if not rows and not prompts:
            return None
        answers = HostScores([self._of_answers(rows, forward.buffers.logits, tokens)]) if rows else None
        return LaunchedScores(
            rows, answers, prompts, HostScores(self._of_prompts(prompts, forward)) if prompts else None
        )

    def _of_answers(self, rows: dict[int, int], logits: torch.Tensor, tokens: torch.Tensor) -> Scores:
        index = upload(list(rows), torch.int64, logits.device)
        return self._score(logits.index_select(0, index), tokens.index_select(0, index), self._k(rows.values()))

    def _of_prompts(self, prompts: SequenceOf[ScoredPrompt], forward: Forward) -> list[Scores]:
        """Scores of as many rows at a time as the buffers have room for."""
        device, at_once = forward.ids.device, self._arena.max_samples
        rows = upload([row for part in prompts for row in range(part.row, part.row + part.size)], torch.int32, device)
        tokens = upload([token for part in prompts for token in part.tokens], torch.int32, device)
        k = self._k(_prompt_alternatives(part.sequence) for part in prompts)
        parts = []
        for some, their in zip(rows.split(at_once), tokens.split(at_once), strict=True):
            buffers = self._arena.views(forward.ids.shape[0], len(some))
            logits = self._model.project(replace(forward, sample_rows=some, buffers=buffers))
            parts.append(self._score(logits, their, k))
        return parts

    def _score(self, logits: torch.Tensor, tokens: torch.Tensor, k: int) -> Scores:
        group, span = self._model.place.group, self._model.spec.vocab_span
        if group is None or span.is_whole:
            return score(logits, tokens, k)
        return score_shards(logits, tokens, k, span, group)

    def _k(self, alternatives: Iterable[int]) -> int:
        return min(max(alternatives), self._model.spec.vocab_size)


def _prompt_alternatives(sequence: Sequence) -> int:
    return sequence.request.prompt_logprobs or 0
