"""Chats as the checkpoints of the families describe them: the template, one begin of text, every end of a turn."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

import mii
from mii.batching.generation.detokenizer import TokenDecoder
from mii.modeling.models import stop_ids
from mii.modeling.tokenizers import HFTokenizer, load_tokenizer
from tests.checkpoints import BYTE_VOCABULARY, byte_tokenizer, write_checkpoint

TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}, {"role": "user", "content": "So?"}]


@dataclass(frozen=True)
class Chat:
    """A family's way to chat; the special tokens get the ids after the bytes, in order."""

    template: str
    tokens: tuple[str, ...]
    bos: str | None
    ends: tuple[str, ...]
    text: str


CHATS = {
    "Gemma": Chat(
        "{{ bos_token }}{% for message in messages %}"
        "{{ '<start_of_turn>' + ('model' if message.role == 'assistant' else message.role) + '\\n' }}"
        "{{ message.content | trim + '<end_of_turn>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}",
        ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
        "<bos>",
        ("<eos>", "<end_of_turn>"),
        "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\nYo<end_of_turn>\n"
        "<start_of_turn>user\nSo?<end_of_turn>\n<start_of_turn>model\n",
    ),
    "Qwen": Chat(
        "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        None,
        ("<|im_end|>", "<|endoftext|>"),
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYo<|im_end|>\n<|im_start|>user\nSo?<|im_end|>\n"
        "<|im_start|>assistant\n",
    ),
    "Phi-3": Chat(
        "{% for message in messages %}{{ '<|' + message.role + '|>\\n' + message.content + '<|end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}",
        ("<s>", "<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>"),
        "<s>",
        ("<|endoftext|>", "<|assistant|>", "<|end|>"),
        "<|user|>\nHi<|end|>\n<|assistant|>\nYo<|end|>\n<|user|>\nSo?<|end|>\n<|assistant|>\n",
    ),
}


@pytest.fixture(params=CHATS)
def chat(request: pytest.FixtureRequest) -> Chat:
    return CHATS[request.param]


@pytest.fixture
def folder(chat: Chat, tmp_path: Path) -> Path:
    """A small model with the family's special tokens and template."""
    write_checkpoint(tmp_path, tokenizer=False, vocab_size=BYTE_VOCABULARY + 8)
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(chat.tokens), "eos_token": chat.ends[0]})
    tokenizer.bos_token = chat.bos
    tokenizer.chat_template = chat.template
    tokenizer.save_pretrained(tmp_path)
    ends = tokenizer.convert_tokens_to_ids(list(chat.ends))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    return tmp_path


def test_a_conversation_is_the_template_s_text_with_one_begin(chat: Chat, folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    assert isinstance(tokenizer, HFTokenizer)
    text = tokenizer.apply_chat_template(TURNS, tokenize=False)
    assert text == chat.text
    ids = tokenizer.encode(text)
    assert ids == tokenizer.apply_chat_template(TURNS)
    assert ids.count(tokenizer.bos_token_id) == text.count(chat.bos or "\0")
    stream = TokenDecoder(tokenizer).start()
    assert "".join([*(stream.push(token) for token in ids), stream.flush()]) == tokenizer.decode(ids) == text


def test_every_end_of_the_checkpoint_ends_an_answer(chat: Chat, folder: Path) -> None:
    with mii.pipeline(str(folder), device="cpu", dtype="fp32", progress=False) as pipe:
        ends = [pipe.tokenizer.encode(end, add_special_tokens=False)[0] for end in chat.ends]
        config = json.loads((folder / "generation_config.json").read_text())
        assert set(stop_ids({}, config)) == set(ends)
        for end in ends:
            answer = pipe(chat.text, allowed_token_ids=[end], max_new_tokens=5)[0]
            assert (answer.finish_reason, answer.generated_length) == ("stop", 1)
        other = pipe.tokenizer.encode(chat.tokens[2], add_special_tokens=False)[0]
        if other not in ends:
            assert pipe(chat.text, allowed_token_ids=[other], max_new_tokens=5)[0].generated_length == 5
