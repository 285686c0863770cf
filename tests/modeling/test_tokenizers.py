"""`load_tokenizer` and its wrappers: everything that users may give, and what they may do to it afterwards."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from mii.errors import PromptEncodingError, RequestError, TokenizerError
from mii.modeling.checkpoint import open_checkpoint
from mii.modeling.tokenizers import GGUFTokenizer, HFTokenizer, MIITokenizerWrapper, load_tokenizer
from tests.checkpoints import byte_tokenizer

MESSAGES = [{"role": "user", "content": "hi"}]
TEMPLATE = (
    "<s>{% for m in messages %}{{ m.role }}:{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}bot:{% endif %}"
)


def with_bos(**options: Any) -> PreTrainedTokenizerFast:
    """Bytes and three special tokens; texts begin with <s>."""
    letters = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    inner = Tokenizer(models.BPE(letters, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(token, special=True) for token in ("<s>", "</s>", "<end>")])
    inner.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 256)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", **options)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with_bos(chat_template=TEMPLATE).save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def smollm2_folder(smollm2: Path, tmp_path: Path) -> Path:
    """SmolLM2's tokenizer as its own repository has it: tokenizer.json under GPT-2's class name."""
    load_tokenizer(smollm2).tokenizer.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"tokenizer_class": "GPT2Tokenizer"}))
    (tmp_path / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    return tmp_path


class Letters(MIITokenizerWrapper):
    """A user's own: letters of the alphabet."""

    @property
    def vocab_size(self) -> int:
        return 26

    @property
    def eos_token_id(self) -> int:
        return 25

    def encode(self, input: str) -> torch.Tensor:
        return torch.tensor([ord(letter) - ord("a") for letter in input])

    def decode(self, tokens: Any) -> str:
        return "".join(chr(int(token) + ord("a")) for token in tokens)


def test_a_wrapper_of_the_user_s_own_is_used_as_it_is() -> None:
    own = Letters()
    assert load_tokenizer(own) is own
    assert own.decode(own.encode("abc")) == "abc"
    with pytest.raises(TokenizerError, match="Letters has no chat template"):
        own.apply_chat_template(MESSAGES)


def test_a_wrapper_that_lacks_a_method_cannot_be_made() -> None:
    class Half(MIITokenizerWrapper):
        pass

    with pytest.raises(TypeError, match="abstract"):
        Half()  # type: ignore[abstract]


def test_a_tokenizer_of_transformers_is_wrapped() -> None:
    inner = with_bos()
    wrapper = load_tokenizer(inner)
    assert isinstance(wrapper, HFTokenizer)
    assert wrapper.tokenizer is inner
    assert wrapper.vocab_size == len(inner) == 259


@pytest.mark.parametrize("make", [str, Path])
def test_a_folder_is_read(folder: Path, make: Any) -> None:
    wrapper = load_tokenizer(make(folder))
    assert wrapper.encode("hi") == with_bos().encode("hi")
    assert wrapper.eos_token_id == 257
    assert isinstance(HFTokenizer(make(folder)), HFTokenizer)


def test_encoding_adds_what_the_tokenizer_adds_and_decoding_keeps_it(folder: Path) -> None:
    wrapper = HFTokenizer(str(folder))
    ids = wrapper.encode("hi there")
    assert ids[0] == 256
    assert wrapper.decode(ids) == "<s>hi there"
    assert wrapper.decode(ids, skip_special_tokens=True) == "hi there"
    assert wrapper.encode("hi there", add_special_tokens=False) == ids[1:]
    for form in (torch.tensor(ids), np.array(ids), tuple(ids)):
        assert wrapper.decode(form) == "<s>hi there"
    assert wrapper.decode(torch.tensor(ids[1])) == wrapper.decode(ids[1]) == "h"
    assert wrapper.decode([]) == ""
    assert wrapper.decode([999_999]) == ""


def test_a_text_that_begins_with_the_begin_token_gets_no_second_one(folder: Path) -> None:
    wrapper = HFTokenizer(str(folder))
    assert wrapper.encode("<s>hi") == wrapper.encode("hi")
    assert wrapper.encode("") == [256]
    assert wrapper.encode("<s>") == [256]


def test_a_chat_template_is_filled_without_a_second_begin_token(folder: Path) -> None:
    wrapper = load_tokenizer(folder)
    text = wrapper.apply_chat_template(MESSAGES, tokenize=False)
    assert text == "<s>user:hi\nbot:"
    ids = wrapper.apply_chat_template(MESSAGES)
    assert ids.count(256) == 1
    assert wrapper.decode(ids) == text
    assert ids == wrapper.encode(text)
    assert wrapper.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=False) == "<s>user:hi\n"
    assert wrapper.apply_chat_template(MESSAGES, tokenize=False, chat_template="{{ messages[0].content }}") == "hi"


