"""What a token costs `mii.pipeline` beside the engine: handed over, made text, put in its answer.

    python benchmarks/run_text.py [--sequences 256] [--tokens 200] [--repeats 5] [--profile]

The pipeline and its tokenizer (SmolLM2's) are the real ones; in place of an engine stands one that draws a token for
each request in each step, whose time is taken off. Microseconds of processor time a token, the best of some runs: of a
call, of one with a stop string, and of `pipe.stream`.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import random
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mii.batching.data_classes import EngineRequest, StepOutput, TokenOutput
from mii.batching.pipeline import MIIPipeline
from mii.config import ModelConfig
from mii.modeling.checkpoint import find_default_model, open_checkpoint
from mii.modeling.tokenizers import load_tokenizer


class RandomTokens:
    """In place of an engine."""

    max_length, vocab_size = 8192, 49152
    stop_ids: tuple[int, ...] = (2,)

    def __init__(self) -> None:
        self._left: dict[int, int] = {}
        draw = random.Random(0)
        self._ids = [draw.randrange(300, 49000) for _ in range(1 << 16)]
        self.seconds = 0.0

    @property
    def has_work(self) -> bool:
        return bool(self._left)

    def add_request(self, request: EngineRequest) -> None:
        self._left[request.uid] = request.max_new_tokens

    def step(self) -> StepOutput:
        begin = time.thread_time()
        uids = [uid for uid, left in self._left.items() if left > 1]
        last = [uid for uid, left in self._left.items() if left == 1]
        at = random.randrange(len(self._ids) - len(self._left))
        ids = self._ids[at : at + len(self._left)]
        self._left = {uid: self._left[uid] - 1 for uid in uids}
        ended = [TokenOutput(uid, [token], "length") for uid, token in zip(last, ids[len(uids) :], strict=True)]
        self.seconds += time.thread_time() - begin
        return StepOutput(uids, ids[: len(uids)], ended)

    def abort(self, uid: int) -> None:
        self._left.pop(uid, None)

    def destroy(self) -> None:
        """There is nothing to give back."""


def microseconds(engine: RandomTokens, work: Callable[[], object], tokens: int, repeats: int) -> float:
    """Of the calling thread, a token, without the engine's."""
    times = []
    for _ in range(repeats):
        engine.seconds, begin = 0.0, time.thread_time()
        work()
        times.append(time.thread_time() - begin - engine.seconds)
    return 1e6 * min(times) / tokens


def use_up(stream: Iterable[object]) -> None:
    for _ in stream:
        pass


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measures what a token costs a pipeline beside its engine.")
    parser.add_argument("--sequences", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=200, help="of each answer")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--profile", action="store_true", help="say where the time of a call goes")
    args = parser.parse_args(arguments)
    path, engine = find_default_model(), RandomTokens()
    with open_checkpoint(str(path)) as checkpoint:
        tokenizer = load_tokenizer(str(path), checkpoint=checkpoint)
    pipe = MIIPipeline(engine, tokenizer, ModelConfig(model_name_or_path=str(path), progress=False))
    prompts = [[5 + place, 6, 7] for place in range(args.sequences)]
    options = {"max_new_tokens": args.tokens, "ignore_eos": True}
    kinds: dict[str, Callable[[], object]] = {
        "call": lambda: pipe(prompts, **options),
        "call with a stop string": lambda: pipe(prompts, stop="\nUser:", **options),
        "stream": lambda: use_up(pipe.stream(prompts, **options)),
    }
    kinds["call"]()  # the tokens' texts are looked up once each
    for name, work in kinds.items():
        cost = microseconds(engine, work, args.sequences * args.tokens, args.repeats)
        print(f"{name}: {cost:.2f} us a token", flush=True)
    if args.profile:
        profiler = cProfile.Profile()
        profiler.runcall(kinds["call"])
        pstats.Stats(profiler).sort_stats("tottime").print_stats(14)
    return 0


if __name__ == "__main__":
    sys.exit(main())
