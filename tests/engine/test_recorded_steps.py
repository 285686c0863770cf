"""On a CPU the engine's steps are recorded and replayed: the same tokens, whatever is batched with what."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mii.batching.data_classes import EngineRequest, SamplingParams
from mii.config import ModelConfig
from mii.engine import load_engine
from mii.engine.engine import Engine
from mii.ops import native
from mii.ops.recording import RecordedSteps

pytestmark = pytest.mark.skipif(
    native.library(torch.device("cpu")) is None, reason="the native library is not built: python setup.py build_native"
)


def generate(engine: Engine, requests: list[EngineRequest]) -> dict[int, list[int]]:
    """Token ids by request; a request joins every second step, so that steps of many shapes come about."""
    tokens: dict[int, list[int]] = {request.uid: [] for request in requests}
    waiting = list(requests)
    while waiting or engine.has_work:
        if waiting:
            engine.add_request(waiting.pop(0))
        for _ in range(2):
            for output in engine.step() if engine.has_work else ():
                tokens[output.uid] += output.token_ids
    return tokens


def requests() -> list[EngineRequest]:
    sampling = (SamplingParams(), SamplingParams(temperature=0.8, top_k=20, seed=5))
    return [
        EngineRequest(
            uid=uid, prompt_ids=[3 + (7 * uid + i) % 250 for i in range(1 + 9 * uid)], max_new_tokens=12 + uid,
            min_new_tokens=4 * (uid % 2), stop_ids=(2,), sampling=sampling[uid % 2],
        )
        for uid in range(6)
    ]  # fmt: skip


def test_recorded_steps_give_the_tokens_of_plain_ones(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = load_engine(ModelConfig(model_name_or_path=str(tiny_llama), device="cpu", dtype="fp32"))
    first, second = generate(engine, requests()), generate(engine, requests())
    recorded = len(engine.runner._recorded)
    monkeypatch.setattr(RecordedSteps, "run", lambda self, key, body: body())
    plain = generate(engine, requests())
    engine.destroy()
    assert recorded > 5
    assert first == plain
    assert second == plain
