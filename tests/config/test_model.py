"""What a model's config accepts, refuses and fills in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from mii.config import ModelConfig, RaggedInferenceEngineConfig
from mii.constants import ModelProvider
from mii.errors import PlacementError
from mii.validation import explain


def make(**options: Any) -> ModelConfig:
    return ModelConfig(**{"model_name_or_path": "m", **options})


def refusal(**options: Any) -> str:
    with pytest.raises(ValidationError) as caught:
        make(**options)
    return explain(caught.value)


def test_the_defaults_are_those_of_the_contract(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    defaults = make().model_dump(exclude={"inference_engine_config"})
    assert defaults == {
        "model_name_or_path": "m",
        "tokenizer": "m",
        "task": "text-generation",
        "tensor_parallel": 1,
        "quantization_mode": None,
        "torch_dist_port": 29500,
        "zmq_port_number": 25555,
        "replica_num": 1,
        "replica_configs": [],
        "device_map": "auto",
        "max_length": None,
        "sync_debug": False,
        "profile_model_time": False,
        "device": "auto",
        "dtype": "auto",
        "trust_remote_code": False,
        "revision": None,
        "memory_fraction": 0.9,
        "seed": None,
        "block_size": None,
        "prefix_caching": True,
        "optimize_for": "throughput",
        "target_token_ms": None,
        "progress": None,
    }
    assert make().provider is ModelProvider.HUGGING_FACE


@pytest.mark.parametrize("name", ["", "   "])
def test_an_empty_model_name_says_what_to_give(name: str) -> None:
    assert "no model was named; give a folder" in refusal(model_name_or_path=name)


def test_no_model_name_says_what_to_give() -> None:
    with pytest.raises(ValidationError, match=r"model_name_or_path is required \(a folder"):
        ModelConfig()


def test_a_path_object_is_a_path() -> None:
    assert make(model_name_or_path=Path("/some/folder")).model_name_or_path == "/some/folder"


def test_tensor_parallel_follows_the_launcher_when_the_config_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert make().tensor_parallel == 4
    assert make().inference_engine_config.tensor_parallel.tp_size == 4
    assert make(tensor_parallel=2).tensor_parallel == 2
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert make().tensor_parallel == 2
    monkeypatch.setenv("WORLD_SIZE", "two")
    assert "WORLD_SIZE is 'two'; it must be a number from 1 up" in refusal()


def test_whole_numbers_in_strings_are_taken_and_halves_are_not() -> None:
    assert make(tensor_parallel="2").tensor_parallel == 2
    assert "tensor_parallel=2.5 must be a valid integer" in refusal(tensor_parallel=2.5)


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("tensor_parallel", 0, "must be greater than or equal to 1"),
        ("tensor_parallel", -1, "must be greater than or equal to 1"),
        ("replica_num", 0, "must be greater than or equal to 1"),
        ("torch_dist_port", 0, "must be greater than or equal to 1"),
        ("zmq_port_number", 65536, "must be less than or equal to 65535"),
        ("max_length", 0, "must be greater than or equal to 1"),
        ("task", "fill-mask", "must be 'text-generation'"),
        ("task", "nonsense", "must be 'text-generation'"),
        ("dtype", "int8", "must be 'auto', 'bf16', 'fp16' or 'fp32'"),
        ("device", "tpu", "must be 'auto', 'cpu' or 'cuda'"),
        ("device", "cuda:1", "device_map=1 picks the second GPU"),
        ("memory_fraction", 0, "must be greater than 0"),
        ("memory_fraction", 1.01, "must be less than or equal to 1"),
        ("seed", -1, "must be from 0 to 2**63 - 1"),
        ("seed", 2**63, "must be from 0 to 2**63 - 1"),
        ("block_size", 48, "must be one of 16, 32, 64, 128, or None"),
        ("quantization_mode", "wf6af16", "mii has no FP6 kernels"),
        ("quantization_mode", "int4", "unknown quantization mode"),
        ("tokenizer", 3, "an object with encode and decode"),
        ("tokenizer", "", "an object with encode and decode"),
        ("sync_debug", "perhaps", "must be a valid boolean"),
    ],
)
def test_a_wrong_value_is_named_with_what_is_allowed(option: str, value: object, words: str) -> None:
    message = refusal(**{option: value})
    assert message.startswith(f"{option}={value!r}")
    assert words in message


def test_a_misspelt_option_gets_the_nearest_name() -> None:
    assert refusal(tensor_paralel=2) == "unknown option 'tensor_paralel'; did you mean 'tensor_parallel'?"


@pytest.mark.parametrize(
    ("given", "kept"),
    [("auto", "auto"), ("bfloat16", "bf16"), ("torch.float16", "fp16"), ("half", "fp16"), ("float", "fp32")],
)
def test_number_formats_go_by_torchs_names_too(given: str, kept: str) -> None:
    assert make(dtype=given).dtype == kept


def test_a_torch_dtype_is_taken_as_it_is() -> None:
    torch = pytest.importorskip("torch")
    assert make(dtype=torch.bfloat16).dtype == "bf16"


def test_a_tokenizer_object_is_kept() -> None:
    class Tokenizer:
        def encode(self, text: str) -> list[int]:
            return [len(text)]

        def decode(self, ids: list[int]) -> str:
            return str(ids)

    tokenizer = Tokenizer()
    assert make(tokenizer=tokenizer).tokenizer is tokenizer


def test_the_engines_options_take_dicts_aliases_and_objects_and_are_not_changed() -> None:
    theirs = RaggedInferenceEngineConfig(manager={"max_ragged_batch_size": 1024})
    given: dict[str, Any] = {"tp": {"tp_size": 8}, "state_manager": {"max_ragged_batch_size": 1024}}
    for engine in (theirs, given):
        config = make(inference_engine_config=engine, tensor_parallel=2)
        assert config.inference_engine_config.state_manager.max_ragged_batch_size == 1024
        assert config.inference_engine_config.tensor_parallel.tp_size == 2
    assert theirs.tensor_parallel.tp_size == 1
    assert given == {"tp": {"tp_size": 8}, "state_manager": {"max_ragged_batch_size": 1024}}


def test_tensor_parallelism_set_only_on_the_engine_is_not_lost() -> None:
    config = make(inference_engine_config={"tensor_parallel": {"tp_size": 2}})
    assert (config.tensor_parallel, config.inference_engine_config.tensor_parallel.tp_size) == (2, 2)


def test_quantisation_set_only_on_the_engine_is_not_lost() -> None:
    message = refusal(inference_engine_config={"quantization": {"quantization_mode": "wf6af16"}})
    assert message.startswith("inference_engine_config.quantization: quantization_mode='wf6af16': mii has no FP6")


def test_there_is_one_replica_config_per_replica() -> None:
    assert len(make(replica_num=2, replica_configs=[{}, {"hostname": "a"}]).replica_configs) == 2
    assert "replica_configs has 1 entries and replica_num is 2" in refusal(replica_num=2, replica_configs=[{}])


def test_an_assignment_is_checked_and_what_follows_from_it_follows() -> None:
    config = make()
    config.tensor_parallel = 4
    assert config.inference_engine_config.tensor_parallel.tp_size == 4
    config.model_name_or_path = "other"
    assert config.tokenizer == "other"
    with pytest.raises(ValidationError):
        config.tensor_parallel = 0
    assert config.tensor_parallel == 4


@pytest.mark.parametrize(
    ("device_map", "tensor_parallel", "rank", "device"),
    [("auto", 1, None, 0), ("auto", 4, "3", 3), (2, 1, "0", 2), ([4, 6], 2, "1", 6), ([[1], [2]], 1, None, 1)],
)
def test_a_process_takes_its_device_from_the_map_or_its_number(
    monkeypatch: pytest.MonkeyPatch, device_map: Any, tensor_parallel: int, rank: str | None, device: int
) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("LOCAL_RANK", rank)
    assert make(device_map=device_map, tensor_parallel=tensor_parallel).local_device == device


def test_a_map_without_a_device_for_each_process_is_refused() -> None:
    with pytest.raises(PlacementError, match=r"devices \[0, 1\] and tensor_parallel is 1"):
        _ = make(device_map=[0, 1]).local_device


def test_a_config_survives_a_round_trip_through_json_and_dicts() -> None:
    config = make(tensor_parallel=2, device_map=[[0, 1]], inference_engine_config={"manager": {"max_context": 99}})
    assert ModelConfig.model_validate_json(config.model_dump_json()) == config
    assert ModelConfig(**config.model_dump()) == config
