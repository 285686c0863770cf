"""How wrong options are reported, whatever config class they are for."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import pytest
from pydantic import BaseModel, Field, ValidationError

from mii.validation import ConfigModel, Number, Port, PositiveInt, explain, suggest


class Inner(ConfigModel):
    size: PositiveInt = Field(default=1, description="how many")
    low: int = 0
    high: int = 10

    def check_together(self) -> None:
        if self.low > self.high:
            raise ValueError(f"low={self.low} is above high={self.high}")


class Outer(ConfigModel):
    keeps_auto = frozenset({"text"})
    hints: ClassVar[dict[str, str]] = {"sizes": "give inner={'size': 3}"}

    inner: Inner = Field(default=Inner(), alias="part")
    inners: list[Inner] = Field(default=[])
    port: Port = 80
    ratio: Number = 0.5
    text: str = ""
    needed: int = Field(default=..., description="what it is for")


def message(**options: object) -> str:
    with pytest.raises(ValidationError) as caught:
        Outer(**{"needed": 1, **options})
    return explain(caught.value)


def test_a_value_out_of_range_is_named_with_its_limit_and_what_the_option_is_for() -> None:
    assert message(part={"size": 0}) == "part: size=0 must be greater than or equal to 1 (how many)"


def test_a_missing_option_is_named_with_what_it_is_for() -> None:
    with pytest.raises(ValidationError) as caught:
        Outer()
    assert explain(caught.value) == "needed is required (what it is for)"


def test_a_misspelt_option_gets_the_nearest_name_where_it_was_misspelt() -> None:
    assert message(prot=3) == "unknown option 'prot'; did you mean 'port'?"
    assert message(inners=[{}, {"sise": 1}]) == "inners.1: unknown option 'sise'; did you mean 'size'?"


def test_an_option_like_no_other_gets_the_list_and_a_known_one_its_hint() -> None:
    assert message(zzz=3) == "unknown option 'zzz'; options are: part, inners, port, ratio, text, needed"
    assert message(sizes=3) == "unknown option 'sizes'; give inner={'size': 3}"


def test_every_wrong_option_has_its_line_and_pydantics_error_keeps_type_place_and_input() -> None:
    with pytest.raises(ValidationError) as caught:
        Outer(needed="x", port=70000, part={"low": 11})
    errors = {error["loc"]: (error["type"], error["input"]) for error in caught.value.errors()}
    assert errors[("port",)] == ("less_than_equal", 70000)
    assert errors[("needed",)] == ("int_parsing", "x")
    assert errors[("part",)][0] == "value_error"
    assert "part: low=11 is above high=10" in explain(caught.value).splitlines()


@pytest.mark.parametrize("value", [3, "text", [1], None])
def test_options_that_are_no_dict_are_named(value: object) -> None:
    assert message(part=value) == f"part: options must be given as a dict, not {value!r}"


@pytest.mark.parametrize("option", ["port", "ratio"])
def test_a_truth_value_is_no_number(option: str) -> None:
    assert message(**{option: True}) == f"{option}=True: a number is needed, not True or False"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_are_finite(value: float) -> None:
    assert "must be a finite number" in message(ratio=value)


def test_braces_and_long_values_do_not_break_a_message() -> None:
    assert message(port="{message} {x}").startswith("port='{message} {x}' must be a valid integer")
    assert len(message(port="9" * 5000)) < 200


def test_numpy_scalars_and_digits_in_strings_are_numbers() -> None:
    numpy = pytest.importorskip("numpy")
    options = Outer(needed="3", port=numpy.int64(8080), ratio=numpy.float32(0.25))
    assert (options.needed, options.port, options.ratio) == (3, 8080, 0.25)


def test_auto_counts_as_not_given_unless_strict_or_a_free_text() -> None:
    options = Outer(needed=1, port="auto", part={"size": "auto"}, text="auto")
    assert (options.port, options.inner.size, options.text) == (80, 1, "auto")
    assert options.model_fields_set == {"needed", "inner", "text"}
    with pytest.raises(ValidationError):
        Outer(strict=True, needed=1, port="auto")


def test_assignment_is_checked_and_a_refused_one_changes_nothing() -> None:
    options = Inner(low=3)
    options.high = 5
    for name, value in (("low", 6), ("high", "x"), ("high", 2)):
        before = options.model_dump(), set(options.model_fields_set)
        with pytest.raises(ValidationError):
            setattr(options, name, value)
        assert (options.model_dump(), options.model_fields_set) == before
    with pytest.raises(ValidationError, match=r"'hihg'"):
        options.hihg = 5  # type: ignore[attr-defined]


def test_fields_are_given_by_name_or_alias_but_not_both() -> None:
    assert Outer(needed=1, part={"size": 2}) == Outer(needed=1, inner={"size": 2})
    with pytest.raises(ValidationError):
        Outer(needed=1, part={"size": 2}, inner={"size": 2})


def test_objects_of_other_libraries_are_read_as_what_was_set_on_them() -> None:
    class Foreign(BaseModel):
        size: int = 7
        low: int = 1
        other: str = "a default that we do not know"

    class OldStyle:
        def dict(self, exclude_unset: bool) -> dict[str, int]:
            return {"size": 4}

    options = Outer(needed=1, part=Foreign(low=2), inners=[OldStyle()])
    assert options.inner.model_dump() == {"size": 1, "low": 2, "high": 10}
    assert options.inners[0].size == 4
    assert "unknown option 'other'" in message(part=Foreign(other="set"))


def test_a_default_object_is_not_shared() -> None:
    first, second = Outer(needed=1), Outer(needed=1)
    first.inner.size = 9
    assert second.inner.size == 1


def test_other_errors_are_explained_by_their_own_message() -> None:
    assert explain(RuntimeError("as it is")) == "as it is"


def test_suggestions_need_likeness() -> None:
    assert suggest("max_new_token", ["max_new_tokens", "seed"]) == "; did you mean 'max_new_tokens'?"
    assert suggest("abc", ["max_new_tokens", "seed"]) == ""


def test_a_dataclass_is_not_taken_for_options() -> None:
    @dataclasses.dataclass
    class Plain:
        size: int = 1

    assert "options must be given as a dict" in message(part=Plain())
