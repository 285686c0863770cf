"""Where a command's prompts come from: arguments, a file, or standard input."""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mii.errors import EmptyPromptError, PromptEncodingError, PromptTypeError

_HEADING = 70
_LINE_FORMS = '"a prompt", [token ids], {"prompt": ...} or {"messages": [...]}'


@dataclass(frozen=True)
class CommandPrompt:
    """One prompt as it was given.

    Args:
        given: Text, token ids, or the messages of a chat.
    """

    given: Any

    @property
    def is_chat(self) -> bool:
        return isinstance(self.given, list) and bool(self.given) and isinstance(self.given[0], dict)

    @property
    def text(self) -> str:
        """The prompt as text, "" where it was not given as text."""
        return self.given if isinstance(self.given, str) else ""

    def heading(self, index: int, count: int) -> str:
        """The lines that tell this answer from the others, where there are others."""
        if count == 1:
            return ""
        said = str(self.given[-1].get("content", "")) if self.is_chat else str(self.given)
        line = " ".join(said.split())
        shown = line if len(line) <= _HEADING else line[: _HEADING - 3] + "..."
        return ("\n" if index else "") + f"[{index + 1}/{count}] {shown}\n"

    def for_model(self, tokenizer: Any, chat: bool, system: str | None) -> Any:
        """What the pipeline takes: the prompt itself, or the token ids of a chat that ends with it.

        Args:
            tokenizer: The model's.
            chat: Whether a text is what a user says in a chat.
            system: The system message of that chat.
        """
        if not self.is_chat and not (chat and isinstance(self.given, str)):
            return self.given
        messages = self.given if self.is_chat else [{"role": "user", "content": self.given}]
        if system is not None:
            messages = [{"role": "system", "content": system}, *messages]
        return tokenizer.apply_chat_template(messages)


def read_prompts(args: argparse.Namespace) -> list[CommandPrompt]:
    """The prompts of a command line.

    Raises:
        argparse.ArgumentError: None are given, or in two ways.
        EmptyPromptError: The file or standard input holds none.
        PromptEncodingError: A text is not UTF-8.
        PromptTypeError: A line of JSON has another form than it may have.
        OSError: The file cannot be read.
    """
    if args.prompts and args.file is not None:
        raise argparse.ArgumentError(None, "prompts are given as arguments and in --file; give one of the two")
    if args.prompts:
        return [CommandPrompt(_checked_argument(text, at)) for at, text in enumerate(args.prompts, 1)]
    name = args.file if args.file is not None else "-"
    lines = _lines(name)
    if args.jsonl or name.endswith(".jsonl"):
        prompts = [CommandPrompt(_from_json(line, f"{_source(name)}, line {at}")) for at, line in lines]
    else:
        prompts = [CommandPrompt(line) for _, line in lines]
    if not prompts:
        raise EmptyPromptError(f"{_source(name)} holds no prompt; give one a line, or prompts as arguments")
    return prompts


def _checked_argument(text: str, at: int) -> str:
    """What was typed, also where the locale is not UTF-8 and Python has kept the bytes apart."""
    try:
        return os.fsencode(text).decode()
    except UnicodeError:
        raise PromptEncodingError(f"prompt {at} on the command line is not UTF-8") from None


def _lines(name: str) -> list[tuple[int, str]]:
    """The lines that are not blank, with their numbers."""
    if name == "-":
        if sys.stdin is None or sys.stdin.isatty():
            raise argparse.ArgumentError(None, 'no prompt; give it as an argument: mii generate "DeepSpeed is"')
        raw = sys.stdin.buffer.read()
    else:
        raw = Path(name).read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise PromptEncodingError(
            f"{_source(name)} is not UTF-8: byte 0x{raw[error.start]:02x} in line {line}; convert it, for example with "
            "iconv -t UTF-8"
        ) from None
    numbered = enumerate(text.replace("\r\n", "\n").split("\n"), 1)
    return [(number, line) for number, line in numbered if line.strip()]


def _from_json(line: str, where: str) -> Any:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise PromptTypeError(f"{where} is not JSON: {error}") from None
    if isinstance(value, dict):
        value = value.get("messages", value.get("prompt"))
        if isinstance(value, list) and value and isinstance(value[0], dict):
            return value
    if isinstance(value, str) or (isinstance(value, list) and all(type(token) is int for token in value)):
        return value
    raise PromptTypeError(f"{where} has no prompt; a line is {_LINE_FORMS}")


def _source(name: str) -> str:
    return "standard input" if name == "-" else name
