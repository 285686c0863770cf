"""A shape that the kernels do not take is computed by plain torch, with a warning, and the answers are the same."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from mii.logging import logger
from mii.ops import abi, native
from tests.oracle import generate, random_prompts, small_engine


def test_an_operation_without_a_kernel_is_served_by_torch_with_one_warning(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = native.library(torch.device("cpu"))
    if library is None:
        pytest.skip("no native library for the CPU here")
    prompts = random_prompts(200, [5, 40])
    expected = generate(small_engine(tiny_llama), prompts, 12)
    monkeypatch.setitem(library.functions, "mii_attention", lambda args, stream: abi.UNSUPPORTED)
    monkeypatch.setattr(library, "_warned", set())
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    try:
        engine, before = small_engine(tiny_llama), native.fallbacks
        assert generate(engine, prompts, 12) == expected
    finally:
        logger.removeHandler(handler)
    assert native.fallbacks > before
    assert len(messages) == 1
    assert "no kernel for mii_attention with" in messages[0]
    assert "head_dim 64" in messages[0]
