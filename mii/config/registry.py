"""Which deployments run on this machine: a folder with a JSON file for each, readable by its owner only.

The folders lie under ``MII_CACHE_PATH`` (by default ``/tmp/mii_cache``), in a folder for each user. What is in them is
data: nothing of it is ever run.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from pydantic import ValidationError

from mii.config.deployment import MIIConfig, default_deployment_name
from mii.constants import CACHE_PATH_DEFAULT, cache_path
from mii.errors import DeploymentNotFoundError, RegistryError, UnsupportedFeatureError
from mii.launch.folder import DeploymentFolder
from mii.validation import explain

__all__ = [
    "check_can_be_saved",
    "config_json",
    "deployment_folder",
    "deployment_names",
    "forget_deployment",
    "get_mii_config",
    "make_registry_folder",
    "registry_folder",
    "save_deployment",
    "writing_registry",
]


def deployment_folder(deployment_name: str) -> DeploymentFolder:
    """Where the files of a deployment lie, or would."""
    return DeploymentFolder(registry_folder() / _quote(deployment_name))


def save_deployment(config: MIIConfig) -> Path:
    """Makes `config` known to `get_mii_config` in every process of this user; replaces one of the same name.

    Raises:
        UnsupportedFeatureError: the tokenizer is an object, which other processes cannot be given.
        OSError: the registry cannot be written.
    """
    check_can_be_saved(config)
    make_registry_folder()
    path = deployment_folder(config.deployment_name).config_file
    path.parent.mkdir(mode=0o700, exist_ok=True)
    # mkstemp makes the file with mode 600, and the rename shows readers the old file or the new one, never half of one.
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(config_json(config))
    os.replace(temporary, path)
    return path


def config_json(config: MIIConfig) -> str:
    """What was given, as JSON, so that a reader still sees what was left to the defaults; and what was chosen here."""
    options: dict[str, Any] = config.model_dump(mode="json", by_alias=True, exclude_unset=True)
    for name in ("deployment_name", "port_number", "restful_api_port"):
        options[name] = getattr(config, name)
    options["model_config"]["tensor_parallel"] = config.model_conf.tensor_parallel
    return json.dumps(options, indent=2)


def check_can_be_saved(config: MIIConfig) -> None:
    """Makes sure that other processes can be told what `config` says.

    Raises:
        UnsupportedFeatureError: the tokenizer is an object.
    """
    if not isinstance(config.model_conf.tokenizer, str):
        raise UnsupportedFeatureError(
            "a tokenizer given as an object cannot be passed to a deployment's processes; save it to a folder and give "
            "that folder as tokenizer="
        )


def forget_deployment(deployment_name: str) -> None:
    """Takes a deployment out of the registry; one that is not in it is fine."""
    deployment_folder(deployment_name).remove()


def deployment_names() -> list[str]:
    """The registered deployments, sorted."""
    return sorted(unquote(file.parent.name) for file in registry_folder().glob("*/deployment.json"))


def get_mii_config(model_or_deployment_name: str) -> MIIConfig:
    """The config of a deployment, by its name or, where it was not given one, by its model's.

    Raises:
        DeploymentNotFoundError: no such deployment, or its file is not this user's or is damaged.
    """
    for name in (model_or_deployment_name, default_deployment_name(model_or_deployment_name)):
        path = deployment_folder(name).config_file
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


def registry_folder() -> Path:
    """The folder of this user's deployments; it need not exist."""
    return cache_path() / f"deployments-{os.getuid()}"


@contextlib.contextmanager
def writing_registry() -> Iterator[None]:
    """Says of what the system refuses within which folder is meant, and how to have another one.

    Raises:
        RegistryError: in place of what the system said.
    """
    try:
        yield
    except OSError as error:
        if error.strerror is None:  # mii's own words
            raise
        raise RegistryError(
            f"deployments are recorded in {registry_folder()}, which cannot be written: {error.strerror}; make room "
            "for it, or set MII_CACHE_PATH to a folder of your own"
        ) from error


def make_registry_folder() -> None:
    """Makes the folder, readable by this user only.

    Raises:
        PermissionError: another user has made it.
    """
    root, folder = cache_path(), registry_folder()
    if not root.exists():
        root.mkdir(parents=True, exist_ok=True)
        if root == Path(CACHE_PATH_DEFAULT):
            root.chmod(0o1777)  # like /tmp itself: every user of the machine has a folder in it
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise PermissionError(f"{folder} belongs to another user; set MII_CACHE_PATH to a folder of your own")


def _quote(deployment_name: str) -> str:
    """Names may hold spaces and slashes, so folders have percent-encoded names; ``.`` and ``..`` would be no names."""
    name = quote(deployment_name, safe="")
    return f"%2E{name[1:]}" if name.startswith(".") else name
