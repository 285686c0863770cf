"""Tokenizers out of a GGUF file's metadata, as `tokenizers.Tokenizer` objects.

Two kinds occur in language models: byte-level BPE ("gpt2": vocabulary, merges, the name of a pre-tokenizer) and
SentencePiece ("llama": vocabulary with scores, and bytes for what it lacks).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE

from mii.errors import TokenizerError
from mii.logging import logger
from mii.modeling.gguf_pretokenizers import BEGINS_TEXT, WHOLE_WORDS, known_names, pre_tokenizer

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 1, 2, 3, 4, 5
_SPACE = "\u2581"  # SentencePiece's visible space


@dataclass(frozen=True, slots=True)
class GGUFVocabulary:
    """The tokenizer's part of the metadata, checked.

    Args:
        source: the file, for messages.
        tokens: the text of each id, without unused ones at the end.
        kinds: the type of each token, int.
        metadata: every key of the file.
    """

    source: str
    tokens: list[str]
    kinds: np.ndarray[Any, np.dtype[Any]]
    metadata: Mapping[str, Any]

    @classmethod
    def read(cls, source: str, metadata: Mapping[str, Any]) -> GGUFVocabulary:
        """Raises TokenizerError where the file has no vocabulary or a broken one."""
        tokens = metadata.get("tokenizer.ggml.tokens")
        if not isinstance(tokens, list) or not tokens or not isinstance(tokens[0], str):
            raise TokenizerError(f"{source} holds no vocabulary. Pass tokenizer= with a folder or hub id that has one.")
        kinds = metadata.get("tokenizer.ggml.token_type")
        if kinds is None:
            kinds = np.full(len(tokens), _NORMAL)
        if not isinstance(kinds, np.ndarray) or len(kinds) != len(tokens):
            raise TokenizerError(
                f"{source} is corrupt: {len(tokens)} tokens and token types for another number of them."
            )
        used = np.flatnonzero(kinds != _UNUSED)
        count = int(used[-1]) + 1 if len(used) else len(tokens)
        return cls(source, tokens[:count], kinds[:count], metadata)

    def get(self, name: str, default: Any = None) -> Any:
        return self.metadata.get(f"tokenizer.ggml.{name}", default)

    def special(self, role: str) -> str | None:
        """The text of the token with a role: "bos", "eos", "unknown", "padding"."""
        token = self.get(f"{role}_token_id")
        return self.tokens[token] if type(token) is int and 0 <= token < len(self.tokens) else None

    @property
    def adds_bos(self) -> bool:
        default = self.get("model") == "llama" or self.get("pre") in BEGINS_TEXT
        return bool(self.get("add_bos_token", default)) and self.special("bos") is not None

    @property
    def adds_eos(self) -> bool:
        return bool(self.get("add_eos_token", False)) and self.special("eos") is not None


def build_tokenizer(vocabulary: GGUFVocabulary) -> Tokenizer:
    """The tokenizer of a file, equal token for token to what the model was trained with.

    Raises:
        TokenizerError: a kind or a pre-tokenizer that mii does not know; says what to do instead.
    """
    kind = vocabulary.get("model")
    if kind == "gpt2":
        tokenizer = _byte_level(vocabulary)
    elif kind == "llama":
        tokenizer = _sentence_piece(vocabulary)
    else:
        raise TokenizerError(
            f"{vocabulary.source} has a tokenizer of kind {kind!r}; mii reads gpt2 and llama ones from GGUF. Pass "
            "tokenizer= with a Hugging Face folder or hub id of the same model."
        )
    _add_tokens(tokenizer, vocabulary)
    _add_ends(tokenizer, vocabulary)
    return tokenizer


def special_tokens(vocabulary: GGUFVocabulary) -> dict[str, str]:
    """The named special tokens of a file, as `transformers` calls them."""
    roles = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    return {name: text for name, role in roles.items() if (text := vocabulary.special(role)) is not None}


def chat_template(vocabulary: GGUFVocabulary) -> str | dict[str, str] | None:
    """The chat template of a file; a dictionary by name where it has several."""
    default = vocabulary.metadata.get("tokenizer.chat_template")
    names = vocabulary.metadata.get("tokenizer.chat_templates")
    templates = {name: vocabulary.metadata.get(f"tokenizer.chat_template.{name}") for name in names or ()}
    named = {name: template for name, template in templates.items() if isinstance(template, str)}
    if not named:
        return default if isinstance(default, str) else None
    return {"default": default, **named} if isinstance(default, str) else named


def _byte_level(vocabulary: GGUFVocabulary) -> Tokenizer:
    name = vocabulary.get("pre")
    if name is None:
        logger.warning(
            "%s does not name its pre-tokenizer; using the default one, which may not fit", vocabulary.source
        )
        name = "default"
    splitter = pre_tokenizer(name)
    if splitter is None:
        raise TokenizerError(
            f"{vocabulary.source} asks for the pre-tokenizer {name!r}; mii knows {', '.join(known_names())}. Pass "
            "tokenizer= with a Hugging Face folder or hub id of the same model."
        )
    merges = vocabulary.get("merges")
    if not isinstance(merges, list):
        raise TokenizerError(f"{vocabulary.source} is corrupt: its vocabulary has no merges.")
    tokenizer = _bpe(vocabulary, [_pair(merge) for merge in merges], ignore_merges=name in WHOLE_WORDS)
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _pair(merge: str) -> tuple[str, str]:
    cut = merge.find(" ", 1)  # a part may itself begin with a space
    return merge[:cut], merge[cut + 1 :]


def _bpe(vocabulary: GGUFVocabulary, merges: list[tuple[str, str]], **options: Any) -> Tokenizer:
    ids = {token: number for number, token in enumerate(vocabulary.tokens)}
    try:
        return Tokenizer(BPE(vocab=ids, merges=merges, **options))
    except Exception as error:  # the library's own errors have no narrower type
        raise TokenizerError(
            f"{vocabulary.source} is corrupt: its vocabulary does not fit its merges: {error}."
        ) from error


def _sentence_piece(vocabulary: GGUFVocabulary) -> Tokenizer:
    tokenizer = _bpe(vocabulary, _merges(vocabulary), unk_token=vocabulary.special("unknown"), fuse_unk=True,
                     byte_fallback=True)  # fmt: skip
    spaces = normalizers.Replace(" ", _SPACE)
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if vocabulary.get("add_space_prefix", True):
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces])
        tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    else:
        tokenizer.normalizer = spaces
        tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def _merges(vocabulary: GGUFVocabulary) -> list[tuple[str, str]]:
    """SentencePiece's BPE joins the two neighbours whose union scores best: every split of every token, best first."""
    scores = vocabulary.get("scores")
    if not isinstance(scores, np.ndarray) or len(scores) < len(vocabulary.tokens):
        raise TokenizerError(f"{vocabulary.source} is corrupt: its SentencePiece vocabulary has no scores.")
    textual = np.isin(vocabulary.kinds, (_NORMAL, _USER_DEFINED))
    ids = {token: number for number, token in enumerate(vocabulary.tokens) if textual[number]}
    order = np.argsort(-scores[: len(vocabulary.tokens)], kind="stable").tolist()
    merges: list[tuple[str, str]] = []
    for number in order:
        token = vocabulary.tokens[number]
        if not textual[number]:
            continue
        splits = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        splits = [pair for pair in splits if pair[0] in ids and pair[1] in ids]
        merges += sorted(splits, key=lambda pair: (ids[pair[0]], ids[pair[1]]))
    return merges


