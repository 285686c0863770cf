"""Tokenizers of models: text to token ids and back, and chat templates.

`load_tokenizer` takes what users have: a folder, a hub id, a .gguf file, a tokenizer object of `transformers`, or a
`MIITokenizerWrapper` of their own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mii.errors import CheckpointError, PromptEncodingError, RequestError, TokenizerError
from mii.modeling.checkpoint import Checkpoint, locate
from mii.modeling.checkpoint.folder import find_weights, read_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Message = Mapping[str, Any]

_OTHER_FILES = ("tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "tekken.json", "*.tiktoken")


class MIITokenizerWrapper(ABC):
    """What mii needs of a tokenizer. Subclass it to bring your own, and pass an instance as `tokenizer=`.

    `tokenizer` is the object that is wrapped, for whoever needs more than this interface.
    """

    tokenizer: Any = None

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """The number of ids that have a token."""

    @property
    @abstractmethod
    def eos_token_id(self) -> int | None:
        """The id that ends a text, if there is one. Read anew for every request, so that it may be changed."""

    @abstractmethod
    def encode(self, input: str) -> Any:
        """The token ids of a text: a list or a 1-D tensor."""

    @abstractmethod
    def decode(self, tokens: Any) -> str:
        """The text of token ids, special tokens included."""

    def apply_chat_template(self, messages: Sequence[Message], **options: Any) -> Any:
        """The prompt of a conversation; tokenizers without a chat template refuse."""
        raise TokenizerError(f"{type(self).__name__} has no chat template. Override apply_chat_template, or send text.")


class HFTokenizer(MIITokenizerWrapper):
    """A tokenizer of `transformers`.

    Args:
        tokenizer: the tokenizer, or the folder, hub id or .gguf file to load it from.

    Raises:
        TokenizerError: there is none there, or it cannot be read.
    """

    def __init__(self, tokenizer: Any) -> None:
        if isinstance(tokenizer, str | Path):
            tokenizer = _load_transformers(Path(_locate(str(tokenizer), None, False)), False)
        self.tokenizer = tokenizer
        _set_padding(tokenizer)

    @property
    def vocab_size(self) -> int:
        return len(self.tokenizer)

    @property
    def eos_token_id(self) -> int | None:
        # Qwen's own tokenizers call it eod.
        for name in ("eod", "eos_token_id", "eos_token", "eod_id"):
            value = getattr(self.tokenizer, name, None)
            if isinstance(value, str):
                value = self.tokenizer.convert_tokens_to_ids(value)
            if value is not None:
                return int(value)
        return None

    @property
    def bos_token_id(self) -> int | None:
        """The id that begins a text, if there is one."""
        return getattr(self.tokenizer, "bos_token_id", None)

    @property
    def backend_tokenizer(self) -> Tokenizer | None:
        """The tokenizer of the Rust library within; None where it is written in Python."""
        return getattr(self.tokenizer, "backend_tokenizer", None)

    def encode(self, input: str, add_special_tokens: bool = True) -> list[int]:
        """The token ids of a text.

        Args:
            input: the text.
            add_special_tokens: add what the tokenizer puts around a text, as a begin-of-text token. A text that begins
                with that token already (a filled chat template) does not get a second one.

        Raises:
            PromptEncodingError: the text holds lone surrogates, so it is not Unicode.
        """
        try:
            ids = self._encode(input, add_special_tokens)
        except (UnicodeEncodeError, TypeError) as error:
            if isinstance(input, str):
                raise PromptEncodingError(_not_unicode(input)) from error
            raise
        return self._with_one_begin(ids) if add_special_tokens else ids

    def encode_batch(self, inputs: Sequence[str]) -> list[list[int]]:
        """What `encode` gives for each of many texts; on several cores at once where the Rust library does the work."""
        backend = self.backend_tokenizer
        if backend is None or backend.truncation is not None or backend.padding is not None:
            return [self.encode(text) for text in inputs]
        try:
            encodings = backend.encode_batch_fast(list(inputs))
        except (UnicodeEncodeError, TypeError):
            return [self.encode(text) for text in inputs]  # says which of them is no text
        return [self._with_one_begin(encoding.ids) for encoding in encodings]

    def _with_one_begin(self, ids: list[int]) -> list[int]:
        return ids[1:] if len(ids) > 1 and ids[0] == ids[1] == self.bos_token_id else ids

    def decode(self, tokens: Any, skip_special_tokens: bool = False) -> str:
        """The text of token ids (a list, an array or a tensor); ids without a token give nothing."""
        ids = tokens.tolist() if hasattr(tokens, "tolist") else tokens
        return self._decode([ids] if isinstance(ids, int) else list(ids), skip_special_tokens)

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        *,
        tokenize: bool = True,
        add_generation_prompt: bool = True,
        chat_template: str | None = None,
        tools: Sequence[Any] | None = None,
        **options: Any,
    ) -> Any:
        """The prompt of a conversation.

        Args:
            messages: the turns, each with "role" and "content".
            tokenize: return token ids; False for text.
            add_generation_prompt: end with the opening of the assistant's turn.
            chat_template: a Jinja template, or the name of one of the model's, in place of its default one.
            tools: descriptions of functions that the model may call, for templates that know them.
            options: passed on to the template.

        Returns:
            Token ids, exactly those of the rendered text (nothing is added around it), or the text.

        Raises:
            TokenizerError: the model has no chat template and none was given.
            RequestError: the template refuses these messages; the message is the template's own.
        """
        if chat_template is None and not getattr(self.tokenizer, "chat_template", None):
            raise TokenizerError(
                "This model has no chat template. Use an instruction-tuned model, or pass a Jinja template as "
                "chat_template=."
            )
        from jinja2 import TemplateError

        try:
            text = self.tokenizer.apply_chat_template(
                list(messages),
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                chat_template=chat_template,
                tools=tools,
                **options,
            )
        except (TemplateError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise RequestError(f"The chat template refuses these messages: {error}") from error
        return self.encode(text, add_special_tokens=False) if tokenize else text

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        backend = self.backend_tokenizer
        # Straight to the Rust library: no padding or truncation to set, so threads do not disturb each other.
        if backend is not None and backend.truncation is None and backend.padding is None:
            return list(backend.encode(text, add_special_tokens=add_special_tokens).ids)
        return list(self.tokenizer.encode(text, add_special_tokens=add_special_tokens))

    def _decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        # Tidying spaces up would make the text of a part differ from a part of the text.
        return str(
            self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)
        )


class GGUFTokenizer(HFTokenizer):
    """The tokenizer of a GGUF file. The object of `transformers` is made when asked for: that takes half a second.

    Args:
        source: the file, for messages.
        metadata: its metadata.

    Raises:
        TokenizerError: the file has no tokenizer, or one of a kind that mii does not know.
    """

    def __init__(self, source: str, metadata: Mapping[str, Any]) -> None:
        from mii.modeling import gguf_tokenizer

        self._vocabulary = gguf_tokenizer.GGUFVocabulary.read(source, metadata)
        self._backend: Tokenizer = gguf_tokenizer.build_tokenizer(self._vocabulary)
        self._wrapped: Any = None

    @property
    def tokenizer(self) -> Any:
        if self._wrapped is None:
            self._wrapped = _wrap_gguf(self._backend, self._vocabulary)
        return self._wrapped

    @property
    def vocab_size(self) -> int:
        return self._backend.get_vocab_size() if self._wrapped is None else super().vocab_size

    @property
    def eos_token_id(self) -> int | None:
        return self._role("eos") if self._wrapped is None else super().eos_token_id

    @property
    def bos_token_id(self) -> int | None:
        return self._role("bos") if self._wrapped is None else super().bos_token_id

    @property
    def backend_tokenizer(self) -> Tokenizer | None:
        return self._backend if self._wrapped is None else super().backend_tokenizer

    def _role(self, role: str) -> int | None:
        known = self._vocabulary.special(role) is not None
        return int(self._vocabulary.get(f"{role}_token_id")) if known else None

    def _decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        if self._wrapped is not None:
            return super()._decode(ids, skip_special_tokens)
        return str(self._backend.decode(ids, skip_special_tokens=skip_special_tokens))


def load_tokenizer(
    name_or_path_or_wrapper: Any,
    *,
    checkpoint: Checkpoint | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> MIITokenizerWrapper:
    """The tokenizer of a model.

    Args:
        name_or_path_or_wrapper: a folder, a hub id or a .gguf file; a wrapper, which is returned as it is; or a
            tokenizer of `transformers`, which is wrapped.
        checkpoint: the opened model; spares reading a GGUF file twice where it is the same.
        revision: branch, tag or commit of a hub repository.
        trust_remote_code: run tokenizer code that the repository brings along.

    Raises:
        TokenizerError: there is no tokenizer, or it cannot be read.
    """
    source = name_or_path_or_wrapper
    if isinstance(source, MIITokenizerWrapper):
        return source
    if not isinstance(source, str | Path):
        if callable(getattr(source, "encode", None)) and callable(getattr(source, "decode", None)):
            return HFTokenizer(source)
        raise TokenizerError(
            f"tokenizer= is a {type(source).__name__}. Give a folder, a hub id, a .gguf file, a tokenizer of "
            "transformers or a MIITokenizerWrapper."
        )
    path = _locate(str(source), revision, trust_remote_code)
    metadata = getattr(checkpoint, "metadata", None)  # a GGUF file has it, and may hold the tokenizer
    if checkpoint is not None and metadata is not None and _belongs(path, checkpoint):
        return GGUFTokenizer(str(checkpoint.path), metadata)
    if path.is_dir() and not _has_tokenizer(path) and any(path.glob("*.gguf")):
        path = find_weights(path).files[0]
    if path.is_file():
        return _from_gguf(path)
    return HFTokenizer(_load_transformers(path, trust_remote_code))


def _belongs(path: Path, checkpoint: Checkpoint) -> bool:
    """Whether a GGUF checkpoint holds the tokenizer of a path: the file itself, or a folder with nothing else."""
    return path == checkpoint.path or (path == checkpoint.path.parent and not _has_tokenizer(path))


def _locate(name: str, revision: str | None, trust_remote_code: bool) -> Path:
    try:
        return locate(name, revision=revision, trust_remote_code=trust_remote_code, weights=False)
    except CheckpointError as error:
        raise TokenizerError(f"The tokenizer cannot be loaded. {error}") from error


def _from_gguf(path: Path) -> MIITokenizerWrapper:
    from mii.modeling.checkpoint.gguf.reader import read_metadata

    try:
        metadata = read_metadata(path)
    except CheckpointError as error:
        raise TokenizerError(f"The tokenizer cannot be loaded. {error}") from error
    return GGUFTokenizer(str(path), metadata)


def _has_tokenizer(folder: Path) -> bool:
    return any(any(folder.glob(pattern)) for pattern in ("tokenizer.json", *_OTHER_FILES))


def _load_transformers(folder: Path, trust_remote_code: bool) -> Any:
    """tokenizer.json says all there is to say, so it is read as it stands.

    `AutoTokenizer` rebuilds many of them from their vocabulary alone and takes another second to import; it serves
    where there is no such file, and for code of the repository's own.
    """
    if not _has_tokenizer(folder):
        raise TokenizerError(
            f"{folder} has no tokenizer files (tokenizer.json, tokenizer.model, ...). Pass tokenizer= with a folder or "
            "hub id that has them."
        )
    own_code = "auto_map" in read_json(folder / "tokenizer_config.json", required=False)
    if (folder / "tokenizer.json").is_file() and not (own_code and trust_remote_code):
        from transformers import PreTrainedTokenizerFast

        return _quietly(folder, lambda: PreTrainedTokenizerFast.from_pretrained(str(folder)))
    if (folder / "qwen.tiktoken").is_file() and not trust_remote_code:
        from mii.modeling.tiktoken_file import load_qwen

        return _quietly(folder, lambda: load_qwen(folder))
    if own_code and not trust_remote_code:
        raise TokenizerError(
            f"The tokenizer in {folder} is Python code of its own. Pass trust_remote_code=True to run it."
        )
    from transformers import AutoTokenizer

    return _quietly(folder, lambda: AutoTokenizer.from_pretrained(str(folder), trust_remote_code=trust_remote_code))


def _quietly(folder: Path, load: Callable[[], Any]) -> Any:
    """Loads without the library's advice on how else it could be done; its errors become a sentence."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        return load()
    except Exception as error:  # the Rust library raises bare exceptions for broken files
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise TokenizerError(f"The tokenizer in {folder} cannot be loaded: {reason[0]}") from error
    finally:
        logging.set_verbosity(before)


def _set_padding(tokenizer: Any) -> None:
    if getattr(tokenizer, "pad_token", "") is None and getattr(tokenizer, "eos_token", None) is not None:
        tokenizer.pad_token = tokenizer.eos_token


def _wrap_gguf(backend: Tokenizer, vocabulary: Any) -> Any:
    from transformers import PreTrainedTokenizerFast

    from mii.modeling.gguf_tokenizer import chat_template, special_tokens

    architecture = vocabulary.metadata.get("general.architecture")
    length = vocabulary.metadata.get(f"{architecture}.context_length")
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        clean_up_tokenization_spaces=False,
        add_bos_token=vocabulary.adds_bos,
        add_eos_token=vocabulary.adds_eos,
        chat_template=chat_template(vocabulary),
        **({"model_max_length": length} if type(length) is int else {}),
        **special_tokens(vocabulary),
    )
    _set_padding(wrapped)
    return wrapped


def _not_unicode(text: str) -> str:
    position = next((at for at, character in enumerate(text) if "\ud800" <= character <= "\udfff"), 0)
    return f"The prompt is not valid Unicode: character {position} is half of a surrogate pair."
