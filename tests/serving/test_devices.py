"""More GPUs are asked for than there are: a clear error before anything starts. The driver's count is made up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import mii
from mii.config import ReplicaConfig
from mii.errors import PlacementError
from tests.serving.deployments import free_port

GPUS = 2


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for module in ("mii.config.placement", "mii.backend.plan"):
        monkeypatch.setattr(f"{module}.local_gpu_count", lambda visible: GPUS)


@pytest.mark.usefixtures("gpus")
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tensor_parallel": 4}, r"needs 1 groups of 4 device\(s\); there is room for 0 \(devices: localhost: 2\)"),
        ({"replica_num": 3}, r"needs 3 groups of 1 device\(s\).*room for 2 \(devices: localhost: 2\)"),
        ({"replica_num": 2, "tensor_parallel": 2}, "there is room for 1"),
        ({"device_map": 2}, "device 2 is not there; the host has 2, from 0 up"),
        ({"device_map": {"localhost": [[0], [5]]}, "replica_num": 2}, "device 5 is not there"),
    ],
)
def test_more_gpus_than_there_are_is_an_error_and_nothing_is_left(
    tiny_llama: Path, cache: Path, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(PlacementError, match=words):
        mii.serve(str(tiny_llama), deployment_name="many", progress=False, **options)


@pytest.mark.usefixtures("gpus")
def test_a_hostfile_that_promises_gpus_that_are_not_there_is_an_error(
    tiny_llama: Path, tmp_path: Path, cache: Path
) -> None:
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("localhost slots=8\n")
    with pytest.raises(PlacementError, match=r"GPUs \[0, 1, 2, 3\] of this machine, which has 2 .*hostfile's slots"):
        mii.serve(str(tiny_llama), deployment_name="many", hostfile=str(hostfile), tensor_parallel=4, progress=False)


@pytest.mark.usefixtures("gpus")
def test_a_replica_that_was_laid_out_by_hand_is_checked_too(tiny_llama: Path, cache: Path) -> None:
    port = free_port()
    replica = ReplicaConfig(
        hostname="localhost", tensor_parallel_ports=[port], torch_dist_port=port + 1, gpu_indices=[7]
    )
    with pytest.raises(PlacementError, match=r"GPUs \[7\] of this machine, which has 2"):
        mii.serve(str(tiny_llama), deployment_name="many", replica_configs=[replica], progress=False)


@pytest.mark.usefixtures("cache")
def test_a_gpu_where_there_is_none_is_an_error(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mii.config.placement.local_gpu_count", lambda visible: 0)
    with pytest.raises(PlacementError, match="has no usable NVIDIA GPU; use device='cpu'"):
        mii.serve(str(tiny_llama), deployment_name="none", device="cuda", progress=False)
