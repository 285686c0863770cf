"""Algorithms of products that were timed once, kept for later starts on the same kind of GPU.

So later starts need not time them, and multiply in the same way: a product by another algorithm may round another way.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from importlib import metadata
from pathlib import Path

import torch

from mii.logging import logger
from mii.ops import abi


def kept_path(device: torch.device) -> Path | None:
    """The file for a GPU and the libraries that multiply, under `$XDG_CACHE_HOME` or `~/.cache`; None: a user without a
    home.
    """
    parts = [torch.cuda.get_device_name(device), torch.__version__, _cublas_version()]
    name = "-".join(re.sub(r"[^A-Za-z0-9.]+", "_", part) for part in parts)
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    except RuntimeError:
        return None
    return folder / "mii" / f"products-{name}.json"


def read_kept(path: Path | None) -> dict[str, bytes]:
    """What a file says, by the product's name; nothing where there is none, or none that can be read."""
    if path is None:
        return {}
    try:
        found = {name: bytes.fromhex(algorithm) for name, algorithm in json.loads(path.read_text()).items()}
        return {name: algorithm for name, algorithm in found.items() if len(algorithm) in (0, abi.ALGORITHM_BYTES)}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        logger.warning("%s cannot be read and is written anew: %s", path, error)
        return {}


def keep(path: Path, chosen: Mapping[str, bytes]) -> None:
    """Adds to a file. What it has stays as it is; where it cannot be written, nothing is kept."""
    new = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        everything = dict(chosen) | read_kept(path)
        new.write_text(json.dumps({name: algorithm.hex() for name, algorithm in sorted(everything.items())}, indent=1))
        new.replace(path)
    except OSError as error:
        with suppress(OSError):
            new.unlink()
        logger.info("the algorithms of products are not kept: %s", error)


def _cublas_version() -> str:
    for name in ("nvidia-cublas", "nvidia-cublas-cu12"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            pass
    return str(torch.version.cuda)
