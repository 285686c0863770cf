"""Which deployments run on this machine: one JSON file for each, readable by its owner only.

The files lie under ``MII_CACHE_PATH`` (by default ``/tmp/mii_cache``), in a folder for each user. They are data:
nothing in them is ever run.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from urllib.parse import quote, unquote

from pydantic import ValidationError

from mii.config.deployment import MIIConfig, default_deployment_name
from mii.constants import CACHE_PATH_DEFAULT, cache_path
from mii.errors import DeploymentNotFoundError, UnsupportedFeatureError
from mii.validation import explain

__all__ = ["deployment_names", "forget_deployment", "get_mii_config", "save_deployment"]

_SUFFIX = ".json"


def save_deployment(config: MIIConfig) -> Path:
    """Makes `config` known to `get_mii_config` in every process of this user; replaces one of the same name.

    Raises:
        UnsupportedFeatureError: the tokenizer is an object, which other processes cannot be given.
        OSError: the registry cannot be written.
    """
    if not isinstance(config.model_conf.tokenizer, str):
        raise UnsupportedFeatureError(
            "a tokenizer given as an object cannot be passed to a deployment's processes; save it to a folder and give "
            "that folder as tokenizer="
        )
    _make_folder()
    path = _path(config.deployment_name)
    # mkstemp makes the file with mode 600, and the rename shows readers the old file or the new one, never half of one.
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(config.model_dump_json(by_alias=True, indent=2))
    os.replace(temporary, path)
    return path


def forget_deployment(deployment_name: str) -> None:
    """Takes a deployment out of the registry; one that is not in it is fine."""
    _path(deployment_name).unlink(missing_ok=True)


def deployment_names() -> list[str]:
    """The registered deployments, sorted."""
    files = _folder().glob(f"*{_SUFFIX}")
    return sorted(unquote(file.name.removesuffix(_SUFFIX)) for file in files)


def get_mii_config(model_or_deployment_name: str) -> MIIConfig:
    """The config of a deployment, by its name or, where it was not given one, by its model's.

    Raises:
        DeploymentNotFoundError: no such deployment, or its file is not this user's or is damaged.
    """
    for name in (model_or_deployment_name, default_deployment_name(model_or_deployment_name)):
        path = _path(name)
        if os.path.isfile(path):
            return _read(path, name)
    known = ", ".join(deployment_names()) or "none"
    raise DeploymentNotFoundError(
        f"no deployment or model {model_or_deployment_name!r} is served on this machine (served: {known}); start it "
        "with mii.serve(...), or set MII_CACHE_PATH to what the server has"
    )


def _read(path: Path, name: str) -> MIIConfig:
    with path.open(encoding="utf-8") as file:
        if os.fstat(file.fileno()).st_uid != os.getuid():
            raise DeploymentNotFoundError(
                f"{path} of deployment {name!r} belongs to another user, so it is not trusted"
            )
        text = file.read()
    try:
        return MIIConfig.model_validate_json(text)
    except ValidationError as error:
        raise DeploymentNotFoundError(f"{path} of deployment {name!r} is damaged: {explain(error)}") from error


def _folder() -> Path:
    return cache_path() / f"deployments-{os.getuid()}"


def _make_folder() -> None:
    root, folder = cache_path(), _folder()
    if not root.exists():
        root.mkdir(parents=True, exist_ok=True)
        if root == Path(CACHE_PATH_DEFAULT):
            root.chmod(0o1777)  # like /tmp itself: every user of the machine has a folder in it
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise PermissionError(f"{folder} belongs to another user; set MII_CACHE_PATH to a folder of your own")


def _path(deployment_name: str) -> Path:
    """Names may hold spaces and slashes, so the file name is the percent-encoded name."""
    return _folder() / (quote(deployment_name, safe="") + _SUFFIX)
