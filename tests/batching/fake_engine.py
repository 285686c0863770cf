"""An engine without a model: it says what it was told to, a token a step, and keeps account of what it holds."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from mii.batching.data_classes import EngineRequest, StepOutput, TokenOutput
from mii.errors import PromptTooLongError

END = 256
BEGIN = 257


def byte_tokenizer() -> Tokenizer:
    """A byte-level tokenizer whose token b is the byte b, so scripts of answers are `list(text.encode())`."""
    alphabet = {0: 0}
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    alphabet = {byte: chr(byte) for byte in plain}
    alphabet |= {byte: chr(256 + at) for at, byte in enumerate(byte for byte in range(256) if byte not in plain)}
    vocabulary = {char: byte for byte, char in alphabet.items()}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("</s>", special=True), AddedToken("<s>", special=True)])
    return tokenizer


class Wrapper:
    """The tokenizer as a pipeline sees it."""

    eos_token_id = END
    bos_token_id = BEGIN
    vocab_size = 258

    def __init__(self, adds_begin: bool = False) -> None:
        self.backend_tokenizer = byte_tokenizer()
        self._begin = [BEGIN] if adds_begin else []

    def encode(self, text: str) -> list[int]:
        return self._begin + list(self.backend_tokenizer.encode(text).ids)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        return str(self.backend_tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens))


@dataclass
class _Running:
    request: EngineRequest
    answer: Iterator[int]
    generated: int = 0


def random_letters(request: EngineRequest) -> Iterator[int]:
    """A function of (prompt, seed, position) alone, as a real sampler's draws are."""
    letters = random.Random(f"{request.prompt_ids} {request.sampling.seed}")
    while True:
        yield letters.choice(b"abcdefgh ")


@dataclass
class FakeEngine:
    """Deterministic tokens with the engine's methods.

    Args:
        answers: The tokens of a request's answer; when they run out, end-of-text follows.
        at_once: Requests that run in a step; later ones wait.
        capacity: Prompts of more tokens are refused.
        on_step: Called with the number of each step, before it.
    """

    answers: Callable[[EngineRequest], Iterator[int]] = random_letters
    at_once: int = 8
    capacity: int = 1000
    on_step: Callable[[int], object] = lambda _: None
    max_length: int = 2000
    vocab_size: int = 258
    stop_ids: tuple[int, ...] = (END,)
    requests: dict[int, _Running] = field(default_factory=dict)
    seen: list[EngineRequest] = field(default_factory=list)
    aborted: list[int] = field(default_factory=list)
    batch_sizes: list[int] = field(default_factory=list)
    destroyed: int = 0

    @property
    def has_work(self) -> bool:
        return bool(self.requests)

    def add_request(self, request: EngineRequest) -> None:
        if len(request.prompt_ids) > self.capacity:
            raise PromptTooLongError(f"{len(request.prompt_ids)} tokens, the cache holds {self.capacity}")
        assert request.uid not in self.requests
        self.seen.append(request)
        self.requests[request.uid] = _Running(request, self.answers(request))

    def step(self) -> StepOutput:
        assert self.has_work
        assert not self.destroyed
        self.on_step(len(self.batch_sizes))
        batch = list(self.requests.values())[: self.at_once]
        self.batch_sizes.append(len(batch))
        return StepOutput.of(self._advance(running) for running in batch)

    def _advance(self, running: _Running) -> TokenOutput:
        request = running.request
        token = next(running.answer, END)
        if token == -1:
            del self.requests[request.uid]
            return TokenOutput(request.uid, [], "error", "its numbers are not finite")
        running.generated += 1
        reason = None
        if token in request.stop_ids and running.generated > request.min_new_tokens:
            reason = "stop"
        elif running.generated >= request.max_new_tokens:
            reason = "length"
        if reason is not None:
            del self.requests[request.uid]
        return TokenOutput(request.uid, [token], reason)

    def abort(self, uid: int) -> None:
        if self.requests.pop(uid, None) is not None:
            self.aborted.append(uid)

    def destroy(self) -> None:
        self.destroyed += 1
        self.requests.clear()


def saying(*texts: str) -> Callable[[EngineRequest], Iterator[int]]:
    """Answers in the order in which requests are added; the last one again and again."""
    left = list(texts)

    def answer(_: EngineRequest) -> Iterator[int]:
        return iter(list((left.pop(0) if len(left) > 1 else left[0]).encode()))

    return answer
