"""How GGUF's byte-level vocabularies cut text before merging: `tokenizer.ggml.pre` names one of these.

The patterns are those that the models were published with. Order matters: each step splits what the one before left.
"""

from __future__ import annotations

from collections.abc import Callable

from tokenizers import Regex, pre_tokenizers
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Punctuation, Split

_HEAD = r"[^\r\n\p{L}\p{N}]?"
_ENGLISH = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_BLANKS = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


def _words(digits: str) -> str:
    """Words with at most one character of another kind before them, `digits` digits, punctuation with its line ends."""
    return rf"{_ENGLISH}|{_HEAD}\p{{L}}+|\p{{N}}{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_BLANKS}"


def _cased_words(digits: str, ending: str) -> str:
    """The same, but a word also ends where a capital follows a small letter."""
    words = rf"{_HEAD}{_UPPER}*{_LOWER}+{ending}|{_HEAD}{_UPPER}+{_LOWER}*{ending}"
    return rf"{words}|\p{{N}}{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_BLANKS}"


_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CJK = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_DEEPSEEK3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|"
    + _BLANKS
)
_BLOOM = " ?[^(\\s|[.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c])]+"


def _split(*patterns: str) -> list[PreTokenizer]:
    splits: list[PreTokenizer] = [Split(Regex(pattern), "isolated") for pattern in patterns]
    return [*splits, ByteLevel(add_prefix_space=False, use_regex=False)]


def _gpt2(*before: PreTokenizer) -> list[PreTokenizer]:
    return [*before, ByteLevel(add_prefix_space=False, use_regex=True)]


def _falcon() -> list[PreTokenizer]:
    return [
        *_gpt2(Punctuation("contiguous")),
        Digits(individual_digits=False),
        Split(Regex("[0-9][0-9][0-9]"), "isolated"),
    ]


_STEPS: dict[str, Callable[[], list[PreTokenizer]]] = {
    "default": lambda: _split(r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
    "gpt-2": _gpt2,
    "smollm": lambda: _gpt2(Digits(individual_digits=True)),
    "falcon": _falcon,
    "llama-bpe": lambda: _split(_words("{1,3}")),
    "qwen2": lambda: _split(_words("")),
    "tekken": lambda: _split(_cased_words("", "")),
    "gpt-4o": lambda: _split(_cased_words("{1,3}", f"{_ENGLISH}?")),
    "deepseek-coder": lambda: _split(
        "[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+", r"\p{N}"
    ),
    "deepseek-v3": lambda: _split(r"\p{N}{1,3}", _CJK, _DEEPSEEK3),
    "bloom": lambda: _split(_BLOOM),
}
_SAME = {
    "gpt-2": "phi-2 mpt olmo jais gigachat a.x-4.0 mellum exaone4 trillion granite-docling",
    "smollm": "starcoder refact command-r codeshell exaone minerva-7b",
    "llama-bpe": "llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 dbrx smaug-bpe glm4 chatglm-bpe",
    "qwen2": "deepseek-r1-qwen kormo stablelm2 hunyuan megrez grok-2",
    "gpt-4o": "llama4 minimax-m2",
    "deepseek-v3": "hunyuan-dense",
    "bloom": "poro-chat gpt3-finnish",
}
_ALIASES = {alias: name for name, aliases in _SAME.items() for alias in aliases.split()}
# A word that is in the vocabulary as a whole is that token, whatever the merges would make of it.
WHOLE_WORDS = frozenset(
    ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "tekken")
)
# These begin a text with the begin-of-text token where the file does not say otherwise.
BEGINS_TEXT = WHOLE_WORDS


def pre_tokenizer(name: str) -> PreTokenizer | None:
    """The pre-tokenizer of a name; None for a name that is not known."""
    steps = _STEPS.get(_ALIASES.get(name, name))
    return None if steps is None else pre_tokenizers.Sequence(steps())


def known_names() -> list[str]:
    """Every name that `pre_tokenizer` knows."""
    return sorted([*_STEPS, *_ALIASES])
