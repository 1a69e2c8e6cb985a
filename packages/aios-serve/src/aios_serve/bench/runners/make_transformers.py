"""Makes a safetensors folder of a GGUF file. Runs in the environment of transformers, which needs `gguf` for it."""

from __future__ import annotations

import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any


def main(source: str, target: str, dtype: str, threads: str) -> None:
    """Dequantise.

    Args:
        source: The GGUF file.
        target: The folder to write; a folder under this name is always whole.
        dtype: torch's name of the type to write.
        threads: How many threads to use.
    """
    torch, transformers = import_module("torch"), import_module("transformers")
    torch.set_num_threads(int(threads))
    file = Path(source)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=getattr(torch, dtype)
    )
    with tempfile.TemporaryDirectory(dir=Path(target).parent) as scratch:
        folder = Path(scratch) / "model"
        _plain_copy(transformers, model).save_pretrained(folder)
        folder.rename(target)


def _plain_copy(transformers: Any, model: Any) -> Any:
    """The same weights in a model that does not call itself quantised: transformers saves no other."""
    config = model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = transformers.AutoModelForCausalLM.from_config(config, dtype=model.dtype)
    plain.load_state_dict(model.state_dict())
    return plain