def test_chat_templates_that_are_missing_or_refuse_say_so(folder: Path) -> None:
    with pytest.raises(TokenizerError, match=r"no chat template\. Use an instruction-tuned model"):
        HFTokenizer(with_bos()).apply_chat_template(MESSAGES)
    wrapper = load_tokenizer(folder)
    with pytest.raises(RequestError, match="refuses these messages: roles must alternate"):
        wrapper.apply_chat_template(MESSAGES, chat_template="{{ raise_exception('roles must alternate') }}")
    with pytest.raises(RequestError, match="refuses these messages"):
        wrapper.apply_chat_template(MESSAGES, chat_template="{{ unclosed")


def test_the_end_of_text_id_may_be_changed_at_any_time(folder: Path, smollm2: Path) -> None:
    for source in (folder, smollm2):
        wrapper = load_tokenizer(source)
        assert wrapper.eos_token_id is not None
        wrapper.tokenizer.eos_token_id = 65
        assert wrapper.eos_token_id == 65
        wrapper.tokenizer.eos_token = "<s>" if source is folder else "<|im_start|>"
        assert wrapper.eos_token_id == (256 if source is folder else 1)


def test_tokenizers_with_other_names_for_the_end_of_text() -> None:
    class Qwen:
        eod_id = 151643

        def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
            return [*text.encode()]

        def decode(self, ids: list[int], **options: Any) -> str:
            return bytes(ids).decode()

    wrapper = load_tokenizer(Qwen())
    assert wrapper.eos_token_id == 151643
    assert wrapper.decode(wrapper.encode("hi")) == "hi"


def test_padding_is_set_without_a_word(folder: Path, caplog: pytest.LogCaptureFixture, capfd: Any) -> None:
    wrapper = load_tokenizer(folder)
    assert wrapper.tokenizer.pad_token == "</s>"
    padded = with_bos(pad_token="<end>")
    assert load_tokenizer(padded).tokenizer.pad_token == "<end>"
    assert caplog.records == []
    assert capfd.readouterr() == ("", "")


def test_truncation_in_a_tokenizer_file_does_not_cut_prompts(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    content["truncation"] = {"max_length": 4, "stride": 0, "strategy": "LongestFirst", "direction": "Right"}
    content["padding"] = {"strategy": {"Fixed": 9}, "direction": "Left", "pad_to_multiple_of": None, "pad_id": 257,
                          "pad_type_id": 0, "pad_token": "</s>"}  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(content))
    assert len(load_tokenizer(folder).encode("a text of more than four tokens")) == 32
    assert len(load_tokenizer(folder).encode("hi")) == 3


def test_text_that_is_not_unicode_is_refused(folder: Path, smollm2: Path) -> None:
    for source in (folder, smollm2):
        with pytest.raises(PromptEncodingError, match="character 2 is half of a surrogate pair"):
            load_tokenizer(source).encode("ab\ud83d")
        with pytest.raises(PromptEncodingError, match="character 2 is half of a surrogate pair"):
            load_tokenizer(source).encode_batch(["fine", "ab\ud83d"])


def test_many_texts_are_encoded_as_one_by_one(folder: Path, smollm2: Path) -> None:
    texts = ["hi", "", "<s>hi", "12  345 ½", "日本語"]
    for source in (folder, smollm2):
        wrapper = load_tokenizer(source)
        assert isinstance(wrapper, HFTokenizer)
        expected = [wrapper.encode(text) for text in texts]
        assert wrapper.encode_batch(texts) == expected
        assert isinstance(wrapper.tokenizer, PreTrainedTokenizerFast)
        assert wrapper.encode_batch(texts) == expected


