"""A request's life: from a prompt to the text of its answer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mii.batching.async_pipeline import MIIAsyncPipeline
    from mii.batching.pipeline import MIIPipeline

__all__ = ["MIIAsyncPipeline", "MIIPipeline"]


def __getattr__(name: str) -> Any:
    """The pipelines load when they are first named, because their parts are heavier than this package."""
    if name == "MIIPipeline":
        from mii.batching.pipeline import MIIPipeline

        return MIIPipeline
    if name == "MIIAsyncPipeline":
        from mii.batching.async_pipeline import MIIAsyncPipeline

        return MIIAsyncPipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
