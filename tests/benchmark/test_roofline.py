"""The least times, against figures by hand for the Llama-3-8B shape on a chip of 3.02 TB/s and 807 TFLOP/s."""

from __future__ import annotations

import pytest
import torch

from mii.benchmark.limits import MachineLimits, measure_limits
from mii.benchmark.roofline import Roofline
from mii.benchmark.shapes import SHAPES, Job, make_mix
from mii.modeling.models import find_family


@pytest.fixture(scope="module")
def llama() -> Roofline:
    config = SHAPES["llama3-8b"]
    spec = find_family(config).read_spec(config)
    return Roofline.of(spec, torch.bfloat16, MachineLimits(3.02e12, 807e12, "given"))


def test_weights_are_counted_once_each(llama: Roofline) -> None:
    # 32 layers of (6144 + 4096 + 28672) x 4096 and 4096 x 14336, and a head of 128256 x 4096
    behind_attention = (4096 + 28672) * 4096 + 4096 * 14336
    assert llama.tail == behind_attention
    assert llama.body == 32 * (6144 * 4096 + behind_attention) - llama.tail
    assert llama.head == 128256 * 4096
    assert llama.kv_bytes == 131072


@pytest.mark.parametrize(("batch", "milliseconds"), [(1, 4.98), (8, 5.06), (64, 5.72)])
def test_a_decode_step_reads_the_weights_and_each_context(llama: Roofline, batch: int, milliseconds: float) -> None:
    assert 1e3 * llama.decode_step(batch, 272) == pytest.approx(milliseconds, abs=0.01)


def test_of_two_ranks_each_reads_half_of_all() -> None:
    config = SHAPES["llama3-8b"]
    spec = find_family(config).read_spec(config)
    limits = MachineLimits(3.02e12, 807e12, "given")
    whole, half = (Roofline.of(each, torch.bfloat16, limits) for each in (spec, spec.sharded(0, 2)))
    assert half.decode_step(8, 272) == pytest.approx(whole.decode_step(8, 272) / 2)
    jobs = make_mix("chat", 128256)
    assert half.workload(jobs) == pytest.approx(whole.workload(jobs) / 2)


def test_a_prompt_is_bound_by_arithmetic(llama: Roofline) -> None:
    jobs = make_mix("prefill-2048", 128256)
    assert 64 * 2048 / llama.workload(jobs) == pytest.approx(57_200, rel=0.01)


def test_only_sampled_tokens_go_through_the_whole_last_layer(llama: Roofline) -> None:
    flops = (llama.products(10**6, 10**5, 1) - llama.products(10**6, 0, 1)) * 807e12
    assert flops == pytest.approx(2e5 * (llama.head + llama.tail))


@pytest.mark.parametrize("normed", [True, False])
def test_some_blocks_compute_all_rows(normed: bool) -> None:
    config = {"model_type": "bloom", "hidden_size": 64, "n_layer": 2, "n_head": 4, "vocab_size": 96}
    config["apply_residual_connection_post_layernorm"] = normed
    spec = find_family(config).read_spec(config)
    tail = Roofline.of(spec, torch.bfloat16, MachineLimits(3e12, 800e12, "given")).tail
    assert tail == (0 if normed else 9 * 64 * 64)


def test_a_lone_request_pays_for_the_weights_at_every_step(llama: Roofline) -> None:
    steps = llama.workload([Job([1], 100)]) / llama.decode_step(1, 50)
    assert steps == pytest.approx(100, rel=0.01)


def test_more_work_never_takes_less_time(llama: Roofline) -> None:
    jobs = make_mix("chat", 128256)
    times = [llama.workload(jobs[:count]) for count in (1, 10, 100, 768)]
    assert times == sorted(times)


def test_only_the_experts_that_are_hit_are_read() -> None:
    config = SHAPES["qwen3-30b-a3b"]
    spec = find_family(config).read_spec(config)
    roof = Roofline.of(spec, torch.bfloat16, MachineLimits(3e12, 800e12, "given"))
    expert = 48 * 3 * 2048 * 768  # one in every layer
    assert roof.experts == 128 * expert
    dense = roof.body + roof.tail + roof.head
    assert roof.products(1, 1, 1) == pytest.approx(2 * (dense + 8 * expert) / 3e12)
    # two tokens share 8 * 8 / 128 experts on average
    assert roof.products(2, 2, 1) == pytest.approx(2 * (dense + 15.5 * expert) / 3e12)
    # each token's arithmetic is that of its own experts
    assert roof.products(10**6, 0, 1) == pytest.approx(2e6 * (roof.body + 47 / 48 * 8 * expert) / 800e12)


def test_limits_of_this_machine_are_measured() -> None:
    limits = measure_limits(torch.device("cpu"), torch.float32)
    assert limits.bandwidth > 1e8
    assert limits.matmul > 1e9