def test_threads_encode_alike_while_another_pads(folder: Path) -> None:
    wrapper = HFTokenizer(str(folder))
    expected, seen = wrapper.encode("some text"), []

    def encode() -> None:
        seen.extend(wrapper.encode("some text") for _ in range(200))

    threads = [threading.Thread(target=encode) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(50):
        wrapper.tokenizer(["a", "longer text"])
    for thread in threads:
        thread.join()
    assert seen == [expected] * 800


def test_tokenizer_json_is_taken_at_its_word(smollm2: Path, smollm2_folder: Path) -> None:
    """transformers 5 rebuilds GPT-2 tokenizers from the vocabulary: SmolLM's numbers are no longer cut into digits."""
    text = "12  345 ½ x"
    assert load_tokenizer(smollm2_folder).encode(text) == load_tokenizer(smollm2).encode(text)
    assert load_tokenizer(smollm2_folder).encode(text) == [33, 34, 256, 35, 36, 37, 216, 16738, 1792]


def test_a_gguf_file_gives_the_tokenizer_with_its_checkpoint_or_alone(smollm2: Path) -> None:
    with open_checkpoint(smollm2) as checkpoint:
        both = [load_tokenizer(smollm2), load_tokenizer(str(smollm2), checkpoint=checkpoint)]
    for wrapper in both:
        assert isinstance(wrapper, GGUFTokenizer)
        assert (wrapper.vocab_size, wrapper.eos_token_id, wrapper.bos_token_id) == (49152, 2, 1)
        assert wrapper.encode("The capital of France is") == [504, 3575, 282, 4649, 314]


def test_a_folder_with_a_gguf_file_and_nothing_else(smollm2: Path, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").symlink_to(smollm2)
    with open_checkpoint(tmp_path) as checkpoint:
        assert load_tokenizer(tmp_path, checkpoint=checkpoint).vocab_size == 49152


def test_another_tokenizer_than_the_model_s_own(smollm2: Path, folder: Path) -> None:
    with open_checkpoint(smollm2) as checkpoint:
        assert load_tokenizer(folder, checkpoint=checkpoint).vocab_size == 259


def test_the_gguf_wrapper_says_the_same_before_and_after_transformers(smollm2: Path) -> None:
    wrapper = load_tokenizer(smollm2)
    texts = ["Hello  world 123", "<|im_start|>user\nhi<|im_end|>", "日本語 ½", ""]

    def facts() -> list[Any]:
        ids = [wrapper.encode(text) for text in texts]
        plain = [wrapper.decode(part, skip_special_tokens=True) for part in ids]
        return [ids, [wrapper.decode(part) for part in ids], plain, wrapper.vocab_size, wrapper.eos_token_id]

    before = facts()
    assert isinstance(wrapper.tokenizer, PreTrainedTokenizerFast)
    assert wrapper.tokenizer is wrapper.tokenizer
    assert facts() == before
    assert [wrapper.tokenizer.encode(text) for text in texts] == before[0]
    wrapper.tokenizer.add_tokens(["<new>"])
    assert wrapper.vocab_size == 49153
    assert wrapper.encode("<new>") == [49152]


def test_smollm2_s_chat_template(smollm2: Path) -> None:
    wrapper = load_tokenizer(smollm2)
    text = wrapper.apply_chat_template(MESSAGES, tokenize=False)
    assert text == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert wrapper.decode(wrapper.apply_chat_template(MESSAGES)) == text


def test_text_from_a_gguf_file_needs_no_transformers(smollm2: Path) -> None:
    script = (
        "import sys\nfrom mii.modeling.tokenizers import load_tokenizer\n"
        "wrapper = load_tokenizer(sys.argv[1])\nassert wrapper.decode(wrapper.encode('hi 12')) == 'hi 12'\n"
        "print('transformers' in sys.modules)"
    )
    root = str(Path(__file__).resolve().parents[2])
    command = [sys.executable, "-c", script, str(smollm2)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": root}, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_what_is_not_there_or_no_tokenizer_is_said_in_a_sentence(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(TokenizerError, match=r"cannot be loaded. There is no folder or file"):
        load_tokenizer(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(TokenizerError, match=r"empty has no tokenizer files \(tokenizer\.json, .* Pass tokenizer="):
        load_tokenizer(tmp_path / "empty")
    with pytest.raises(TokenizerError, match="tokenizer= is a int"):
        load_tokenizer(3)
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(TokenizerError, match=r"The tokenizer in .* cannot be loaded"):
        load_tokenizer(folder)
    (tmp_path / "broken.gguf").write_bytes(b"GGUF\3\0\0\0")
    with pytest.raises(TokenizerError, match=r"cannot be loaded. .*truncated"):
        load_tokenizer(tmp_path / "broken.gguf")


def own_code(folder: Path) -> Path:
    (folder / "own.py").write_text(
        "from transformers import PreTrainedTokenizerFast\n\n\nclass Own(PreTrainedTokenizerFast):\n    mark = 'ran'\n"
    )
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"auto_map": {"AutoTokenizer": [None, "own.Own"]}, "tokenizer_class": "Own"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


def test_code_of_the_repository_runs_only_when_trusted(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    own_code(folder)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
    assert not hasattr(load_tokenizer(folder).tokenizer, "mark")
    assert load_tokenizer(folder, trust_remote_code=True).tokenizer.mark == "ran"
    (folder / "tokenizer.json").unlink()
    shutil.copy(folder / "config.json", folder / "vocab.json")
    with pytest.raises(TokenizerError, match=r"Python code of its own. Pass trust_remote_code=True"):
        load_tokenizer(folder)


def test_a_vocabulary_without_tokenizer_json_is_read_by_its_class(tmp_path: Path) -> None:
    vocabulary = {token: number for number, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocabulary["<|endoftext|>"] = 256
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    wrapper = load_tokenizer(tmp_path)
    assert wrapper.decode(wrapper.encode("hi there")) == "hi there"
    assert wrapper.eos_token_id == 256


def test_the_byte_tokenizer_of_the_other_tests(tmp_path: Path) -> None:
    byte_tokenizer().save_pretrained(tmp_path)
    wrapper = load_tokenizer(tmp_path)
    assert wrapper.decode(wrapper.encode("naïve 日本"), skip_special_tokens=True) == "naïve 日本"
