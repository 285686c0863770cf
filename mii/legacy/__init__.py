"""The names of DeepSpeed-MII's first API, which are also at the top of `mii`.

The enums work. The rest says, when it is called, what to use in its place: scripts and annotations that only name them
keep working, and nothing pretends to deploy.
"""

from __future__ import annotations

from typing import Any, ClassVar, NoReturn

from mii.constants import DeploymentType, ModelProvider, TaskType
from mii.errors import UnsupportedFeatureError

__all__ = [
    "DeploymentType",
    "MIIClient",
    "MIIConfig",
    "MIIServer",
    "ModelConfig",
    "ModelProvider",
    "TaskType",
    "aml_output_path",
    "deploy",
    "get_supported_models",
    "mii_query_handle",
    "terminate",
]


class _Replaced:
    """A class of the first API; making one fails with the way out."""

    instead: ClassVar[str]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        _refuse(type(self).__name__, self.instead)


class ModelConfig(_Replaced):
    """The first API's model options."""

    instead = "mii.config.ModelConfig, or give the options to mii.pipeline"


class MIIConfig(_Replaced):
    """The first API's deployment options."""

    instead = "mii.config.MIIConfig, or give the options to mii.serve"


class MIIServer(_Replaced):
    """The first API's server."""

    instead = "mii.serve"


class MIIClient(_Replaced):
    """The first API's client."""

    instead = "mii.client"


def deploy(*args: Any, **kwargs: Any) -> NoReturn:
    """Deployed a model for one of the tasks of the first API.

    Raises:
        UnsupportedFeatureError: always.
    """
    _refuse("deploy", "mii.serve(model, deployment_name=...), or mii.pipeline(model) in this process")


def mii_query_handle(*args: Any, **kwargs: Any) -> NoReturn:
    """Connected to what `deploy` had started.

    Raises:
        UnsupportedFeatureError: always.
    """
    _refuse("mii_query_handle", "mii.client(deployment_name)")


def terminate(*args: Any, **kwargs: Any) -> NoReturn:
    """Ended what `deploy` had started.

    Raises:
        UnsupportedFeatureError: always.
    """
    _refuse("terminate", "mii.client(deployment_name).terminate_server()")


def get_supported_models(*args: Any, **kwargs: Any) -> NoReturn:
    """Listed the hub's models for a task.

    Raises:
        UnsupportedFeatureError: always.
    """
    _refuse("get_supported_models", "mii.pipeline(model), which names the supported architectures where one is not")


def aml_output_path(*args: Any, **kwargs: Any) -> NoReturn:
    """Named the folder of generated Azure ML files.

    Raises:
        UnsupportedFeatureError: always.
    """
    _refuse("aml_output_path", "mii.serve on the machine or in the container itself; mii makes no Azure ML deployments")


def _refuse(name: str, instead: str) -> NoReturn:
    raise UnsupportedFeatureError(
        f"mii.{name} belongs to DeepSpeed-MII's first API, which mii does not run; use {instead}"
    )
