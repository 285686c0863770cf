"""Which replica gets a prompt: the least busy one, or the one that has its beginning."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as some

from mii.grpc_related.convert import pack_request
from mii.grpc_related.routing import PrefixMap, Work, choose, read_work


@dataclass
class Replica:
    index: int
    tokens: int = 0


def work_of(prompt: str | list[int], **options: object) -> Work:
    (work,) = read_work(pack_request([prompt], options))
    return work


def test_work_is_the_prompt_and_what_may_be_generated() -> None:
    assert work_of("x" * 400, max_new_tokens=50).cost == 150
    assert work_of([1] * 100, max_new_tokens=50).cost == 150
    assert work_of("x" * 400).cost > 150
    assert work_of("x" * 400, max_new_tokens=-5).cost == work_of("x" * 400).cost


def test_equal_beginnings_have_equal_keys_up_to_where_they_differ() -> None:
    system = "You are a helpful assistant. " * 40
    one, other = work_of(system + "a" * 600).keys, work_of(system + "b" * 600).keys
    common = len(system) // 256
    assert one[:common] == other[:common] and one[common] != other[common]
    assert work_of("short").keys == []
    assert work_of([7] * 128).keys == work_of([7] * 130).keys != work_of([8] * 128).keys
    assert len(work_of("x" * 10_000_000).keys) < 100


def test_a_prompt_goes_where_there_is_the_least_work() -> None:
    replicas = [Replica(0, 500), Replica(1, 300), Replica(2, 400)]
    assert choose(replicas, work_of("x"), PrefixMap(), {}).index == 1
    assert choose(replicas, work_of("x"), PrefixMap(), {1: 150}).index == 2


def test_a_prompt_goes_where_its_beginning_is_unless_that_is_much_busier() -> None:
    prefixes, prompt = PrefixMap(), work_of("x" * 2560)
    prefixes.record(prompt.keys, 1)
    assert choose([Replica(0), Replica(1, 2000)], prompt, prefixes, {}).index == 1
    assert choose([Replica(0), Replica(1, 3000)], prompt, prefixes, {}).index == 0
    assert choose([Replica(0, 10_000), Replica(1, 15_000)], prompt, prefixes, {}).index == 1
    assert choose([Replica(0), Replica(2)], prompt, prefixes, {}).index == 0


def test_the_longest_beginning_counts() -> None:
    prefixes, prompt = PrefixMap(), work_of("x" * 2560)
    prefixes.record(prompt.keys[:2], 0)
    prefixes.record(prompt.keys[:8], 1)
    assert prefixes.match(prompt.keys) == {0: 2, 1: 8}
    assert choose([Replica(0), Replica(1, 100)], prompt, prefixes, {}).index == 1
    prefixes.forget(1)
    assert prefixes.match(prompt.keys) == {0: 2}
    prefixes.forget(0)
    assert len(prefixes) == 0


def test_what_was_not_seen_for_longest_is_forgotten() -> None:
    prefixes = PrefixMap(capacity=4)
    prefixes.record([1, 2], 0)
    prefixes.record([3, 4], 0)
    prefixes.record([1], 0)
    prefixes.record([5], 0)
    assert len(prefixes) == 4
    assert prefixes.match([1]) == {0: 1} and prefixes.match([2]) == {}


@given(some.lists(some.integers(1, 2000), min_size=1, max_size=200), some.integers(1, 8))
def test_prompts_without_common_beginnings_are_spread_evenly(costs: list[int], count: int) -> None:
    replicas, prefixes, planned = (
        [Replica(index) for index in range(count)],
        PrefixMap(),
        dict.fromkeys(range(count), 0),
    )
    for cost in costs:
        chosen = choose(replicas, Work(cost, ()), prefixes, planned)
        planned[chosen.index] += cost
    assert max(planned.values()) - min(planned.values()) <= max(costs)


def test_a_common_beginning_spreads_once_its_replica_is_busy() -> None:
    replicas, prefixes = [Replica(0), Replica(1)], PrefixMap()
    prompts = [work_of("You are a helpful assistant. " * 40 + f"{number} " * 100) for number in range(64)]
    for prompt in prompts:
        chosen = choose(replicas, prompt, prefixes, {})
        prefixes.record(prompt.keys, chosen.index)
        chosen.tokens += prompt.cost
    assert min(replica.tokens for replica in replicas) * 3 > max(replica.tokens for replica in replicas)
