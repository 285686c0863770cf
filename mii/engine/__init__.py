"""The engine: continuous batching over a paged KV cache. `load_engine` builds one from a `ModelConfig`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mii.engine.engine import Engine, EngineStats
    from mii.engine.loading import build_engine, load_engine

__all__ = ["Engine", "EngineStats", "build_engine", "load_engine"]

_HOMES = {
    "Engine": "mii.engine.engine",
    "EngineStats": "mii.engine.engine",
    "build_engine": "mii.engine.loading",
    "load_engine": "mii.engine.loading",
}


def __getattr__(name: str) -> Any:
    """Loads torch and the engine when they are first asked for; the scheduler and its tests need neither."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
