"""What a model folder holds: which files are its weights, and its JSON configs."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from mii.errors import CheckpointError, CheckpointNotFoundError

# (single file, index of shards, kind) in the order in which they are looked for
_STANDARD = (
    ("model.safetensors", "model.safetensors.index.json", "safetensors"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json", "bin"),
)
_OTHER = (("safetensors", (".safetensors",)), ("bin", (".bin", ".pt", ".pth")), ("gguf", (".gguf",)))
# Files that end like weights and are none, or hold tensors under other than the Hugging Face names.
_NOT_WEIGHTS = re.compile(
    r"(training_args|optimizer|scheduler|scaler|rng_state|random_states|adapter_|consolidated|mmproj|tokenizer|sentencepiece)"
)
_SHARD = re.compile(r"-(\d{5})-of-(\d{5})\.")


@dataclass(frozen=True, slots=True)
class Weights:
    """The weight files of a folder. `weight_map` is tensor name -> file where an index says so, else None."""

    kind: str
    files: tuple[Path, ...]
    weight_map: Mapping[str, Path] | None = None


def read_json(path: Path, *, required: bool = True) -> dict[str, Any]:
    """A JSON object from a file; {} where an optional file is missing.

    Raises:
        CheckpointError: the file is missing though required, is not UTF-8, not JSON, or not an object.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        if not required:
            return {}
        raise CheckpointNotFoundError(_missing_config(path)) from error
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not UTF-8 text (byte {error.start}). Copy or download it again.") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
    try:
        value = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}. Copy or download it again.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not a {type(value).__name__}.")
    return value


def _missing_config(path: Path) -> str:
    folder = path.parent
    if (folder / "adapter_config.json").exists():
        return f"{folder} holds a LoRA adapter, not a model. Merge it into its base model first and give that folder."
    if (folder / "ds_model_config.pkl").exists():
        return f"{folder} is a DeepSpeed engine checkpoint. Give the Hugging Face folder it was made from."
    return (
        f"{folder} has no {path.name}, so it is not a model folder. A Hugging Face model folder holds config.json, "
        "tokenizer files and *.safetensors (or *.bin); a .gguf file is given by its own path."
    )


def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the language model: where it is nested in `text_config`, its fields over the outer ones.

    The outer model_type and architectures then name the whole, so the inner ones win; without a nested part the result
    equals the input.
    """
    nested = config.get("text_config")
    outer = {key: value for key, value in config.items() if key != "text_config"}
    if not isinstance(nested, Mapping):
        return outer
    return outer | dict(nested)


def find_weights(folder: Path) -> Weights:
    """The weight files of a folder: safetensors before .bin before .gguf.

    Raises:
        CheckpointError: there are none, a shard is missing, an index is broken, or several GGUF files leave it open
            which one is meant.
    """
    for single, index, kind in _STANDARD:
        if (folder / single).is_file():
            return Weights(kind, (folder / single,))
        if (folder / index).is_file():
            return _indexed(folder / index, kind)
    names = sorted(path for path in folder.iterdir() if path.is_file())
    for kind, endings in _OTHER:
        found = [path for path in names if path.name.endswith(endings) and not _NOT_WEIGHTS.match(path.name)]
        if found:
            return _loose(kind, found)
    raise CheckpointNotFoundError(_no_weights(folder, names))


def split_parts(name: str) -> list[str]:
    """The names of all parts of a split file ("model-00002-of-00003.gguf"); just `name` for any other."""
    match = _SHARD.search(name)
    if match is None:
        return [name]
    total = int(match[2])
    return [_SHARD.sub(f"-{number:05d}-of-{total:05d}.", name) for number in range(1, total + 1)]


def choose_files(repository: str, names: list[str]) -> list[str]:
    """The weight files among the names in a repository, by the same rules as `find_weights`.

    Raises:
        CheckpointError: several GGUF files leave it open which one is meant.
        CheckpointNotFoundError: there are none.
    """
    for single, index, kind in _STANDARD:
        if single in names:
            return [single]
        if index in names:
            stem = single.partition(".")[0]
            return [index] + [name for name in names if name.startswith(stem) and name.endswith(f".{kind}")]
    for kind, endings in _OTHER:
        found = [name for name in names if name.endswith(endings) and not _NOT_WEIGHTS.match(name)]
        if kind == "gguf" and len(found) > 1 and not all(map(_SHARD.search, found)):
            shown = ", ".join(found[:6]) + (", …" if len(found) > 6 else "")
            raise CheckpointError(
                f"{repository} holds {len(found)} GGUF files. Name one as {repository}/<file>: {shown}."
            )
        if found:
            return found
    raise CheckpointNotFoundError(f"The hub repository {repository} holds no weights that mii reads.")


def _no_weights(folder: Path, files: list[Path]) -> str:
    if any(path.name.startswith("consolidated") for path in files):
        return (
            f"{folder} holds weights in the original (consolidated) layout only. Give a folder with Hugging Face "
            "weights (model*.safetensors or pytorch_model*.bin)."
        )
    if (folder / "adapter_config.json").exists():
        return f"{folder} holds a LoRA adapter, not a model. Merge it into its base model first and give that folder."
    return f"{folder} holds no weights: no *.safetensors, *.bin, *.pt or *.gguf file. Is the download complete?"


def _indexed(index: Path, kind: str) -> Weights:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map from tensor names to files. Copy or download it again.")
    paths = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or PurePosixPath(file).is_absolute() or ".." in PurePosixPath(file).parts:
            raise CheckpointError(f"{index} places tensor {name} in {file!r}, which is no file of this folder.")
        paths[name] = index.parent / file
    files = tuple(sorted(set(paths.values())))
    missing = [path.name for path in files if not path.is_file()]
    if missing:
        raise CheckpointNotFoundError(_missing_shards(index.parent, missing, len(files)))
    return Weights(kind, files, paths)


def _missing_shards(folder: Path, missing: list[str], total: int) -> str:
    shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
    return f"{folder} lacks {len(missing)} of {total} weight files: {shown}. Is the download complete?"


def _loose(kind: str, found: list[Path]) -> Weights:
    """Files under other than the standard names, and shards without an index."""
    shards = [match for path in found if (match := _SHARD.search(path.name))]
    if len(shards) == len(found) and len({match[2] for match in shards}) == 1:
        total = int(shards[0][2])
        have = {int(match[1]) for match in shards}
        missing = [_SHARD.sub(f"-{n:05d}-of-{total:05d}.", found[0].name) for n in range(1, total + 1) if n not in have]
        if missing:
            raise CheckpointNotFoundError(_missing_shards(found[0].parent, missing, total))
    elif kind == "gguf" and len(found) > 1:
        names = ", ".join(path.name for path in found[:6]) + (", …" if len(found) > 6 else "")
        raise CheckpointError(f"{found[0].parent} holds {len(found)} GGUF files. Give the path of one: {names}.")
    return Weights(kind, tuple(found))
