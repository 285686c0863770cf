"""The first API's names: enums that work, and calls that say what to use in their place."""

from __future__ import annotations

import pytest

import mii
from mii.config import MIIConfig
from mii.errors import UnsupportedFeatureError

REPLACED = ("MIIClient", "MIIConfig", "MIIServer", "ModelConfig")
FUNCTIONS = ("aml_output_path", "deploy", "get_supported_models", "mii_query_handle", "terminate")


@pytest.mark.parametrize("name", [*REPLACED, *FUNCTIONS])
def test_a_call_says_what_to_use_and_is_a_not_implemented_error(name: str) -> None:
    with pytest.raises(UnsupportedFeatureError, match=rf"mii\.{name} belongs to .*first API.*use mii\.") as caught:
        getattr(mii, name)("any", argument=1)
    assert isinstance(caught.value, NotImplementedError)


@pytest.mark.parametrize("name", REPLACED)
def test_classes_can_be_named_in_annotations_and_isinstance(name: str) -> None:
    assert not isinstance(3, getattr(mii, name))


def test_the_top_level_enums_are_accepted_by_the_configs() -> None:
    config = MIIConfig(
        model_config={"model_name_or_path": "m", "task": mii.TaskType.TEXT_GENERATION},
        deployment_type=mii.DeploymentType.LOCAL,
    )
    assert (config.deployment_type, config.model_conf.task) == ("local", "text-generation")
