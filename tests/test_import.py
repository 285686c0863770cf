"""What `import mii` brings in, and which names it gives. Each check of modules runs in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import mii

HEAVY = ("torch", "transformers", "tokenizers", "deepspeed", "grpc", "fastapi", "numpy")


def modules_after(statement: str) -> set[str]:
    code = f"import json, sys\n{statement}\nprint(json.dumps(sorted(sys.modules)))"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60).stdout
    return set(json.loads(output.splitlines()[-1]))


def test_importing_mii_loads_itself_and_nothing_but_the_standard_library() -> None:
    before = modules_after("pass")
    added = modules_after("import mii") - before
    assert "mii" in added
    assert not added & {*HEAVY, "pydantic", "msgspec"}
    assert len(added) < 40, sorted(added)


@pytest.mark.parametrize(
    "statement",
    [
        "import mii.config, mii.errors, mii.constants, mii.logging, mii.batching.data_classes, mii.legacy",
        "from mii import pipeline, serve, client, MIIConfig, TaskType",
        "import mii; mii.config.GenerateParamsConfig(max_new_tokens=3)",
        "import mii.api; mii.api._parse_kwargs_to_mii_config('m', replica_num=2).generate_replica_configs()",
    ],
)
def test_configs_errors_and_public_functions_load_nothing_heavy(statement: str) -> None:
    assert not modules_after(statement) & set(HEAVY)


@pytest.mark.parametrize("first", ["mii.config", "mii.batching.generation.params", "mii.batching", "mii.validation"])
def test_every_module_of_the_configs_can_be_the_first_one_imported(first: str) -> None:
    assert "mii.config.model" in modules_after(f"import {first}; from mii.config import GenerateParamsConfig")


def test_the_list_of_public_names_is_exactly_this() -> None:
    assert set(mii.__all__) == {
        *("pipeline", "serve", "client", "__version__"),
        *("MIIServer", "MIIClient", "MIIConfig", "ModelConfig", "DeploymentType", "TaskType"),
        *("mii_query_handle", "deploy", "terminate", "aml_output_path", "get_supported_models"),
    }


def test_every_public_name_resolves_and_stays_the_same_object() -> None:
    for name in mii.__all__:
        assert getattr(mii, name) is getattr(mii, name)
        assert name in dir(mii)


@pytest.mark.parametrize(
    "name", ["api", "backend", "batching", "config", "errors", "launch", "legacy", "logging", "modeling"]
)
def test_submodules_are_attributes(name: str) -> None:
    assert getattr(mii, name) is sys.modules[f"mii.{name}"]


def test_a_name_that_does_not_exist_is_an_attribute_error_that_lists_those_that_do() -> None:
    with pytest.raises(AttributeError, match=r"no attribute 'pipelin'.*pipeline"):
        _ = mii.pipelin


def test_the_version_is_text_with_numbers() -> None:
    assert all(part.isdigit() for part in mii.__version__.split("+")[0].split(".")[:2])


def test_names_of_the_contract_are_importable_from_where_they_were() -> None:
    from mii.api import _parse_kwargs_to_mii_config, _parse_kwargs_to_model_config, async_pipeline
    from mii.config import DEVICE_MAP_DEFAULT, GenerateParamsConfig, MIIConfig, ModelConfig, ReplicaConfig
    from mii.config import get_mii_config as get_config
    from mii.constants import DeploymentType, GenerationFinishReason, ModelProvider, TaskType
    from mii.errors import DeploymentNotFoundError, UnknownArgument

    assert DEVICE_MAP_DEFAULT == "auto"
    assert {DeploymentType.LOCAL, TaskType.TEXT_GENERATION, ModelProvider.HUGGING_FACE} == {
        *("local", "text-generation", "hugging-face")
    }
    assert GenerationFinishReason("stop") is GenerationFinishReason.STOP
    assert all(issubclass(error, Exception) for error in (DeploymentNotFoundError, UnknownArgument))
    functions = (_parse_kwargs_to_mii_config, _parse_kwargs_to_model_config, async_pipeline, get_config)
    assert all(callable(name) for name in (*functions, GenerateParamsConfig, MIIConfig, ModelConfig, ReplicaConfig))
