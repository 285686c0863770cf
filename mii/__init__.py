"""mii: LLM inference in one call, with the API of DeepSpeed-MII.

    import mii

    pipe = mii.pipeline("path-or-id")
    print(pipe(["DeepSpeed is", "Seattle is"], max_new_tokens=128))

Names load when they are first used: importing mii takes milliseconds and brings in neither torch nor transformers,
deepspeed or grpc.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mii.api import client, pipeline, serve
    from mii.legacy import (
        DeploymentType,
        MIIClient,
        MIIConfig,
        MIIServer,
        ModelConfig,
        TaskType,
        aml_output_path,
        deploy,
        get_supported_models,
        mii_query_handle,
        terminate,
    )

    __version__: str

__all__ = [
    "DeploymentType",
    "MIIClient",
    "MIIConfig",
    "MIIServer",
    "ModelConfig",
    "TaskType",
    "__version__",
    "aml_output_path",
    "client",
    "deploy",
    "get_supported_models",
    "mii_query_handle",
    "pipeline",
    "serve",
    "terminate",
]

# The module that each public name comes from. As in DeepSpeed-MII, the classes here are the first API's: those that
# mii.serve works with are mii.config.ModelConfig, mii.config.MIIConfig and so on.
_HOMES = dict.fromkeys(("client", "pipeline", "serve"), "mii.api") | dict.fromkeys(
    (
        "DeploymentType",
        "MIIClient",
        "MIIConfig",
        "MIIServer",
        "ModelConfig",
        "TaskType",
        "aml_output_path",
        "deploy",
        "get_supported_models",
        "mii_query_handle",
        "terminate",
    ),
    "mii.legacy",
)
_SUBMODULES = (
    *("api", "backend", "batching", "benchmark", "cli", "config", "constants", "engine", "entrypoints", "errors"),
    *("grpc_related", "launch", "legacy", "logging", "modeling", "ops", "progress", "validation"),
)


def __getattr__(name: str) -> Any:
    """Loads a public name, or a submodule, the first time that it is asked for."""
    if name in _HOMES:
        value: Any = getattr(importlib.import_module(_HOMES[name]), name)
    elif name in _SUBMODULES:
        value = importlib.import_module(f"mii.{name}")
    elif name == "__version__":
        value = _version()
    else:
        raise AttributeError(f"module 'mii' has no attribute {name!r}; public names: {', '.join(__all__)}")
    globals()[name] = value
    return value


def _version() -> str:
    """What the build wrote; a source tree that was never built has no version."""
    try:
        return str(importlib.import_module("mii.version").__version__)
    except ModuleNotFoundError:
        return "0.0.0"


def __dir__() -> list[str]:
    return sorted({*__all__, *_SUBMODULES, *globals()})
