"""mii's log: the logger "MII", on standard error, with lines that say when, what and from where.

The root logger is never touched and nothing is passed on to it. The level comes from `MII_LOG_LEVEL` (a name such as
`warning`, or a number), else INFO; `set_level` changes it later. Standard output stays free for what a program prints.

Example:
    >>> from mii.logging import logger
    >>> logger.info("weights read: 269 MB in 0.4 s")
"""

from __future__ import annotations

import logging
import os
import sys
from typing import TYPE_CHECKING, TextIO

LEVEL_ENV = "MII_LOG_LEVEL"
FORMAT = "[%(asctime)s] [%(levelname)s] [%(filename)s:%(lineno)d:%(funcName)s] %(message)s"
LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")


if TYPE_CHECKING:
    _StreamHandler = logging.StreamHandler[TextIO]
else:  # not subscriptable before Python 3.11
    _StreamHandler = logging.StreamHandler


class _StandardError(_StreamHandler):
    """Writes to whatever `sys.stderr` is at that moment, so a redirection after the import is followed."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:
        return sys.stderr

    @stream.setter
    def stream(self, value: TextIO) -> None:
        raise AttributeError("this handler follows sys.stderr; add a handler of your own to write elsewhere")


def parse_level(level: str | int) -> int:
    """The number of a level given as a name in any case or as a number.

    Raises:
        ValueError: the name is none of `LEVELS`.
    """
    text = str(level).strip()
    if text.isdigit():
        return int(text)
    if text.upper() in LEVELS:
        return int(getattr(logging, text.upper()))
    raise ValueError(f"{level!r} is not a log level; use one of {', '.join(LEVELS).lower()}, or a number")


def set_level(level: str | int) -> None:
    """Shows messages of this level and above, e.g. `set_level("warning")`.

    Raises:
        ValueError: the level is not known.
    """
    logger.setLevel(parse_level(level))


def _create_logger() -> logging.Logger:
    result = logging.getLogger("MII")
    result.propagate = False
    if not any(isinstance(handler, _StandardError) for handler in result.handlers):
        handler = _StandardError()
        handler.setFormatter(logging.Formatter(FORMAT))
        result.addHandler(handler)
    return result


def _apply_environment() -> None:
    """A wrong `MII_LOG_LEVEL` is reported, not raised: it must not keep mii from being imported."""
    level = os.environ.get(LEVEL_ENV) or "INFO"
    try:
        set_level(level)
    except ValueError as error:
        set_level("INFO")
        logger.warning("%s: %s", LEVEL_ENV, error)


logger = _create_logger()
_apply_environment()
