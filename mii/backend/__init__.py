"""The processes of a deployment as seen from outside: the server starts them, the client talks to them.

Both load when they are first used, so that the processes themselves can import what they need from here alone.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mii.backend.client import MIIClient
    from mii.backend.server import MIIServer

__all__ = ["MIIClient", "MIIServer"]

_HOMES = {"MIIClient": "mii.backend.client", "MIIServer": "mii.backend.server"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'mii.backend' has no attribute {name!r}; public names: {', '.join(__all__)}")
    value: Any = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value
