"""Runs the workloads of a plan on DeepSpeed-MII, through `mii.api.async_pipeline`: it takes a length for each request.

Started by peers.py in DeepSpeed-MII's environment, where `mii` is that package. Prompts are text there: word i of the
checkpoint's tokenizer is token i.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any


def run(pipe: Any, jobs: list[list[Any]]) -> tuple[float, int]:
    """Seconds from the first request given to the last answer, and the tokens that came back."""
    prompts = [" ".join(f"w{token}" for token in ids) for ids, _ in jobs]
    begin = time.perf_counter()
    for prompt, (_, count) in zip(prompts, jobs, strict=True):
        options = {"max_new_tokens": count, "min_new_tokens": count, "ignore_eos": True, "do_sample": False}
        pipe.put_request(prompt, options)
    answers = [pipe.get_response() for _ in jobs]
    seconds = time.perf_counter() - begin
    for uid, _ in answers:
        pipe.flush_uid(uid)
    return seconds, sum(response.generated_length for _, response in answers)


def main() -> None:
    plan = json.loads(Path(sys.argv[1]).read_text())
    begin = time.time()
    from mii.api import async_pipeline
    from mii.config import ModelConfig

    pipe = async_pipeline(
        ModelConfig(
            model_name_or_path=plan["model"], tokenizer=plan["model"], tensor_parallel=1, max_length=plan["max_length"]
        )
    )
    pipe.start()
    results: dict[str, Any] = {"ready_s": time.time() - begin, "runs": []}
    for work in plan["runs"]:
        seconds, tokens = run(pipe, work["jobs"])
        results["runs"].append({"seconds": seconds, "answer_tokens": tokens})
        Path(sys.argv[2]).write_text(json.dumps(results))
        print(f"{work['row']}: {seconds:.2f} s", flush=True)
    pipe.shutdown()


if __name__ == "__main__":
    main()
