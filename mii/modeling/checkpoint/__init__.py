"""Reading models: a folder of safetensors or .bin files, a hub id, or a .gguf file, all behind one interface.

with open_checkpoint("path/to/model") as checkpoint:
    weight = checkpoint.get("model.norm.weight", torch.bfloat16)
"""

from __future__ import annotations

from pathlib import Path

from mii.errors import CheckpointError, CheckpointNotFoundError
from mii.modeling.checkpoint.base import Checkpoint, checkpoint_size
from mii.modeling.checkpoint.default_model import find_default_model
from mii.modeling.checkpoint.folder import find_weights, read_json, text_config
from mii.modeling.checkpoint.hub import download, is_hub_id

__all__ = ["Checkpoint", "checkpoint_size", "find_default_model", "locate", "open_checkpoint", "text_config"]


def open_checkpoint(
    model_name_or_path: str | Path,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    token: str | None = None,
) -> Checkpoint:
    """Opens a model without reading its weights.

    Args:
        model_name_or_path: a Hugging Face model folder, a .gguf file, a hub id ("owner/name"), or a GGUF file of a hub
            repository ("owner/name/file.gguf").
        revision: branch, tag or commit of a hub repository.
        trust_remote_code: also download the repository's own Python files (mii never runs them for weights).
        token: hub token; the one that `hf auth login` stored by default.

    Raises:
        CheckpointNotFoundError: there is no such folder, file, repository or revision, or files are missing in it.
        CheckpointError: a file is truncated, corrupt or of the wrong kind, or the hub cannot be reached.
        UnsupportedModelError: the architecture of a GGUF file is not known.
    """
    path = locate(model_name_or_path, revision=revision, trust_remote_code=trust_remote_code, token=token)
    return _open_gguf(path) if path.is_file() else _open_folder(path)


def locate(
    model_name_or_path: str | Path,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    token: str | None = None,
    weights: bool = True,
) -> Path:
    """The local folder or .gguf file of a model, downloaded first where it is a hub id. Arguments and errors as above.

    Args:
        weights: False leaves the weights out of a download: configs and tokenizer files only.
    """
    name = str(model_name_or_path)
    if not name:
        raise CheckpointNotFoundError("The name of the model is empty. Give a folder, a .gguf file or a hub id.")
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        if path.suffix == ".gguf":
            return path
        raise CheckpointError(f"{path} is a file, but not a .gguf file. Give the folder that holds the model.")
    if not is_hub_id(name):
        raise CheckpointNotFoundError(
            f"There is no folder or file {name}, and it has not the form of a hub id (owner/name)."
        )
    return download(name, revision=revision, token=token, weights=weights, code=trust_remote_code)


def _open_folder(path: Path) -> Checkpoint:
    weights = None
    if not (path / "config.json").is_file() and any(path.glob("*.gguf")):
        weights = find_weights(path)
    if weights is None:
        config = read_json(path / "config.json")
        generation_config = read_json(path / "generation_config.json", required=False)
        weights = find_weights(path)
    if weights.kind == "gguf":
        return _open_gguf(weights.files[0])
    # The formats load with torch, which whoever only wants a tokenizer does without.
    if weights.kind == "bin":
        from mii.modeling.checkpoint.bin import BinCheckpoint

        return BinCheckpoint(path, weights, config, generation_config)
    from mii.modeling.checkpoint.safetensors import SafetensorsCheckpoint

    return SafetensorsCheckpoint(path, weights, config, generation_config)


def _open_gguf(path: Path) -> Checkpoint:
    from mii.modeling.checkpoint.gguf.checkpoint import GGUFCheckpoint

    return GGUFCheckpoint(path)
