"""Tokenizers out of GGUF metadata, against slow and simple encoders written from the algorithms' descriptions."""

from __future__ import annotations

import itertools
import re as builtin_re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.pre_tokenizers import ByteLevel

from mii.errors import TokenizerError
from mii.modeling.checkpoint.gguf.reader import GGUFFile
from mii.modeling.gguf_pretokenizers import known_names, pre_tokenizer
from mii.modeling.gguf_tokenizer import GGUFVocabulary, build_tokenizer
from mii.modeling.tokenizers import GGUFTokenizer

TEXTS = [
    "Hello world",
    " leading and trailing  ",
    "digits 1234567890, 3.14 and v2.0; 2024-01-02",
    "12  345   6\t7\n8",
    "half ½, squared ², Ⅷ, ٣٤٥, 一二三",
    "don't you'll WE'RE I'M it'S",
    "naïve café Ünïcödé ßtraße",
    "日本語のテキスト、中文文本。한국어",
    "emoji 👍🏽 family 👨‍👩‍👧 flag 🇫🇷",
    "def f(x):\n    return x**2  # comment\n\n\n\tindented",
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
    "snake_case, kebab-case, camelCase, SCREAMING; a+b=c <tag/> $1^2~|`",
    "line\r\nends\r\n\r\n  and   spaces \n ",
    "\u200b zero width \u00a0 no-break\u3000wide",
    "",
]
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def byte_alphabet() -> dict[int, str]:
    """GPT-2's printable stand-in for every byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + at) for at, byte in enumerate(others)}


ALPHABET = byte_alphabet()


def pair_encode(word: str, ranks: dict[tuple[str, str], int]) -> list[str]:
    """Byte pair encoding: join the best-ranked neighbours, the leftmost first, until none has a rank."""
    symbols = list(word)
    while len(symbols) > 1:
        best = min(itertools.pairwise(symbols), key=lambda pair: ranks.get(pair, 1 << 60))
        if best not in ranks:
            break
        joined, at = [], 0
        while at < len(symbols):
            if at + 1 < len(symbols) and (symbols[at], symbols[at + 1]) == best:
                joined.append(symbols[at] + symbols[at + 1])
                at += 2
            else:
                joined.append(symbols[at])
                at += 1
        symbols = joined
    return symbols


class Smollm:
    """SmolLM's encoder: control tokens, then single digits, then GPT-2's words, then byte pairs."""

    def __init__(self, metadata: dict[str, Any]) -> None:
        tokens = metadata["tokenizer.ggml.tokens"]
        self.ids = {token: number for number, token in enumerate(tokens)}
        merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
        self.ranks = {pair: rank for rank, pair in enumerate(merges)}
        self.control = [
            token for token, kind in zip(tokens, metadata["tokenizer.ggml.token_type"], strict=True) if kind == 3
        ]

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for part in builtin_re.split("(" + "|".join(map(builtin_re.escape, self.control)) + ")", text):
            if part in self.control:
                ids.append(self.ids[part])
                continue
            for piece in regex.findall(r"\p{N}|\P{N}+", part):
                for word in regex.findall(GPT2, piece):
                    stand_in = "".join(ALPHABET[byte] for byte in word.encode())
                    ids += [self.ids[symbol] for symbol in pair_encode(stand_in, self.ranks)]
        return ids


@pytest.fixture(scope="module")
def smollm_metadata(smollm2: Path) -> dict[str, Any]:
    return GGUFFile(smollm2).metadata


@pytest.fixture(scope="module")
def smollm_tokenizer(smollm_metadata: dict[str, Any]) -> GGUFTokenizer:
    return GGUFTokenizer("SmolLM2", smollm_metadata)


@pytest.fixture(scope="module")
def smollm_algorithm(smollm_metadata: dict[str, Any]) -> Smollm:
    return Smollm(smollm_metadata)


@pytest.mark.parametrize("text", TEXTS)
def test_smollm2_encodes_as_the_algorithm_says(
    smollm_tokenizer: GGUFTokenizer, smollm_algorithm: Smollm, text: str
) -> None:
    assert smollm_tokenizer.encode(text) == smollm_algorithm.encode(text)


def test_smollm2_gives_known_ids(smollm_tokenizer: GGUFTokenizer) -> None:
    tokenizer = smollm_tokenizer
    assert tokenizer.encode("The capital of France is") == [504, 3575, 282, 4649, 314]
    # Numbers are cut into digits and the spaces before them stay one token; plain GPT-2 splitting does neither.
    assert tokenizer.encode("12  345 ½ x") == [33, 34, 256, 35, 36, 37, 216, 16738, 1792]


def test_smollm2_decodes_what_it_encoded(smollm_tokenizer: GGUFTokenizer) -> None:
    tokenizer = smollm_tokenizer
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    ids = tokenizer.encode("a<|im_end|>")
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a"


# As in the models' own tokenizer.json files; `|` between the lines.
WORDS = {
    name: "|".join(alternatives)
    for name, alternatives in {
        "llama-bpe": [
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}",
            r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        ],
        "qwen2": [
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}",
            r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        ],
        "gpt-2": [GPT2],
        "tekken": [
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
            r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        ],
        "gpt-4o": [
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
            r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        ],
    }.items()
}


def byte_pieces(name: str, text: str) -> list[bytes]:
    """The pieces of a text, with bytes in place of their stand-ins."""
    back = {stand_in: byte for byte, stand_in in ALPHABET.items()}
    splitter = pre_tokenizer(name)
    assert splitter is not None
    return [bytes(back[character] for character in piece) for piece, _ in splitter.pre_tokenize_str(text)]


def pieces(name: str, text: str) -> list[str]:
    return [piece.decode() for piece in byte_pieces(name, text)]


@pytest.mark.parametrize("name", WORDS)
def test_pre_tokenizers_split_by_the_models_patterns(name: str) -> None:
    for text in TEXTS:
        assert pieces(name, text) == regex.findall(WORDS[name], text), text


SPLITS = {
    "smollm": ("a 12 b", ["a", " ", "1", "2", " b"]),
    "falcon": ("x=12345, ok", ["x", "=", "123", "45", ",", " ok"]),
    "default": ("x=12345, ok", ["x", "=", "123", "45", ",", " ok"]),
    "deepseek-coder": ("ab 12\ncd", ["ab", " ", "1", "2", "\n", "cd"]),
    "deepseek-v3": ("12345 漢字かな ab", ["123", "45", " ", "漢字かな", " ab"]),
    "bloom": ("ab, cd. e", ["ab", ",", " cd", ".", " e"]),
}


@pytest.mark.parametrize("name", SPLITS)
def test_pre_tokenizers_with_several_steps(name: str) -> None:
    text, expected = SPLITS[name]
    assert pieces(name, text) == expected


@pytest.mark.parametrize("name", known_names())
def test_no_pre_tokenizer_loses_a_character(name: str) -> None:
    for text in TEXTS:
        # In bytes: Falcon also cuts at bytes whose stand-in counts as a digit.
        assert b"".join(byte_pieces(name, text)) == text.encode()


def byte_vocabulary(**keys: Any) -> dict[str, Any]:
    tokens = [*sorted(ByteLevel.alphabet()), "ab", "abc", "<s>", "</s>", "<tool>", "[PAD1]", "[PAD2]"]
    kinds = [*[1] * 258, 3, 3, 4, 5, 5]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.array(kinds, dtype=np.int32),
        "tokenizer.ggml.merges": ["a b", "ab c"],
        "tokenizer.ggml.bos_token_id": 258,
        "tokenizer.ggml.eos_token_id": 259,
        **{f"tokenizer.ggml.{name}": value for name, value in keys.items()},
    }


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, [257]),
        ({"add_bos_token": True}, [258, 257]),
        ({"add_eos_token": True}, [257, 259]),
        ({"add_bos_token": True, "add_eos_token": True}, [258, 257, 259]),
        ({"pre": "llama-bpe"}, [258, 257]),  # begins texts unless told otherwise
        ({"pre": "llama-bpe", "add_bos_token": False}, [257]),
        ({"add_bos_token": True, "bos_token_id": 9999}, [257]),  # a token that does not exist
    ],
)
def test_begin_and_end_of_text_are_added_where_the_file_asks(keys: dict[str, Any], expected: list[int]) -> None:
    tokenizer = GGUFTokenizer("test", byte_vocabulary(**keys))
    assert tokenizer.encode("abc") == expected
    assert tokenizer.tokenizer.encode("abc") == expected
    assert tokenizer.encode("abc") == expected  # now through the object that was just made
    assert tokenizer.encode("abc", add_special_tokens=False) == [257]


def test_control_tokens_are_special_and_the_user_s_are_not() -> None:
    tokenizer = GGUFTokenizer("test", byte_vocabulary())
    ids = tokenizer.encode("<s>ab<tool>c")
    assert ids[:3] == [258, 256, 260]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "ab<tool>c"
    assert tokenizer.decode(ids) == "<s>ab<tool>c"


def test_unused_ids_at_the_end_do_not_count() -> None:
    assert GGUFTokenizer("test", byte_vocabulary()).vocab_size == 261


def test_whole_words_come_before_merges_where_the_model_has_it_so() -> None:
    keys = {"merges": ["a b"]}  # "abc" is a token that no merge leads to
    assert GGUFTokenizer("test", byte_vocabulary(**keys)).encode("abc")[0] == 256
    assert GGUFTokenizer("test", byte_vocabulary(**keys, pre="llama-bpe", add_bos_token=False)).encode("abc") == [257]


def sentence_piece(**keys: Any) -> dict[str, Any]:
    words = ["▁", "a", "b", "c", "ab", "bc", "▁a", "abc", "▁ab", "ca", "cab", "▁▁", "▁abc"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words, "<extra>"]
    kinds = [2, 3, 3, *[6] * 256, *[1] * len(words), 4]
    scores = [
        0.0,
        0.0,
        0.0,
        *[0.0] * 256,
        *(-float(rank) for rank in (9, 8, 7, 6, 3, 2, 5, 1, 4, 2.5, 0.5, 10, 1.5)),
        0.0,
    ]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.array(kinds, dtype=np.int32),
        "tokenizer.ggml.scores": np.array(scores, dtype=np.float32),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        **{f"tokenizer.ggml.{name}": value for name, value in keys.items()},
    }


def best_score_first(text: str, metadata: dict[str, Any]) -> list[int]:
    """SentencePiece's BPE: join the neighbours whose union scores best, leftmost first; bytes for the rest."""
    tokens, scores = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.scores"]
    ids = {token: number for number, token in enumerate(tokens) if metadata["tokenizer.ggml.token_type"][number] == 1}
    symbols = list(text.replace(" ", "▁"))
    while True:
        joinable = [at for at in range(len(symbols) - 1) if symbols[at] + symbols[at + 1] in ids]
        if not joinable:
            break
        at = max(joinable, key=lambda at: (scores[ids[symbols[at] + symbols[at + 1]]], -at))
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
    encoded = [[ids[symbol]] if symbol in ids else [3 + byte for byte in symbol.encode()] for symbol in symbols]
    return [number for part in encoded for number in part]


