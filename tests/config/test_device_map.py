"""The forms in which a device map is written."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mii.config.device_map import parse_device_map


@pytest.mark.parametrize(
    ("value", "full"),
    [
        ("auto", "auto"),
        (1, {"localhost": [[1]]}),
        ([0, 1], {"localhost": [[0, 1]]}),
        ((0, 1), {"localhost": [[0, 1]]}),
        ([[0, 1], [2, 3]], {"localhost": [[0, 1], [2, 3]]}),
        ({"a": [[0]], "b": [[1], [2]]}, {"a": [[0]], "b": [[1], [2]]}),
    ],
)
def test_short_forms_are_filled_out(value: Any, full: Any) -> None:
    assert parse_device_map(value) == full


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("gpu", "must be 'auto'"),
        ([], "one list of devices for each replica"),
        ([[]], "a replica has no device"),
        ([0, [1]], r"\[1\] is no device"),
        ([[0], 1], "one list of devices for each replica"),
        ({}, "names no host"),
        ({"a": [0]}, "one list of devices for each replica"),
        ({"a": 0}, "one list of devices for each replica"),
        ({0: [[1]]}, "0 is no host name"),
        (True, "True is no device"),
        ([-1], "-1 is no device"),
        ([1.0], "1.0 is no device"),
        (["0"], "'0' is no device"),
        (None, "None is no device"),
    ],
)
def test_anything_else_is_refused_with_the_part_that_is_wrong(value: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parse_device_map(value)


@given(st.dictionaries(st.text(min_size=1), st.lists(st.lists(st.integers(0, 99), min_size=1), min_size=1), min_size=1))
def test_a_full_map_stays_as_it_is(value: dict[str, list[list[int]]]) -> None:
    assert parse_device_map(value) == value


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.lists(inner), max_leaves=8))
def test_no_value_gives_another_error_or_an_incomplete_map(value: Any) -> None:
    try:
        result = parse_device_map(value)
    except ValueError:
        return
    assert result == "auto" or all(all(group) or 0 in group for groups in result.values() for group in groups)
