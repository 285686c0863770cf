"""Pieces of text joined are the decoded whole, for every kind of tokenizer and any tokens."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from mii.batching.generation.detokenizer import Detokenizer, TokenDecoder, _WindowDetokenizer
from mii.modeling.tokenizers import HFTokenizer, MIITokenizerWrapper, load_tokenizer
from tests.batching.generation.vocabularies import KINDS


@cache
def vocabulary(kind: str) -> tuple[Tokenizer, TokenDecoder]:
    tokenizer = KINDS[kind]()
    return tokenizer, TokenDecoder(tokenizer)


def pieces(detokenizer: Detokenizer, ids: list[int]) -> list[str]:
    return [*(detokenizer.push(token) for token in ids), detokenizer.flush()]


def token_ids(kind: str) -> st.SearchStrategy[list[int]]:
    """Any tokens, some past the end of the vocabulary as in padded output layers; runs of byte tokens are common."""
    size = vocabulary(kind)[0].get_vocab_size()
    some_bytes = st.lists(st.sampled_from(list("aé你😀\n \ufffd")), max_size=4).map(
        lambda chars: [vocabulary(kind)[0].token_to_id(f"<0x{byte:02X}>") for byte in "".join(chars).encode()]
    )
    runs = [some_bytes] if vocabulary(kind)[0].token_to_id("<0x00>") is not None else []
    tokens = st.lists(st.integers(0, size + 2), max_size=12)
    return st.lists(st.one_of(tokens, *runs), max_size=5).map(lambda parts: [token for part in parts for token in part])


@pytest.mark.parametrize("skip", [False, True], ids=["kept", "skipped"])
@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_pieces_joined_are_the_decoded_whole(kind: str, skip: bool, data: st.DataObject) -> None:
    tokenizer, decoder = vocabulary(kind)
    ids = data.draw(token_ids(kind))
    shown = pieces(decoder.start(skip_special_tokens=skip), ids)
    assert "".join(shown) == tokenizer.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_an_answer_in_context_is_what_it_adds_to_the_prompt(kind: str, data: st.DataObject) -> None:
    tokenizer, decoder = vocabulary(kind)
    prompt = tokenizer.encode(data.draw(st.sampled_from(["a b", "the", "b é a", "a"]))).ids
    ids = [token for token in data.draw(token_ids(kind)) if token < tokenizer.get_vocab_size()]
    whole = tokenizer.decode(prompt + ids, skip_special_tokens=False)
    before = tokenizer.decode(prompt, skip_special_tokens=False)
    assert before + "".join(pieces(decoder.start(context=prompt), ids)) == whole


class _DecodeOnly:
    """A user's own tokenizer: all that is known of it is that it decodes."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=False))


@pytest.mark.parametrize("kind", ["byte level", "metaspace", "word level", "word piece"])
@given(data=st.data())
def test_a_tokenizer_that_only_decodes_gives_the_decoded_whole(kind: str, data: st.DataObject) -> None:
    tokenizer, _ = vocabulary(kind)
    size = tokenizer.get_vocab_size()
    ids = data.draw(st.lists(st.integers(0, size - 1), max_size=40))
    shown = pieces(TokenDecoder(_DecodeOnly(tokenizer)).start(), ids)
    assert "".join(shown) == tokenizer.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize("kind", ["byte level", "sentencepiece"])
@given(text=st.text(alphabet="ab é你😀\n", max_size=30))
def test_no_piece_holds_half_a_character(kind: str, text: str) -> None:
    tokenizer, decoder = vocabulary(kind)
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert all("\ufffd" not in piece for piece in pieces(decoder.start(), ids))


def test_a_character_comes_with_its_last_byte() -> None:
    tokenizer, decoder = vocabulary("byte level")
    ids = [tokenizer.token_to_id(char) for char in "ðŁĺĤ"]  # how GPT-2's vocabulary writes the bytes of one emoji
    assert pieces(decoder.start(), ids) == ["", "", "", "😂", ""]


def test_an_unfinished_character_comes_at_the_end_as_in_a_whole_decode() -> None:
    tokenizer, decoder = vocabulary("byte level")
    ids = [tokenizer.token_to_id(char) for char in "aðŁ"]
    assert pieces(decoder.start(), ids) == ["a", "", "", "\ufffd"]
    assert tokenizer.decode(ids) == "a\ufffd"


def test_a_run_of_byte_tokens_is_a_draft_until_it_is_over() -> None:
    tokenizer, decoder = vocabulary("sentencepiece")
    detokenizer = decoder.start()
    tokens = map(tokenizer.token_to_id, ["▁a", "<0x0A>", "<0xC3>", "<0xA9>", "b"])
    seen = [(detokenizer.push(token), detokenizer.draft) for token in tokens]
    assert seen == [("a", ""), ("", "\n"), ("", ""), ("", "é"), ("\néb", "")]


