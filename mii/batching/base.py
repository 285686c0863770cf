"""What the two pipelines share: the parts of a loaded model, and what scripts read off a pipeline."""

from __future__ import annotations

import os
from typing import Any

from typing_extensions import Self

from mii.batching.data_classes import GenerationFinishReason, Response, StreamedResponse, TokenLogprob
from mii.batching.driver import EngineDriver, TokenEngine
from mii.batching.generation.detokenizer import TokenDecoder
from mii.batching.intake import Intake, PreparedRequest
from mii.batching.tracker import TextEvent
from mii.config import ModelConfig


class PipelineBase:
    """A model that is loaded, with its tokenizer.

    Args:
        inference_engine: The engine; it belongs to the pipeline from now on.
        tokenizer: mii's tokenizer wrapper, or an object with the same `encode` and `decode`.
        model_config: What the model was loaded with.
        all_rank_output: Whether processes other than the first get the answers too.
    """

    def __init__(
        self, inference_engine: TokenEngine, tokenizer: Any, model_config: ModelConfig, all_rank_output: bool = False
    ) -> None:
        self.inference_engine: TokenEngine | None = inference_engine
        self.tokenizer = tokenizer
        self.model_config = model_config
        self.all_rank_output = all_rank_output
        self.local_rank = int(os.environ.get("LOCAL_RANK") or 0)
        self.is_rank_0 = int(os.environ.get("RANK") or 0) == 0
        limit = model_config.max_length
        self.max_length = inference_engine.max_length if limit is None else min(limit, inference_engine.max_length)
        self.vocab_size = int(getattr(tokenizer, "vocab_size", inference_engine.vocab_size))
        self._decoder = TokenDecoder(tokenizer)
        self._driver = EngineDriver(inference_engine)
        self._intake = Intake(
            tokenizer,
            max_length=self.max_length,
            vocab_size=inference_engine.vocab_size,
            stop_ids=inference_engine.stop_ids,
            seed=model_config.seed,
        )

    def destroy(self) -> None:
        """Gives the memory of weights and KV cache back; harmless when called again.

        Calls of other threads end with `PipelineDestroyedError`, and so does every later use.
        """
        self._driver.destroy()
        self.inference_engine = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.destroy()


def stream_pieces(prepared: PreparedRequest, event: TextEvent) -> list[StreamedResponse]:
    """An event as it is streamed: the text of new tokens, then at the end an empty piece with the reason."""
    length, generated, none = prepared.prompt_length, event.generated_length, GenerationFinishReason.NONE
    pieces = []
    if event.new_tokens or event.text:
        piece = StreamedResponse(event.text, length, generated, none, prepared.index)
        piece.logprobs, piece.prompt_logprobs = event.logprobs, event.prompt_logprobs
        pieces.append(piece)
    if event.finish_reason is not none:
        pieces.append(StreamedResponse("", length, generated, event.finish_reason, prepared.index))
    return pieces


class AnswerParts:
    """One prompt's answer in the making, for a caller who wants it whole."""

    def __init__(self, prepared: PreparedRequest) -> None:
        self._prepared = prepared
        self._texts = [prepared.text] if prepared.text else []
        self._logprobs: list[TokenLogprob] | None = None
        self._prompt_logprobs: list[TokenLogprob] | None = None
        self.last: TextEvent | None = None

    def add(self, event: TextEvent) -> None:
        """Takes the next event in."""
        self._texts.append(event.text)
        self.last = event
        if event.logprobs is not None:
            self._logprobs = self._logprobs or []
            self._logprobs += event.logprobs
        self._prompt_logprobs = event.prompt_logprobs or self._prompt_logprobs

    def response(self) -> Response | None:
        """The answer; None if there is none, because nothing came or it ended with an error."""
        last = self.last
        if last is None or last.error is not None:
            return None
        return Response(
            "".join(self._texts),
            self._prepared.prompt_length,
            last.generated_length,
            last.finish_reason,
            logprobs=self._logprobs,
            prompt_logprobs=self._prompt_logprobs,
        )
