"""How arguments merge into configs, and what `mii.pipeline` does with them."""

from __future__ import annotations

import copy
import gc
import os
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

import mii
from mii.api import _parse_kwargs_to_mii_config, _parse_kwargs_to_model_config, async_pipeline
from mii.config import MIIConfig, ModelConfig, registry
from mii.errors import (
    ArgumentConflictError,
    ArgumentTypeError,
    CheckpointError,
    CheckpointNotFoundError,
    DeploymentNotFoundError,
    LauncherError,
    TokenizerError,
    UnknownArgument,
)

MODEL = "org/model"


def parse_model(*args: Any, **kwargs: Any) -> ModelConfig:
    config, unknown = _parse_kwargs_to_model_config(*args, **kwargs)
    assert unknown == {}
    return config


# ---------------------------------------------------------------- merging


@pytest.mark.parametrize("parse", [_parse_kwargs_to_model_config, _parse_kwargs_to_mii_config])
def test_without_a_model_name_there_is_a_validation_error(parse: Any) -> None:
    for arguments in ({}, {"model_name_or_path": ""}, {"model_config": {}}, {"model_config": {"max_length": 3}}):
        with pytest.raises(ValidationError, match="model_name_or_path is required"):
            parse(**arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        {"model_name_or_path": MODEL},
        {"model_config": {"model_name_or_path": MODEL}},
        {"model_name_or_path": MODEL, "model_config": {"model_name_or_path": MODEL}},
        {"model_name_or_path": "", "model_config": {"model_name_or_path": MODEL}},
    ],
)
def test_the_model_name_comes_from_the_argument_or_the_dict(arguments: dict[str, Any]) -> None:
    assert parse_model(**arguments).model_name_or_path == MODEL
    assert _parse_kwargs_to_mii_config(**arguments).model_conf.model_name_or_path == MODEL


def test_the_model_name_may_be_inside_mii_config() -> None:
    inside = {"model_config": {"model_name_or_path": MODEL}}
    assert _parse_kwargs_to_mii_config(mii_config=inside).model_conf.model_name_or_path == MODEL
    assert _parse_kwargs_to_mii_config(MODEL, mii_config=inside).model_conf.model_name_or_path == MODEL


@pytest.mark.parametrize(
    "arguments",
    [
        {"model_name_or_path": MODEL, "model_config": {"model_name_or_path": "other"}},
        {"model_name_or_path": MODEL, "model_config": {"max_length": 5}, "max_length": 6},
        {"model_name_or_path": MODEL, "mii_config": {"port_number": 5000}, "port_number": 5001},
        {"model_name_or_path": MODEL, "mii_config": {"model_config": {"model_name_or_path": "other"}}},
        {"model_name_or_path": MODEL, "mii_config": {"model_config": {"max_length": 5}}, "max_length": 6},
    ],
)
def test_one_option_with_two_values_is_an_assertion_error_that_shows_both(arguments: dict[str, Any]) -> None:
    with pytest.raises(
        ArgumentConflictError, match=r"is .* as an argument and .* in m\w+_config; give it once"
    ) as caught:
        _parse_kwargs_to_mii_config(**arguments)
    assert isinstance(caught.value, AssertionError)


def test_one_option_twice_with_one_value_is_fine() -> None:
    config = _parse_kwargs_to_mii_config(
        MODEL, model_config={"max_length": 5}, mii_config={"port_number": 7000}, max_length=5, port_number=7000
    )
    assert (config.model_conf.max_length, config.port_number) == (5, 7000)


def test_keyword_arguments_land_in_the_config_that_has_them() -> None:
    config = _parse_kwargs_to_mii_config(
        MODEL, tensor_parallel=2, max_length=64, deployment_name="name", port_number=6000, enable_restful_api=True
    )
    assert isinstance(config, MIIConfig)
    assert (config.model_conf.tensor_parallel, config.model_conf.max_length) == (2, 64)
    assert (config.deployment_name, config.port_number, config.enable_restful_api) == ("name", 6000, True)


def test_dicts_apart_and_nested_come_to_the_same() -> None:
    model, deployment = {"model_name_or_path": MODEL, "replica_num": 2}, {"deployment_name": "name"}
    apart = _parse_kwargs_to_mii_config(model_config=model, mii_config=deployment)
    nested = _parse_kwargs_to_mii_config(mii_config={**deployment, "model_config": model})
    assert apart == nested == _parse_kwargs_to_mii_config(**model, **deployment)


def test_model_config_counts_before_one_inside_mii_config() -> None:
    inside = {"model_config": {"model_name_or_path": "other", "max_length": 9}}
    config = _parse_kwargs_to_mii_config(model_config={"model_name_or_path": MODEL}, mii_config=inside)
    assert (config.model_conf.model_name_or_path, config.model_conf.max_length) == (MODEL, None)


