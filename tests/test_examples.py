"""Every example runs as its first lines say, on the real SmolLM2, and is short.

One of each kind is a process; the others run in this one, which has torch already.
"""

from __future__ import annotations

import ast
import io
import json
import os
import re
import runpy
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"


def run(name: str, model: Path, given: str = "") -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "MII_LOG_LEVEL": "warning"}
    command = [sys.executable, str(EXAMPLES / name), str(model)]
    done = subprocess.run(command, input=given, env=environment, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def run_here(name: str, model: Path, given: str = "") -> str:
    printed = io.StringIO()
    with mock.patch.multiple(sys, argv=[name, str(model)], stdin=io.StringIO(given)), redirect_stdout(printed):
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return printed.getvalue()


def test_every_example_is_short_and_has_a_test() -> None:
    here = Path(__file__).read_text()
    for path in EXAMPLES.glob("*.py"):
        assert len(path.read_text().splitlines()) < 40, path
        assert f'run("{path.name}"' in here or f'run_here("{path.name}"' in here, path


def test_pipeline_basic(smollm2: Path) -> None:
    printed = run("pipeline_basic.py", smollm2)
    lengths = re.findall(r"-- (\d+) \+ (\d+) tokens, ended by (\w+)", printed)
    assert len(lengths) == 2
    for _, generated, reason in lengths:
        assert (int(generated) == 48) if reason == "length" else (reason == "stop" and int(generated) <= 48)


def test_pipeline_streaming(smollm2: Path) -> None:
    printed = run_here("pipeline_streaming.py", smollm2)
    story, _, rest = printed.partition("\n--\n")
    assert len(story) > 40
    pieces = re.findall(r"^\[(\d)\] (.*)$", rest, re.MULTILINE)
    joined = ["".join(ast.literal_eval(text) for index, text in pieces if index == wanted) for wanted in "01"]
    assert rest.splitlines()[-1] == repr(joined)


def test_pipeline_batch_gives_the_same_answers_twice(smollm2: Path) -> None:
    printed = run_here("pipeline_batch.py", smollm2)
    lines = [json.loads(line) for line in printed.splitlines()]
    assert len(lines) == 8
    assert all("." not in line["generated_text"] and "\n" not in line["generated_text"] for line in lines)
    assert all(1 <= line["generated_length"] <= 32 for line in lines)
    assert run_here("pipeline_batch.py", smollm2) == printed


def test_chat(smollm2: Path) -> None:
    printed = run_here("chat.py", smollm2, "What is the capital of France?\nAnd what language do they speak there?\n")
    assert "Paris" in printed
    assert "French" in printed


def test_async_pipeline(smollm2: Path) -> None:
    lines = run_here("async_pipeline.py", smollm2).splitlines()
    asked = {"first: The sun is", "first: The moon is", "second: Water is", "second: Fire is", "second: Air is"}
    assert {line.split(" ->")[0] for line in lines} >= asked


def test_token_ids(smollm2: Path) -> None:
    printed = run_here("token_ids.py", smollm2)
    assert "Paris" in printed
    assert "same as from text: True" in printed


def test_serve(smollm2: Path) -> None:
    lines = run("serve.py", smollm2).splitlines()
    assert lines[0].startswith("[")
    (reply,) = json.loads(lines[-1])
    assert reply["prompt_length"] == 3
    assert 1 <= reply["generated_length"] <= 8


def test_openai_chat(smollm2: Path) -> None:
    answer, counts = run("openai_chat.py", smollm2).splitlines()
    assert "Paris" in answer
    assert re.fullmatch(r"-- \d+ \+ \d+ tokens", counts)
