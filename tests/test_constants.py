"""Enums are strings, and the numbers are those that deployments of DeepSpeed-MII use."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mii import constants
from mii.constants import DeploymentType, GenerationFinishReason, ModelProvider, TaskType


@pytest.mark.parametrize("enum", [DeploymentType, GenerationFinishReason, ModelProvider, TaskType])
def test_members_compare_print_format_and_serialise_as_their_values(enum: type[TaskType]) -> None:
    for member in enum:
        assert isinstance(member, str)
        assert member == member.value == str(member) == f"{member}" == f"{member.value}"
        assert json.loads(json.dumps(member)) == member.value


def test_finish_reasons_and_tasks_have_the_contracts_values() -> None:
    assert [reason.value for reason in GenerationFinishReason] == ["stop", "length", "none"]
    assert len(TaskType) == 8


def test_ports_are_those_of_the_documentation() -> None:
    assert constants.PORT_NUMBER_DEFAULT == 50050
    assert constants.RESTFUL_API_PORT_DEFAULT == 28080
    assert constants.ZMQ_PORT_DEFAULT == 25555
    assert constants.TORCH_DIST_PORT_DEFAULT == 29500
    assert constants.GRPC_MAX_MESSAGE_BYTES == 128 * 1024 * 1024


def test_the_cache_folder_follows_the_environment_at_the_time_of_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MII_CACHE_PATH", raising=False)
    assert constants.cache_path() == Path("/tmp/mii_cache")
    monkeypatch.setenv("MII_CACHE_PATH", "/elsewhere")
    assert constants.cache_path() == Path("/elsewhere")
