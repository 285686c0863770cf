"""Where replicas go: hostfiles, devices, ports."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mii.config import ModelConfig, ReplicaConfig, placement
from mii.config.placement import (
    available_slots,
    check_ports,
    local_gpu_count,
    make_replica_configs,
    place_replicas,
    read_hostfile,
)
from mii.errors import HostfileError, PlacementError


@pytest.fixture
def hostfile(tmp_path: Path) -> Path:
    return tmp_path / "hostfile"


def test_a_hostfile_has_hosts_with_slots_comments_and_blank_lines(hostfile: Path) -> None:
    hostfile.write_text("# machines\nworker-1 slots=4\n\nworker-2   slots=2 # the old one\n")
    assert list(read_hostfile(hostfile).items()) == [("worker-1", 4), ("worker-2", 2)]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a slots=4\na slots=2\n", "line 2: host 'a' is there twice"),
        ("a slots=4\nb\n", "line 2: 'b' is not of the form 'host slots=N'"),
        ("a slots=-1\n", "line 1: .* is not of the form"),
        ("a slots=4 b slots=2\n", "line 1: .* is not of the form"),
        ("# nothing\n\n", "names no host"),
        ("", "names no host"),
    ],
)
def test_a_wrong_hostfile_is_refused_with_the_line(hostfile: Path, text: str, words: str) -> None:
    hostfile.write_text(text)
    with pytest.raises(HostfileError, match=words) as caught:
        read_hostfile(hostfile)
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, AssertionError)


def test_a_hostfile_that_is_missing_or_not_text_is_refused(hostfile: Path) -> None:
    with pytest.raises(HostfileError, match="cannot be read"):
        read_hostfile(hostfile)
    hostfile.write_bytes(b"\xff\xfe")
    with pytest.raises(HostfileError, match="cannot be read"):
        read_hostfile(hostfile)


@pytest.mark.parametrize(
    ("devices", "count"),
    [(None, 4), ("", 0), ("0", 1), ("2,0", 2), ("0,7,1", 1), ("-1", 0), ("GPU-8932f937,GPU-11", 2), (" 1 , 2 ", 2)],
)
def test_visible_devices_are_counted_as_cuda_does(devices: str | None, count: int) -> None:
    assert placement._visible(4, devices) == count


def test_gpus_are_counted_without_torch_and_agree_with_it() -> None:
    torch = pytest.importorskip("torch")
    assert local_gpu_count(os.environ.get("CUDA_VISIBLE_DEVICES")) == torch.cuda.device_count()


def model(**options: object) -> ModelConfig:
    return ModelConfig(**{"model_name_or_path": "m", **options})


def test_slots_come_from_the_hostfile_where_one_is_named(hostfile: Path) -> None:
    hostfile.write_text("a slots=3\n")
    assert available_slots(str(hostfile), model(device="cpu"), None) == {"a": 3}
    with pytest.raises(HostfileError):
        available_slots(str(hostfile.with_name("absent")), model(), None)


def test_slots_are_this_machines_gpus_or_what_the_replicas_need_of_its_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "local_gpu_count", lambda visible: 8)
    assert available_slots(None, model(), None) == {"localhost": 8}
    assert available_slots(None, model(device="cpu", replica_num=3, tensor_parallel=2), None) == {"localhost": 6}
    monkeypatch.setattr(placement, "local_gpu_count", lambda visible: 0)
    assert available_slots(None, model(replica_num=2), None) == {"localhost": 2}
    assert available_slots(None, model(device_map=[5]), None) == {"localhost": 6}
    with pytest.raises(PlacementError, match="no usable NVIDIA GPU; use device='cpu'"):
        available_slots(None, model(device="cuda"), None)


@pytest.mark.parametrize(
    ("slots", "replica_num", "tensor_parallel", "expected"),
    [
        ({"a": 4}, 4, 1, [("a", (0,)), ("a", (1,)), ("a", (2,)), ("a", (3,))]),
        ({"a": 2, "b": 2}, 2, 2, [("a", (0, 1)), ("b", (0, 1))]),
        ({"a": 8}, 2, 2, [("a", (0, 1)), ("a", (2, 3))]),
        ({"a": 3, "b": 5}, 3, 2, [("a", (0, 1)), ("b", (0, 1)), ("b", (2, 3))]),
        ({"a": 0, "b": 1}, 1, 1, [("b", (0,))]),
    ],
)
def test_automatic_placement_goes_host_by_host(
    slots: dict[str, int], replica_num: int, tensor_parallel: int, expected: list[tuple[str, tuple[int, ...]]]
) -> None:
    placements = place_replicas("auto", slots, replica_num, tensor_parallel)
    assert [(place.host, place.devices) for place in placements] == expected


@pytest.mark.parametrize(
    ("device_map", "words"),
    [
        ({"a": [[0]]}, "1 device.*tensor_parallel is 2"),
        ({"a": [[0, 1], [2]]}, "1 device.*tensor_parallel is 2"),
        ({"a": [[0, 1]]}, "room for 1"),
        ({"a": [[0, 1], [2, 3]], "b": [[0, 1]]}, "3 groups of devices and replica_num is 2"),
        ({"a": [[0, 1]], "c": [[0, 1]]}, "host 'c': no such host; known hosts: a, b"),
        ({"a": [[0, 1], [3, 4]]}, "device 4 is not there; the host has 4"),
        ({"a": [[0, 1], [1, 2]]}, "device 1 is used twice"),
        ({"a": [[0, 0], [1, 2]]}, "device 0 is used twice"),
    ],
)
def test_a_map_that_does_not_fit_is_refused(device_map: dict[str, list[list[int]]], words: str) -> None:
    with pytest.raises(PlacementError, match=words):
        place_replicas(device_map, {"a": 4, "b": 4}, replica_num=2, tensor_parallel=2)


TAKEN = [placement.Placement("a", (0, 1)), placement.Placement("b", (2, 3))]


@pytest.mark.parametrize(
    ("device_map", "added", "expected"),
    [
        ("auto", None, [("a", (2, 3)), ("b", (0, 1))]),
        ({"a": [[0, 1], [3, 2]], "b": [[0, 1], [2, 3]]}, None, [("a", (3, 2)), ("b", (0, 1))]),
        ({"a": [[0, 1]], "b": [[2, 3]]}, {"b": [[1, 0]], "a": [[2, 3]]}, [("b", (1, 0)), ("a", (2, 3))]),
    ],
)
def test_replicas_that_are_added_get_devices_that_are_free(device_map: Any, added: Any, expected: Any) -> None:
    placed = placement.place_more(device_map, {"a": 4, "b": 4}, TAKEN, 2, 2, added)
    assert [(place.host, place.devices) for place in placed] == expected


@pytest.mark.parametrize(
    ("device_map", "count", "added", "words"),
    [
        ("auto", 3, None, "3 more.*2 run, and the devices that are free have room for 2.*Ask for 4 replicas at most"),
        ({"a": [[0, 1]], "b": [[2, 3]]}, 1, None, "the groups of device_map that are free have room for 0"),
        ("auto", 1, {"a": [[1, 2]]}, "device 1 is used twice"),
        ("auto", 2, {"a": [[2, 3]]}, "1 groups of devices and 2 replicas are added"),
        ("auto", 1, {"c": [[2, 3]]}, "no such host; known hosts: a, b"),
    ],
)
def test_replicas_that_are_added_and_do_not_fit_are_refused(
    device_map: Any, count: int, added: Any, words: str
) -> None:
    with pytest.raises(PlacementError, match=words):
        placement.place_more(device_map, {"a": 4, "b": 4}, TAKEN, count, 2, added)


@given(
    slots=st.dictionaries(st.sampled_from("abcdef"), st.integers(0, 9), min_size=1),
    replica_num=st.integers(1, 12),
    tensor_parallel=st.integers(1, 5),
)
def test_automatic_placement_uses_each_device_once_or_says_how_many_replicas_fit(
    slots: dict[str, int], replica_num: int, tensor_parallel: int
) -> None:
    room = sum(slots.values()) // tensor_parallel
    if room < replica_num:
        with pytest.raises(PlacementError, match=f"room for {room} "):
            place_replicas("auto", slots, replica_num, tensor_parallel)
        return
    placements = place_replicas("auto", slots, replica_num, tensor_parallel)
    used = [where for place in placements for where in zip(hosts_of(place), place.devices, strict=True)]
    assert len(placements) == replica_num
    assert len(used) == len(set(used)) == replica_num * tensor_parallel
    assert all(device < slots[host] for host, device in used)
    # Only what fits on no host is divided over several.
    whole = [place for place in placements if not place.hosts]
    assert placements[: len(whole)] == whole
    assert len(whole) == min(replica_num, sum(count // tensor_parallel for count in slots.values()))
    assert all(len(set(place.hosts)) > 1 and place.hosts[0] == place.host for place in placements[len(whole) :])
    # What was placed automatically on single hosts is also right as a map.
    device_map: dict[str, list[list[int]]] = {}
    for place in whole:
        device_map.setdefault(place.host, []).append(list(place.devices))
    if whole:
        assert place_replicas(device_map, slots, len(whole), tensor_parallel) == whole


def hosts_of(place: placement.Placement) -> tuple[str, ...]:
    return place.hosts or (place.host,) * len(place.devices)


def test_a_replica_that_fits_on_no_host_is_divided_over_several() -> None:
    placements = place_replicas("auto", {"a": 3, "b": 1, "c": 4}, 2, 4)
    assert [(hosts_of(place), place.devices) for place in placements] == [
        (("c",) * 4, (0, 1, 2, 3)),
        (("a", "a", "a", "b"), (0, 1, 2, 0)),
    ]
    configs = placement.make_replica_configs(model(tensor_parallel=4), 50050, placements)
    assert [config.rank_hosts for config in configs] == [[], ["a", "a", "a", "b"]]
    assert [configs[1].host_of(rank) for rank in range(4)] == ["a", "a", "a", "b"]
    assert (configs[0].seen_by(2), configs[1].seen_by(2)) == (([0, 1, 2, 3], 2), ([2], 0))
    more = placement.place_more("auto", {"a": 3, "b": 2, "c": 4}, placements[1:], 1, 1)
    assert (more[0].host, more[0].devices) == ("b", (1,))


def test_replica_ports_are_laid_out_as_documented() -> None:
    placements = place_replicas("auto", {"a": 4}, 2, 2)
    first, second = make_replica_configs(model(replica_num=2, tensor_parallel=2), 50050, placements)
    assert first.model_dump() == {
        "hostname": "a",
        "rank_hosts": [],
        "tensor_parallel_ports": [50051, 50052],
        "torch_dist_port": 29500,
        "gpu_indices": [0, 1],
        "zmq_port": 25555,
    }
    assert second.model_dump() == {
        "hostname": "a",
        "rank_hosts": [],
        "tensor_parallel_ports": [50053, 50054],
        "torch_dist_port": 29600,
        "gpu_indices": [2, 3],
        "zmq_port": 25556,
    }


@pytest.mark.parametrize(
    ("options", "port_number", "name"),
    [
        ({}, 65534, "port_number"),
        ({"torch_dist_port": 65500}, 50050, "torch_dist_port"),
        ({"zmq_port_number": 65535}, 50050, "zmq_port_number"),
    ],
)
def test_ports_above_the_last_one_are_refused(options: dict[str, int], port_number: int, name: str) -> None:
    with pytest.raises(PlacementError, match=f"choose a lower {name}"):
        make_replica_configs(model(replica_num=2, **options), port_number, place_replicas("auto", {"a": 2}, 2, 1))


def test_a_port_is_used_once_on_each_host() -> None:
    def replica(host: str, port: int) -> ReplicaConfig:
        return ReplicaConfig(hostname=host, tensor_parallel_ports=[port])

    check_ports({"port_number": [50050]}, [replica("a", 50051), replica("b", 50051)])
    with pytest.raises(PlacementError, match="port 50051 of a would be used twice: gRPC port of replica 0 and gRPC"):
        check_ports({}, [replica("a", 50051), replica("a", 50051)])
    with pytest.raises(PlacementError, match=r"port 50050 of localhost .*port_number and gRPC port of replica 0"):
        check_ports({"port_number": [50050]}, [replica("localhost", 50050)])
