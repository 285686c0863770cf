"""Pipelines over the stand-in engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from mii.batching.async_pipeline import MIIAsyncPipeline
from mii.batching.pipeline import MIIPipeline
from mii.config import ModelConfig
from tests.batching.fake_engine import FakeEngine, Wrapper


@pytest.fixture
def make_pipeline() -> Callable[..., tuple[MIIPipeline, FakeEngine]]:
    """A pipeline and its engine, by the arguments of `FakeEngine`; `tokenizer` and `config` set the other parts."""

    def make(*, tokenizer: Any = None, config: dict[str, Any] | None = None, **engine: Any) -> Any:
        fake = FakeEngine(**engine)
        settings = ModelConfig(**{"model_name_or_path": "none", **(config or {})})
        return MIIPipeline(fake, tokenizer or Wrapper(), settings), fake

    return make


@pytest.fixture
def make_async() -> Iterator[Callable[..., tuple[MIIAsyncPipeline, FakeEngine]]]:
    """A started `MIIAsyncPipeline` and its engine; shut down after the test."""
    made: list[MIIAsyncPipeline] = []

    def make(*, start: bool = True, **engine: Any) -> tuple[MIIAsyncPipeline, FakeEngine]:
        fake = FakeEngine(**engine)
        pipe = MIIAsyncPipeline(fake, Wrapper(), ModelConfig(model_name_or_path="none"))
        made.append(pipe)
        if start:
            pipe.start()
        return pipe, fake

    yield make
    for pipe in made:
        pipe.shutdown()
