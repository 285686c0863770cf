"""Runs the mixes of `mii bench offline` on other engines, so that anyone can check the README's columns of them.

    python benchmarks/peers.py vllm --python /envs/vllm/bin/python --json vllm.json
    python benchmarks/peers.py deepspeed-mii --python /envs/mii/bin/python --json mii.json

Each engine runs in an environment of its own, named by its Python: `pip install vllm`, or `pip install deepspeed-mii`,
which needs `deepspeed` and `deepspeed-kernels` (and is imported as `mii`, so it cannot share ours). It gets the same
requests, greedy and with end-of-text ignored, and a checkpoint of random weights that is written for it. It is timed as
benchmarks/NOTES.md says: a warm-up, then counted tokens over the time of the whole call, the better of two; decoding as
the difference of a run of 272 tokens and one of 16 over 256, median of three. The tokens that come back are counted.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from mii.benchmark.limits import describe_machine
from mii.benchmark.random_checkpoint import RandomCheckpoint
from mii.benchmark.report import write_json
from mii.benchmark.rows import LONG, PROMPT, SHORT
from mii.benchmark.shapes import MIXES, SHAPES, Job, make_batch, make_mix, with_fresh_ids
from mii.benchmark.start import place_for, write_checkpoint

HERE = Path(__file__).resolve().parent
# the packages that an engine needs, the first of which gives its version, and the script that drives it
ENGINES = {
    "vllm": (("vllm",), "peer_vllm.py"),
    "deepspeed-mii": (("deepspeed-mii", "deepspeed", "deepspeed-kernels"), "peer_mii.py"),
}
DECODES = {f"decode-{batch}": batch for batch in (1, 8, 64)}
DEFAULT_ROWS = (*DECODES, "prefill-2048", "fastgen-2600-60", "chat", "decode-128-512")
VERSIONS = "import importlib.metadata as m, json, sys; print(json.dumps({n: m.version(n) for n in sys.argv[1:]}))"
DTYPES = {"bf16": "bfloat16", "fp16": "float16"}


def versions(python: str, packages: Sequence[str]) -> dict[str, str]:
    """What is installed in the environment of that Python.

    Raises:
        SystemExit: It is none, or one of the packages is missing.
    """
    try:
        done = subprocess.run([python, "-c", VERSIONS, *packages], text=True, capture_output=True, env=environment())
    except OSError as error:
        raise SystemExit(f"{python} cannot be run: {error.strerror}. Give the Python of an environment.") from None
    if done.returncode:
        missing = done.stderr.strip().splitlines()[-1]
        raise SystemExit(
            f"The environment of {python} lacks what is needed ({', '.join(packages)}): {missing}. Install it there "
            f"with: {python} -m pip install {' '.join(packages)}"
        )
    return dict(json.loads(done.stdout))


def environment() -> dict[str, str]:
    """Without our own packages: DeepSpeed-MII is called `mii` too."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}


