"""What a deployment's replies come to for users of the client."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from mii.batching.data_classes import Response, StreamedResponse
from mii.errors import GenerationError
from mii.grpc_related.convert import read_reply
from mii.grpc_related.proto.modelresponse_pb2 import HealthReply, MultiGenerationReply, SingleGenerationReply

__all__ = ["check_complete", "health_of", "read_pieces", "responses_of"]

_HEALTH = ("address", "ready", "reason", "max_length", "vocab_size", "device", "dtype", "outstanding")


def responses_of(reply: MultiGenerationReply) -> list[Response]:
    """The answers of a call in the order of its prompts.

    Raises:
        GenerationError: some are not complete.
    """
    answers = sorted(reply.response, key=lambda answer: answer.index)
    responses = [_response(answer) for answer in answers]
    errors = [answer.error for answer in answers if answer.error]
    if errors:
        pairs = zip(answers, responses, strict=True)
        check_complete(errors, [None if answer.error else response for answer, response in pairs])
    return responses


def read_pieces(pieces: Iterable[SingleGenerationReply], errors: list[str]) -> list[StreamedResponse]:
    """Pieces that came. Errors are put aside in `errors` until the other answers have ended."""
    given = list(pieces)
    errors.extend(piece.error for piece in given if piece.error)
    return [read_reply(piece) for piece in given if not piece.error]


def check_complete(errors: Sequence[str], responses: Sequence[Response | None] | None = None) -> None:
    """Raises `GenerationError` if there are errors."""
    if errors:
        text = errors[0] if len(errors) == 1 else f"{len(errors)} answers failed; the first: {errors[0]}"
        error = GenerationError(text)
        error.responses = responses
        raise error


def health_of(reply: HealthReply) -> dict[str, Any]:
    """A deployment's health as plain values."""
    replicas = [{name: getattr(replica, name) for name in _HEALTH} for replica in reply.replicas]
    return {"ready": reply.ready, "reason": reply.reason, "replicas": replicas}


def _response(answer: SingleGenerationReply) -> Response:
    read = read_reply(answer)
    return Response(
        read.generated_text,
        read.prompt_length,
        read.generated_length,
        read.finish_reason,
        logprobs=read.logprobs,
        prompt_logprobs=read.prompt_logprobs,
    )
