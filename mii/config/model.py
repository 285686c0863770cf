"""What to load and how to run it: the config of one model.

Example:
    >>> config = ModelConfig(model_name_or_path="path-or-id", dtype="bfloat16", max_length=4096)
    >>> config.dtype, config.tokenizer
    ('bf16', 'path-or-id')
"""

from __future__ import annotations

import os
import socket
from typing import Any, Literal

from pydantic import Field, field_validator

from mii.config.device_map import DEVICE_MAP_DEFAULT, DeviceMap, parse_device_map
from mii.config.engine import RaggedInferenceEngineConfig, check_quantization_mode
from mii.constants import (
    BLOCK_SIZES,
    TORCH_DIST_PORT_DEFAULT,
    ZMQ_PORT_DEFAULT,
    ModelProvider,
    TaskType,
)
from mii.errors import PlacementError
from mii.validation import ConfigModel, NonNegativeInt, Number, Port, PositiveInt, Seed

__all__ = ["DEVICE_MAP_DEFAULT", "ModelConfig", "ReplicaConfig", "world_size"]

_DTYPES = {
    "bf16": "bf16",
    "bfloat16": "bf16",
    "fp16": "fp16",
    "float16": "fp16",
    "half": "fp16",
    "fp32": "fp32",
    "float32": "fp32",
    "float": "fp32",
}


class ReplicaConfig(ConfigModel):
    """Where one replica of a deployment runs and which ports it uses."""

    hostname: str = Field(default="", description="host of its front and its first process")
    rank_hosts: list[str] = Field(default=[], description="host of each process; empty: all are on `hostname`")
    tensor_parallel_ports: list[Port] = Field(default=[], description="gRPC port of each process")
    torch_dist_port: Port | None = Field(default=None, description="torch's rendezvous port")
    gpu_indices: list[NonNegativeInt] = Field(default=[], description="device of each process, as the host counts them")
    zmq_port: Port | None = Field(default=None, description="from zmq_port_number; kept apart from its other ports")

    @property
    def is_local(self) -> bool:
        """Whether its front and first process run on this machine."""
        return is_this_host(self.hostname)

    @property
    def inner_ports(self) -> list[int]:
        """Its ports for torch and for steps, as far as it has them."""
        return [port for port in (self.torch_dist_port, self.zmq_port) if port is not None]

    def host_of(self, rank: int) -> str:
        """The host of one of its processes."""
        return self.rank_hosts[rank] if self.rank_hosts else self.hostname

    def seen_by(self, rank: int) -> tuple[list[int], int]:
        """The devices that one of its processes sees, and which of these is its own."""
        return ([self.gpu_indices[rank]], 0) if self.rank_hosts else (self.gpu_indices, rank)

    @property
    def address(self) -> str:
        """``host:port`` of its front, which speaks gRPC."""
        return f"{'127.0.0.1' if self.is_local else self.hostname}:{self.tensor_parallel_ports[0]}"


def is_this_host(host: str) -> bool:
    """Whether a host's name, or none, is this machine's."""
    name = socket.gethostname()
    return host in ("", "localhost", "127.0.0.1", name, name.partition(".")[0])


def world_size() -> int:
    """How many processes a launcher started, from ``WORLD_SIZE``; 1 without a launcher.

    Raises:
        ValueError: the variable holds something else than a number from 1 up.
    """
    text = os.environ.get("WORLD_SIZE") or "1"
    if not text.isdigit() or int(text) < 1:
        raise ValueError(f"the environment variable WORLD_SIZE is {text!r}; it must be a number from 1 up, or be unset")
    return int(text)


