"""Which device and number format a model runs in, and how much memory there is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from mii.errors import CheckpointError, UnsupportedDeviceError

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_STORED = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
MINIMUM_CAPABILITY = (8, 0)


def choose_device(requested: str, index: int = 0) -> torch.device:
    """`auto`: the GPU of this index where there is one that mii's kernels run on, else the CPU.

    Raises:
        UnsupportedDeviceError: A GPU was asked for and there is none, or it is older than compute capability 8.0.
    """
    if requested == "cpu" or (requested == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UnsupportedDeviceError(
            "device='cuda' was asked for and torch finds no NVIDIA GPU here. Check the driver with nvidia-smi and that "
            "this torch was built for CUDA, or use device='cpu'."
        )
    if index >= torch.cuda.device_count():
        raise UnsupportedDeviceError(
            f"GPU {index} was asked for and this machine has {torch.cuda.device_count()}, numbered from 0."
        )
    capability = torch.cuda.get_device_capability(index)
    if capability < MINIMUM_CAPABILITY:
        raise UnsupportedDeviceError(
            f"{torch.cuda.get_device_name(index)} has compute capability {capability[0]}.{capability[1]}; mii's "
            "kernels need 8.0 (Ampere) or more. Use device='cpu' on this machine."
        )
    return torch.device("cuda", index)


def choose_dtype(requested: str, config: Mapping[str, Any], device: torch.device) -> torch.dtype:
    """The asked-for format; for `auto` the checkpoint's own, but bfloat16 for a float32 checkpoint on a GPU.

    Raises:
        CheckpointError: The checkpoint's own is asked for, and is none that models run in.
    """
    if requested != "auto":
        return _DTYPES[requested]
    name = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16").removeprefix("torch.")
    stored = _STORED.get(name)
    if stored is None:
        raise CheckpointError(
            f"config.json says that the model's dtype is {name!r}; models run in {', '.join(_STORED)}. Choose one with "
            f"dtype={', '.join(map(repr, _DTYPES))}."
        )
    return torch.bfloat16 if device.type == "cuda" and stored is torch.float32 else stored


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated: on a GPU as the driver says, on a CPU what the system calls available."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return min(_available_ram(), _cgroup_headroom())


def _available_ram() -> int:
    with open("/proc/meminfo") as lines:
        for line in lines:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return 1 << 62


def _cgroup_headroom() -> int:
    """Bytes until the limit of a container, where there is one."""
    try:
        with open("/sys/fs/cgroup/memory.max") as limit, open("/sys/fs/cgroup/memory.current") as current:
            text = limit.read().strip()
            return 1 << 62 if text == "max" else max(0, int(text) - int(current.read()))
    except (OSError, ValueError):
        return 1 << 62
