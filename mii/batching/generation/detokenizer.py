"""Tokens to text as they come: never half a character, and the pieces joined are the decoded whole.

Byte-level vocabularies (GPT-2, Llama 3, Qwen, SmolLM2) are a table from token to bytes and an incremental UTF-8
decoder. Others are decoded in a window: the tokens whose text was last shown, then the new ones. The text that the new
ones add to the window is the next piece, because what a decoder does to a token depends on its neighbour at most, and
on whether it is the first of all (where SentencePiece strips a space). One exception is known, and held until it is
over: in a run of byte tokens (`<0xF0>`), one wrong byte makes replacement characters of the whole run. The work per
token does not grow with the text in either case.

Text is what the tokenizer's own decoder says. The clean-up of spaces that transformers can add to it (" ." to ".") is
not done: it changes code and tables, and cannot be undone once text is shown.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Container, Sequence
from functools import cache
from typing import Any, Protocol

from tokenizers import Tokenizer

REPLACEMENT = "\ufffd"
# Tokens of the prompt that are enough to stand before the first token of an answer.
CONTEXT_TOKENS = 8
# Tokens whose text tells whether a tokenizer does more to it than its decoder.
_SAMPLE = 512
_BYTE_TOKEN = re.compile("<0x([0-9a-fA-F]{2})>")


class Detokenizer(Protocol):
    """One request's tokens becoming text."""

    draft: str
    """What the last token adds to text that is likely but not sure yet, "" mostly; it comes again when it is sure."""

    def push(self, token_id: int) -> str:
        """The text that is sure now that this token came; "" while a character is incomplete."""

    def flush(self) -> str:
        """The rest, once no token follows: bytes that never became a character are U+FFFD, as in a whole decode."""


class TokenDecoder:
    """Makes a `Detokenizer` for each request; what all of them need of one tokenizer is read once.

    Args:
        tokenizer: mii's tokenizer wrapper, a tokenizer of transformers, a `tokenizers.Tokenizer`, or anything that has
            `decode(ids) -> str` (and `decode(ids, skip_special_tokens=True)` where special tokens shall be skipped).

    >>> from tokenizers import Tokenizer, models
    >>> detokenizer = TokenDecoder(Tokenizer(models.WordLevel({"so": 0, "long": 1}, unk_token="so"))).start()
    >>> [detokenizer.push(0), detokenizer.push(1), detokenizer.flush()]
    ['so', ' long', '']
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._fast = _fast_tokenizer(tokenizer)
        self._kinds = _decoder_kinds(self._fast) if self._fast is not None else ()
        self._start_with_skip = cache(self._prepare)
        self._bytes: Callable[[int], bytes] | None = None

    def start(self, *, skip_special_tokens: bool = False, context: Sequence[int] = ()) -> Detokenizer:
        """A detokenizer for a new answer.

        Args:
            skip_special_tokens: Whether special tokens are left out of the text.
            context: Tokens that the answer continues, such as the prompt's. Without them the first token is decoded as
                the beginning of a text, where some tokenizers strip a space.
        """
        return self._start_with_skip(skip_special_tokens)(context)

    def token_bytes(self, token_id: int) -> bytes:
        """What a token adds to a text, as bytes, since it may be part of a character; special tokens as written.

        >>> from tokenizers import Tokenizer, models
        >>> TokenDecoder(Tokenizer(models.WordLevel({"so": 0, "long": 1}, unk_token="so"))).token_bytes(1)
        b' long'
        """
        if self._bytes is None:
            if self._fast is not None and self._kinds == ("ByteLevel",):
                table = _ByteTable(self._fast, skip=False)
                self._bytes = lambda token: table[token][0]
            else:
                self._bytes = _TokensAlone(self._rules(skip=False)).__getitem__
        return self._bytes(token_id)

    def _prepare(self, skip: bool) -> Callable[[Sequence[int]], Detokenizer]:
        """What depends on the switch alone, so it is shared by every request."""
        if self._fast is not None and self._kinds == ("ByteLevel",):
            table = _ByteTable(self._fast, skip)
            return lambda _: _ByteDetokenizer(table)
        rules = self._rules(skip)
        return lambda context: _WindowDetokenizer(rules, context)

    def _rules(self, skip: bool) -> _WindowRules:
        if self._fast is None:
            options = {"skip_special_tokens": True} if skip else {}
            special = frozenset(getattr(self._tokenizer, "all_special_ids", ())) if skip else frozenset()
            return _WindowRules(lambda ids: str(self._tokenizer.decode(ids, **options)), special.__contains__)
        fast, hidden = self._fast, _HiddenTokens(self._fast, skip)
        return _WindowRules(
            lambda ids: fast.decode(ids, skip_special_tokens=False),
            hidden.__getitem__,
            _ByteTokens(fast).__getitem__ if "ByteFallback" in self._kinds else None,
            waits="ByteLevel" in self._kinds,
        )


def _fast_tokenizer(tokenizer: Any) -> Tokenizer | None:
    """The Rust tokenizer within, where its decoder is all that `tokenizer.decode` does."""
    if isinstance(tokenizer, Tokenizer):
        return tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        return None
    sample = list(range(min(_SAMPLE, backend.get_vocab_size())))
    return backend if tokenizer.decode(sample) == backend.decode(sample, skip_special_tokens=False) else None


def _decoder_kinds(tokenizer: Tokenizer) -> tuple[str, ...]:
    """The types of the tokenizer's decoders, in order, e.g. ("Replace", "ByteFallback", "Fuse", "Strip")."""

    def flatten(decoder: dict[str, Any]) -> tuple[str, ...]:
        if decoder["type"] == "Sequence":
            return tuple(kind for part in decoder["decoders"] for kind in flatten(part))
        return (decoder["type"],)

    return flatten(json.loads(tokenizer.decoder.__getstate__())) if tokenizer.decoder is not None else ()


