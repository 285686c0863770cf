"""What a deployment's config accepts, refuses and fills in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from mii.config import MIIConfig, ModelConfig, default_deployment_name
from mii.errors import PlacementError
from mii.validation import explain


@pytest.fixture
def hostfile(tmp_path: Path) -> str:
    path = tmp_path / "hostfile"
    path.write_text("localhost slots=4\n")
    return str(path)


def make(model: dict[str, Any] | None = None, **options: Any) -> MIIConfig:
    return MIIConfig(**{"model_config": {"model_name_or_path": "m", **(model or {})}, **options})


def refusal(**options: Any) -> str:
    with pytest.raises(ValidationError) as caught:
        make(**options)
    return explain(caught.value)


def test_the_defaults_are_those_of_the_documentation() -> None:
    assert make().model_dump(exclude={"model_conf"}) == {
        "deployment_name": "m-mii-deployment",
        "deployment_type": "local",
        "port_number": 50050,
        "host": "127.0.0.1",
        "launcher": "deepspeed",
        "replica_only": False,
        "replica_addresses": [],
        "drain_seconds": 10,
        "start_seconds": None,
        "max_restarts": 5,
        "queue_size": 4096,
        "silence_seconds": 60,
        "enable_restful_api": False,
        "restful_api_host": "localhost",
        "restful_api_port": 28080,
        "restful_processes": 32,
        "hostfile": "/job/hostfile",
        "version": 1,
        "instance_type": "Standard_NC12s_v3",
    }


def test_the_model_is_a_dict_or_an_object_under_its_name_or_its_alias() -> None:
    model = {"model_name_or_path": "m"}
    forms = ({"model_config": model}, {"model_conf": model}, {"model_config": ModelConfig(**model)})
    assert len({MIIConfig(**form).model_dump_json() for form in forms}) == 1


def test_a_deployment_is_named_after_its_model(tmp_path: Path) -> None:
    folder = tmp_path / "some-model"
    folder.mkdir()
    assert default_deployment_name("facebook/opt-125m") == "facebook/opt-125m-mii-deployment"
    assert default_deployment_name(str(folder)) == "some-model-mii-deployment"
    assert default_deployment_name(f"{folder}/") == "some-model-mii-deployment"
    assert make(deployment_name="my name/1").deployment_name == "my name/1"
    assert make(deployment_name="auto").deployment_name == "m-mii-deployment"


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("deployment_type", "aml", "mii makes no Azure ML deployments; use 'local'"),
        ("deployment_type", "non-persistent", "is mii.pipeline"),
        ("deployment_type", "cloud", "must be 'local', 'aml' or 'non-persistent'"),
        ("port_number", 0, "must be greater than or equal to 1"),
        ("port_number", 65536, "must be less than or equal to 65535"),
        ("restful_api_port", -1, "must be greater than or equal to 1"),
        ("restful_processes", 0, "must be greater than or equal to 1"),
        ("hostfile", 3, "must be a valid string"),
    ],
)
def test_a_wrong_value_is_named_with_what_is_allowed(option: str, value: object, words: str) -> None:
    message = refusal(**{option: value})
    assert message.startswith(f"{option}={value!r}")
    assert words in message


def test_a_wrong_option_of_the_model_is_found_inside() -> None:
    assert refusal(model={"max_lenght": 3}) == "model_config: unknown option 'max_lenght'; did you mean 'max_length'?"


def test_the_model_is_given_once() -> None:
    assert refusal(model_conf={"model_name_or_path": "m"}).endswith("the name of this option is 'model_config'")


def test_the_two_servers_need_two_ports() -> None:
    assert make(port_number=28080).port_number == 28080
    assert "both 28080; give them different ports" in refusal(port_number=28080, enable_restful_api=True)


@pytest.mark.parametrize(
    "device_map",
    [
        {"localhost": [[0]]},
        {"localhost": [[0, 1], [2]]},
        {"localhost": [[0, 1]]},
        {"localhost": [[0, 1], [2, 3], [4, 5]]},
    ],
)
def test_a_device_map_that_does_not_fit_the_replicas_is_a_value_error(hostfile: str, device_map: Any) -> None:
    config = make(model={"device_map": device_map, "replica_num": 2, "tensor_parallel": 2}, hostfile=hostfile)
    with pytest.raises(ValueError):
        config.generate_replica_configs()
    assert config.model_conf.replica_configs == []


@pytest.mark.parametrize(
    ("device_map", "replica_num", "tensor_parallel"),
    [
        ({"localhost": [[0, 1], [2, 3]]}, 2, 2),
        ({"localhost": [[1]]}, 1, 1),
        ("auto", 1, 4),
        ("auto", 2, 2),
        ("auto", 4, 1),
        ([[0, 1]], 1, 2),
        ([0, 1], 1, 2),
        (1, 1, 1),
    ],
)
def test_replica_configs_are_made_from_the_map(
    hostfile: str, device_map: Any, replica_num: int, tensor_parallel: int
) -> None:
    options = {"device_map": device_map, "replica_num": replica_num, "tensor_parallel": tensor_parallel}
    config = make(model=options, hostfile=hostfile)
    config.generate_replica_configs()
    replicas = config.model_conf.replica_configs
    assert len(replicas) == replica_num
    assert all(len(replica.gpu_indices) == tensor_parallel for replica in replicas)
    again = config.model_dump()
    config.generate_replica_configs()
    assert config.model_dump() == again


def test_replica_configs_that_were_given_are_kept_and_their_ports_are_checked() -> None:
    given = {"hostname": "elsewhere", "tensor_parallel_ports": [6000], "gpu_indices": [3]}
    config = make(model={"replica_configs": [given]}, hostfile="/no/such/file")
    config.generate_replica_configs()
    assert config.model_conf.replica_configs[0].gpu_indices == [3]
    clash = make(model={"replica_configs": [given | {"hostname": "localhost"}]}, port_number=6000)
    with pytest.raises(PlacementError, match="port 6000 of localhost would be used twice"):
        clash.generate_replica_configs()


def test_the_gateways_port_must_not_be_a_replicas() -> None:
    options = {"port_number": 28079, "hostfile": None}
    make(model={"device": "cpu"}, **options).generate_replica_configs()
    options |= {"enable_restful_api": True, "restful_api_port": 28080}
    with pytest.raises(PlacementError, match="port 28080 of localhost"):
        make(model={"device": "cpu"}, **options).generate_replica_configs()


@pytest.mark.parametrize(
    ("port_number", "field", "moved"), [(25554, "zmq_port", 25556), (29499, "torch_dist_port", 29501)]
)
def test_ports_that_nobody_asked_for_make_way_for_those_of_the_deployment(
    port_number: int, field: str, moved: int
) -> None:
    config = make(model={"device": "cpu"}, port_number=port_number, hostfile=None)
    config.generate_replica_configs()
    (replica,) = config.model_conf.replica_configs
    assert replica.tensor_parallel_ports == [port_number + 1]
    assert getattr(replica, field) == moved
    option = "zmq_port_number" if field == "zmq_port" else field
    asked = make(model={"device": "cpu", option: port_number + 1}, port_number=port_number, hostfile=None)
    with pytest.raises(PlacementError, match=f"port {port_number + 1} of localhost would be used twice"):
        asked.generate_replica_configs()


def test_a_config_survives_a_round_trip_through_json() -> None:
    config = make(model={"device": "cpu", "replica_num": 2}, hostfile=None)
    config.generate_replica_configs()
    assert MIIConfig.model_validate_json(config.model_dump_json(by_alias=True)) == config