def test_what_the_caller_gives_stays_as_it_is_and_can_be_given_again() -> None:
    model = {"inference_engine_config": {"tensor_parallel": {"tp_size": 4}}, "device_map": [[0, 1]]}
    deployment: dict[str, Any] = {"deployment_name": "name", "model_config": model}
    before = copy.deepcopy(deployment)
    for _ in range(2):
        config = _parse_kwargs_to_mii_config(MODEL, mii_config=deployment, tensor_parallel=2, port_number=6000)
        config.generate_replica_configs()
        _parse_kwargs_to_model_config(MODEL, model_config=model, tensor_parallel=2)
    assert deployment == before
    assert deployment["model_config"] is model


@pytest.mark.parametrize("value", [ModelConfig(model_name_or_path=MODEL), "m", 3, [("a", 1)]])
def test_a_model_config_that_is_no_dict_is_an_assertion_error(value: Any) -> None:
    for parse in (_parse_kwargs_to_model_config, _parse_kwargs_to_mii_config):
        with pytest.raises(
            ArgumentTypeError, match=f"model_config is of type {type(value).__name__}; it must be a dict"
        ):
            parse(MODEL, model_config=value)
    with pytest.raises(AssertionError):
        _parse_kwargs_to_mii_config(MODEL, mii_config={"model_config": value})


def test_a_mii_config_that_is_no_dict_is_an_assertion_and_an_attribute_error() -> None:
    for model_config in (None, {"model_name_or_path": MODEL}):
        for error in (AssertionError, AttributeError):
            with pytest.raises(error, match="mii_config is of type str; it must be a dict"):
                _parse_kwargs_to_mii_config(model_config=model_config, mii_config="text")


def test_the_model_parser_hands_back_what_it_does_not_know() -> None:
    config, unknown = _parse_kwargs_to_model_config(MODEL, port_number=3, zzz=4, max_length=5)
    assert unknown == {"port_number": 3, "zzz": 4}
    assert config.max_length == 5


def test_unknown_options_inside_a_dict_are_validation_errors() -> None:
    for arguments in ({"model_config": {"zzz": 1}}, {"mii_config": {"zzz": 1}}):
        with pytest.raises(ValidationError, match="unknown option 'zzz'"):
            _parse_kwargs_to_mii_config(MODEL, **arguments)


def test_the_fields_own_name_of_the_model_config_is_a_validation_error_that_names_the_option() -> None:
    for arguments in ({"model_conf": {}}, {"mii_config": {"model_conf": {}}}):
        with pytest.raises(ValidationError, match="the name of this option is 'model_config'"):
            _parse_kwargs_to_mii_config(MODEL, **arguments)


# ---------------------------------------------------------------- serve and client


def test_serve_refuses_what_neither_config_has() -> None:
    with pytest.raises(UnknownArgument, match=r"mii.serve has no option 'prot_number'; did you mean 'port_number'\?"):
        mii.serve(MODEL, prot_number=3)
    with pytest.raises(UnknownArgument, match=r"'all_rank_output', which is one of mii\.pipeline"):
        mii.serve(MODEL, all_rank_output=True)


def test_serve_checks_its_options_before_it_starts_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MII_CACHE_PATH", str(tmp_path))
    with pytest.raises(ValidationError, match="replica_num=0"):
        mii.serve(MODEL, replica_num=0)
    with pytest.raises(ValidationError, match="mii makes no Azure ML deployments"):
        mii.serve(MODEL, deployment_type="aml")
    with pytest.raises(CheckpointNotFoundError, match="there is no folder or file /nowhere/model; give one"):
        mii.serve("/nowhere/model")
    assert not list(tmp_path.iterdir())


def test_client_knows_running_deployments_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MII_CACHE_PATH", str(tmp_path))
    with pytest.raises(DeploymentNotFoundError, match="no deployment or model 'nowhere'"):
        mii.client("nowhere")
    registry.save_deployment(_parse_kwargs_to_mii_config(MODEL, deployment_name="here"))
    with pytest.raises(DeploymentNotFoundError, match="'here' has ended: its supervisor was killed; its logs are in"):
        mii.client("here")
    nameless: Any = None
    with pytest.raises(TypeError, match="the deployment is None; give its name"):
        mii.client(nameless)


# ---------------------------------------------------------------- pipeline


def test_pipeline_names_every_unknown_option_and_where_it_belongs() -> None:
    with pytest.raises(UnknownArgument) as caught:
        mii.pipeline(MODEL, port_number=3, max_new_tokens=5, tensor_paralel=2, zzz=1)
    assert str(caught.value).split("; ") == [
        "mii.pipeline has no option 'port_number', which is one of mii.serve",
        "mii.pipeline has no option 'max_new_tokens', which is one of each call: pipe(prompts, max_new_tokens=...)",
        "mii.pipeline has no option 'tensor_paralel'",
        "did you mean 'tensor_parallel'?",
        "mii.pipeline has no option 'zzz'",
    ]