class _HiddenTokens(dict[int, bool]):
    """Which tokens are left out before decoding: unknown ids always, special tokens when they are skipped."""

    def __init__(self, tokenizer: Tokenizer, skip: bool) -> None:
        super().__init__()
        self._token_of = tokenizer.id_to_token
        added = tokenizer.get_added_tokens_decoder().values() if skip else ()
        self._special: Container[str] = frozenset(token.content for token in added if token.special)

    def __missing__(self, token_id: int) -> bool:
        token = self._token_of(token_id)
        hidden = self[token_id] = token is None or token in self._special
        return hidden


class _ByteTokens(dict[int, int | None]):
    """The byte that a token such as `<0x0A>` stands for; None for every other token."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self._token_of = tokenizer.id_to_token

    def __missing__(self, token_id: int) -> int | None:
        match = _BYTE_TOKEN.fullmatch(self._token_of(token_id) or "")
        byte = self[token_id] = int(match[1], 16) if match else None
        return byte


@cache
def _byte_of_char() -> dict[str, int]:
    """How byte-level BPE writes a byte: as itself where that is printable, else the next of U+0100 and on (GPT-2)."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in set(plain)]
    return {chr(byte): byte for byte in plain} | {chr(256 + at): byte for at, byte in enumerate(others)}


class _ByteTable(dict[int, tuple[bytes, str | None]]):
    """Of each token its bytes, and its text where the bytes are whole characters."""

    def __init__(self, tokenizer: Tokenizer, skip: bool) -> None:
        super().__init__()
        self._token_of = tokenizer.id_to_token
        self._hidden = _HiddenTokens(tokenizer, skip)

    def __missing__(self, token_id: int) -> tuple[bytes, str | None]:
        token = "" if self._hidden[token_id] else self._token_of(token_id) or ""
        try:
            raw = bytes(map(_byte_of_char().__getitem__, token))
        except KeyError:  # an added token, kept as it was written
            raw = token.encode()
        try:
            entry: tuple[bytes, str | None] = (raw, raw.decode())
        except UnicodeDecodeError:
            entry = (raw, None)
        self[token_id] = entry
        return entry


class _ByteDetokenizer:
    """Byte-level vocabularies: at most three bytes ever wait."""

    draft = ""

    def __init__(self, table: _ByteTable) -> None:
        self._table = table
        self._waiting = b""

    def push(self, token_id: int) -> str:
        raw, text = self._table[token_id]
        if text is not None and not self._waiting:
            return text
        raw = self._waiting + raw
        text, used = codecs.utf_8_decode(raw, "replace", False)
        self._waiting = raw[used:]
        return text

    def flush(self) -> str:
        waiting, self._waiting = self._waiting, b""
        return waiting.decode(errors="replace")


