"""A deployment: a model, the replicas that run it and the ports that they answer on.

Example:
    >>> config = MIIConfig(model_config={"model_name_or_path": "facebook/opt-125m"})
    >>> config.deployment_name, config.port_number, config.restful_api_port
    ('facebook/opt-125m-mii-deployment', 50050, 28080)
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar
from urllib.parse import quote

from pydantic import Field, field_validator

from mii.config.model import ModelConfig
from mii.config.placement import (
    available_slots,
    check_ports,
    make_replica_configs,
    move_unasked_ports,
    place_replicas,
)
from mii.constants import (
    DEPLOYMENT_NAME_SUFFIX,
    HOST_DEFAULT,
    HOSTFILE_DEFAULT,
    PORT_NUMBER_DEFAULT,
    RESTFUL_API_PORT_DEFAULT,
    RESTFUL_PROCESSES_DEFAULT,
    SERVER_STOP_GRACE_SECONDS,
    DeploymentType,
)
from mii.validation import ConfigModel, NonNegativeInt, Number, Port, PositiveInt

__all__ = ["MIIConfig", "default_deployment_name"]

_LONGEST_NAME = 240  # characters once percent-encoded, which the registry and routes do


def default_deployment_name(model_name_or_path: str) -> str:
    """The name of a deployment that was not given one: the model's id, or the last part of its path."""
    is_local = os.path.exists(model_name_or_path)
    model = Path(model_name_or_path).resolve().name if is_local else model_name_or_path
    return f"{model}-{DEPLOYMENT_NAME_SUFFIX}"


class MIIConfig(ConfigModel):
    """Everything that `mii.serve` needs to know.

    Raises:
        pydantic.ValidationError: an option is unknown, missing, of the wrong type or out of range.
    """

    hints: ClassVar[Mapping[str, str]] = {"model_conf": "the name of this option is 'model_config'"}

    deployment_name: str = Field(default="", description="name for mii.client; empty: made from the model's")
    deployment_type: DeploymentType = Field(
        default=DeploymentType.LOCAL, description="'local', the only type that is served"
    )
    model_conf: ModelConfig = Field(alias="model_config", description="options of the model, a dict or a ModelConfig")
    port_number: Port = Field(
        default=PORT_NUMBER_DEFAULT, description="gRPC port of the load balancer; replicas use those after it"
    )
    host: str = Field(
        default=HOST_DEFAULT,
        min_length=1,
        description="address that gRPC listens on; '0.0.0.0': every one of the machine",
    )
    enable_restful_api: bool = Field(default=False, description="also answer HTTP")
    restful_api_host: str = Field(default="localhost", description="address that the HTTP gateway listens on")
    restful_api_port: Port = Field(
        default=RESTFUL_API_PORT_DEFAULT, description="port that the HTTP gateway listens on"
    )
    restful_processes: PositiveInt = Field(
        default=RESTFUL_PROCESSES_DEFAULT,
        description="processes that answer HTTP, up to one a core; not given: one for each 16 cores, up to 8",
    )
    hostfile: str | None = Field(
        default=HOSTFILE_DEFAULT,
        description="file with lines 'host slots=N'; None, or the default where absent: this machine",
    )
    launcher: str = Field(
        default="deepspeed",
        min_length=1,
        description="command that starts processes on other hosts, such as 'deepspeed --launcher slurm'",
    )
    replica_only: bool = Field(
        default=False, description="one replica and no load balancer: it answers on `host` and `port_number` itself"
    )
    replica_addresses: list[str] = Field(
        default=[],
        description="replicas that others run, as 'host:port'; a name with several addresses is all of them, and is "
        "looked up again and again. The deployment is then a load balancer, and starts no engine",
    )
    drain_seconds: Number = Field(
        default=SERVER_STOP_GRACE_SECONDS,
        ge=0,
        description="how long what runs may still take once the end is asked for",
    )
    start_seconds: Number | None = Field(
        default=None, gt=0, description="longest time that the start may take; None: any, downloads included"
    )
    max_restarts: NonNegativeInt = Field(
        default=5, description="times in a row that a process which died is started again before all is ended"
    )
    queue_size: PositiveInt = Field(
        default=4096,
        description="prompts that one replica takes at once, running or waiting; more are refused until there is room",
    )
    silence_seconds: Number = Field(
        default=60, gt=0, description="an engine that has work and finishes no step for so long is ended and restarted"
    )
    version: PositiveInt = Field(default=1, description="of an Azure ML deployment; not used")
    instance_type: str = Field(default="Standard_NC12s_v3", description="of an Azure ML deployment; not used")

    @field_validator("deployment_type")
    @classmethod
    def _type_is_served(cls, value: DeploymentType) -> DeploymentType:
        if value == DeploymentType.AML:
            raise ValueError("mii makes no Azure ML deployments; use 'local' on the machine or in the container itself")
        if value == DeploymentType.NON_PERSISTENT:
            raise ValueError("a model inside your own process is mii.pipeline(...), not mii.serve(...)")
        return value

    @field_validator("replica_addresses")
    @classmethod
    def _addresses_have_ports(cls, value: list[str]) -> list[str]:
        for address in value:
            host, _, port = address.rpartition(":")
            if not host or not port.isdigit() or not 0 < int(port) <= 65535:
                raise ValueError(f"{address!r} is no address of a replica; give host:port, as in 10.0.0.7:50050")
        return value

    def check_together(self) -> None:
        if not self.deployment_name:
            self.__dict__["deployment_name"] = default_deployment_name(self.model_conf.model_name_or_path)
        if len(quote(self.deployment_name, safe="")) > _LONGEST_NAME:
            raise ValueError(
                f"deployment_name={self.deployment_name[:40]!r}... is too long for a file name; shorten it"
            )
        if self.replica_only and self.model_conf.replica_num > 1:
            raise ValueError(f"replica_only is one replica and replica_num is {self.model_conf.replica_num}; use 1")
        if self.replica_only and (self.enable_restful_api or self.replica_addresses):
            raise ValueError(
                "replica_only starts neither HTTP nor a load balancer; 'mii balance' does, here or on another machine"
            )
        if self.enable_restful_api and self.restful_api_port == self.port_number:
            raise ValueError(f"port_number and restful_api_port are both {self.port_number}; give them different ports")

    def generate_replica_configs(self) -> None:
        """Fills `model_conf.replica_configs` from the device map, the hostfile and the ports, unless it is filled.

        Raises:
            PlacementError: replicas, devices, hosts or ports do not fit together.
            HostfileError: the hostfile is missing, empty or malformed.
        """
        model = self.model_conf
        named = {} if self.replica_only else {"port_number": [self.port_number]}
        if self.enable_restful_api and "restful_api_port" in self.model_fields_set:
            named["restful_api_port"] = [self.restful_api_port]
        if not model.replica_configs and not self.replica_addresses:
            slots = available_slots(self.hostfile, model, os.environ.get("CUDA_VISIBLE_DEVICES"))
            model.replica_configs = make_replica_configs(
                model,
                self.port_number - self.replica_only,  # alone, a replica has the deployment's port
                place_replicas(model.device_map, slots, model.replica_num, model.tensor_parallel),
            )
            move_unasked_ports(model, named, model.replica_configs)
        check_ports(named, model.replica_configs)