def _add_tokens(tokenizer: Tokenizer, vocabulary: GGUFVocabulary) -> None:
    """Control tokens and the user's own are found in a text before anything else."""
    for kinds, special in (((_UNKNOWN, _CONTROL), True), ((_USER_DEFINED,), False)):
        numbers = np.flatnonzero(np.isin(vocabulary.kinds, kinds)).tolist()
        added = [AddedToken(vocabulary.tokens[n], special=special, normalized=False) for n in numbers]
        if special:
            tokenizer.add_special_tokens(added)
        else:
            tokenizer.add_tokens(added)


def _add_ends(tokenizer: Tokenizer, vocabulary: GGUFVocabulary) -> None:
    """Begin- and end-of-text tokens around a text, where the file asks for them."""
    bos = vocabulary.special("bos") if vocabulary.adds_bos else None
    eos = vocabulary.special("eos") if vocabulary.adds_eos else None
    if bos is None and eos is None:
        return
    single = [*([bos] if bos else []), "$A", *([eos] if eos else [])]
    pair = [*single, *([f"{bos}:1"] if bos else []), "$B:1", *([f"{eos}:1"] if eos else [])]
    ids = {token: vocabulary.tokens.index(token) for token in (bos, eos) if token is not None}
    tokenizer.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=list(ids.items()))
