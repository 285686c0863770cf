"""The engine's options under DeepSpeed's names."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mii.config import DSStateManagerConfig, MemoryConfig, RaggedInferenceEngineConfig
from mii.errors import UnsupportedFeatureError
from mii.validation import explain


def test_the_defaults_are_deepspeeds() -> None:
    assert RaggedInferenceEngineConfig().model_dump() == {
        "tensor_parallel": {"tp_size": 1},
        "state_manager": {
            "max_tracked_sequences": 2048,
            "max_ragged_batch_size": 768,
            "max_ragged_sequence_count": 512,
            "max_context": 8192,
            "memory_config": {"mode": "reserve", "size": 1_000_000_000},
            "offload": False,
        },
        "quantization": {"quantization_mode": None},
    }


@pytest.mark.parametrize("name", ["state_manager", "manager"])
def test_names_and_aliases_are_taken(name: str) -> None:
    config = RaggedInferenceEngineConfig(**{name: {"max_tracked_sequences": 3}})
    assert config.state_manager.max_tracked_sequences == 3


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({}, 512),
        ({"max_ragged_batch_size": 100}, 100),
        ({"max_tracked_sequences": 7}, 7),
        ({"max_ragged_batch_size": 4096}, 512),
        ({"max_ragged_batch_size": 4096, "max_ragged_sequence_count": 1024}, 1024),
    ],
)
def test_the_sequence_count_fits_the_other_limits(options: dict[str, int], count: int) -> None:
    assert DSStateManagerConfig(**options).max_ragged_sequence_count == count


@pytest.mark.parametrize("limit", ["max_tracked_sequences", "max_ragged_batch_size"])
def test_a_sequence_count_above_another_limit_is_refused_with_the_number_that_fits(limit: str) -> None:
    with pytest.raises(ValidationError, match="use at most 100"):
        DSStateManagerConfig(max_ragged_sequence_count=101, **{limit: 100})


@pytest.mark.parametrize("name", ["max_tracked_sequences", "max_ragged_batch_size", "max_context"])
def test_limits_are_positive(name: str) -> None:
    with pytest.raises(ValidationError, match=f"{name}=0 must be greater than or equal to 1"):
        DSStateManagerConfig(**{name: 0})


def test_what_was_given_can_be_told_from_defaults() -> None:
    config = RaggedInferenceEngineConfig(manager={"max_ragged_batch_size": 300})
    assert config.state_manager.model_fields_set == {"max_ragged_batch_size"}


def test_the_kv_cache_is_a_reserve_or_a_number_of_blocks() -> None:
    assert MemoryConfig(mode="allocate", size=64).mode == "allocate"
    with pytest.raises(ValidationError, match="mode='all' must be 'reserve' or 'allocate'"):
        MemoryConfig(mode="all")


def test_offload_is_refused_as_not_implemented() -> None:
    with pytest.raises(NotImplementedError, match="offload=True: mii does not move KV blocks"):
        RaggedInferenceEngineConfig(manager={"offload": True})
    assert issubclass(UnsupportedFeatureError, NotImplementedError)


class Theirs(BaseModel):
    """Shaped like DeepSpeed's config classes."""

    model_config = ConfigDict(extra="forbid", validate_default=True, populate_by_name=True, use_enum_values=True)


class TheirTP(Theirs):
    tp_size: int = 1


class TheirManager(Theirs):
    max_tracked_sequences: int = 2048
    max_ragged_batch_size: int = 768
    max_ragged_sequence_count: int = 512
    added_later: str = "a default"


class TheirEngine(Theirs):
    tensor_parallel: TheirTP = Field(default={}, alias="tp")
    state_manager: TheirManager = Field(default={}, alias="manager")


@pytest.mark.parametrize("nested", [False, True])
def test_deepspeeds_own_objects_are_read_whole_or_as_parts(nested: bool) -> None:
    manager = TheirManager(max_ragged_batch_size=2048, max_ragged_sequence_count=2048)
    given: Any = {"tensor_parallel": TheirTP(tp_size=4), "state_manager": manager}
    config = RaggedInferenceEngineConfig.model_validate(given if nested else TheirEngine(**given))
    assert config.tensor_parallel.tp_size == 4
    assert config.state_manager.max_ragged_sequence_count == 2048
    assert config.state_manager.max_tracked_sequences == 2048


def test_an_option_set_on_deepspeeds_object_that_mii_lacks_is_not_dropped_silently() -> None:
    with pytest.raises(ValidationError) as caught:
        RaggedInferenceEngineConfig(manager=TheirManager(added_later="x"))
    assert "unknown option 'added_later'" in explain(caught.value)


def test_the_real_deepspeed_objects_are_taken() -> None:
    v2 = pytest.importorskip("deepspeed.inference", exc_type=ImportError)
    config = RaggedInferenceEngineConfig.model_validate(
        v2.RaggedInferenceEngineConfig(tensor_parallel=v2.DeepSpeedTPConfig(tp_size=2))
    )
    assert config.tensor_parallel.tp_size == 2
