"""The event loop of the serving processes, and what keeps it from being held up."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

__all__ = ["importing", "run", "settle"]

Result = TypeVar("Result")


def run(main: Coroutine[Any, Any, Result]) -> Result:
    """`asyncio.run` on uvloop, where it is installed: a gRPC message costs two thirds of the time there."""
    try:
        import uvloop
    except ImportError:
        return asyncio.run(main)
    result: Result = uvloop.run(main)
    return result


@contextmanager
def importing() -> Iterator[None]:
    """To import many modules in the block: collections of garbage would find none in what they make."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def settle() -> None:
    """To be called once a process is up. What was made so far stays; without it in the collector's sight a collection
    takes microseconds and not a tenth of a second, in which no token would move.
    """
    gc.freeze()