class ModelConfig(ConfigModel):
    """One model: checkpoint, tokenizer, devices, number format, limits.

    Where `inference_engine_config` sets ``tensor_parallel.tp_size`` and `tensor_parallel` is not given, the former is
    used; where both are given, `tensor_parallel` is.

    Raises:
        pydantic.ValidationError: an option is unknown, missing, of the wrong type or out of range.
        UnsupportedFeatureError: an option that DeepSpeed-MII has and mii does not.
    """

    model_name_or_path: str = Field(description="a folder, a .gguf file, or the id of a Hugging Face repository")
    tokenizer: Any = Field(
        default=None, description="a folder, an id, or an object with encode and decode; None: the model's own"
    )
    task: TaskType | None = Field(
        default=TaskType.TEXT_GENERATION, description="'text-generation', the only task of this API"
    )
    tensor_parallel: PositiveInt = Field(
        default_factory=world_size, description="processes that share one copy of the model, one device each"
    )
    quantization_mode: str | None = Field(default=None, description="None runs the checkpoint as it is")
    inference_engine_config: RaggedInferenceEngineConfig = Field(
        default=RaggedInferenceEngineConfig(), description="DeepSpeed's options of the engine"
    )
    torch_dist_port: Port = Field(
        default=TORCH_DIST_PORT_DEFAULT,
        description="port of the launcher for replicas on other hosts; replica i uses this + 100 i",
    )
    zmq_port_number: Port = Field(
        default=ZMQ_PORT_DEFAULT, description="not used: the processes of a replica meet on free ports"
    )
    replica_num: PositiveInt = Field(default=1, description="copies of the model in a deployment")
    replica_configs: list[ReplicaConfig] = Field(
        default=[], description="one ReplicaConfig per replica; empty: made from device_map"
    )
    device_map: str | DeviceMap = Field(
        default=DEVICE_MAP_DEFAULT,
        description="'auto', one device 0, one replica's devices [0, 1], several replicas' [[0, 1], [2, 3]], or "
        "{'host': [[0, 1]]}",
    )
    max_length: PositiveInt | None = Field(
        default=None, description="most tokens of prompt plus answer; None: the model's own limit"
    )
    sync_debug: bool = Field(default=False, description="wait for the device after each internal step and log its time")
    profile_model_time: bool = Field(default=False, description="log the time of the model's forward passes")

    device: str = Field(default="auto", description="'auto', 'cpu' or 'cuda'; 'auto' takes a GPU where there is one")
    dtype: str = Field(
        default="auto", description="'bf16', 'fp16', 'fp32', or 'auto' for what the checkpoint and the device suit"
    )
    trust_remote_code: bool = Field(default=False, description="run Python code that a checkpoint brings along")
    revision: str | None = Field(default=None, description="branch, tag or commit of a Hugging Face repository")
    memory_fraction: Number = Field(
        default=0.9, gt=0, le=1, description="share of the memory free at start that weights and KV cache may use"
    )
    seed: Seed | None = Field(default=None, description="makes sampling repeatable; None: new at each start")
    block_size: PositiveInt | None = Field(
        default=None, description="tokens of one KV block; None: chosen for the device"
    )
    prefix_caching: bool = Field(
        default=True, description="keep KV blocks of finished requests for prompts that begin alike"
    )
    optimize_for: Literal["throughput", "latency"] = Field(
        default="throughput",
        description="'latency' cuts prompts smaller, so that running answers get each token in about four times the "
        "least time of a step",
    )
    target_token_ms: Number | None = Field(
        default=None, gt=0, description="milliseconds that a running answer may wait for a token; None: no such limit"
    )
    progress: bool | None = Field(default=None, description="progress bars; None: when standard error is a terminal")

    @property
    def provider(self) -> ModelProvider:
        """Where the checkpoint comes from."""
        return ModelProvider.HUGGING_FACE

    @property
    def local_device(self) -> int:
        """The GPU of this process: its entry in the first group of `device_map`, else its number on this host.

        Raises:
            PlacementError: the group has not one device for each process.
        """
        rank = int(os.environ.get("LOCAL_RANK") or 0)
        if isinstance(self.device_map, str):
            return rank
        group = next(iter(self.device_map.values()))[0]
        if len(group) != self.tensor_parallel or rank >= len(group):
            raise PlacementError(
                f"device_map gives the devices {group} and tensor_parallel is {self.tensor_parallel}; give one device "
                "for each process"
            )
        return group[rank]

    @field_validator("model_name_or_path", "tokenizer", mode="before")
    @classmethod
    def _paths_are_text(cls, value: Any) -> Any:
        return os.fspath(value) if isinstance(value, os.PathLike) else value

    @field_validator("model_name_or_path")
    @classmethod
    def _model_is_named(cls, value: str) -> str:
        if not value.strip():
            raise ValueError("no model was named; give a folder, a .gguf file, or the id of a Hugging Face repository")
        return value

    @field_validator("tokenizer")
    @classmethod
    def _tokenizer_is_usable(cls, value: Any) -> Any:
        if value is None or (isinstance(value, str) and value):
            return value
        if callable(getattr(value, "encode", None)) and callable(getattr(value, "decode", None)):
            return value
        raise ValueError("must be a folder, an id, or an object with encode and decode")

    @field_validator("task", mode="before")
    @classmethod
    def _task_is_text_generation(cls, value: Any) -> Any:
        if value is None or value == TaskType.TEXT_GENERATION:
            return TaskType.TEXT_GENERATION
        raise ValueError("must be 'text-generation'; leave it out")

    @field_validator("quantization_mode")
    @classmethod
    def _quantization_is_known(cls, value: str | None) -> str | None:
        return check_quantization_mode(value)

    @field_validator("inference_engine_config")
    @classmethod
    def _engine_config_is_ours(cls, value: RaggedInferenceEngineConfig) -> RaggedInferenceEngineConfig:
        return value.model_copy(deep=True)  # tp_size is written below; the caller's object stays as it is

    @field_validator("device_map", mode="plain")
    @classmethod
    def _device_map_has_hosts(cls, value: Any) -> str | DeviceMap:
        return parse_device_map(value)

    @field_validator("device")
    @classmethod
    def _device_is_known(cls, value: str) -> str:
        if value not in ("auto", "cpu", "cuda"):
            raise ValueError("must be 'auto', 'cpu' or 'cuda'; device_map=1 picks the second GPU")
        return value

    @field_validator("dtype", mode="before")
    @classmethod
    def _dtype_is_known(cls, value: Any) -> str:
        name = str(value).removeprefix("torch.")
        if name != "auto" and name not in _DTYPES:
            raise ValueError("must be 'auto', 'bf16', 'fp16' or 'fp32', or torch's name of one of these")
        return _DTYPES.get(name, "auto")

    @field_validator("block_size")
    @classmethod
    def _block_size_has_kernels(cls, value: int | None) -> int | None:
        if value is not None and value not in BLOCK_SIZES:
            raise ValueError(f"must be one of {', '.join(map(str, BLOCK_SIZES))}, or None")
        return value

    def check_together(self) -> None:
        if self.replica_configs and len(self.replica_configs) != self.replica_num:
            raise ValueError(
                f"replica_configs has {len(self.replica_configs)} entries and replica_num is {self.replica_num}; give "
                "one entry per replica, or leave replica_configs out"
            )
        if "tokenizer" not in self.model_fields_set or self.tokenizer is None:
            self.__dict__["tokenizer"] = self.model_name_or_path
        engine_tp = self.inference_engine_config.tensor_parallel
        if "tensor_parallel" not in self.model_fields_set and "tp_size" in engine_tp.model_fields_set:
            self.__dict__["tensor_parallel"] = engine_tp.tp_size
        engine_tp.__dict__["tp_size"] = self.tensor_parallel
