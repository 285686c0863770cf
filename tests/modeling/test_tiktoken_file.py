"""Qwen 1's `qwen.tiktoken`: the merges by rank as published, special tokens, chats, and streams without remote code."""

from __future__ import annotations

import base64
import itertools
import json
import re
import unicodedata
from collections import Counter
from pathlib import Path

import pytest

from mii.batching.generation.detokenizer import TokenDecoder
from mii.errors import TokenizerError
from mii.modeling.tokenizers import HFTokenizer, load_tokenizer

CORPUS = (
    "The quick brown fox isn't lazy: it'll jump over 13 dogs, over and over again.\n\n"
    "def fibonacci(n):\n    return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)\n"
    "通义千问是一个大模型。能回答问题。 naïve café Ελληνικά 🤗🤗 "
)
TEXTS = (
    "",
    "The lazy dogs aren't over there, they'LL be back",
    "over  and   over\n\n  again\t\r\n \n",
    "12345 fibonacci(n-1)",
    "问题是模型 🤗 e\u0301 naïve",
    "mixed 大dog模 x\u200dy",
)


def train(text: str, merges: int) -> list[bytes]:
    """Bytes, then the most frequent neighbours of a text, one union after the other: how such vocabularies are made."""
    ranks = [bytes([value]) for value in range(256)]
    parts = [bytes([value]) for value in text.encode()]
    for _ in range(merges):
        left, right = Counter(itertools.pairwise(parts)).most_common(1)[0][0]
        ranks.append(left + right)
        parts = merged(parts, left + right)
    return list(dict.fromkeys(ranks))


def merged(parts: list[bytes], union: bytes) -> list[bytes]:
    """The first neighbours whose union this is become one, again and again."""
    result: list[bytes] = []
    index = 0
    while index < len(parts):
        pair = b"".join(parts[index : index + 2])
        joined = len(parts) - index > 1 and pair == union
        result.append(pair if joined else parts[index])
        index += 1 + joined
    return result


def encode_by_rank(word: bytes, ranks: dict[bytes, int]) -> list[int]:
    """Of all neighbours those with the lowest rank of their union are merged first."""
    if word in ranks:
        return [ranks[word]]
    parts = [bytes([value]) for value in word]
    while len(parts) > 1:
        unions = [left + right for left, right in itertools.pairwise(parts)]
        best = min(range(len(unions)), key=lambda index: (ranks.get(unions[index], len(ranks)), index))
        if unions[best] not in ranks:
            break
        parts[best : best + 2] = [unions[best]]
    return [ranks[part] for part in parts]


def words(text: str) -> list[str]:
    """Qwen's cut of a text, for texts whose letters and digits Python's `re` tells apart in the same way."""
    letter, number = r"[^\W\d_]", r"\d"
    other = rf"(?:(?!{letter}|{number})[^\r\n])"
    pattern = (
        rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|{other}?{letter}+|{number}| ?(?:(?!{letter}|{number}|\s).)+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    return [match[0] for match in re.finditer(pattern, text)]


RANKS = train(CORPUS, 120)


def write(folder: Path, chat: bool = False) -> Path:
    lines = [base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(RANKS)]
    (folder / "qwen.tiktoken").write_bytes(b"".join(lines))
    settings = {"auto_map": {"AutoTokenizer": ["tokenization_qwen.QWenTokenizer", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    if chat:
        (folder / "generation_config.json").write_text(json.dumps({"chat_format": "chatml", "eos_token_id": 151643}))
    return folder


@pytest.fixture
def tokenizer(tmp_path: Path) -> HFTokenizer:
    loaded = load_tokenizer(write(tmp_path))
    assert isinstance(loaded, HFTokenizer)
    return loaded


@pytest.mark.parametrize("text", [*TEXTS, CORPUS])
def test_texts_are_merged_by_rank(tokenizer: HFTokenizer, text: str) -> None:
    ranks = {token: rank for rank, token in enumerate(RANKS)}
    expected = [
        each for word in words(unicodedata.normalize("NFC", text)) for each in encode_by_rank(word.encode(), ranks)
    ]
    assert tokenizer.encode(text) == expected
    assert tokenizer.decode(expected) == unicodedata.normalize("NFC", text)


def test_special_tokens_follow_the_ranks(tokenizer: HFTokenizer) -> None:
    end = len(RANKS)
    assert tokenizer.encode("<|endoftext|><|im_start|><|im_end|><|extra_0|><|extra_204|>") == [
        *range(end, end + 4),
        end + 207,
    ]
    assert tokenizer.eos_token_id == end
    assert tokenizer.vocab_size == end + 208


def test_a_chat_model_speaks_its_format_and_ends_with_a_turn(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write(tmp_path, chat=True))
    assert isinstance(tokenizer, HFTokenizer)
    assert tokenizer.eos_token_id == len(RANKS) + 2
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert text == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    ids = tokenizer.apply_chat_template([{"role": "system", "content": "S"}, {"role": "user", "content": "Hi"}])
    assert ids == tokenizer.encode(
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert ids[0] == len(RANKS) + 1


def test_streamed_pieces_joined_are_the_decoded_whole(tokenizer: HFTokenizer) -> None:
    ids = [*tokenizer.encode(CORPUS), *range(200, 260), len(RANKS) + 2]
    stream = TokenDecoder(tokenizer).start()
    assert "".join([*(stream.push(token) for token in ids), stream.flush()]) == tokenizer.decode(ids)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"no-base64 256", "line 257 is no token in base64"),
        (b"IQ==", "line 257 is no token in base64"),
        (b"IQ== 700", "not those from 0 on"),
    ],
)
def test_a_broken_file_says_where(tmp_path: Path, line: bytes, message: str) -> None:
    path = write(tmp_path) / "qwen.tiktoken"
    path.write_bytes(b"".join(each + b"\n" for each in [*path.read_bytes().splitlines()[:256], line]))
    with pytest.raises(TokenizerError, match=message):
        load_tokenizer(tmp_path)