def test_pipeline_without_a_model_says_what_to_give() -> None:
    for arguments in ((), ("",), (" ",)):
        with pytest.raises(ValidationError, match=r"a folder, a \.gguf file, or the id of a Hugging Face repository"):
            mii.pipeline(*arguments)


def test_tensor_parallelism_needs_as_many_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(LauncherError, match=r"needs 2 processes and there are 1; .* deepspeed --num_gpus 2 script\.py"):
        mii.pipeline(MODEL, tensor_parallel=2)
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(RuntimeError, match=r"tensor_parallel=2 and 4 processes were started"):
        mii.pipeline(MODEL, tensor_parallel=2)


def test_async_pipeline_takes_the_config_object_only() -> None:
    with pytest.raises(ArgumentTypeError, match=r"must be a mii\.config\.ModelConfig"):
        async_pipeline({"model_name_or_path": MODEL})  # type: ignore[arg-type]


def test_a_model_that_is_not_there_is_one_clear_error() -> None:
    with pytest.raises(CheckpointError, match="/no/such/folder") as caught:
        mii.pipeline("/no/such/folder")
    assert isinstance(caught.value, FileNotFoundError)


def living_tensors() -> list[Any]:
    import torch

    return [value for value in gc.get_objects() if issubclass(type(value), torch.Tensor)]


def test_pipeline_loads_answers_and_gives_everything_back(tiny_llama: Path) -> None:
    before = {id(tensor) for tensor in living_tensors()}
    pipe = mii.pipeline(str(tiny_llama), device="cpu", max_length=32, progress=False)
    tensors = [weakref.ref(tensor) for tensor in living_tensors() if id(tensor) not in before]
    assert len(tensors) > 20
    (answer,) = pipe("DeepSpeed is", max_new_tokens=4, do_sample=False, ignore_eos=True)
    assert (answer.generated_length, answer.finish_reason) == (4, "length")
    assert pipe.model_config.max_length == pipe.max_length == 32
    pipe.destroy()
    gc.collect()
    assert [tensor() for tensor in tensors if tensor() is not None] == []


def test_a_path_object_and_options_in_a_dict_work_too(tiny_llama: Path) -> None:
    options = {"model_name_or_path": tiny_llama, "device": "cpu"}
    with mii.pipeline(model_config=options) as pipe:
        assert pipe.model_config.tokenizer == str(tiny_llama)


def test_async_pipeline_loads_and_answers(tiny_llama: Path) -> None:
    pipe = async_pipeline(ModelConfig(model_name_or_path=str(tiny_llama), device="cpu"))
    pipe.start()
    try:
        uid = pipe.put_request("DeepSpeed is", {"max_new_tokens": 3, "ignore_eos": True})
        answered, response = pipe.get_response()
    finally:
        pipe.shutdown()
        pipe.destroy()
    assert (answered, response.generated_length) == (uid, 3)


def test_a_missing_tokenizer_is_found_before_weights_are_read(tiny_llama: Path, tmp_path: Path) -> None:
    for file in ("config.json", *(path.name for path in tiny_llama.glob("*.safetensors*"))):
        (tmp_path / file).symlink_to(tiny_llama / file)
    with pytest.raises(TokenizerError):
        mii.pipeline(str(tmp_path), device="cpu")


def test_when_the_pipeline_cannot_be_made_the_engine_is_destroyed(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mii.batching.pipeline

    engines: list[Any] = []

    class Broken:
        def __init__(self, inference_engine: Any, **_: Any) -> None:
            engines.append(weakref.ref(inference_engine))
            raise KeyboardInterrupt

    monkeypatch.setattr(mii.batching.pipeline, "MIIPipeline", Broken)
    with pytest.raises(KeyboardInterrupt):
        mii.pipeline(str(tiny_llama), device="cpu")
    gc.collect()
    assert [engine() for engine in engines] == [None]


def test_the_four_lines_of_the_documentation_run_as_they_are(tiny_llama: Path) -> None:
    code = f"""
import mii
pipe = mii.pipeline({str(tiny_llama)!r})
response = pipe(["DeepSpeed is", "Seattle is"], max_new_tokens=5)
print(response); print(response[0].prompt_length, response[0].generated_length, response[0].finish_reason)
pipe.destroy(); pipe.destroy()
try:
    pipe("again")
except RuntimeError as error:
    print("RuntimeError:", error)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=os.environ)
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert lines[0].startswith("[")
    assert lines[-1].startswith("RuntimeError: ")
    prompt_length, generated_length, reason = lines[-2].split()
    assert int(prompt_length) > 0
    assert 1 <= int(generated_length) <= 5
    assert reason in ("length", "stop")
