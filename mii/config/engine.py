"""The engine's part of a model's config, with the names that DeepSpeed gives it.

`RaggedInferenceEngineConfig` and the classes under it take what DeepSpeed's classes of the same names take; DeepSpeed's
own objects can be given in their place.

Example:
    >>> RaggedInferenceEngineConfig(manager={"max_ragged_batch_size": 256}).state_manager.max_ragged_sequence_count
    256
"""

from __future__ import annotations

from enum import Enum

from pydantic import Field, field_validator

from mii.errors import UnsupportedFeatureError
from mii.validation import ConfigModel, PositiveInt

__all__ = [
    "AllocationMode",
    "DSStateManagerConfig",
    "DeepSpeedTPConfig",
    "MemoryConfig",
    "QuantizationConfig",
    "RaggedInferenceEngineConfig",
    "check_quantization_mode",
]

_SEQUENCE_COUNT_DEFAULT = 512


def check_quantization_mode(mode: str | None) -> str | None:
    """`mode`, if this version can run it.

    Raises:
        ValueError: any mode but None; says so apart for ``"wf6af16"``, which DeepSpeed-MII has.
    """
    if mode is None:
        return None
    if mode == "wf6af16":
        raise ValueError("mii has no FP6 kernels; leave quantization_mode out to run the checkpoint in 16 bits")
    raise ValueError("unknown quantization mode; leave quantization_mode out to run the checkpoint in 16 bits")


class DeepSpeedTPConfig(ConfigModel):
    """Tensor parallelism."""

    tp_size: PositiveInt = Field(default=1, description="processes that share one copy of the model")


class AllocationMode(str, Enum):
    """What `MemoryConfig.size` counts."""

    RESERVE = "reserve"
    ALLOCATE = "allocate"


class MemoryConfig(ConfigModel):
    """How large the KV cache is."""

    mode: AllocationMode = Field(
        default=AllocationMode.RESERVE,
        description="'reserve' leaves `size` bytes of memory free and uses the rest; 'allocate' takes `size` blocks",
    )
    size: PositiveInt = Field(
        default=1_000_000_000, description="bytes to leave free ('reserve') or KV blocks ('allocate')"
    )


class DSStateManagerConfig(ConfigModel):
    """How much the engine holds and does at once.

    `max_ragged_sequence_count` that was not given is lowered to the other two limits where they are smaller.
    """

    max_tracked_sequences: PositiveInt = Field(default=2048, description="requests that may hold KV blocks at once")
    max_ragged_batch_size: PositiveInt = Field(
        default=768, description="tokens of one forward pass, the SplitFuse budget"
    )
    max_ragged_sequence_count: PositiveInt = Field(
        default=_SEQUENCE_COUNT_DEFAULT, description="requests of one forward pass"
    )
    max_context: PositiveInt = Field(
        default=8192, description="longest sequence that block tables are made for, in tokens"
    )
    memory_config: MemoryConfig = Field(default=MemoryConfig(), description="how large the KV cache is")
    offload: bool = Field(default=False, description="moving KV blocks to host memory; mii does not do this")

    @field_validator("offload")
    @classmethod
    def _no_offload(cls, value: bool) -> bool:
        if value:
            raise UnsupportedFeatureError(
                "offload=True: mii does not move KV blocks to host memory; leave it out, requests that do not fit wait"
            )
        return value

    def check_together(self) -> None:
        limit = min(self.max_tracked_sequences, self.max_ragged_batch_size)
        if "max_ragged_sequence_count" not in self.model_fields_set:
            self.__dict__["max_ragged_sequence_count"] = min(_SEQUENCE_COUNT_DEFAULT, limit)
        elif self.max_ragged_sequence_count > limit:
            raise ValueError(
                f"max_ragged_sequence_count={self.max_ragged_sequence_count} is more than "
                f"max_tracked_sequences={self.max_tracked_sequences} or "
                f"max_ragged_batch_size={self.max_ragged_batch_size} allow; use at most {limit}"
            )


class QuantizationConfig(ConfigModel):
    """Weight quantisation; this version runs none."""

    quantization_mode: str | None = Field(default=None, description="None runs the checkpoint as it is")

    @field_validator("quantization_mode")
    @classmethod
    def _known_mode(cls, value: str | None) -> str | None:
        return check_quantization_mode(value)


class RaggedInferenceEngineConfig(ConfigModel):
    """Everything that DeepSpeed lets users set on its engine, under DeepSpeed's names and aliases."""

    tensor_parallel: DeepSpeedTPConfig = Field(
        default=DeepSpeedTPConfig(), alias="tp", description="tensor parallelism, {'tp_size': 2}"
    )
    state_manager: DSStateManagerConfig = Field(
        default=DSStateManagerConfig(),
        alias="manager",
        description="limits of a forward pass and of the KV cache, {'max_ragged_batch_size': 1024}",
    )
    quantization: QuantizationConfig = Field(default=QuantizationConfig(), description="weight quantisation")

    @classmethod
    def option_names(cls) -> list[str]:
        return ["tensor_parallel", "tp", "state_manager", "manager", "quantization"]
