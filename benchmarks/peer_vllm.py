"""Runs the workloads of a plan on vLLM, through its public offline API. Started by peers.py in vLLM's environment."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any


def run(llm: Any, params: Any, jobs: list[list[Any]]) -> tuple[float, int]:
    """Seconds of a call with all requests, and the tokens that came back."""
    prompts = [{"prompt_token_ids": ids} for ids, _ in jobs]
    wanted = [params(max_tokens=count, temperature=0.0, ignore_eos=True, detokenize=False) for _, count in jobs]
    begin = time.perf_counter()
    outputs = llm.generate(prompts, wanted, use_tqdm=False)
    seconds = time.perf_counter() - begin
    return seconds, sum(len(output.outputs[0].token_ids) for output in outputs)


def main() -> None:
    plan = json.loads(Path(sys.argv[1]).read_text())
    begin = time.time()
    from vllm import LLM, SamplingParams

    llm = LLM(model=plan["model"], dtype=plan["dtype"], max_model_len=plan["max_length"])
    results: dict[str, Any] = {"ready_s": time.time() - begin, "runs": []}
    for work in plan["runs"]:
        seconds, tokens = run(llm, SamplingParams, work["jobs"])
        results["runs"].append({"seconds": seconds, "answer_tokens": tokens})
        Path(sys.argv[2]).write_text(json.dumps(results))
        print(f"{work['row']}: {seconds:.2f} s", flush=True)


if __name__ == "__main__":  # vLLM starts processes that import this file
    main()