def test_special_tokens_are_kept_or_skipped_and_never_eat_a_space() -> None:
    tokenizer, decoder = vocabulary("sentencepiece")
    ids = [tokenizer.token_to_id(token) for token in ("▁a", "</s>", "▁the")]
    assert pieces(decoder.start(), ids) == ["a", "</s>", " the", ""]
    assert pieces(decoder.start(skip_special_tokens=True), ids) == ["a", "", " the", ""]


HARD_TOKENS = {
    "byte level and more": ["ð", "b"],
    "sentencepiece": ["▁", "▁▁", "<0xF0>", "\ufffd", "b"],
    "metaspace": ["▁", "▁▁", "\ufffd", "b"],
}


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in HARD_TOKENS.items() for name in names])
def test_work_per_token_does_not_grow_with_the_text(kind: str, name: str) -> None:
    """Counts the tokens that are decoded, also where they are incomplete, spaces or empty for thousands of tokens."""
    tokenizer, decoded = KINDS[kind](), 0
    token = tokenizer.token_to_id(name)

    class Counting:
        def decode(self, ids: list[int]) -> str:
            nonlocal decoded
            decoded += len(ids)
            return str(tokenizer.decode(ids, skip_special_tokens=False))

    for counted in (TokenDecoder(Counting()).start(), TokenDecoder(tokenizer).start()):
        assert isinstance(counted, _WindowDetokenizer)
        counted._rules.decode = Counting().decode
        decoded = 0
        assert "".join(pieces(counted, [token] * 3000)) == tokenizer.decode([token] * 3000, skip_special_tokens=False)
        assert decoded <= 20 * 3000


class _Shouting:
    """A tokenizer whose decode does more than its decoder."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.backend_tokenizer = tokenizer

    def decode(self, ids: list[int]) -> str:
        return str(self.backend_tokenizer.decode(ids, skip_special_tokens=False)).upper()


def test_a_decode_of_the_users_own_is_what_counts() -> None:
    tokenizer, _ = vocabulary("byte level")
    ids = tokenizer.encode("the lazy dog").ids
    assert "".join(pieces(TokenDecoder(_Shouting(tokenizer)).start(), ids)) == "THE LAZY DOG"


@pytest.fixture(scope="module")
def smollm2_tokenizer(smollm2: Path) -> MIITokenizerWrapper:
    return load_tokenizer(str(smollm2))


@given(ids=st.lists(st.integers(0, 49_151), max_size=60), skip=st.booleans())
def test_pieces_of_smollm2s_tokens_joined_are_the_decoded_whole(
    smollm2_tokenizer: MIITokenizerWrapper, ids: list[int], skip: bool
) -> None:
    assert isinstance(smollm2_tokenizer, HFTokenizer)
    decoder = TokenDecoder(smollm2_tokenizer)
    shown = pieces(decoder.start(skip_special_tokens=skip), ids)
    assert "".join(shown) == smollm2_tokenizer.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "end of word"])  # where a space needs what follows
def test_bytes_of_tokens_joined_are_the_text_but_for_a_space_in_front(kind: str) -> None:
    tokenizer, decoder = vocabulary(kind)
    for text in ("the b a", "a b é b", "b</s>a", "the\n\té 😀"):
        ids = tokenizer.encode(text).ids
        known = tokenizer.decode(ids, skip_special_tokens=False)
        joined = b"".join(map(decoder.token_bytes, ids))
        if kind in ("byte level", "sentencepiece") or "\ufffd" not in joined.decode():
            assert joined.decode().lstrip() == known.lstrip()


@given(ids=token_ids("byte level"))
def test_bytes_of_byte_level_tokens_joined_are_the_text(ids: list[int]) -> None:
    tokenizer, decoder = vocabulary("byte level")
    text = b"".join(map(decoder.token_bytes, ids)).decode(errors="replace")
    assert text == tokenizer.decode(ids, skip_special_tokens=False)


def test_a_token_s_bytes_keep_its_space_and_special_tokens_are_as_written() -> None:
    tokenizer, decoder = vocabulary("sentencepiece")
    names = ["▁the", "b", "<0x0A>", "<0xF0>", "</s>", "▁"]
    shown = [decoder.token_bytes(tokenizer.token_to_id(name)) for name in names]
    assert shown == [b" the", b"b", b"\n", b"\xf0", b"</s>", b" "]


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_that_the_tokenizer_does_not_have_has_no_bytes(kind: str) -> None:
    tokenizer, decoder = vocabulary(kind)
    assert decoder.token_bytes(tokenizer.get_vocab_size() + 5) == b""


def test_bytes_of_a_tokenizer_that_only_decodes_are_those_of_its_text() -> None:
    tokenizer, decoder = vocabulary("metaspace")
    other = TokenDecoder(_DecodeOnly(tokenizer))
    size = tokenizer.get_vocab_size()
    assert [other.token_bytes(token) for token in range(size)] == [decoder.token_bytes(token) for token in range(size)]
