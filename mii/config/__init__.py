"""Every config class. None of this imports torch.

`ModelConfig` is what `mii.pipeline` takes, `MIIConfig` what `mii.serve` takes, and `GenerateParamsConfig` what a call
of the pipeline takes.
"""

from mii.batching.generation.params import GenerateParamsConfig
from mii.config.deployment import MIIConfig, default_deployment_name
from mii.config.device_map import DEVICE_MAP_DEFAULT
from mii.config.engine import (
    DeepSpeedTPConfig,
    DSStateManagerConfig,
    MemoryConfig,
    QuantizationConfig,
    RaggedInferenceEngineConfig,
)
from mii.config.model import ModelConfig, ReplicaConfig
from mii.config.registry import get_mii_config

__all__ = [
    "DEVICE_MAP_DEFAULT",
    "DSStateManagerConfig",
    "DeepSpeedTPConfig",
    "GenerateParamsConfig",
    "MIIConfig",
    "MemoryConfig",
    "ModelConfig",
    "QuantizationConfig",
    "RaggedInferenceEngineConfig",
    "ReplicaConfig",
    "default_deployment_name",
    "get_mii_config",
]
