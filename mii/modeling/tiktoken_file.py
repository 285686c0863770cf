"""Qwen 1's tokenizer out of its `qwen.tiktoken`, which its repository reads with Python code of its own.

A line of the file is a token's bytes in base64 and its rank, which is its id. Of all neighbours in a text those two are
merged first whose union has the lowest rank; special tokens come after the last rank.
"""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

from mii.errors import TokenizerError
from mii.modeling.checkpoint.folder import read_json

FILE = "qwen.tiktoken"
END, TURN, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
_SPECIAL = (END, TURN, TURN_END, *(f"<|extra_{number}|>" for number in range(205)))
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CHAT = (
    "{% if messages and messages[0].role != 'system' %}"
    "{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{% endif %}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def load_qwen(folder: Path) -> Any:
    """The tokenizer of `transformers` for a folder with `qwen.tiktoken`.

    For a chat model it has the conversation's format that the model was trained with, and a turn ends a text.

    Raises:
        TokenizerError: a line is no token and rank.
    """
    from transformers import PreTrainedTokenizerFast

    chats = read_json(folder / "generation_config.json", required=False).get("chat_format") == "chatml"
    return PreTrainedTokenizerFast(
        tokenizer_object=build_tokenizer(read_ranks(folder / FILE)),
        eos_token=TURN_END if chats else END,
        pad_token=END,
        chat_template=_CHAT if chats else None,
        clean_up_tokenization_spaces=False,
    )


def read_ranks(path: Path) -> list[bytes]:
    """The bytes of every token, by its rank."""
    ranks: dict[int, bytes] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[int(rank)] = base64.b64decode(token, validate=True)
        except ValueError as error:
            raise TokenizerError(f"{path}, line {number} is no token in base64 and its rank.") from error
    if sorted(ranks) != list(range(len(ranks))) or len(set(ranks.values())) < len(ranks):
        raise TokenizerError(f"{path}: its {len(ranks)} ranks are not those from 0 on, each with a token of its own.")
    return [ranks[rank] for rank in range(len(ranks))]


def build_tokenizer(ranks: list[bytes]) -> Tokenizer:
    """The tokenizer whose merges have these ranks."""
    letters = _letters()
    names = ["".join(letters[byte] for byte in token) for token in ranks]
    vocabulary = {name: rank for rank, name in enumerate(names)}
    merges = [
        (name[:cut], name[cut:])
        for name in names
        for cut in range(1, len(name))
        if name[:cut] in vocabulary and name[cut:] in vocabulary
    ]
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=merges, ignore_merges=True))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in _SPECIAL])
    return tokenizer


def _letters() -> dict[int, str]:
    """The printable letter that stands for each byte in byte-level vocabularies: itself, or one past the 256th."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + index) for index, byte in enumerate(others)}
