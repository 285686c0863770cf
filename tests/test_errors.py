"""The exception tree is what its module says, and catches under the builtin names that callers know."""

from __future__ import annotations

import inspect
import pickle
import re

import pytest

from mii import errors


def classes() -> dict[str, type[BaseException]]:
    own = [value for value in vars(errors).values() if inspect.isclass(value) and value.__module__ == errors.__name__]
    return {value.__name__: value for value in own}


def test_the_public_list_names_every_exception() -> None:
    assert sorted(errors.__all__) == sorted(classes())


def test_the_drawn_tree_is_the_real_one() -> None:
    drawn: dict[str, tuple[str, set[str]]] = {}
    path: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        match = re.match(r"^    ([│├└─ ]*)(\w+)(?:\s+(?:\(([\w, ]+)\))?.*)?$", line)
        if match is None or not (match[2].endswith("Error") or match[2] == "UnknownArgument"):
            continue
        depth = len(match[1]) // 4
        path[depth:] = [match[2]]
        parent = path[depth - 1] if depth else "Exception"
        drawn[match[2]] = (parent, set(re.findall(r"\w+", match[3] or "")))
    assert set(drawn) == set(classes())
    for name, (parent, builtins) in drawn.items():
        bases = [base.__name__ for base in classes()[name].__bases__]
        assert bases[0] == parent, name
        assert set(bases[1:]) == builtins, name


@pytest.mark.parametrize("name", errors.__all__)
def test_an_error_keeps_its_message_also_across_processes(name: str) -> None:
    error = classes()[name]("the message")
    assert str(error) == str(pickle.loads(pickle.dumps(error))) == "the message"
    assert isinstance(error, errors.MIIError)