def workloads(rows: Sequence[str], vocab: int) -> list[dict[str, Any]]:
    """Every run of every row, in order; those without a "kind" are warm-ups."""
    runs: list[dict[str, Any]] = []

    def add(row: str, jobs: list[Job], **more: str) -> None:
        fresh = with_fresh_ids(jobs, vocab, len(runs) + 1)
        runs.append({"row": row, "jobs": [[job.prompt_ids, job.new_tokens] for job in fresh], **more})

    for row in rows:
        if row in DECODES:
            short = make_batch(DECODES[row], PROMPT, SHORT, vocab)
            add(row, short)
            for _ in range(3):
                add(row, short, kind="short")
                add(row, make_batch(DECODES[row], PROMPT, LONG, vocab), kind="long")
            continue
        jobs = make_mix(row, vocab)
        add(row, [Job(job.prompt_ids, min(job.new_tokens, 4)) for job in jobs[: max(1, len(jobs) // 8)]])
        for _ in range(2):
            add(row, jobs, kind="mix")
    return runs


def figures(runs: Sequence[dict[str, Any]], results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A figure for each row whose runs are all there.

    Raises:
        SystemExit: Fewer or more tokens came back than were asked for.
    """
    timed: dict[str, dict[str, list[tuple[float, dict[str, Any]]]]] = {}
    for run, result in zip(runs, results, strict=False):
        asked = sum(count for _, count in run["jobs"])
        if result["answer_tokens"] != asked:
            raise SystemExit(f"{run['row']}: {asked} tokens were asked for and {result['answer_tokens']} came back")
        if "kind" in run:
            timed.setdefault(run["row"], {}).setdefault(run["kind"], []).append((result["seconds"], run))
    rows = []
    for name, kinds in timed.items():
        if "mix" in kinds and len(kinds["mix"]) == 2:
            samples = [counted(name, run["jobs"]) / seconds for seconds, run in kinds["mix"]]
            rows.append({"name": name, "unit": "tokens/s", "value": max(samples), "samples": samples})
        elif len(kinds.get("long", [])) == 3:
            pairs = zip(kinds["short"], kinds["long"], strict=True)
            samples = [1e3 * (more - less) / (LONG - SHORT) for (less, _), (more, _) in pairs]
            rows.append({"name": name, "unit": "ms/step", "value": median(samples), "samples": samples})
    return rows


def counted(name: str, jobs: Sequence[Any]) -> int:
    """The tokens that count in a mix: of answers, of prompts, or both."""
    prompts, answers = sum(len(ids) for ids, _ in jobs), sum(count for _, count in jobs)
    if name == "prefill-2048":
        return prompts
    return answers if name in ("chat", "decode-128-512", "answers-256") else prompts + answers


def write_tokenizer(folder: Path, config: dict[str, Any]) -> None:
    """Word i is token i, for engines that take text alone."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {f"w{token}": token for token in range(config["vocab_size"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {f"{kind}_token": f"w{config[f'{kind}_token_id']}" for kind in ("bos", "eos")}
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "w0", **special})
    )


def measure(args: argparse.Namespace) -> dict[str, Any]:
    packages, script = ENGINES[args.engine]
    found = versions(args.python, packages)
    config = dict(SHAPES[args.shape]) | {"torch_dtype": DTYPES[args.dtype]}
    if args.layers is not None:
        config["num_hidden_layers"] = args.layers
    runs = workloads(args.rows, config["vocab_size"])
    checkpoint = RandomCheckpoint(config, torch.device("cpu"))
    with tempfile.TemporaryDirectory(prefix="mii-peer-", dir=place_for(checkpoint)) as name:
        folder, plan, output = Path(name), Path(name, "plan.json"), Path(name, "results.json")
        write_checkpoint(folder, checkpoint)
        write_tokenizer(folder, config)
        length = min(config["max_position_embeddings"], 8192)
        work = {"model": name, "dtype": DTYPES[args.dtype], "max_length": length, "runs": runs}
        plan.write_text(json.dumps(work))
        command = [args.python, str(HERE / script), str(plan), str(output)]
        code = subprocess.run(command, env=environment(), cwd=name).returncode
        results = json.loads(output.read_text()) if output.exists() else {"ready_s": None, "runs": []}
    if code:
        print(f"{args.engine} ended with exit code {code} after {len(results['runs'])} of {len(runs)} runs", flush=True)
    rows = figures(runs, results["runs"])
    return {"engine": args.engine, "versions": found, "ready_s": results["ready_s"], "exit_code": code, "rows": rows}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Runs the mixes of mii bench offline on another engine.")
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("--python", required=True, metavar="PATH", help="the Python of the engine's own environment")
    parser.add_argument("--shape", choices=SHAPES, default="llama3-8b", metavar="SHAPE", help=", ".join(SHAPES))
    rows = (*DECODES, *MIXES)
    parser.add_argument("--rows", nargs="+", choices=rows, default=DEFAULT_ROWS, metavar="ROW", help=", ".join(rows))
    parser.add_argument("--layers", type=int, help="use only this many layers of the shape")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args(arguments)
    report = measure(args)
    for row in report["rows"]:
        print(f"{row['name']:<18} {row['value']:12,.2f} {row['unit']}")
    if args.json is not None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        about = {"benchmark": "peers", "date": datetime.now(timezone.utc).isoformat(timespec="seconds")}
        model = {"name": args.shape, "dtype": DTYPES[args.dtype], "layers": args.layers}
        write_json(about | {"machine": describe_machine(device), "model": model} | report, args.json)
    return 0 if report["exit_code"] == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