class _WindowRules:
    """How one tokenizer decodes a window.

    Args:
        decode: Token ids to text.
        hidden: Whether a token is left out of the text.
        byte_of: The byte of a byte token, None of others; None where the tokenizer has no byte tokens.
        waits: Whether U+FFFD at the end may mean that a character is incomplete.
    """

    def __init__(
        self,
        decode: Callable[[list[int]], str],
        hidden: Callable[[int], bool],
        byte_of: Callable[[int], int | None] | None = None,
        waits: bool = True,
    ) -> None:
        self.decode = decode
        self.hidden = hidden
        self.byte_of = byte_of or (lambda _: None)
        self.waits = waits
        self._alone: dict[int, str] = {}

    def alone(self, ids: list[int]) -> str:
        """`decode`, remembered for single tokens."""
        if len(ids) != 1:
            return self.decode(ids)
        text = self._alone.get(ids[0])
        if text is None:
            text = self._alone[ids[0]] = self.decode(ids)
        return text

    def tail(self, context: Sequence[int]) -> list[int]:
        """The last tokens of `context` that show, without cutting a run of byte tokens; one at the end is complete."""
        kept = [token for token in context if not self.hidden(token)]
        while kept and self.byte_of(kept[-1]) is not None:
            kept.pop()
        start = max(0, len(kept) - CONTEXT_TOKENS)
        while start > 0 and (self.byte_of(kept[start]) is not None or not self.decode(kept[start:])):
            start -= 1
        return kept[start:]


class _WindowDetokenizer:
    """Any decoder: what the new tokens add to the text of those before them."""

    def __init__(self, rules: _WindowRules, context: Sequence[int]) -> None:
        self._rules = rules
        self._window = rules.tail(context) if context else []
        self._read = len(self._window)
        self._shown = rules.decode(self._window) if self._window else ""
        # The last tokens that have text of their own: behind them no token is the first of the text.
        self._anchor = list(self._window) if self._shown else []
        self._next_try = 0
        self._run: codecs.IncrementalDecoder | None = None
        self._run_is_broken = False
        self.draft = ""

    def push(self, token_id: int) -> str:
        self.draft = ""
        if self._rules.hidden(token_id):
            return ""
        self._window.append(token_id)
        byte = self._rules.byte_of(token_id)
        if byte is not None:
            self.draft = self._read_run(byte)
            return ""
        self._run = None
        return self._take() if len(self._window) >= self._next_try else ""

    def flush(self) -> str:
        return self._take(final=True) if len(self._window) > self._read else ""

    def _read_run(self, byte: int) -> str:
        """The character that this byte completes, as long as the run of byte tokens is valid UTF-8."""
        if self._run is None:
            self._run = codecs.getincrementaldecoder("utf-8")()
            self._run_is_broken = byte == ord(" ") and not self._anchor  # a space that may be stripped
        if self._run_is_broken:
            return ""
        try:
            return self._run.decode(bytes([byte]))
        except UnicodeDecodeError:
            self._run_is_broken = True
            return ""

    def _take(self, final: bool = False) -> str:
        text = self._rules.decode(self._window)
        if self._rules.waits and text.endswith(REPLACEMENT) and not final:
            # Tried again when the window has grown by a share of itself, so that waiting costs O(1) a token.
            self._next_try = len(self._window) + 1 + len(self._window) // 8
            return ""
        piece = text[len(self._shown) :]
        self._slide(text)
        return piece

    def _slide(self, text: str) -> None:
        """Begins the next window: with the new tokens, or where they alone have no text, with some that do."""
        fresh = self._window[self._read :]
        alone = self._rules.alone(fresh)
        if alone:
            self._anchor, self._window, self._shown = fresh, list(fresh), alone
        elif self._anchor:
            self._window = self._anchor + fresh
            self._shown = self._rules.decode(self._window)
        else:
            self._anchor = list(self._window) if text else []
            self._shown = text
        self._read = len(self._window)
        self._next_try = 0


class _TokensAlone(dict[int, bytes]):
    """What each token adds to a text that some ordinary token precedes: a token alone may lose its space."""

    def __init__(self, rules: _WindowRules) -> None:
        super().__init__()
        self._rules = rules
        plain = (token for token in range(_SAMPLE) if rules.byte_of(token) is None and not rules.hidden(token))
        self._before = next(([token] for token in plain if self._decode([token]).isalnum()), [])

    def __missing__(self, token_id: int) -> bytes:
        byte = self._rules.byte_of(token_id)
        if byte is not None:
            return bytes([byte])
        before = self._decode(self._before) if self._before else ""
        text = "" if self._rules.hidden(token_id) else self._decode([*self._before, token_id])
        entry = self[token_id] = text.removeprefix(before).encode(errors="replace")
        return entry

    def _decode(self, ids: list[int]) -> str:
        """The text of tokens; none where the tokenizer has no such token."""
        try:
            return self._rules.decode(ids)
        except (IndexError, KeyError, TypeError, ValueError, OverflowError):
            return ""