@settings(max_examples=300)
@given(st.text(alphabet="abc dé", max_size=24))
def test_sentence_piece_joins_the_best_neighbours_first(text: str) -> None:
    metadata = sentence_piece(add_space_prefix=False)
    tokenizer = build_tokenizer(GGUFVocabulary.read("test", metadata))
    assert tokenizer.encode(text, add_special_tokens=False).ids == best_score_first(text, metadata)
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_sentence_piece_begins_a_text_with_a_space_and_the_begin_token() -> None:
    tokenizer = GGUFTokenizer("test", sentence_piece())
    ids = tokenizer.encode("abc")
    assert ids == [1, 3 + 256 + 12]
    assert tokenizer.decode(ids) == "<s> abc"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "abc"
    assert tokenizer.encode("é")[-2:] == [3 + 0xC3, 3 + 0xA9]


BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "no vocabulary": ({"tokenizer.ggml.model": "gpt2"}, "holds no vocabulary. Pass tokenizer="),
    "numbers for tokens": (byte_vocabulary(tokens=np.arange(4)), "holds no vocabulary"),
    "types of another length": (byte_vocabulary(token_type=np.zeros(3)), "token types for another number"),
    "an unknown kind": (byte_vocabulary(model="t5"), "tokenizer of kind 't5'; mii reads gpt2 and llama"),
    "an unknown pre-tokenizer": (byte_vocabulary(pre="klingon"), "pre-tokenizer 'klingon'; mii knows .*smollm"),
    "no merges": (byte_vocabulary(merges=None), "its vocabulary has no merges"),
    "merges of tokens that are none": (byte_vocabulary(merges=["zz yy"]), "does not fit its merges"),
    "no scores": (sentence_piece(scores=None), "has no scores"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_tokenizers_are_refused_with_the_reason(case: str) -> None:
    metadata, message = BROKEN[case]
    with pytest.raises(TokenizerError, match=message):
        GGUFTokenizer("file.gguf", metadata)


def test_several_chat_templates_are_kept_by_name() -> None:
    metadata = byte_vocabulary() | {
        "tokenizer.chat_template": "default {{ messages[0].content }}",
        "tokenizer.chat_templates": ["tool_use", "absent"],
        "tokenizer.chat_template.tool_use": "tools {{ messages[0].content }}",
    }
    tokenizer = GGUFTokenizer("test", metadata)
    messages = [{"role": "user", "content": "ab"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "default ab"
    assert tokenizer.apply_chat_template(messages, tokenize=False, chat_template="tool_use") == "tools ab"
