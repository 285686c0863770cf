"""The registry of deployments: data, private, and without side effects when it is only read."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from mii.config import MIIConfig, get_mii_config, registry
from mii.config.registry import (
    deployment_names,
    forget_deployment,
    make_registry_folder,
    save_deployment,
    writing_registry,
)
from mii.errors import DeploymentNotFoundError, RegistryError, UnsupportedFeatureError


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MII_CACHE_PATH", str(tmp_path / "cache"))
    return tmp_path / "cache"


def config(name: str = "", model: str = "some/model") -> MIIConfig:
    return MIIConfig(deployment_name=name, model_config={"model_name_or_path": model, "replica_num": 2})


@pytest.mark.parametrize(
    "name", ["plain", "with space", "org/model", "../up", ".hidden", "ümlaut", ".", "..", "a%2Fb", "x" * 100]
)
def test_a_saved_deployment_is_found_under_any_name_and_stays_in_the_folder(folder: Path, name: str) -> None:
    path = save_deployment(config(name))
    assert get_mii_config(name) == config(name)
    assert path.resolve().parent.parent.parent == folder.resolve()
    assert deployment_names() == [name]
    forget_deployment(name)
    forget_deployment(name)
    assert deployment_names() == []


def test_what_was_left_to_the_defaults_and_what_was_not_stays_known() -> None:
    model = {"model_name_or_path": "m", "inference_engine_config": {"manager": {"max_ragged_batch_size": 64}}}
    given = MIIConfig(model_config={**model, "replica_num": 2, "memory_fraction": 0.5, "device": "cpu"})
    given.generate_replica_configs()
    save_deployment(given)
    found = get_mii_config("m")
    assert found == given
    assert found.model_conf.model_fields_set == given.model_conf.model_fields_set | {"tensor_parallel"}
    manager = found.model_conf.inference_engine_config.state_manager
    assert manager.model_fields_set == {"max_ragged_batch_size"}
    assert "drain_seconds" not in found.model_fields_set


def test_a_deployment_without_a_name_is_found_by_its_model() -> None:
    save_deployment(config())
    assert get_mii_config("some/model").deployment_name == "some/model-mii-deployment"


def test_the_later_one_of_a_name_counts() -> None:
    save_deployment(config("a", model="first"))
    save_deployment(config("a", model="second"))
    assert get_mii_config("a").model_conf.model_name_or_path == "second"
    assert deployment_names() == ["a"]


def test_only_the_owner_can_read_a_file_and_nothing_else_is_left(folder: Path) -> None:
    path = save_deployment(config("a"))
    assert stat.S_IMODE(path.parent.parent.stat().st_mode) == 0o700
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert list(path.parent.iterdir()) == [path]


def test_looking_for_an_unknown_name_creates_nothing_and_lists_the_known_ones(folder: Path) -> None:
    with pytest.raises(DeploymentNotFoundError, match=r"'nowhere' is served on this machine \(served: none\)"):
        get_mii_config("nowhere")
    assert not folder.exists()
    save_deployment(config("here"))
    with pytest.raises(DeploymentNotFoundError, match=r"\(served: here\)"):
        get_mii_config("nowhere")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"model_config": {"model_name_or_path": ""}}', "\x00"])
def test_a_damaged_file_is_reported_as_such(text: str) -> None:
    save_deployment(config("a")).write_text(text)
    with pytest.raises(DeploymentNotFoundError, match="of deployment 'a' is damaged"):
        get_mii_config("a")


def test_a_file_of_another_user_is_not_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_deployment(config("a"))
    monkeypatch.setattr(registry.os, "getuid", lambda: path.stat().st_uid + 1)
    monkeypatch.setattr(registry, "registry_folder", lambda: path.parent.parent)
    with pytest.raises(DeploymentNotFoundError, match="belongs to another user"):
        get_mii_config("a")


def test_a_name_that_no_file_can_have_is_refused_or_not_found() -> None:
    with pytest.raises(ValueError, match="too long for a file name"):
        config("ü" * 60)
    for name in ("x" * 5000, "a\0b", ""):
        with pytest.raises(DeploymentNotFoundError):
            get_mii_config(name)


def test_the_default_folder_has_room_for_other_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "CACHE_PATH_DEFAULT", str(tmp_path / "cache"))
    path = save_deployment(config("a"))
    assert stat.S_IMODE(path.parent.parent.parent.stat().st_mode) == 0o1777


def test_a_folder_of_another_user_is_not_written_to(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_deployment(config("a")).parent.parent
    monkeypatch.setattr(registry, "registry_folder", lambda: folder)
    monkeypatch.setattr(registry.os, "getuid", lambda: folder.stat().st_uid + 1)
    with pytest.raises(PermissionError, match="belongs to another user; set MII_CACHE_PATH"):
        save_deployment(config("b"))


def test_a_folder_that_cannot_be_written_is_named_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setenv("MII_CACHE_PATH", str(file))
    words = f"deployments are recorded in {file}/deployments-.*Not a directory; .* set MII_CACHE_PATH"
    with pytest.raises(RegistryError, match=words), writing_registry():
        make_registry_folder()


def test_a_tokenizer_object_cannot_be_saved() -> None:
    class Tokenizer:
        def encode(self, text: str) -> list[int]:
            return []

        def decode(self, ids: list[int]) -> str:
            return ""

    deployment = MIIConfig(model_config={"model_name_or_path": "m", "tokenizer": Tokenizer()})
    with pytest.raises(UnsupportedFeatureError, match="save it to a folder"):
        save_deployment(deployment)
