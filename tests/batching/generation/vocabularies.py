"""Small tokenizers of every decoder kind, built in memory, for tests of text."""

from __future__ import annotations

from collections.abc import Callable

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

TEXT = [
    "the quick brown fox jumps over the lazy dog",
    "don't stop ! , . 你好 世界 😀😁 naïve café ½",
    "   a\n\n\tb  c",
]
SPECIAL = ["<s>", "</s>", "<|im_end|>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def byte_level() -> Tokenizer:
    """BPE over bytes, as GPT-2's and Llama 3's; merges cross character borders."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False
    )
    tokenizer.train_from_iterator([*TEXT, "😀😁😀😁😂😀你好你世界你好" * 3] * 3, trainer)
    tokenizer.add_tokens(["né 😀", AddedToken("Ġé")])
    return tokenizer


def sentencepiece(first_space: str = "strip") -> Tokenizer:
    """Pieces with U+2581 for a space and a token for each byte, decoded as Llama 2 does (strip) or Gemma (keep)."""
    pieces = ["<unk>", *SPECIAL, *BYTES, "▁", "▁▁", "▁the", "▁a", "b", "é", "▁", "▁😀", "你", "\ufffd", "▁b▁"]
    tokenizer = Tokenizer(models.Unigram([(piece, -1.0) for piece in dict.fromkeys(pieces)], 0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    strip = [decoders.Strip(" ", 1, 0)] if first_space == "strip" else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def metaspace() -> Tokenizer:
    """Unigram without bytes, as T5's: every U+2581 of the first token is dropped."""
    pieces = ["<unk>", *SPECIAL, "▁", "▁▁", "▁the", "a▁b", "b", "é", "😀", "\ufffd", "▁a"]
    tokenizer = Tokenizer(models.Unigram([(piece, -1.0) for piece in pieces], 0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def word_level() -> Tokenizer:
    """Whole words, joined by spaces."""
    tokenizer = Tokenizer(
        models.WordLevel({word: at for at, word in enumerate(["<unk>", *["a", "b", ".", ",", "n't"], "é"])}, "<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def word_piece() -> Tokenizer:
    """BERT's: a word's later parts begin with ##."""
    words = ["[UNK]", "a", "##b", "##", "the", "##é", ".", "n", "'", "t"]
    tokenizer = Tokenizer(models.WordPiece({word: at for at, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def end_of_word() -> Tokenizer:
    """BPE that marks the ends of words, as GPT-1's and CLIP's."""
    vocabulary = {piece: at for at, piece in enumerate(["<unk>", "a", "b</w>", "c", "é</w>", "</w>", "."])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.BPEDecoder()
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def replacing_bytes() -> Tokenizer:
    """Byte-level with a step behind it, so that the decoder must be seen as a whole."""
    tokenizer = byte_level()
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace("q", "QQ")])
    return tokenizer


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte level": byte_level,
    "byte level and more": replacing_bytes,
    "sentencepiece": sentencepiece,
    "sentencepiece, first space kept": lambda: sentencepiece("keep"),
    "metaspace": metaspace,
    "word level": word_level,
    "word piece": word_piece,
    "end of word": end_of_word,
}
