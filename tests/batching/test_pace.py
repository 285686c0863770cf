"""A target for the time of a token: steps keep it whatever comes, prompts still end, and nobody starves."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mii.batching.pace import Pace, StepCosts, make_pace
from mii.batching.scheduler import Chunk, Plan, Scheduler, SchedulerLimits
from mii.engine.kv_cache import BlockPool
from tests.batching.test_scheduler import Device, sequence

COSTS = st.builds(
    StepCosts,
    step=st.floats(1e-3, 20e-3),
    token=st.floats(1e-6, 2e-3),
    context=st.floats(0, 1e-5),
    pair=st.floats(0, 1e-5),
)


def seconds_of(plan: Plan, costs: StepCosts) -> float:
    """The time of a step by the model that the scheduler goes by: products together, attention after them."""
    tokens = costs.token * plan.num_tokens
    pairs = sum(costs.chunk(chunk.size, chunk.start) - chunk.size * costs.token for chunk in plan.prompts)
    return max(costs.step, tokens) + costs.context * sum(plan.lengths) + pairs


@given(COSTS, st.floats(0, 1), st.integers(0, 10_000))
def test_as_many_tokens_fit_as_take_the_time(costs: StepCosts, seconds: float, start: int) -> None:
    count = costs.fitting(seconds, start)
    assert count >= 0
    assert costs.chunk(count, start) <= seconds + 1e-9
    assert costs.chunk(count + 2, start) > seconds


def test_attention_comes_on_top_of_reading_the_weights() -> None:
    """Products of a few tokens cost nothing beside the weights; their attention does."""
    costs = StepCosts(step=8e-3, token=1e-6, pair=7e-6)
    left = Pace(costs, 12e-3).left(decodes=1, context=4)
    count = left.fitting(start=0)
    assert seconds_of(Plan(prompts=[Chunk(None, 0, count, True)], num_tokens=count + 1), costs) <= 12e-3
    assert seconds_of(Plan(prompts=[Chunk(None, 0, count + 1, True)], num_tokens=count + 2), costs) > 12e-3


@given(COSTS, st.one_of(st.none(), st.floats(1e-4, 1)))
def test_a_pace_can_be_kept(costs: StepCosts, target: float | None) -> None:
    pace = make_pace(costs, target, least=16)
    assert pace.seconds >= 1.5 * costs.step
    if target is not None and target >= 1.5 * costs.step:
        assert pace.seconds == target


class Watch(Device):
    """Checks the time of every step with running answers."""

    pace: Pace

    def launch(self, plan: Plan) -> None:
        if plan.decodes:
            allowed = max(self.pace.seconds, self.decoding(plan)) + self.pace.costs.chunk(self.pace.least, 200)
            assert seconds_of(plan, self.pace.costs) <= allowed + 1e-9
        super().launch(plan)

    def decoding(self, plan: Plan) -> float:
        return self.pace.costs.decode(len(plan.decodes), sum(plan.lengths))


@settings(max_examples=200)
@given(
    COSTS,
    st.floats(1e-3, 0.2),
    st.lists(st.tuples(st.integers(1, 60), st.integers(1, 30)), min_size=1, max_size=12),
    st.sampled_from([0, 1]),
)
def test_steps_keep_the_time_and_everything_finishes(
    costs: StepCosts, target: float, requests: list[tuple[int, int]], depth: int
) -> None:
    pace = make_pace(costs, target, least=4)
    limits = SchedulerLimits(max_tokens=64, max_sequences=8, max_slots=8, pace=pace)
    scheduler = Scheduler(limits, BlockPool(200, 4))
    device = Watch(scheduler, depth)
    device.pace = pace
    for uid, (prompt, answer) in enumerate(requests):
        scheduler.add(sequence(uid, [uid] * prompt, answer))
    device.run(limits)
    assert len(device.finished) == len(requests)


def test_a_long_prompt_is_cut_to_the_time_while_others_answer() -> None:
    costs = StepCosts(step=5e-3, token=25e-6)
    limits = SchedulerLimits(8192, 64, 64, pace=Pace(costs, 10e-3))
    scheduler = Scheduler(limits, BlockPool(400, 64))
    scheduler.add(sequence(0, [1] * 8, 100))
    scheduler.schedule()
    scheduler.add(sequence(1, [2] * 3000, 10))
    plan = scheduler.schedule()
    assert plan.decodes == [scheduler.running[0]]
    assert [chunk.size for chunk in plan.prompts] in ([398], [399])  # 10 ms are 400 tokens, one of which decodes
    while scheduler.running[1].remaining > 1:
        for seq in plan.sampled:
            seq.receive(1)
        plan = scheduler.schedule()
        assert plan.num_tokens <= 400


def test_prompts_alone_take_whole_steps() -> None:
    limits = SchedulerLimits(8192, 64, 64, pace=Pace(StepCosts(5e-3, 25e-6), 10e-3))
    scheduler = Scheduler(limits, BlockPool(400, 64))
    scheduler.add(sequence(0, [2] * 3000, 10))
    assert scheduler.schedule().num_tokens == 3000


def test_requests_wait_when_one_more_would_make_all_too_slow() -> None:
    costs = StepCosts(step=5e-3, token=1e-6, context=1e-5)
    limits = SchedulerLimits(8192, 64, 64, pace=Pace(costs, 10e-3))
    scheduler = Scheduler(limits, BlockPool(400, 64, prefix_caching=False))
    for uid in range(8):
        scheduler.add(sequence(uid, [uid] * 150, 4))
    device = Device(scheduler, 0)
    device.launch(scheduler.schedule())
    assert len(scheduler.running) == 3  # 450 tokens of context are 4.5 ms more; a fourth would make it 11
    device.collect()
    device.run(limits, steps=100)
    assert len(device.finished) == 8


@pytest.mark.parametrize("running", [0, 1])
def test_one_request_always_runs(running: int) -> None:
    assert Pace(StepCosts(5e-3, 1e-3), 1e-3).admits(running, 100_000)
