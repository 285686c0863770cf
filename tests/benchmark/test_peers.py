"""benchmarks/peers.py drives another environment's engine, counts what comes back, and says what is missing there."""

from __future__ import annotations

import importlib.util
import json
import sys
import venv
from pathlib import Path
from types import ModuleType

import pytest

PATH = Path(__file__).resolve().parents[2] / "benchmarks" / "peers.py"

# The engines' public surfaces, as far as they are used: each answers with as many tokens as it was asked for.
VLLM = """
import types
class SamplingParams:
    def __init__(self, max_tokens, temperature, ignore_eos, detokenize):
        assert temperature == 0 and ignore_eos and not detokenize
        self.max_tokens = max_tokens
class LLM:
    def __init__(self, model, dtype, max_model_len):
        assert dtype == "bfloat16" and max_model_len == 8192
    def generate(self, prompts, params, use_tqdm):
        assert all(prompt["prompt_token_ids"] for prompt in prompts)
        return [types.SimpleNamespace(outputs=[types.SimpleNamespace(token_ids=[1] * (each.max_tokens - SHORT))])
                for each in params]
SHORT = 0
"""
MII = """
import types
from transformers_free import load
class Pipeline:
    def __init__(self, config):
        self.words, self.answers = load(config.tokenizer), []
    def start(self): pass
    def shutdown(self): pass
    def flush_uid(self, uid): pass
    def put_request(self, prompt, options):
        assert options["ignore_eos"] and not options["do_sample"]
        assert all(word in self.words for word in prompt.split())
        self.answers.append(types.SimpleNamespace(generated_length=options["max_new_tokens"]))
    def get_response(self):
        return len(self.answers), self.answers.pop(0)
def async_pipeline(config): return Pipeline(config)
"""
CONFIG = """
class ModelConfig:
    def __init__(self, model_name_or_path, tokenizer, tensor_parallel, max_length):
        self.tokenizer = tokenizer
"""
LOAD = """
import json, pathlib
def load(folder): return json.loads(pathlib.Path(folder, "tokenizer.json").read_text())["model"]["vocab"]
"""


@pytest.fixture(scope="module")
def peers() -> ModuleType:
    spec = importlib.util.spec_from_file_location("peers", PATH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["peers"] = module
    spec.loader.exec_module(module)
    return module


def make_environment(folder: Path, files: dict[str, str], packages: list[str]) -> str:
    """An environment of its own with these modules, and with these packages in its books."""
    venv.create(folder, symlinks=True, with_pip=False)
    site = next(folder.glob("lib/python*/site-packages"))
    for name, text in files.items():
        (site / name).parent.mkdir(exist_ok=True)
        (site / name).write_text(text)
    for package in packages:
        info = site / f"{package.replace('-', '_')}-1.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.2\n")
    return str(folder / "bin" / "python")


def arguments(engine: str, python: str, *more: str) -> list[str]:
    rows = ("--shape", "smollm2-135m", "--layers", "1", "--rows", "decode-8", "answers-256")
    return [engine, "--python", python, *rows, *more]


@pytest.mark.parametrize(
    ("engine", "files", "packages"),
    [
        ("vllm", {"vllm.py": VLLM}, ["vllm"]),
        (
            "deepspeed-mii",
            {"mii/__init__.py": "", "mii/api.py": MII, "mii/config.py": CONFIG, "transformers_free.py": LOAD},
            ["deepspeed-mii", "deepspeed", "deepspeed-kernels"],
        ),
    ],
)
def test_every_row_is_timed_in_the_engines_own_environment(
    peers: ModuleType, tmp_path: Path, engine: str, files: dict[str, str], packages: list[str]
) -> None:
    python = make_environment(tmp_path / "env", files, packages)
    assert peers.main(arguments(engine, python, "--json", str(tmp_path / "result.json"))) == 0
    report = json.loads((tmp_path / "result.json").read_text())
    assert [row["name"] for row in report["rows"]] == ["decode-8", "answers-256"]
    assert [len(row["samples"]) for row in report["rows"]] == [3, 2]
    assert report["versions"] == dict.fromkeys(packages, "1.2")
    assert report["ready_s"] >= 0


def test_an_engine_that_answers_too_little_is_not_timed(peers: ModuleType, tmp_path: Path) -> None:
    python = make_environment(tmp_path / "env", {"vllm.py": VLLM.replace("SHORT = 0", "SHORT = 1")}, ["vllm"])
    with pytest.raises(SystemExit, match="tokens were asked for"):
        peers.main(arguments("vllm", python))


def test_an_engine_that_dies_leaves_the_rows_before(
    peers: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dying = VLLM.replace("        assert all(", "        assert len(prompts) < 9\n        assert all(")
    python = make_environment(tmp_path / "env", {"vllm.py": dying}, ["vllm"])
    assert peers.main(arguments("vllm", python)) == 1
    printed = capsys.readouterr().out
    assert "decode-8" in printed
    assert "exit code 1" in printed


@pytest.mark.parametrize("engine", ["vllm", "deepspeed-mii"])
def test_what_is_not_installed_is_named(peers: ModuleType, tmp_path: Path, engine: str) -> None:
    python = make_environment(tmp_path / "env", {}, [])
    with pytest.raises(SystemExit, match=rf"lacks what is needed \({engine}.*pip install {engine}"):
        peers.main(arguments(engine, python))
    with pytest.raises(SystemExit, match="cannot be run"):
        peers.main(arguments(engine, str(tmp_path / "nothing")))
