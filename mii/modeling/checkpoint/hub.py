"""Downloads from the Hugging Face hub: only the files that are needed, resumed where they broke off, cached as usual.

`HF_HUB_OFFLINE=1` and an unreachable hub both lead to the cache; `HF_HOME`, `HF_ENDPOINT` and `HF_TOKEN` work as
everywhere.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from mii.errors import CheckpointError, CheckpointNotFoundError
from mii.modeling.checkpoint.folder import choose_files, split_parts

_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?"
_HUB_ID = re.compile(rf"(?P<repo>{_PART}(?:/{_PART})?)")
_HUB_FILE = re.compile(rf"(?P<repo>{_PART}/{_PART})/(?P<file>.+\.gguf)")
# Configs, tokenizers of every kind, chat templates.
_SMALL_FILES = (".json", ".model", ".txt", ".jinja", ".tiktoken")
_WEIGHT_INDEX = ".index.json"
# What a cached model must have to be tried without the hub; what else it lacks shows when it is opened.
_LEAST = ["config.json"]

_Result = TypeVar("_Result")


def is_hub_id(name: str) -> bool:
    """Whether a name has the form of a hub repository ("owner/name", "name") or of a GGUF file in one."""
    return ".." not in name and bool(_HUB_ID.fullmatch(name) or _HUB_FILE.fullmatch(name))


def download(name: str, *, revision: str | None, token: str | None, weights: bool = True, code: bool = False) -> Path:
    """Brings a repository into the local cache.

    Args:
        name: "owner/name", or "owner/name/file.gguf" for a single file.
        revision: branch, tag or commit; None for the main branch.
        token: hub token; None for the stored one.
        weights: whether weights are wanted too.
        code: whether Python files are wanted too.

    Returns:
        The folder in the cache, or the .gguf file.

    Raises:
        CheckpointNotFoundError: no such repository, revision or file, or it is not in the cache and the hub is out of
            reach.
        CheckpointError: access is denied, or the download failed.
    """
    import huggingface_hub

    file = _HUB_FILE.fullmatch(name)
    if file is not None:
        return _download_file(file["repo"], file["file"], revision, token)
    wanted = _wanted(name, revision, token, weights, code)
    folder = _explained(
        name,
        revision,
        lambda: huggingface_hub.snapshot_download(
            name, revision=revision, token=token, allow_patterns=wanted or _LEAST, local_files_only=wanted is None
        ),
    )
    return Path(folder)


def _download_file(repository: str, file: str, revision: str | None, token: str | None) -> Path:
    """One GGUF file; of a split one every part, beside each other."""
    import huggingface_hub

    paths = {}
    for part in split_parts(file):
        call = functools.partial(huggingface_hub.hf_hub_download, repository, part, revision=revision, token=token)
        paths[part] = Path(_explained(f"{repository}/{part}", revision, call))
    return paths[file]


def _wanted(name: str, revision: str | None, token: str | None, weights: bool, code: bool) -> list[str] | None:
    """The files to fetch; None when the hub is out of reach, so that the cache must do."""
    import huggingface_hub
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return None
    try:
        info = _explained(
            name, revision, lambda: huggingface_hub.HfApi(token=token).model_info(name, revision=revision)
        )
    except _UnreachableError:
        return None
    listed = [sibling.rfilename for sibling in info.siblings or ()]
    top = [file for file in listed if "/" not in file]
    small = [file for file in top if file.endswith(_SMALL_FILES) and not file.endswith(_WEIGHT_INDEX)]
    if code:
        small += [file for file in listed if file.endswith(".py")]
    return small + (choose_files(name, top) if weights else [])


class _UnreachableError(CheckpointError):
    """The hub does not answer."""


def _explained(name: str, revision: str | None, call: Callable[[], _Result]) -> _Result:
    """Runs a hub call and turns its errors into sentences."""
    from huggingface_hub import errors

    try:
        return call()
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"Access to {name} must be granted first: ask for it on its page of the hub, then run `hf auth login` or "
            "pass token=."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointNotFoundError(f"The hub repository {name} has no revision {revision!r}.") from error
    except errors.LocalEntryNotFoundError as error:
        raise CheckpointNotFoundError(
            f"There is no folder or file {name}, it is not in the local hub cache, and the hub is out of reach "
            "(or HF_HUB_OFFLINE is set)."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointNotFoundError(
            f"There is neither a folder {name} here nor such a repository on the hub (or it is private: run "
            "`hf auth login` or pass token=)."
        ) from error
    except errors.EntryNotFoundError as error:
        raise CheckpointNotFoundError(f"The hub has no file {name}.") from error
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status is not None and status < 500:
            raise CheckpointError(f"The hub refused the download of {name} (HTTP {status}).") from error
        raise _UnreachableError(f"The hub failed at {name} (HTTP {status}). Try again later.") from error
    except Exception as error:  # the HTTP library below the hub's client changes, and its exceptions with it
        raise _unreachable(name, error) from error


def _unreachable(name: str, error: Exception) -> _UnreachableError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return _UnreachableError(f"The download of {name} from the hub failed: {reason}. Run it again to resume.")
