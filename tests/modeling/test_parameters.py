"""Fused parameters: parts of rows and of columns, products over inputs side by side, tensors arranged as they come."""

from __future__ import annotations

import pytest
import torch

from mii.modeling.families.base import Target
from mii.modeling.families.names import grouped_rows
from mii.modeling.parameters import JointLinear, Parameter, Placement

PLACE = Placement(torch.device("cpu"), torch.float32)


def test_parts_may_be_ranges_of_columns() -> None:
    parameter = Parameter(torch.zeros(2, 5), {"a": 2, "b": 3}, dim=1)
    parameter.view("b").fill_(1)
    parameter.filled("b")
    assert parameter.tensor.tolist() == [[0, 0, 1, 1, 1]] * 2
    assert parameter.missing == {"a"}


@pytest.mark.parametrize("biased", [(), ("b",), ("a", "b")])
def test_a_joint_product_is_the_sum_of_the_products(biased: tuple[str, ...]) -> None:
    linear = JointLinear(PLACE, {"a": 24, "b": 40}, 16, biased)
    inputs = {"a": torch.randn(5, 24), "b": torch.randn(5, 40)}
    weights = {name: torch.randn(16, x.shape[1]) for name, x in inputs.items()}
    biases = {name: torch.randn(16) for name in biased}
    for name, weight in weights.items():
        assert not linear.complete
        linear.weight.view(name).copy_(weight)
        linear.weight.filled(name)
    for name, bias in biases.items():
        assert linear.bias is not None
        linear.bias.view(name).copy_(bias)
        linear.bias.filled(name)
    assert linear.complete
    linear.finish()
    linear.finish()  # again, as at the end of loading
    expected = sum(inputs[name] @ weight.t() for name, weight in weights.items()) + sum(biases.values())
    out = linear(torch.empty(5, 16), torch.cat(list(inputs.values()), dim=1))
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (6, 2), (5, 1)])
def test_rows_of_grouped_heads_come_apart(heads: int, groups: int) -> None:
    size = 3
    queries, keys, values = (torch.randn(groups, count, size, 7) for count in (heads // groups, 1, 1))
    stored = torch.cat([queries, keys, values], dim=1).reshape(-1, 7)
    arranged = Target("", rows=grouped_rows(heads, groups, size)).arranged(stored)
    assert torch.equal(arranged, torch.cat([part.reshape(-1, 7) for part in (queries, keys, values)]))


def test_a_transposed_tensor_is_turned_and_a_bias_is_not() -> None:
    target, stored = Target("", transposed=True), torch.randn(3, 5)
    assert target.stored_shape((5, 3)) == (3, 5)
    assert torch.equal(target.arranged(stored), stored.t())
    assert torch.equal(target.arranged(stored[0]), stored[0])
