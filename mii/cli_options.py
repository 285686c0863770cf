"""Options that several commands have."""

from __future__ import annotations

import argparse
import json
from typing import Any


def add_config_option(parser: argparse._ActionsContainer) -> None:
    """`--option NAME=VALUE`, collected in `args.option` as (name, value) pairs."""
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        type=name_and_value,
        metavar="NAME=VALUE",
        help="a further field of ModelConfig, its value as JSON: --option memory_fraction=0.5; may be repeated",
    )


def name_and_value(text: str) -> tuple[str, Any]:
    """The two halves of NAME=VALUE, the value as JSON where it is that and else as text.

    Raises:
        argparse.ArgumentTypeError: There is no name or no equals sign.
    """
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form NAME=VALUE")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value
