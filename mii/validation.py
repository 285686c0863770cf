"""The base of every config class, and the words in which a wrong option is reported.

pydantic finds what is wrong; here its findings become sentences that name the option, the value and the way out:

    >>> from mii.config import ModelConfig
    >>> try:
    ...     ModelConfig(model_name_or_path="m", tensor_paralel=2)
    ... except ValueError as error:
    ...     print(explain(error))
    unknown option 'tensor_paralel'; did you mean 'tensor_parallel'?
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, ClassVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError
from typing_extensions import Self

__all__ = ["ConfigModel", "NonNegativeInt", "Number", "Port", "PositiveInt", "Seed", "explain", "suggest"]

_LONGEST_VALUE = 80


def _no_truth_value(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("a number is needed, not True or False")
    return value


def _fits_seed(value: int) -> int:
    if not 0 <= value < 2**63:
        raise ValueError("must be from 0 to 2**63 - 1")
    return value


PositiveInt = Annotated[int, BeforeValidator(_no_truth_value), Field(ge=1)]
NonNegativeInt = Annotated[int, BeforeValidator(_no_truth_value), Field(ge=0)]
Port = Annotated[int, BeforeValidator(_no_truth_value), Field(ge=1, le=65535)]
Seed = Annotated[int, BeforeValidator(_no_truth_value), AfterValidator(_fits_seed)]
Number = Annotated[float, BeforeValidator(_no_truth_value), Field(allow_inf_nan=False)]


class ConfigModel(BaseModel):
    """A config class: no unknown options, defaults and assignments checked, enums kept as their strings.

    A field takes its name or its alias. An option whose value is the string ``"auto"`` counts as not given, unless
    `strict` is true or the class lists it in `keeps_auto`. An object of another library with a ``model_dump`` or
    ``dict`` method is read as the options that were set on it.

    Raises:
        pydantic.ValidationError: one line for each wrong option.
    """

    model_config = ConfigDict(
        extra="forbid",
        validate_default=True,
        validate_assignment=True,
        use_enum_values=True,
        populate_by_name=True,
        arbitrary_types_allowed=True,
        protected_namespaces=(),
    )

    keeps_auto: ClassVar[frozenset[str]] = frozenset()
    # What to say about names that are no options here, but are elsewhere.
    hints: ClassVar[Mapping[str, str]] = {}

    def __init__(self, strict: bool = False, **data: Any) -> None:
        if not strict:
            data = {name: value for name, value in data.items() if name in self.keeps_auto or not _is_auto(value)}
        super().__init__(**data)

    @classmethod
    def option_names(cls) -> list[str]:
        """Every name that the constructor takes: an alias where there is one, else the field's own."""
        return [field.alias or name for name, field in cls.model_fields.items()]

    def check_together(self) -> None:
        """What one field asks of another; runs after every construction and assignment.

        Values that follow from others go into ``self.__dict__``, which leaves them marked as not given.

        Raises:
            ValueError: fields do not go together.
        """

    @model_validator(mode="wrap")
    @classmethod
    def _report_plainly(cls, value: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """`value` is a dict or, when a field is assigned, the object itself, which a failure leaves as it was."""
        before = (dict(value.__dict__), set(value.model_fields_set)) if isinstance(value, cls) else None
        try:
            result = handler(value if before else _set_options(value))
            result.check_together()
        except ValueError as error:
            if before:
                value.__dict__.update(before[0])
                value.model_fields_set.intersection_update(before[1])
            raise ValidationError.from_exception_data(cls.__name__, _plain_lines(cls, value, error)) from None
        return result


def suggest(name: str, allowed: Iterable[str]) -> str:
    """``; did you mean 'x'?`` for the nearest allowed name, or an empty string when none is near."""
    near = difflib.get_close_matches(name, list(allowed), n=1, cutoff=0.7)
    return f"; did you mean {near[0]!r}?" if near else ""


def explain(error: BaseException) -> str:
    """An error as sentences for a person, one per line, without class names or pydantic's codes."""
    if not isinstance(error, ValidationError):
        return str(error)
    lines = []
    for line in error.errors(include_url=False):
        named = line.get("ctx", {}).get("names_option", False)
        where = ".".join(str(part) for part in (line["loc"][:-1] if named else line["loc"]))
        lines.append(f"{where}: {line['msg']}" if where else line["msg"])
    return "\n".join(lines)


def _is_auto(value: Any) -> bool:
    return isinstance(value, str) and value == "auto"


def _set_options(value: Any) -> Any:
    """What was set on a config object of another library, as a dict; anything else as it is."""
    if hasattr(value, "model_dump"):
        return value.model_dump(exclude_unset=True)
    if not isinstance(value, Mapping) and callable(getattr(value, "dict", None)):
        return value.dict(exclude_unset=True)
    return value


def _plain_lines(cls: type[ConfigModel], value: Any, error: ValueError) -> list[InitErrorDetails]:
    """pydantic's findings in our words; those that a nested config has put into words already are kept."""
    if not isinstance(error, ValidationError):
        return [_line("value_error", str(error), (), value)]
    return [
        _line(line["type"], line["msg"], line["loc"], line["input"], line["ctx"]["names_option"])
        if "names_option" in line.get("ctx", {})
        else _line(line["type"], _message(cls, line), line["loc"], line["input"], bool(line["loc"]))
        for line in error.errors(include_url=False)
    ]


def _line(
    kind: str, message: str, loc: tuple[int | str, ...], value: Any, names_option: bool = False
) -> InitErrorDetails:
    """`names_option`: the message itself names the last part of `loc`."""
    error = PydanticCustomError(kind, "{message}", {"message": message, "names_option": names_option})
    return InitErrorDetails(type=error, loc=loc, input=value)


def _message(cls: type[ConfigModel], line: Any) -> str:
    if not line["loc"]:
        return _own_words(line) or f"options must be given as a dict, not {_short(line['input'])}"
    name = str(line["loc"][0])
    if line["type"] == "extra_forbidden" and len(line["loc"]) == 1:
        return _unknown_option(cls, name)
    if line["type"] == "missing" and len(line["loc"]) == 1:
        return f"{name} is required" + _description(cls, name)
    where = name + "".join(f"[{part!r}]" for part in line["loc"][1:])
    words = _own_words(line) or line["msg"].replace("Input should be", "must be") + _description(cls, name)
    return f"{where}={_short(line['input'])}{' ' if words.startswith('must be') else ': '}{words}"


def _own_words(line: Any) -> str:
    """The message of a validator's own ValueError."""
    return str(line["ctx"]["error"]) if line["type"] in ("value_error", "assertion_error") else ""


def _unknown_option(cls: type[ConfigModel], name: str) -> str:
    if name in cls.hints:
        return f"unknown option {name!r}; {cls.hints[name]}"
    allowed = cls.option_names()
    return f"unknown option {name!r}" + (suggest(name, allowed) or f"; options are: {', '.join(allowed)}")


def _description(cls: type[ConfigModel], name: str) -> str:
    field = cls.model_fields.get(name) or next((f for f in cls.model_fields.values() if f.alias == name), None)
    return f" ({field.description})" if field is not None and field.description else ""


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST_VALUE else f"{text[: _LONGEST_VALUE - 3]}..."
